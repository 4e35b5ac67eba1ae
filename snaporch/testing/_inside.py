"""Checks of points inside images: reverts to them, and what prevents a revert."""

from __future__ import annotations

from functools import partial

from snaporch.engine.states import State
from snaporch.engine.steps import CREATE
from snaporch.engine.ways import WAYS
from snaporch.errors import InvalidInput, TargetExists, Unsupported
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.model.way import Way
from snaporch.testing._support import (
    cancelled_in,
    check_back,
    check_same,
    expect,
    names,
    picture,
    raises,
    state_of,
    states_of,
    take,
    unchanged,
)
from snaporch.testing._world import World


async def _snapshot(world: World, name: str, *targets: str) -> DomainSnapshot:
    """Return a request for a point of all disks inside their images, or only of these."""
    info = await world.orchestrator.domain_info(world.domain)
    taken = targets or tuple(disk.target for disk in info.disks if not disk.readonly)
    return DomainSnapshot(name, disks=tuple(DiskSnapshot(DeviceDisk(t), external=False) for t in taken))


async def _take_inside(world: World, name: str, *targets: str, flags: CreateFlag = CreateFlag(0)) -> None:  # noqa: B008
    await world.orchestrator.create(world.domain, await _snapshot(world, name, *targets), flags)


async def check_internal(world: World) -> None:
    """A checkpoint inside the images reverts to exactly its point, any number of times, of an inactive one too."""
    first = await world.number()
    await _take_inside(world, "point")
    record = await world.orchestrator.show(world.domain, "point")
    expect((record.strategy, record.memory) == (Strategy.INTERNAL, None), f"it was taken as {record.strategy}")
    expect(await state_of(world) is DomainState.RUNNING, "the guest does not run after the create")
    expect(0 < (record.timings.pause or 0) < record.timings.total, f"the pause: {record.timings}")
    await world.go_on()
    far = await world.number()
    files = (await world.everything())["files"]
    for _ in range(2):
        await check_back(world, "point", first, far)
    await world.orchestrator.destroy(world.domain)
    await check_back(world, "point", first, far)
    expect((await world.everything())["files"] == files, "a revert has left, or taken, a file")
    async with unchanged(world, "verify"):
        report = await world.orchestrator.verify(world.domain, "point", boot=True)
    expect((report.ok, report.booted) == (True, True), f"a whole snapshot: {report}")


async def check_internal_mixed(world: World) -> None:
    """What cannot be done with points inside images is refused before anything is touched, and says why."""
    create, domain = world.orchestrator.create, world.domain
    await _take_inside(world, "inner")
    async with unchanged(world, "requests that are refused"):
        with raises(InvalidInput):
            await _take_inside(world, "mixed", "vda")
        with raises(InvalidInput):
            await _take_inside(world, "live", flags=CreateFlag.LIVE)
        with raises(TargetExists):
            await _take_inside(world, "inner")
    await take(world, "outer")
    async with unchanged(world, "a revert inside an image that another snapshot is in"):
        with raises(Unsupported) as caught:
            await world.orchestrator.revert(domain, "inner")
        expect("outer" in str(caught[0]), f"it does not say what is in the way: {caught[0]}")
    await world.orchestrator.revert(domain, "outer")
    await world.check_consistent()
    await _take_inside(world, "upper")  # inside the overlay over the image that has the others
    await world.orchestrator.revert(domain, "upper")
    await world.check_consistent()
    await world.orchestrator.destroy(domain)
    first, *others = (disk.target for disk in (await world.orchestrator.domain_info(domain)).disks)
    await create(domain, await _snapshot(world, "both", first), CreateFlag.DISK_ONLY)
    record = await world.orchestrator.show(domain, "both")
    expect(list(record.inside) == [first] and others, f"each disk has its own way, and {list(record.inside)} is in")
    await world.start()
    await world.go_on()
    async with unchanged(world, "disks inside images under a running guest"):
        with raises(Unsupported):
            await world.orchestrator.revert(domain, "both")
    await world.orchestrator.revert(domain, "both", RevertFlag.FORCE)
    expect(await state_of(world) is DomainState.INACTIVE, "it is not inactive, as it was at the point")
    await world.orchestrator.revert(domain, "both")
    await world.start()
    await world.check_consistent()


async def check_internal_cancelled(world: World) -> None:
    """A create or a revert inside the images that is cancelled leaves everything as it was, or is complete."""
    for state in states_of(CREATE[Strategy.INTERNAL]):
        before, name = await picture(world), f"in-{state}"
        if await cancelled_in(world, state, partial(_take_inside, world, name)):
            expect(state is State.COMMITTING, f"a create cancelled when {state} is complete")
            expect(name in await names(world), "a complete create has no snapshot")
        else:
            await check_same(world, before, f"a create inside cancelled when {state}")
    await _take_inside(world, f"in-{State.STREAMING}")  # nothing is left inside that would have this name
    for state in states_of(WAYS[Way.INSIDE].phases):
        before = await picture(world)
        call = partial(world.orchestrator.revert, world.domain, f"in-{State.COMMITTING}")
        if not await cancelled_in(world, state, call):
            await check_same(world, before, f"a revert inside cancelled when {state}")
        await world.check_consistent()
