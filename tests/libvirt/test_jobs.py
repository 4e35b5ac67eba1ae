"""libvirt's own jobs on a domain: refused before anything is touched, and survived where they come in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from snaporch.engine.states import State
from snaporch.errors import OperationFailed, Refused
from tests.libvirt.test_records import check_records
from tests.libvirt.test_story import active, world
from tests.libvirt.world import LibvirtWorld
from tests.live.world import HELD_BANDWIDTH, NAME

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

__all__ = ["world"]  # the fixture

PULL = """\
<domainbackup mode='pull'><server transport='unix' socket='{place}/nbd'/><disks>
<disk name='vda' backup='yes' type='file'><scratch file='{place}/scratch.qcow2'/></disk>
<disk name='vdb' backup='no'/></disks></domainbackup>"""


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_refused(world: LibvirtWorld, tmp_path: Path) -> None:
    """A backup, and a copy of a disk: create, delete, flatten and revert say so, and nothing is changed."""
    await world.create("one")
    await world.create("two")
    (tmp_path / "pull.xml").write_text(PULL.format(place=tmp_path))
    copy = tmp_path / "copy.qcow2"
    for begin, end in (
        (("backup-begin", str(tmp_path / "pull.xml")), ("domjobabort",)),
        (("blockcopy", "vda", str(copy), "--bandwidth", "1", "--transient-job"), ("blockjob", "vda", "--abort")),
    ):
        world.virsh(*begin)
        files, disks = world.files(), await active(world)
        for verb in (
            lambda: world.create("three"),
            lambda: world.orch.delete(NAME, "one"),
            lambda: world.orch.delete(NAME, "two"),
            lambda: world.orch.flatten(NAME),
            lambda: world.revert("one"),
        ):
            with pytest.raises(Refused, match=r"job|copy|work on its images"):
                await verb()
        assert (world.files(), await active(world), world.libvirt_disks()) == (files, disks, disks)
        await world.check_runs(3)
        world.virsh(*end)
    await world.create("three")
    await world.orch.delete(NAME, "two")
    await world.check_runs(3)
    await check_records(world)


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_committed_meanwhile(world: LibvirtWorld) -> None:
    """Somebody merges an overlay into the image just frozen while memory streams: no checkpoint is claimed."""

    def merge() -> None:
        target, path = next(iter(world.libvirt_disks().items()))
        assert ".qcow2" in path
        world.virsh("blockcommit", target, "--active", "--pivot", "--wait")

    before = world.files(), world.libvirt_disks()
    with pytest.raises(OperationFailed, match="another program has changed"):
        await world.during(State.STREAMING, merge, world.create("point", bandwidth=HELD_BANDWIDTH))
    assert not await world.orch.list(NAME)
    assert (world.files(), world.libvirt_disks()) == before
    await world.check_runs(3)
    await world.create("next")
    await check_records(world)
