"""Checks of drivers when things go wrong: an operation is complete, or everything is as it was before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import attrs

from snaporch.engine.replay import Action, after_create
from snaporch.engine.states import State
from snaporch.engine.steps import CREATE
from snaporch.engine.ways import WAYS
from snaporch.errors import Busy, DamagedSnapshot, SnaporchError, Stranded
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.model.rfc import RevertFlag
from snaporch.model.way import Way
from snaporch.testing._support import (
    bounded,
    cancelled_in,
    check_back,
    check_same,
    during,
    expect,
    go_back,
    last_operation,
    names,
    picture,
    raises,
    state_of,
    states_of,
    take,
    take_as,
    unchanged,
)
from snaporch.testing._telling import check_told
from snaporch.testing._traits import phases_of
from snaporch.testing._world import CrashWorld, World


async def check_cancelled_background(world: World) -> None:
    """A background create that is cancelled, in whichever state, leaves everything as it was before."""
    await _check_cancelled(world, Strategy.BACKGROUND)


async def check_cancelled_precopy(world: World) -> None:
    """A precopy create that is cancelled, in whichever state, leaves everything as it was before."""
    await _check_cancelled(world, Strategy.PRECOPY)


async def check_cancelled_paused(world: World) -> None:
    """A create without LIVE that is cancelled, in whichever state, leaves everything as it was before."""
    await _check_cancelled(world, Strategy.PAUSED)


async def _check_cancelled(world: World, strategy: Strategy) -> None:
    for state in states_of(await phases_of(world, strategy)):
        before, name = await picture(world), f"in-{state}"
        # so that its end does not come first
        bandwidth = world.slow if state is State.STREAMING else 0
        if await cancelled_in(world, state, partial(take, world, name, strategy, bandwidth=bandwidth)):
            expect(state is State.COMMITTING, f"a create cancelled when {state} is complete")
            expect(name in await names(world), "a complete create has no snapshot")
        else:
            await check_same(world, before, f"{strategy} cancelled when {state}")
    await _check_next(world, strategy)


async def _check_next(world: World, strategy: Strategy) -> None:
    """Check that the guest is well, and that the next create works."""
    await world.check_consistent()
    await take(world, "next", strategy)
    await go_back(world, "next")
    await world.check_consistent()


async def check_cancelled_revert(world: World) -> None:
    """A revert that is cancelled, in whichever state, leaves the old guest as it was, or is complete."""
    await take(world, "point")
    for state in states_of(WAYS[Way.BESIDE].phases):
        before = await picture(world)
        call = partial(world.orchestrator.revert, world.domain, "point", RevertFlag.PAUSED)
        if await cancelled_in(world, state, call):
            expect(state is State.COMMITTING, f"a revert cancelled when {state} is complete")
            await world.orchestrator.resume(world.domain)
        else:
            await check_same(world, before, f"revert cancelled when {state}")
        await world.check_consistent()


async def check_proven(world: World) -> None:
    """Where two guests cannot be there at one time, the point is proved first; the old guest is kept until then."""
    first, far = await bounded(world, "point")
    with world.one_at_a_time():
        back = await world.orchestrator.revert(world.domain, "point")
        expect(back.way == Way.PROVEN, f"it went back {back.way}")
        expect(bool(back.outage_seconds), f"its guest was paused for {back.outage_seconds} s")
        await world.check_consistent()
        await check_back(world, "point", first, far)
    expect(".kept" not in str(await world.everything()), "what was kept is left")


async def check_proven_cancelled(world: World) -> None:
    """Such a revert that is cancelled, in whichever state, leaves a guest as it was, or is complete."""
    await take(world, "point")
    for state in states_of(WAYS[Way.PROVEN].phases):
        await world.go_on()
        was, before = await world.number(), await picture(world)
        with world.one_at_a_time():
            complete = await cancelled_in(world, state, partial(world.orchestrator.revert, world.domain, "point"))
        if complete:
            expect(state is State.COMMITTING, f"a revert cancelled when {state} is complete")
        else:
            expect(await world.number() >= was, f"cancelled when {state}: the guest is not what it was")
            after = await picture(world)
            expect(after["files"] == before["files"], f"cancelled when {state}, files are left: {after['files']}")
            expect(await state_of(world) is DomainState.RUNNING, f"cancelled when {state}, it does not run")
        await world.check_consistent()


async def check_broken_background(world: World) -> None:
    """A background create in which something fails leaves everything as it was before."""
    await _check_broken(world, Strategy.BACKGROUND)


async def check_broken_precopy(world: World) -> None:
    """A precopy create in which something fails leaves everything as it was before."""
    await _check_broken(world, Strategy.PRECOPY)


async def check_broken_paused(world: World) -> None:
    """A create without LIVE in which something fails leaves everything as it was before."""
    await _check_broken(world, Strategy.PAUSED)


async def _check_broken(world: World, strategy: Strategy) -> None:
    for trouble in world.troubles(strategy):
        before = await picture(world)
        async with world.break_next(trouble) as snapshot:
            with raises(SnaporchError) as caught:
                await take_as(world, snapshot, strategy, bandwidth=world.slow)
        expect(not isinstance(caught[0], Stranded), f"{trouble}: {caught[0]}")
        expect((await last_operation(world)).state == State.ROLLED_BACK, f"{trouble}: it was not rolled back")
        await check_same(world, before, f"{strategy}, {trouble}")
    await _check_next(world, strategy)


async def check_busy(world: World) -> None:
    """While an operation runs the domain can be looked at, and a second operation hears of the first."""
    domain, orchestrator = world.domain, world.orchestrator
    await take(world, "zero")

    async def look() -> None:
        first = await last_operation(world)
        expect(first.state == State.STREAMING, f"the catalog says that it is {first.state}")
        info = await orchestrator.domain_info(domain)
        expect(info.state is DomainState.RUNNING, f"while its memory streams the guest is {info.state}")
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "create": partial(take, world, "second"),
            "revert": partial(orchestrator.revert, domain, "zero"),
            "pause": partial(orchestrator.pause, domain),
            "destroy": partial(orchestrator.destroy, domain),
        }
        for what, call in calls.items():
            with raises(Busy) as caught:
                await call()
            told = caught[0].domain, caught[0].operation, caught[0].running
            expect(told == (domain, first.id, "create first"), f"{what} was told {told}")

    await during(world, State.STREAMING, look, partial(take, world, "first", bandwidth=world.slow))
    expect(await names(world) == ["zero", "first"], "the list is not what was made")
    await go_back(world, "first")
    await world.check_consistent()


async def check_damaged_memory(world: World) -> None:
    """A snapshot whose memory was damaged is refused before anything is touched, and the guest runs on."""
    memory = (await take(world, "point")).snapshot.memory_file
    await world.damage(memory)
    async with unchanged(world, "a revert to a damaged snapshot"):
        with raises(DamagedSnapshot) as caught:
            await world.orchestrator.revert(world.domain, "point")
    expect(caught[0].path == memory, f"the error names {caught[0].path}")
    await world.check_consistent()


async def check_verify(world: World) -> None:
    """Verify says whether a snapshot is whole and runs, touches nothing, and names the file that is damaged."""
    domain, verify = world.domain, world.orchestrator.verify
    record = await take(world, "point")
    async with unchanged(world, "verify"):
        report = await verify(domain, "point")
        expect((report.ok, report.problems, report.booted) == (True, (), None), f"a whole snapshot: {report}")
        async with world.orchestrator.events() as events:
            report = await verify(domain, "point", boot=True)
            expect(check_told(events), "nothing was told of a verify that runs the snapshot")
        expect((report.ok, report.booted) == (True, True), f"a whole snapshot: {report}")
    await world.check_consistent()
    await world.damage(record.snapshot.memory_file)
    async with unchanged(world, "verify of a damaged snapshot"):
        report = await verify(domain, "point", boot=True)
    expect(not report.ok, "damage was not found")
    expect(any(record.snapshot.memory_file in text for text in report.problems), f"not named: {report.problems}")


async def check_recovery(world: CrashWorld) -> None:
    """After a SIGKILL in any state of a create `recover` does what `snaporch.engine.replay` says, to the end."""
    for strategy in (Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED):
        for state in states_of(CREATE[strategy]):
            before, name = await picture(world), f"{strategy}-{state}"
            await world.kill_in(strategy, state, name)
            await world.orchestrator.recover()
            complete = name in await names(world)
            gone_on = after_create(strategy, state) is Action.GO_ON
            expect(complete == gone_on, f"a create with {strategy} killed when {state}: complete is {complete}")
            if complete:
                await world.check_consistent()
                await go_back(world, name)
            else:
                await check_same(world, before, f"{strategy} killed when {state}")
            expect(await state_of(world) is DomainState.RUNNING, f"{strategy} killed when {state}: it does not run")
            await world.check_consistent()
    again = await world.orchestrator.recover()
    expect(not again, f"recover has found more to do: {[attrs.asdict(record) for record in again]}")
