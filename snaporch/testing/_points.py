"""Checks of what a driver is for: points that can be gone back to."""

from __future__ import annotations

from snaporch.errors import InvalidInput, NotFound, TargetExists, Unsupported
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag, DomainSnapshot, RevertFlag
from snaporch.testing._support import (
    bounded,
    can_be_saved,
    check_back,
    expect,
    go_back,
    names,
    raises,
    revert,
    state_of,
    take,
    take_as,
    unchanged,
)
from snaporch.testing._world import World


async def check_background(world: World) -> None:
    """A background checkpoint reverts to exactly its point; where it is not possible, the reason is told."""
    found = (await world.orchestrator.doctor(world.domain))[world.domain]
    if found["background"]:
        await _check_strategy(world, Strategy.BACKGROUND)
        return
    async with unchanged(world, "a background create that is not possible"):
        with raises(Unsupported) as caught:
            await take(world, "background", Strategy.BACKGROUND)
    expect(found["background_blocker"] in str(caught[0]), f"no reason in {caught[0]}")
    record = await take(world, "auto")
    expect(record.strategy is Strategy.PRECOPY, f"auto has become {record.strategy}")
    expect(found["background_blocker"] in record.reason, f"no reason in {record.reason!r}")


async def check_precopy(world: World) -> None:
    """A precopy checkpoint reverts to exactly its point."""
    await _check_strategy(world, Strategy.PRECOPY)


async def check_paused(world: World) -> None:
    """A checkpoint without LIVE reverts to exactly its point."""
    await _check_strategy(world, Strategy.PAUSED)


async def _check_strategy(world: World, strategy: Strategy) -> None:
    first = await world.number()
    record = await take(world, "point", strategy)
    expect(record.strategy is strategy, f"{strategy} was asked for, {record.strategy} was done: {record.reason}")
    expect(record.domain_state is DomainState.RUNNING, "the record says that the guest did not run")
    expect(await state_of(world) is DomainState.RUNNING, "the guest does not run after the create")
    await world.go_on()
    await world.check_consistent()
    await check_back(world, "point", first, await world.number())


async def check_repeated_reverts(world: World) -> None:
    """A snapshot can be reverted to any number of times, and stays what it was."""
    first = await world.number()
    record = await take(world, "point")
    await world.go_on()
    far = await world.number()
    for _ in range(3):
        await check_back(world, "point", first, far)
        expect(await world.orchestrator.show(world.domain, "point") == record, "a revert has changed the record")
    report = await world.orchestrator.verify(world.domain, "point")
    expect(report.ok, f"a revert has changed the snapshot: {report.problems}")


async def check_branches(world: World) -> None:
    """Snapshots taken after a revert branch off; each branch can be gone to from each other one."""
    bounds = {name: await bounded(world, name) for name in "ab"}
    await go_back(world, "a")
    bounds["c"] = await bounded(world, "c")
    tree = await world.orchestrator.tree(world.domain)
    expect(dict(tree) == {None: ("a",), "a": ("b", "c")}, f"the tree is {tree}")
    for name in ("b", "c", "a"):
        await check_back(world, name, *bounds[name])
        current = (await world.orchestrator.domain_info(world.domain)).current
        expect(current == name, f"the domain says that it descends from {current}")


async def check_paused_guest(world: World) -> None:
    """A guest that is paused stays so through a create, done or refused, and is so after the revert."""
    first = await world.number()
    await world.orchestrator.pause(world.domain)
    if not await can_be_saved(world):
        async with unchanged(world, "a checkpoint of a paused guest"):
            with raises(Unsupported):
                await take(world, "point", Strategy.PAUSED)
        await world.check_still()
        return
    record = await take(world, "point", Strategy.BACKGROUND)
    expect(record.strategy is Strategy.PAUSED, f"a paused guest's strategy is {record.strategy}")
    expect(record.domain_state is DomainState.PAUSED, "the record does not say that it was paused")
    await world.check_still()
    await world.orchestrator.resume(world.domain)
    await world.go_on()
    far = await world.number()
    await revert(world, "point")
    expect(await state_of(world) is DomainState.PAUSED, "the guest is not paused, as it was at the point")
    await world.check_still()
    await check_back(world, "point", first, far)


async def check_revert_states(world: World) -> None:
    """RUNNING and PAUSED override what the guest did at the point; both at once make no sense."""
    domain, orchestrator = world.domain, world.orchestrator
    await take(world, "running")
    await orchestrator.pause(domain)
    of_paused = "paused" if await can_be_saved(world) else "running"
    if of_paused == "paused":
        await take(world, of_paused)
    async with unchanged(world, "contradicting flags"):
        with raises(InvalidInput):
            await orchestrator.revert(domain, "running", RevertFlag.RUNNING | RevertFlag.PAUSED)
    for name, flags, wanted in [
        ("running", RevertFlag(0), DomainState.RUNNING),
        ("running", RevertFlag.PAUSED, DomainState.PAUSED),
        (of_paused, RevertFlag.RUNNING, DomainState.RUNNING),
    ]:
        await revert(world, name, flags)
        found = await state_of(world)
        expect(found is wanted, f"{name} with {flags} is {found}")
        if wanted is DomainState.RUNNING:
            await world.check_consistent()
        else:
            await world.check_still()


async def check_disks_only(world: World) -> None:
    """An inactive domain's disks are a snapshot by themselves; reverted to it is inactive again, and starts."""
    domain, orchestrator = world.domain, world.orchestrator
    async with unchanged(world, "disks alone of a running guest"):
        with raises(Unsupported):
            await orchestrator.create(domain, DomainSnapshot("disks"), CreateFlag.DISK_ONLY)
    await orchestrator.destroy(domain)
    async with unchanged(world, "memory of an inactive domain"):
        with raises(InvalidInput):
            await take(world, "memory")
    record = await orchestrator.create(domain, DomainSnapshot("disks"), CreateFlag.DISK_ONLY)
    expect((record.memory, record.strategy) == (None, Strategy.NONE), "it says that it holds memory")
    expect(await state_of(world) is DomainState.INACTIVE, "a disk-only create has started the domain")
    await world.start()
    await world.go_on()
    await revert(world, "disks")
    expect(await state_of(world) is DomainState.INACTIVE, "it is not inactive, as it was at the point")
    await world.start()
    await world.check_consistent()


async def check_taken_names(world: World) -> None:
    """A name or a file that is there already is never overwritten, a snapshot that is not there never found."""
    record = await take(world, "one")
    memory = record.snapshot.memory_file
    async with unchanged(world, "requests that are refused"):
        with raises(TargetExists):
            await take(world, "one")
        with raises(TargetExists) as caught:
            await take_as(world, DomainSnapshot("two", memory_file=memory), Strategy.AUTO)
        expect(caught[0].path == memory, f"the error names {caught[0].path!r}, not the file")
        with raises(NotFound):
            await world.orchestrator.revert(world.domain, "two")
    expect(await names(world) == ["one"], "the list is not what was made")
    await world.check_consistent()
