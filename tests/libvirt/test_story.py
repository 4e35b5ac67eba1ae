"""Checkpoints of a guest that libvirt manages, taken, gone back to and deleted; judged by the guest itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snaporch.errors import SnaporchError
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag
from snaporch.model.way import Way
from tests.conftest import _qemus
from tests.libvirt.lab import Libvirt
from tests.libvirt.world import LibvirtWorld, open_libvirt_world
from tests.live.world import NAME

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]


@pytest.fixture
async def world(daemon: Libvirt, kernel: Path, tmp_path: Path) -> AsyncIterator[LibvirtWorld]:
    """A world with a running guest."""
    qemu = _qemus()["7.2" if daemon.qemu == "-" else "10.0"]
    async with open_libvirt_world(tmp_path / "w", daemon, qemu, kernel) as opened:
        yield opened


async def active(world: LibvirtWorld) -> dict[str, str]:
    """Return the images that snaporch has the disks on, by target."""
    return {disk.target: disk.active for disk in (await world.orch.domain_info(NAME)).disks}


async def test_story(world: LibvirtWorld) -> None:
    """Two live checkpoints, back to the first, one deleted: the guest is whole, and libvirt knows its disks."""
    one = await world.create("one")
    assert one.strategy is Strategy.BACKGROUND
    assert one.timings.pause is not None
    two = await world.create("two")
    await world.check_runs()
    assert world.libvirt_disks() == {
        disk.target: disk.active for disk in (await world.orch.domain_info(NAME)).disks
    }
    assert (await world.orch.verify(NAME, "one", boot=True)).ok

    back = await world.revert("one")
    assert back.way is Way.PROVEN
    first = await world.check_consistent()
    assert first.seq <= two.point * 1000
    assert world.libvirt_disks() == world.libvirt_disks("--inactive") == await active(world)

    await world.orch.delete(NAME, "one")
    await world.check_runs()
    assert world.libvirt_disks() == await active(world)
    assert (await world.orch.verify(NAME, "two")).ok


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_transient(daemon: Libvirt, kernel: Path, tmp_path: Path) -> None:
    """One that libvirt forgets at its end goes back as any other; it cannot be started, and can be gone back to."""
    async with open_libvirt_world(tmp_path / "w", daemon, _qemus()["10.0"], kernel, transient=True) as world:
        await world.create("one")
        await world.revert("one")
        await world.check_runs(3)
        assert world.virsh("snapshot-list", "--name").split() == ["one"]
        assert world.libvirt_disks() == await active(world)
        world.virsh("destroy")
        assert await world.state() is DomainState.INACTIVE
        with pytest.raises(SnaporchError, match="has no domain"):
            await world.orch.start(NAME)
        assert (await world.orch.verify(NAME, "one")).ok
        await world.revert("one")
        await world.check_runs(3)


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_paused_and_power_cycle(world: LibvirtWorld) -> None:
    """A checkpoint without --live; then libvirt's user ends the guest, and starts it again."""
    await world.create("still", Strategy.PAUSED)
    await world.check_runs()
    world.virsh("destroy")
    assert await world.state() is DomainState.INACTIVE
    since = world.position()
    world.virsh("start")
    assert await world.state() is DomainState.RUNNING
    await world.wait_report(lambda report: report.checked > 0, since=since)
    await world.check_runs()
    await world.create("again")
    await world.orch.destroy(NAME)
    assert await world.state() is DomainState.INACTIVE
    await world.create("off", flags=CreateFlag.DISK_ONLY)
    assert world.libvirt_disks("--inactive") == await active(world)
    await world.orch.delete(NAME, "off")
    assert world.libvirt_disks("--inactive") == await active(world)
    await world.start()
