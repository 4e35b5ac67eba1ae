"""Checks of deletes: what is given up is gone, and nothing that anybody else sees has changed."""

from __future__ import annotations

from functools import partial

from snaporch.engine.states import State
from snaporch.errors import NotFound, Stranded
from snaporch.model.domain import DomainState
from snaporch.model.merge import MergePlan, Where
from snaporch.model.record import OperationKind
from snaporch.model.rfc import DeleteFlag
from snaporch.testing._support import (
    bounded,
    check_back,
    cut_in,
    expect,
    go_back,
    last_operation,
    names,
    raises,
    state_of,
    unchanged,
)
from snaporch.testing._world import World

Bounds = dict[str, tuple[int, int]]


async def _tree(world: World) -> Bounds:
    """Make points a, b, c in a row, and d over a, on top of which the domain goes on."""
    bounds = {name: await bounded(world, name) for name in "abc"}
    await go_back(world, "a")
    return bounds | {"d": await bounded(world, "d")}


async def _delete(world: World, name: str, flags: DeleteFlag = DeleteFlag(0)) -> MergePlan:  # noqa: B008
    """Delete, and check that nothing has changed for those that remain."""
    state = await state_of(world)
    plan = await world.orchestrator.delete(world.domain, name, flags)
    expect(not plan.doomed & set(await names(world)), f"{plan.doomed} were deleted, and are there")
    expect(await state_of(world) is state, f"the domain was {state} before the delete of {name}")
    if state is DomainState.RUNNING:
        await world.check_consistent()
    for each in await names(world):
        report = await world.orchestrator.verify(world.domain, each)
        expect(report.ok, f"after the delete of {name}: {each}: {report.problems}")
    return plan


async def _check_points(world: World, bounds: Bounds) -> None:
    """Go back to all that remain."""
    for name in await names(world):
        await check_back(world, name, *bounds[name])


async def check_delete(world: World) -> None:
    """Be it a leaf, a fork or what the guest runs on top of: the guest and the other points do not notice."""
    files = (await world.everything())["files"]
    bounds = await _tree(world)
    async with unchanged(world, "a dry run"):
        foreseen = await world.orchestrator.delete(world.domain, "b", dry_run=True)
    plan = await _delete(world, "b")  # in the other branch, which the guest does not run on
    expect(plan.doomed == foreseen.doomed, f"foreseen were {foreseen.doomed}, deleted were {plan.doomed}")
    expect({step.where for step in plan.steps} <= {Where.OFFLINE}, "images that no guest has open merged in one")
    await _delete(world, "d")  # what the guest runs on top of
    await _check_points(world, bounds)
    tree = await world.orchestrator.tree(world.domain)
    expect(dict(tree) == {None: ("a",), "a": ("c",)}, f"the tree is {tree}")
    await _delete(world, "a")
    await _check_points(world, bounds)
    await _delete(world, "c")
    expect((await world.everything())["files"] == files, "not all files of what was deleted are gone")
    with raises(NotFound):
        await world.orchestrator.delete(world.domain, "c")


async def check_delete_inactive(world: World) -> None:
    """The same of a domain that does not run; CHILDREN_ONLY and CHILDREN take what descends."""
    files = (await world.everything())["files"]
    bounds = await _tree(world)
    await world.orchestrator.destroy(world.domain)
    plan = await _delete(world, "b")
    expect({step.where for step in plan.steps} <= {Where.OFFLINE}, "images that no guest has open merged in one")
    await _check_points(world, bounds)
    await world.orchestrator.destroy(world.domain)
    await _delete(world, "a", DeleteFlag.CHILDREN_ONLY)
    expect(await names(world) == ["a"], f"CHILDREN_ONLY has left {await names(world)}")
    await _check_points(world, bounds)
    await world.orchestrator.destroy(world.domain)
    await _delete(world, "a", DeleteFlag.CHILDREN)
    expect((await world.everything())["files"] == files, "not all files of what was deleted are gone")
    await world.start()
    await world.check_consistent()


async def check_flatten(world: World) -> None:
    """A domain's chain can be shortened to one image; its points stay, and the guest does not notice."""
    bounds = {name: await bounded(world, name) for name in "abc"}
    await world.orchestrator.flatten(world.domain)
    depths = [len(disk.chain) for disk in (await world.orchestrator.domain_info(world.domain)).disks]
    expect(set(depths) == {1}, f"the disks are {depths} images deep")
    await world.check_consistent()
    await _check_points(world, bounds)


async def check_cancelled_delete(world: World) -> None:
    """A delete that is cancelled leaves the guest and all other points as they are, and `recover` finishes it."""
    bounds = await _tree(world)
    cut = await cut_in(world, State.MERGING, partial(world.orchestrator.delete, world.domain, "d"))
    expect(isinstance(cut, Stranded), f"a delete that is cut short says {cut!r}")
    await world.check_consistent()
    await world.orchestrator.recover()
    last = await last_operation(world)
    expect(
        (last.kind, last.state) == (OperationKind.DELETE, State.COMPLETE),
        f"recovered, the {last.kind} is {last.state}",
    )
    expect(await names(world) == ["a", "b", "c"], f"there are {await names(world)}")
    await world.check_consistent()
    await _check_points(world, bounds)
