"""A guest that libvirt manages and one of snaporch's own, taken at one instant."""

from __future__ import annotations

from pathlib import Path

import pytest

from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import CreateFlag, DeviceDisk, DomainSnapshot
from tests.libvirt.test_records import check_records
from tests.libvirt.test_story import world
from tests.libvirt.world import LibvirtWorld
from tests.live.world import MEMORY, NAME, RAM_MIB, World, make_image

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

__all__ = ["world"]  # the fixture

OTHER = "other"


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_group(world: LibvirtWorld, kernel: Path, tmp_path: Path) -> None:
    """Both go back together, and both are whole; libvirt's list has the snapshot of its own."""
    disk, log = DeviceDisk("vda", str(tmp_path / "vda.qcow2")), tmp_path / "serial.log"
    make_image(world.qemu, Path(disk.path))
    definition = DomainDefinition(
        OTHER,
        memory=MEMORY,
        machine="q35",
        accel="tcg",
        kernel=str(kernel),
        append=f"rate=100 dirty=20 ram={RAM_MIB}",
        serial=str(log),
        emulator=world.qemu.emulator,
        disks=(disk,),
    )
    other = World(tmp_path, world.qemu, world.orch, definition, log)
    await world.orch.define(definition)
    await world.orch.start(OTHER)
    try:
        await other.wait_report(lambda report: report.seq >= 2, since=0)
        records = await world.orch.create_group([NAME, OTHER], DomainSnapshot("both"), CreateFlag.LIVE)
        assert len({record.group for record in records}) == 1
        await world.check_runs(3)
        await world.orch.revert_group([NAME, OTHER], "both")
        await world.check_consistent()
        await other.check_consistent()
        await check_records(world)
    finally:
        await world.orch.destroy(OTHER)  # noqa: ASYNC102 - a test
