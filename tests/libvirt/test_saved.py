"""A domain that libvirt has put to sleep: its images belong to the memory that was saved."""

from __future__ import annotations

import pytest

from snaporch.errors import Refused
from snaporch.model.domain import DomainState
from snaporch.model.rfc import CreateFlag, RevertFlag
from tests.libvirt.test_records import check_records
from tests.libvirt.test_story import active, world
from tests.libvirt.world import LibvirtWorld
from tests.live.world import NAME

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

__all__ = ["world"]  # the fixture


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_asleep(world: LibvirtWorld) -> None:
    """Whatever would change what is below the saved memory is refused; then the guest wakes up, and is whole."""
    await world.create("one")
    await world.create("two")
    world.virsh("managedsave")
    assert await world.state() is DomainState.INACTIVE
    files, disks = world.files(), await active(world)
    orch = world.orch
    for verb in (
        lambda: world.create("off", flags=CreateFlag.DISK_ONLY),
        lambda: world.revert("one"),
        lambda: world.revert("one", RevertFlag.FORCE),
        lambda: orch.delete(NAME, "two"),
        lambda: orch.flatten(NAME),
        lambda: orch.start(NAME),
    ):
        with pytest.raises(Refused, match="virsh managedsave-remove"):
            await verb()
    assert (world.files(), await active(world), world.libvirt_disks("--inactive")) == (files, disks, disks)
    assert (await orch.verify(NAME, "one")).ok

    since = world.position()
    world.virsh("start")
    await world.wait_report(lambda report: report.checked > 0, since=since)
    await world.check_consistent()
    await world.create("three")
    await check_records(world)
    await world.revert("one")
    await world.check_consistent()
