"""snaporch, libvirtd or QEMU killed while a checkpoint is taken of a guest that libvirt manages."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest
import trio

from snaporch.engine.states import State
from snaporch.errors import SnaporchError
from snaporch.model.request import Strategy
from tests.libvirt.test_records import check_records
from tests.libvirt.test_story import active, world
from tests.libvirt.world import LibvirtWorld
from tests.live.test_crash import killed
from tests.live.world import NAME, SECONDS

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

__all__ = ["world"]  # the fixture


async def runs_again(world: LibvirtWorld) -> None:
    """Wait until libvirt says that the guest runs."""
    with trio.fail_after(SECONDS):
        while world.virsh("domstate").strip() != "running":  # noqa: ASYNC110 - the guard tells nobody
            await trio.sleep(0.05)


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
@pytest.mark.parametrize("step", ["pause", "switch"])
async def test_killed_in_the_pause(world: LibvirtWorld, step: str) -> None:
    """The guard lets the guest run by libvirt's own call, and recovery puts the disks back."""
    before = await active(world)
    await killed(world, f"after:{step}#1", "create", "point", Strategy.BACKGROUND)
    await runs_again(world)
    await world.check_runs(3)
    (ended,) = await world.orch.recover()
    assert ended.state == State.ROLLED_BACK
    assert world.libvirt_disks() == world.libvirt_disks("--inactive") == await active(world) == before
    await check_records(world)
    await world.create("next")
    await check_records(world)
    await world.check_runs(3)


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
@pytest.mark.parametrize("who", ["qemu", "both"])
async def test_qemu_killed_on_its_overlays(world: LibvirtWorld, who: str) -> None:
    """Libvirt's definition is back on the images that are there, and the domain starts, by virsh too."""
    before = await active(world)
    await killed(world, "after:switch#1", "create", "point", Strategy.BACKGROUND, who=who)
    await world.orch.recover()
    assert world.libvirt_disks("--inactive") == await active(world) == before
    since = world.position()
    world.virsh("start")
    await world.wait_report(lambda report: report.checked > 0, since=since)
    await world.check_runs(3)
    await check_records(world)


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_killed_before_the_old_guest_ends(world: LibvirtWorld) -> None:
    """Its end was decided, and what it holds is in a file: it runs on, and recovery removes that."""
    await world.create("point")
    before = await active(world)
    await killed(world, "after:insist#1", "revert", "point")
    await runs_again(world)
    await world.check_runs(3)
    (ended,) = await world.orch.recover()
    assert ended.state == State.ROLLED_BACK
    assert world.libvirt_disks() == await active(world) == before
    await world.check_runs(3)
    await check_records(world)


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_qemu_killed_when_its_memory_is_kept(world: LibvirtWorld) -> None:
    """The guest is brought back from what was kept, and nothing is left of the process before."""
    await world.create("one")
    await world.revert("one")
    await killed(world, "after:keep_old#1", "revert", "one", who="qemu")
    await world.check_runs(3)
    assert not await world.orch.recover()
    assert world.libvirt_disks() == world.libvirt_disks("--inactive") == await active(world)
    assert len(list((world.root / NAME).glob("run-*"))) == 1
    await check_records(world)


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_killed_while_memory_streams(world: LibvirtWorld) -> None:
    """The guest runs on, and recovery completes the checkpoint."""
    await killed(world, State.STREAMING, "create", "point", Strategy.BACKGROUND)
    await world.check_runs(3)
    (ended,) = await world.orch.recover()
    assert ended.state == State.COMPLETE
    assert world.libvirt_disks() == await active(world)
    await check_records(world)
    assert (await world.orch.verify(NAME, "point", boot=True)).ok


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_libvirtd_killed_while_memory_streams(world: LibvirtWorld) -> None:
    """The create ends in one of its three ways; when libvirtd is back, all is as snaporch says."""

    def kill() -> None:
        world.daemon.kill(signal.SIGKILL)
        world.daemon.start()

    with suppress(SnaporchError):  # which of its ways it was is looked at below
        await world.during(State.STREAMING, kill, world.create("point", bandwidth=20 * 2**20))
    await world.orch.recover()
    await world.check_runs(3)
    assert world.libvirt_disks() == await active(world)
    await world.create("next")
    await check_records(world)
    await world.check_runs(3)
