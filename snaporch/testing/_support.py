"""What the checks are written with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import attrs
import trio

from snaporch.engine.states import OperationState, Signal, State
from snaporch.engine.steps import Phase
from snaporch.errors import SnaporchError
from snaporch.model.domain import DomainState
from snaporch.model.record import Event, EventKind, OperationRecord, SnapshotRecord
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DomainSnapshot, RevertFlag
from snaporch.testing._traits import in_its_place
from snaporch.testing._world import World

E = TypeVar("E", bound=SnaporchError)


def expect(holds: object, what: str) -> None:
    """Raise AssertionError unless something holds; unlike ``assert`` also under ``python -O``."""
    if not holds:
        raise AssertionError(what)


@contextmanager
def raises(kind: type[E]) -> Iterator[list[E]]:
    """Expect the body to raise an error, which is in the list afterwards."""
    caught: list[E] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    except SnaporchError as error:
        raise AssertionError(f"{kind.__name__} was expected, not {error!r}") from error
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


# --- short forms --------------------------------------------------------------------------------------------


async def take(world: World, name: str, strategy: Strategy = Strategy.AUTO, **options: Any) -> SnapshotRecord:
    """Create a checkpoint; PAUSED stands for a create without LIVE."""
    return await take_as(world, DomainSnapshot(name), strategy, **options)


async def take_as(world: World, snapshot: DomainSnapshot, strategy: Strategy, **options: Any) -> SnapshotRecord:
    """As `take`, with all that is asked for."""
    flags, asked = CreateFlag.LIVE, strategy
    if strategy is Strategy.PAUSED:
        flags, asked = CreateFlag(0), Strategy.AUTO
    return await world.orchestrator.create(world.domain, snapshot, flags, CreateOptions(strategy=asked, **options))


async def state_of(world: World) -> DomainState:
    """Return what the domain does."""
    return (await world.orchestrator.domain_info(world.domain)).state


async def can_be_saved(world: World) -> bool:
    """Return whether the guest's memory can be saved as it is now: some must run, as they take part in that."""
    return not (await world.orchestrator.doctor(world.domain))[world.domain]["memory_blocker"]


async def names(world: World) -> list[str]:
    """Return the names of the domain's snapshots."""
    return [record.name for record in await world.orchestrator.list(world.domain)]


async def last_operation(world: World) -> OperationRecord:
    """Return the domain's newest operation."""
    return (await world.orchestrator.operations(world.domain))[-1]


async def revert(world: World, name: str, flags: RevertFlag = RevertFlag(0)) -> None:  # noqa: B008
    """Revert, in the way that the driver has."""
    await world.orchestrator.revert(world.domain, name, flags | await in_its_place(world))


async def go_back(world: World, name: str) -> int:
    """Revert, so that the guest is paused at the point; let it run, and return how far it then says it has come."""
    await revert(world, name, RevertFlag.PAUSED)
    expect(await state_of(world) is DomainState.PAUSED, "it is not paused after a revert with PAUSED")
    await world.orchestrator.resume(world.domain)
    return await world.number()


async def check_back(world: World, name: str, first: int, far: int) -> None:
    """Go back to a point that lies between two numbers, and check that the guest does."""
    number = await go_back(world, name)
    expect(first <= number < far, f"{name} is between {first} and {far}; after the revert the guest is at {number}")
    await world.check_consistent()


async def bounded(world: World, name: str) -> tuple[int, int]:
    """Create a checkpoint and let the guest go on; return the numbers that the point lies between."""
    first = await world.number()
    await take(world, name)
    await world.go_on()
    return first, await world.number()


# --- as it was before ---------------------------------------------------------------------------------------


async def picture(world: World) -> dict[str, object]:
    """Return everything that an operation that did not complete must leave as it was."""
    info = await world.orchestrator.domain_info(world.domain)
    return {
        "info": attrs.evolve(info, disks=tuple(attrs.evolve(disk, node="") for disk in info.disks)),
        "snapshots": await world.orchestrator.list(world.domain),
        **await world.everything(),
    }


async def check_same(world: World, before: dict[str, object], what: str) -> None:
    """Check that everything is as it was."""
    after = await picture(world)
    for key, value in before.items():
        expect(after[key] == value, f"{what}: {key} was {value!r} and is {after[key]!r}")


@asynccontextmanager
async def unchanged(world: World, what: str) -> AsyncIterator[None]:
    """Check that everything is after the body as before it."""
    before = await picture(world)
    yield
    await check_same(world, before, what)


# --- states -------------------------------------------------------------------------------------------------


def states_of(phases: Iterable[Phase]) -> Sequence[State]:
    """Return the states that an operation by a table goes through, up to COMMITTING."""
    machine = OperationState()
    return [machine.send(signal) for signal in [*(phase.signal for phase in phases), Signal.COMMIT]]


async def in_state(
    events: trio.MemoryReceiveChannel[Event], state: State, action: Callable[[], Awaitable[None]]
) -> None:
    """Do something, once, when an operation enters a state."""
    async for event in events:
        if event.kind is EventKind.STATE and event.state == state:
            await action()
            return


async def cut_in(world: World, state: State, call: Callable[[], Awaitable[object]]) -> SnaporchError | None:
    """Cancel an operation in a state; return what it raised then."""
    scope, failure = trio.CancelScope(), None

    async def cancel() -> None:
        scope.cancel()
        await trio.lowlevel.checkpoint()

    async with world.orchestrator.events() as events, trio.open_nursery() as nursery:
        nursery.start_soon(in_state, events, state, cancel)
        with scope:
            try:
                await call()
            except SnaporchError as error:
                failure = error
        nursery.cancel_scope.cancel()
    expect(scope.cancel_called, f"it was never {state}")
    return failure


async def cancelled_in(world: World, state: State, call: Callable[[], Awaitable[object]]) -> bool:
    """Cancel an operation, which can be undone, in a state; return whether it is complete nevertheless."""
    if (failure := await cut_in(world, state, call)) is not None:
        raise AssertionError(f"cancelled when {state}, it raised {failure!r}") from failure
    last = (await last_operation(world)).state
    expect(last in {State.COMPLETE, State.ROLLED_BACK}, f"cancelled when {state}, it ended as {last}")
    return last == State.COMPLETE


async def during(
    world: World, state: State, action: Callable[[], Awaitable[None]], call: Callable[[], Awaitable[object]]
) -> None:
    """Run an operation, and do something beside it from the moment at which it enters a state."""
    done = False

    async def act() -> None:
        nonlocal done
        await action()
        done = True

    async with world.orchestrator.events() as events, trio.open_nursery() as nursery:
        nursery.start_soon(in_state, events, state, act)
        await call()
        nursery.cancel_scope.cancel()
    expect(done, f"the operation was over before what was to be done when it is {state}")
