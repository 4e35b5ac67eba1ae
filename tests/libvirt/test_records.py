"""libvirt's own list of snapshots: ours are in it, virsh goes back to them, and nothing is lost by that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from snaporch.engine.states import State
from snaporch.errors import Refused
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag
from tests.libvirt.test_story import active, world
from tests.libvirt.world import LibvirtWorld
from tests.live.test_crash import killed
from tests.live.world import NAME

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

__all__ = ["world"]  # the fixture


def current(world: LibvirtWorld) -> str:
    """Return the name of libvirt's current snapshot."""
    return world.virsh("snapshot-current", "--name").strip()


def named(world: LibvirtWorld, name: str) -> list[str]:
    """Return the overlays that libvirt's record of a snapshot names: what libvirt would unlink, were it current."""
    text = world.daemon.virsh("snapshot-dumpxml", world.theirs, name)
    listed = text[text.index("<disks>") : text.index("</disks>")]
    return sorted(re.findall(r"source file='([^']*)'", listed))


async def check_records(world: LibvirtWorld) -> None:
    """Compare libvirt's list with ours; the current record names what the domain is on, no other one does."""
    ours = {each.name: each.parent for each in await world.orch.list(NAME)}
    theirs = world.virsh("snapshot-list", "--parent").splitlines()
    rows = [row.split() for row in theirs if row.strip()]
    assert {row[0]: (row[-1] if row[-1] in ours else None) for row in rows} == ours
    present = sorted((await active(world)).values())
    info = await world.orch.domain_info(NAME)
    if info.current is not None:
        assert current(world) == info.current
    for name in ours:
        assert (named(world, name) == present) == (name == info.current)


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_records(world: LibvirtWorld) -> None:
    """Create, revert, delete and rename: libvirt's tree is ours; without records nothing is there."""
    await world.create("one")
    await world.create("two")
    await check_records(world)
    await world.revert("one")
    await check_records(world)
    await world.create("three")
    assert [line.strip() for line in world.virsh("snapshot-list", "--tree").splitlines() if line.strip(" |")] == [
        "one",
        "+- three",
        "+- two",
    ]
    await world.orch.edit(NAME, "one", new_name="first")
    await check_records(world)
    await world.orch.delete(NAME, "first")
    await check_records(world)
    await world.check_runs()

    await world.orch.sync(NAME, records=False)
    assert world.virsh("snapshot-list", "--name").strip() == ""
    await world.create("four")
    assert world.virsh("snapshot-list", "--name").strip() == ""
    report = await world.orch.sync(NAME, records=True)
    assert (report.imported, report.problems) == ((), ())
    await check_records(world)


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_virsh_goes_back(world: LibvirtWorld) -> None:
    """`virsh snapshot-revert`, after reverts of ours and before: noticed, followed, every snapshot still good."""
    await world.create("one")
    await world.create("two")
    await world.revert("one")
    world.virsh("snapshot-revert", "two")  # libvirt takes what its current record names for the state that is left
    await world.check_runs()
    with pytest.raises(Refused, match=f"domain sync {NAME}"):
        await world.create("three")
    report = await world.orch.sync(NAME)
    assert (report.followed, report.problems) == ("two", ())
    await check_records(world)
    await world.create("three")
    await check_records(world)
    await world.revert("one")
    await world.check_runs()
    world.virsh("snapshot-revert", "three")
    await world.check_runs()
    await world.orch.sync(NAME)
    for name in ("one", "two", "three"):
        report_ = await world.orch.verify(NAME, name)
        assert report_.ok, report_.problems
    await world.revert("two")
    await world.check_runs()
    await check_records(world)


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_killed_before_libvirt_knows(world: LibvirtWorld) -> None:
    """The catalog has the snapshot and libvirt not: the next start of snaporch tells it."""
    await world.create("one")
    await killed(world, State.COMPLETE, "create", "two", Strategy.BACKGROUND)
    assert world.virsh("snapshot-list", "--name").split() == ["one"]
    await world.orch.recover()
    await check_records(world)


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_virsh_restores_our_memory(world: LibvirtWorld, tmp_path: Path) -> None:
    """Our memory file is one of libvirt's: `virsh restore` takes it, on overlays of the user's."""
    await world.create("zero")  # what is below the frozen image belongs to it, too
    one = await world.create("one")
    await world.orch.destroy(NAME)
    assert one.memory is not None
    xml = world.daemon.virsh("save-image-dumpxml", one.memory.path, "--security-info")
    for disk in one.snapshot.disks:
        overlay = tmp_path / f"{disk.disk.target}-mine.qcow2"
        backing = ["-F", disk.disk.format, "-b", disk.disk.path]
        await trio.run_process([world.qemu.img, "create", "-q", "-f", "qcow2", *backing, str(overlay)])
        xml = xml.replace(disk.disk.path, str(overlay))
    (tmp_path / "mine.xml").write_text(xml)
    world.daemon.virsh("restore", one.memory.path, "--xml", str(tmp_path / "mine.xml"))
    await world.check_runs()
    world.virsh("destroy")


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_offline_records(world: LibvirtWorld) -> None:
    """Snapshots of an inactive domain are in the list too, and go with it."""
    await world.orch.destroy(NAME)
    await world.create("off", flags=CreateFlag.DISK_ONLY)
    await check_records(world)
    await world.orch.delete(NAME, "off")
    assert world.virsh("snapshot-list", "--name").strip() == ""
