"""A late stop on the real thing: in time, missed, and killed in between; QEMU from 10.0 on."""

from __future__ import annotations

import pytest

from snaporch.drivers.qmp import index
from snaporch.engine.states import State
from snaporch.model.record import SnapshotRecord
from snaporch.model.request import Strategy
from snaporch.operations import create, create_plan
from tests.live.test_crash import STANDS_SECONDS, killed, stood, watched
from tests.live.world import SLOW, SLOW_BANDWIDTH, MakeWorld, World

pytestmark = pytest.mark.live

# The stream has begun; the guest is paused, in time; it is paused too late; the stream is ended; the guest runs;
# the next stream is opened; the guest is paused once more.
PLACES = [
    ("late", "after:migrate#1"),
    ("late", "after:stop#1"),
    ("missed", "after:stop#1"),
    ("missed", "after:migrate_cancel#1"),
    ("missed", "after:cont#1"),
    ("missed", "after:getfd#3"),
    ("missed", "after:stop#2"),
]


async def taken(world: World, name: str) -> SnapshotRecord:
    return await world.create(name, Strategy.BACKGROUND, late_stop=True)


async def test_late_stop(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed anywhere it is undone; in time or missed, the guest finds itself of one instant."""
    world = await make_world(append=SLOW)
    first = await taken(world, "first")
    assert "no late stop" in first.reason
    if world.qemu.old:
        return
    assert first.timings.setup is not None
    for how, place in PLACES:
        before = await world.everything()
        slow = SLOW_BANDWIDTH if how == "missed" else 0  # else it would have ended by itself
        async with watched(world) as (qmp, events):
            died = await killed(world, place, "create", "killed", how, slow)
            assert await stood(qmp, events, died) < STANDS_SECONDS, place
        await world.check_runs(3)
        (ended,) = await world.orch.recover()
        assert ended.state == State.ROLLED_BACK, place
        await world.check_same(before, place)
        await world.check_runs(3)
    monkeypatch.setattr(create_plan, "WORTH_SECONDS", -1.0)
    monkeypatch.setattr(create, "LEAD_SECONDS", 60.0)  # at once
    soon = await taken(world, "soon")
    assert soon.timings.foreseen is not None
    monkeypatch.setattr(create, "LEAD_SECONDS", -4.0)  # the stream has come to its end
    monkeypatch.setattr(create, "HOLD_SECONDS", -60.0)
    missed = await taken(world, "missed")
    assert missed.timings.missed
    assert missed.memory is not None
    assert index.load(missed.index).checksum == missed.memory.checksum
    for record in (soon, missed):
        await world.revert(record.name)
        await world.check_consistent()
    await world.check_no_orphans()
