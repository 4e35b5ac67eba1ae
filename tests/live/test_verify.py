"""`verify --boot` of every kind of snapshot: a throw-away copy runs; neither the guest nor a file is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot
from tests.live.world import NAME, World

pytestmark = pytest.mark.live

INSIDE = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))


async def check_boots(world: World, name: str) -> None:
    """Assert that a copy of a snapshot's guest runs, and that all is as before."""
    async with world.unchanged():
        report = await world.orch.verify(NAME, name, boot=True)
    assert (report.ok, report.booted, report.problems) == (True, True, ())


async def test_running(world: World) -> None:
    """With memory, by every strategy, while the guest runs beside the copy."""
    for strategy in (Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED):
        record = await world.create(strategy.value, strategy)
        assert record.strategy is strategy
        await check_boots(world, strategy.value)
    await world.create("inside", flags=CreateFlag(0), disks=INSIDE)
    await check_boots(world, "inside")
    await world.check_runs()


async def test_inactive(world: World) -> None:
    """Of an inactive domain, in overlays and inside the images: the copy boots from its disks."""
    await world.orch.destroy(NAME)
    await world.create("outside", flags=CreateFlag.DISK_ONLY)
    await check_boots(world, "outside")
    await world.create("inside", flags=CreateFlag.DISK_ONLY, disks=INSIDE)
    await check_boots(world, "inside")


async def test_not_what_was_saved(world: World) -> None:
    """Memory that is no memory does not run, is said so, and leaves nothing; a good one beside it does."""
    record = await world.create("point")
    assert record.memory is not None
    memory = Path(record.memory.path)
    whole = memory.read_bytes()
    memory.write_bytes(whole[: len(whole) // 2] + bytes(4096) + whole[len(whole) // 2 + 4096 :])
    async with world.unchanged():
        report = await world.orch.verify(NAME, "point", boot=True)
    assert (report.ok, report.booted) == (False, None)
    assert memory.name in report.problems[0]
    memory.write_bytes(whole)
    await check_boots(world, "point")
