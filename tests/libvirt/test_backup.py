"""libvirt's checkpoints, which are bitmaps in the images: an incremental backup after what snaporch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.libvirt.test_story import world
from tests.libvirt.world import LibvirtWorld
from tests.live.world import NAME, SECONDS

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

__all__ = ["world"]  # the fixture

BACKUP = """\
<domainbackup mode='push'><incremental>{since}</incremental><disks>
<disk name='vda' backup='yes' type='file'><target file='{place}/vda.{since}'/><driver type='qcow2'/></disk>
<disk name='vdb' backup='no'/></disks></domainbackup>"""


async def backed_up(world: LibvirtWorld, since: str, place: Path) -> str:
    """Have libvirt make an incremental backup; return why it could not, or an empty string."""
    (place / "backup.xml").write_text(BACKUP.format(since=since, place=place))
    words = ["virsh", "-q", "-c", "qemu:///system", "backup-begin", world.theirs, str(place / "backup.xml")]
    done = world.daemon.run(*words)
    if done.returncode:
        return done.stderr.strip()
    with trio.fail_after(SECONDS):
        while "None" not in world.virsh("domjobinfo"):  # noqa: ASYNC110 - virsh tells nobody
            await trio.sleep(0.1)
    return ""


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_backups(world: LibvirtWorld, tmp_path: Path) -> None:
    """It works after creates and live deletes; after a revert libvirt says that there is no way but a full one."""
    world.virsh("checkpoint-create-as", "base")
    await world.create("one")
    await world.create("two")
    await world.orch.delete(NAME, "one")
    await world.orch.delete(NAME, "two")
    await world.check_runs(3)
    assert await backed_up(world, "base", tmp_path) == ""
    await world.create("three")
    await world.revert("three")
    assert "bitmap" in await backed_up(world, "base", tmp_path)
    await world.check_runs(3)
