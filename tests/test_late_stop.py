"""The guest runs through the hypervisor's set-up: in time, too late, and where that would gain nothing."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from trio.testing import MockClock

from snaporch import CreateFlag, CreateOptions, DomainSnapshot, SnapshotRecord
from snaporch.operations import create
from snaporch.testing import SimulatedHost, SimulatedSpeed, SimulatedWorld, ThreadsHoldTime, open_simulated_world

LATE = CreateOptions(late_stop=True)


async def taken(world: SimulatedWorld, name: str, options: CreateOptions = LATE) -> SnapshotRecord:
    """Take a checkpoint, and see whether its memory and its disks hold one number."""
    record = await world.orchestrator.create(world.domain, DomainSnapshot(name), CreateFlag.LIVE, options)
    assert record.memory is not None
    images = [disk.disk.path for disk in record.snapshot.disks]
    assert len({world.host.number(path) for path in (record.memory.path, *images)}) == 1
    await world.check_consistent()
    return record


async def test_in_time(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """It takes an earlier checkpoint to know for how long; then the pause is shorter by what the guest ran."""
    async with open_simulated_world(tmp_path) as world:
        first = await taken(world, "first")
        assert (first.timings.foreseen, first.timings.missed) == (None, False)
        assert first.reason.endswith("no late stop: no earlier checkpoint says how long the guest could run on")
        second = await taken(world, "second")
        assert second.timings.foreseen == first.timings.setup == pytest.approx(0.01)
        assert not second.timings.missed
        assert first.timings.pause is not None
        assert second.timings.pause is not None
        assert second.timings.pause < first.timings.pause - 0.004
        assert (await taken(world, "plain", CreateOptions())).timings.foreseen is None


async def test_too_late(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point lay before the pause: all is done once more, and the account of the pause is that of the last."""
    async with open_simulated_world(tmp_path) as world:
        first = await taken(world, "first")
        monkeypatch.setattr(create, "LEAD_SECONDS", -1.0)
        record = await taken(world, "second")
        assert record.timings.missed
        assert record.timings.pause == pytest.approx(first.timings.pause, abs=0.002)
        await world.orchestrator.revert(world.domain, "second")
        await world.check_consistent()


async def test_worth_nothing(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """A guest with little memory is paused first."""
    host = SimulatedHost(speed=attrs.evolve(SimulatedSpeed(), arm_rate=1e12))
    async with open_simulated_world(tmp_path, host=host) as world:
        await taken(world, "first")
        record = await taken(world, "second")
        assert record.reason.endswith("no late stop: it could gain no more than 1 ms")
        assert record.timings.foreseen is None
