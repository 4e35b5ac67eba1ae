"""A live merge tells how far it is, keeps to its bandwidth, and never holds a guest up that must not be."""

from __future__ import annotations

import pytest
import trio

from snaporch.drivers.qmp import blockjob
from snaporch.drivers.qmp.blockjob import Brake
from snaporch.engine.states import State
from snaporch.errors import Stranded
from snaporch.model.record import Event
from snaporch.model.request import MergeOptions, OnTimeout
from tests.live.world import MIB, NAME, MakeWorld, World

pytestmark = pytest.mark.live

WRITES = {"memory": 40 * MIB, "append": "ram=2 dirty=1 rate=50 report=20 bulk=24 span=8"}
SLOW = 4 * MIB  # bytes a second: far less than the guest writes
SOON = 0.5


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A world with a snapshot, whose guest has since written 8 MiB, again and again."""
    world = await make_world(**WRITES)
    await world.create("a")
    await world.check_runs(50)
    return world


async def limits(world: World) -> list[int]:
    """Return what the guest's disks are throttled to."""
    return [block["inserted"]["bps_wr"] for block in await world.qmp("query-block")]


async def test_progress_and_bandwidth(world: World) -> None:
    """The first job is followed from nothing to all of it, and QEMU has been told how fast it may be."""
    speeds: list[int] = []
    progress: list[Event] = []

    async def look(event: Event) -> None:
        speeds.extend(job["speed"] for job in await world.qmp("query-block-jobs"))
        progress.append(event)

    async with trio.open_nursery() as nursery, world.orch.events() as events:

        async def listen() -> None:
            async for event in events:
                if event.kind == "progress" and event.state == State.MERGING:
                    await look(event)

        nursery.start_soon(listen)
        await world.create("b")  # what is merged is no more written to
        await world.orch.delete(NAME, "a", options=MergeOptions(bandwidth=6 * MIB))
        nursery.cancel_scope.cancel()
    assert 6 * MIB in speeds
    done = [event.done for event in progress]
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert all(event.done <= event.total for event in progress)
    await world.check_runs()


@pytest.mark.window("a guest that writes faster than the merge")
async def test_a_guest_that_outruns_it_is_slowed_down_and_then_left_alone(world: World) -> None:
    """The snapshot goes, its image stays as a link, no limit is left; the next merge has it."""
    slowed: list[list[int]] = []
    reach = blockjob.BlockJob.reach

    async def watched(job: blockjob.BlockJob, *arguments: object) -> bool:
        slowed.append(await limits(world))
        return await reach(job, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockjob.BlockJob, "reach", watched)
        patch.setattr(blockjob, "THROTTLED_LEAST", 64 * MIB)  # which does not help
        hopeless = MergeOptions(bandwidth=SLOW, max_seconds=SOON)
        plan = await world.orch.delete(NAME, "a", options=hopeless)
    assert [0, 0] in slowed
    assert any(0 < first <= 64 * MIB for first, _ in slowed)
    (kept,) = plan.kept
    assert kept[0] == world.definition.disks[0].path
    assert "writes faster" in kept[1]
    assert await limits(world) == [0, 0]
    assert await world.orch.list(NAME) == ()
    await world.check_runs()
    await world.check_no_orphans()
    await world.create("b")
    plan = await world.orch.delete(NAME, "b")
    assert not plan.kept
    assert not world.images()
    await world.check_runs()


@pytest.mark.window("a guest that writes faster than the merge")
async def test_slowed_down_it_gets_there(world: World) -> None:
    """A guest whose writes are limited to half of what the merge copies is caught up with."""
    plan = await world.orch.delete(NAME, "a", options=MergeOptions(bandwidth=16 * MIB, max_seconds=4))
    assert not plan.kept
    assert not world.images()
    assert await limits(world) == [0, 0]
    await world.check_runs()


@pytest.mark.window("a guest that writes faster than the merge")
async def test_paused_where_that_is_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest is paused for the rest, and runs on; so it does when snaporch dies just then."""
    stopped: list[bool] = []
    stop = Brake._stop

    async def watched(brake: Brake) -> None:
        await stop(brake)
        stopped.append(brake._stopped)

    monkeypatch.setattr(Brake, "_stop", watched)
    options = MergeOptions(bandwidth=SLOW, max_seconds=0.1, on_timeout=OnTimeout.PAUSE)
    plan = await world.orch.delete(NAME, "a", options=options)
    assert any(stopped)
    assert not plan.kept
    assert not world.images()
    assert await limits(world) == [0, 0]
    await world.check_runs()


@pytest.mark.window("a guest that writes faster than the merge")
async def test_cancelled_while_slowed_down(world: World) -> None:
    """Cancelled with the guest's writes limited: no limit stays, no job, and `recover` finishes the delete."""
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def cancel_when_slowed() -> None:
            while not any(await limits(world)):  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.05)
            scope.cancel()

        nursery.start_soon(cancel_when_slowed)
        with scope, pytest.raises(Stranded, match="cancelled"):
            await world.orch.delete(NAME, "a", options=MergeOptions(bandwidth=SLOW, max_seconds=SOON))
        nursery.cancel_scope.cancel()
    assert await limits(world) == [0, 0]
    assert await world.qmp("query-block-jobs") == []
    await world.check_runs()
    (ended,) = await world.orch.recover()
    assert ended.state == State.COMPLETE
    await world.check_runs()
