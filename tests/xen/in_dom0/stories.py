"""What the Xen driver does with a real guest, under a real Xen: run in dom0, by `tests/xen/test_dom0.py`.

They share one guest, as each start of one takes its time: each goes on with what the one before has left.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

import pytest
import trio

from snaporch import CreateFlag, DomainSnapshot, DomainState, Refused, SnapshotRecord
from snaporch.drivers.base import Overlay
from snaporch.drivers.xen.machine import XenMachine
from snaporch.model.request import Strategy
from tests.xen.in_dom0.world import NAME, World, open_world

LIVE = CreateFlag.LIVE
MEMORY = 104  # MiB: little, and room for what it compares
Switch = Callable[[XenMachine, Sequence[Overlay]], Awaitable[None]]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A guest that runs."""
    async with open_world(memory=MEMORY) as world:
        yield world


async def _take(world: World, name: str, flags: CreateFlag) -> SnapshotRecord:
    """Take a checkpoint: the guest then runs on overlays, and finds nothing wrong."""
    before = await world.images()
    record = await world.orch.create(NAME, DomainSnapshot(name), flags)
    assert record.memory is not None
    assert (record.timings.pause or 0) > 0
    assert all(image != before[target] for target, image in (await world.images()).items())
    await world.check_told()
    return record


async def test_live(world: World) -> None:
    """Memory is sent while the guest runs; the guest that comes back is of one instant, as it says itself."""
    (first, *_) = await world.reports(1)
    record = await _take(world, "live", LIVE)
    assert record.strategy is Strategy.PRECOPY
    far = await world.check_consistent()
    since = world.positions()
    await world.orch.revert(NAME, "live")
    (back, *_) = await world.wait_report(lambda found: len(found) > 1 and found[0].seq < far.seq, since)
    assert first.seq <= back.seq < far.seq
    await world.check_consistent()
    await world.check_told()
    await world.check_alone()


async def test_not_live(world: World) -> None:
    """The guest is suspended first, and goes on when its memory is in the file."""
    record = await _take(world, "still", CreateFlag(0))
    assert record.strategy is Strategy.PAUSED
    await world.check_consistent()


async def test_disks_only(world: World) -> None:
    """The disks of an inactive domain; and the snapshot is deleted again while the guest runs on its overlays."""
    orch = world.orch
    await orch.destroy(NAME)
    before = await world.images()
    record = await orch.create(NAME, DomainSnapshot("disks"), CreateFlag.DISK_ONLY)
    assert record.memory is None
    assert {target: chain[0].path for target, chain in record.images.items()} == before
    await world.ready()
    await world.check_consistent()
    assert await world.images() != before
    await orch.delete(NAME, "disks")
    await world.check_consistent()
    await world.check_told()
    assert "disks" not in [found.name for found in await orch.list(NAME)]


async def test_refused(world: World) -> None:
    """A paused guest cannot take part in its suspension: said at once, and nothing is touched."""
    orch, before = world.orch, await world.images()
    await orch.pause(NAME)
    for flags in (LIVE, CreateFlag(0)):
        with pytest.raises(Refused, match="let it run first"):
            await orch.create(NAME, DomainSnapshot("refused"), flags)
    assert await world.state() is DomainState.PAUSED
    await orch.resume(NAME)
    assert await world.images() == before
    await world.check_consistent()


async def _die(_machine: XenMachine, _overlays: Sequence[Overlay]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    await trio.sleep_forever()


async def _create(switch: Switch, flags: CreateFlag = LIVE) -> None:
    async with open_world(memory=MEMORY) as world:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(XenMachine, "switch", switch)
            await world.orch.create(NAME, DomainSnapshot("cut"), flags)


async def _check(before: dict[str, str], *, undone: bool) -> None:
    async with open_world(memory=MEMORY) as world:
        assert (await world.images() == before) is undone
        assert ("cut" not in [record.name for record in await world.orch.list(NAME)]) is undone
        await world.check_consistent()
        await world.check_alone()


async def _images() -> dict[str, str]:
    async with open_world(memory=MEMORY) as world:
        return await world.images()


def test_killed() -> None:
    """Killed while the guest is suspended, before the disks switch, it is undone; if its helper is, it goes on."""
    before = trio.run(_images)
    if not (child := os.fork()):  # a new process of Python's would take ten seconds to import all this
        try:
            trio.run(_create, _die)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    trio.run(partial(_check, before, undone=True))

    async def lose_helper(machine: XenMachine, overlays: Sequence[Overlay]) -> None:
        os.kill(machine.helper._program.process.pid, signal.SIGKILL)
        await original(machine, overlays)

    original: Switch = XenMachine.switch
    trio.run(_create, lose_helper)
    trio.run(partial(_check, before, undone=False))
