"""The reset button, and a look at the screen."""

from __future__ import annotations

import pytest
import trio

from snaporch.errors import Refused, Unsupported
from snaporch.guest.report import count_starts
from snaporch.model.domain import DomainState
from tests.live.world import NAME, SECONDS, MakeWorld, World

pytestmark = pytest.mark.live

PNG = b"\x89PNG\r\n\x1a\n"


async def check_begins_anew(world: World, since: int) -> None:
    """Assert that the guest boots once, and then runs and finds its disks as it left them."""
    with trio.fail_after(SECONDS):
        while not count_starts(world.text(since)):  # noqa: ASYNC110 - nothing tells us
            await trio.sleep(0.01)
    await world.check_runs()
    assert count_starts(world.text(since)) == 1


async def test_reset(make_world: MakeWorld) -> None:
    """The guest boots anew in the same process, on its overlays; the point before can be gone back to."""
    world = await make_world(extra_args=("-device", "VGA"))
    await world.create("before")
    pid, disks, since = await world.pid(), (await world.orch.domain_info(NAME)).disks, world.position()
    assert (await world.orch.reset(NAME)).state is DomainState.RUNNING
    await check_begins_anew(world, since)
    info = await world.orch.domain_info(NAME)
    assert (info.pid, [disk.active for disk in info.disks]) == (pid, [disk.active for disk in disks])
    assert (await world.orch.screenshot(NAME)).startswith(PNG)
    await world.create("after")

    await world.orch.pause(NAME)
    since = world.position()
    assert (await world.orch.reset(NAME)).state is DomainState.PAUSED
    await world.check_still()
    await world.orch.resume(NAME)
    await check_begins_anew(world, since)

    for name in ("before", "after"):
        await world.revert(name)
        await world.check_consistent()
    await world.orch.destroy(NAME)
    for call in (world.orch.reset, world.orch.screenshot):
        with pytest.raises(Refused, match="is inactive"):
            await call(NAME)


async def test_no_screen(world: World) -> None:
    before = world.position()
    with pytest.raises(Unsupported, match=r"has no screen to take a picture of: .*console"):
        await world.orch.screenshot(NAME)
    await world.check_runs()
    assert count_starts(world.text(before)) == 0
