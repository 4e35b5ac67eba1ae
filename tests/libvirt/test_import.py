"""Snapshots that virsh has taken: `domain sync` takes them over, as far as that is possible."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from snaporch.drivers.libvirt.driver import LibvirtDriver
from snaporch.drivers.local.files import LocalStorage
from snaporch.errors import Refused
from snaporch.orchestrator import open_orchestrator
from tests.libvirt.test_records import check_records
from tests.libvirt.test_story import active, world
from tests.libvirt.world import LibvirtWorld
from tests.live.world import NAME

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

__all__ = ["world"]  # the fixture


def taken(world: LibvirtWorld, name: str, *options: str) -> None:
    """Have virsh take an external snapshot."""
    specs = [f"{target},file={world.directory}/{target}-{name}.qcow2" for target in ("vda", "vdb")]
    words = [word for spec in specs for word in ("--diskspec", spec)]
    world.virsh("snapshot-create-as", name, *options, *words)


def with_memory(world: LibvirtWorld, name: str) -> list[str]:
    """Return the options for memory, too."""
    return ["--live", "--memspec", f"file={world.directory}/{name}.mem,snapshot=external"]


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_import(world: LibvirtWorld, tmp_path: Path) -> None:
    """External ones, with memory and of the disks alone, are as ours; one inside its images is only shown."""
    await world.create("ours")
    taken(world, "stock", *with_memory(world, "stock"))
    taken(world, "disks", "--disk-only")
    with pytest.raises(Refused, match=f"domain sync {NAME}"):
        await world.create("next")
    report = await world.orch.sync(NAME)
    assert (report.imported, report.problems) == (("stock", "disks"), ())
    await check_records(world)
    found = {each.name: each for each in await world.orch.list(NAME)}
    assert (found["stock"].parent, found["disks"].parent, found["stock"].foreign) == ("ours", "stock", "libvirt")
    await world.create("next")
    await world.check_runs(3)

    assert (await world.orch.verify(NAME, "stock", boot=True)).ok
    await world.revert("stock")
    await world.check_consistent()
    await check_records(world)
    await world.orch.delete(NAME, "stock")
    await check_records(world)
    assert not (world.directory / "stock.mem").exists()
    await world.check_runs(3)
    assert (await world.orch.verify(NAME, "next")).ok

    driver = LibvirtDriver(storage=LocalStorage(world.qemu.img))
    async with open_orchestrator(tmp_path / "other", drivers={"libvirt": driver}) as other:
        await other.attach("theirs", driver="libvirt", uri=world.daemon.uri, of=world.theirs)
        report = await other.sync("theirs")
        assert report.imported == ()
        assert "another root" in report.problems[0]
    await check_records(world)

    world.virsh("snapshot-create-as", "inside")
    report = await world.orch.sync(NAME)
    assert report.imported == ("inside",)
    assert re.search("inside: .*virsh snapshot-revert|inside can only be looked at", " ".join(report.problems))
    with pytest.raises(Refused, match="virsh snapshot-revert"):
        await world.revert("inside")
    with pytest.raises(Refused, match="can only be deleted there"):
        await world.orch.delete(NAME, "inside")
    world.virsh("snapshot-delete", "inside")
    assert (await world.orch.sync(NAME)).gone == ("inside",)
    await check_records(world)
    assert world.libvirt_disks() == await active(world)
