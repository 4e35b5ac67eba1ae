"""A flatten shortens chains, by hand and by itself; nobody sees a difference, and it can be given up any time."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from snaporch.drivers.local.files import LocalStorage
from snaporch.engine.states import State
from snaporch.errors import InvalidInput, NotEnoughSpace
from snaporch.model.record import Event, OperationKind
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import RevertFlag
from tests.live.world import MIB, NAME, MakeWorld, World, when

pytestmark = pytest.mark.live

WRITES = {"memory": 40 * MIB, "append": "ram=2 dirty=1 rate=200 report=20 bulk=4 span=12"}


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A world with two snapshots, whose guest writes to its first disk all the time."""
    world = await make_world(**WRITES)
    for name in "ab":
        await world.create(name)
        await world.check_runs(50)
    return world


async def depths(world: World) -> list[int]:
    """Return the lengths of the chains that the domain is on."""
    return [len(disk.chain) for disk in (await world.orch.domain_info(NAME)).disks]


async def check_all(world: World) -> None:
    """Assert that each snapshot is what the catalog says, and that the last, which has most below it, is whole."""
    await world.check_no_orphans()
    records = await world.orch.list(NAME)
    for record in records:
        report = await world.orch.verify(NAME, record.name)
        assert report.ok, report.problems
    await world.revert(records[-1].name, RevertFlag.RUNNING)
    await world.check_runs(2)


async def test_by_hand(world: World) -> None:
    """Running: onto the base, then a snapshot alone; inactive: alone. A dry run says so and touches nothing."""
    with pytest.raises(InvalidInput):
        await world.orch.flatten(NAME, depth=0)
    before = await depths(world)
    dry = await world.orch.flatten(NAME, depth=2, dry_run=True)
    assert (await depths(world), before) == ([3, 3], [3, 3])
    plan = await world.orch.flatten(NAME, depth=2)
    assert [(s.kind, s.where, s.new_backing) for s in plan.steps] == [
        (s.kind, s.where, s.new_backing) for s in dry.steps
    ]
    assert {(s.kind, s.where) for s in plan.steps} == {("stream", "live")}
    assert await depths(world) == [2, 2]
    await world.check_runs()
    assert not (await world.orch.flatten(NAME, depth=2)).steps
    await world.orch.flatten(NAME, "b")
    record = await world.orch.show(NAME, "b")
    assert [len(chain) for chain in record.images.values()] == [1, 1]
    await check_all(world)
    await world.orch.destroy(NAME)
    await world.orch.flatten(NAME)
    assert await depths(world) == [1, 1]
    cost = (await world.orch.doctor(NAME))[NAME]["chain of vda"]
    assert cost["images"] == 1
    assert min(cost["open_ms"], cost["read_us"], cost["open_ms_base_alone"], cost["read_us_base_alone"]) > 0
    await world.check_nothing_lost()
    await check_all(world)


async def test_by_itself(world: World) -> None:
    """A domain that keeps its snapshots stays within its depth, create after create."""
    with pytest.raises(InvalidInput):
        await world.orch.limit_depth(NAME, 2)
    await world.orch.limit_depth(NAME, 3)
    for name in "cde":
        await world.create(name)
        assert max(await depths(world)) <= 3
    kinds = [operation.kind for operation in await world.orch.operations(NAME)]
    assert kinds.count(OperationKind.FLATTEN) == 2
    await world.check_runs()
    await check_all(world)
    await world.orch.delete(NAME, ("a", "b", "c", "d", "e"))
    assert max(await depths(world)) <= 2
    await world.check_runs()


@pytest.mark.window("the rate of the merge")
async def test_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled, or with no room for it: the chains are as they were, and so is everything that anybody sees."""

    def under_way(event: Event) -> bool:
        return event.state == State.MERGING and event.done > 0

    await world.create("c")
    await world.create("d")  # with nearly nothing of its own: there is much to copy
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        await nursery.start(when, world.orch, under_way, scope.cancel)
        with scope:
            await world.orch.flatten(NAME, "d", options=MergeOptions(bandwidth=MIB))
    assert scope.cancelled_caught
    assert (await world.orch.operations(NAME))[-1].state == State.ROLLED_BACK
    assert await depths(world) == [5, 5]
    assert await world.qmp("query-block-jobs") == []

    async def none(_: LocalStorage, directory: str) -> tuple[str, int]:
        await trio.lowlevel.checkpoint()
        return str(Path(directory).stat().st_dev), 0

    monkeypatch.setattr(LocalStorage, "free", none)
    with pytest.raises(NotEnoughSpace):
        await world.orch.flatten(NAME)
    monkeypatch.undo()
    await world.check_runs()
    await check_all(world)
