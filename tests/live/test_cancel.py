"""Cancellation in every state: rolled back, or complete once it is committed; nothing in between, nothing left."""

from __future__ import annotations

import signal

import pytest
import trio

from snaporch.engine.states import State
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.model.rfc import RevertFlag
from tests.live.world import HELD_BANDWIDTH, NAME, SLOW, MakeWorld, World, when

pytestmark = pytest.mark.live

STATES = {
    Strategy.BACKGROUND: (
        State.PREPARING,
        State.PAUSING,
        State.SWITCHING,
        State.ARMING,
        State.RESUMING,
        State.STREAMING,
        State.COMMITTING,
    ),
    Strategy.PRECOPY: (
        State.PREPARING,
        State.STREAMING,
        State.SWITCHING,
        State.RESUMING,
        State.SEALING,
        State.COMMITTING,
    ),
    Strategy.PAUSED: (
        State.PREPARING,
        State.PAUSING,
        State.SWITCHING,
        State.STREAMING,
        State.RESUMING,
        State.SEALING,
        State.COMMITTING,
    ),
}


async def cancelled_create(world: World, name: str, strategy: Strategy, state: State) -> bool:
    """Cancel a create in a state; return whether it is complete."""
    bandwidth = HELD_BANDWIDTH if state is State.STREAMING else 0
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        await nursery.start(when, world.orch, state, scope.cancel)
        with scope:
            await world.create(name, strategy, bandwidth=bandwidth)
        nursery.cancel_scope.cancel()
    assert scope.cancel_called, f"it was never {state}"
    return name in [record.name for record in await world.orch.list(NAME)]


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("strategy", list(STATES))
async def test_create(make_world: MakeWorld, strategy: Strategy) -> None:
    """A create cancelled in each state leaves everything as it was; the next one works."""
    world = await make_world(append=SLOW)
    for state in STATES[strategy]:
        before = await world.everything()
        complete = await cancelled_create(world, f"in-{state}", strategy, state)
        last = (await world.orch.operations(NAME))[-1]
        assert last.state == (State.COMPLETE if complete else State.ROLLED_BACK), state
        if complete:
            assert state is State.COMMITTING
        else:
            await world.check_same(before, state)
        await world.check_runs(3)
    await world.create("next", strategy)
    await world.check_runs(3)
    await world.revert("next")
    await world.check_consistent()


@pytest.mark.window("the rate of the stream")
async def test_create_of_paused(make_world: MakeWorld) -> None:
    """A guest that was paused is paused after a cancelled create, and on with its own images."""
    world = await make_world(append=SLOW)
    await world.orch.pause(NAME)
    for state in (State.SWITCHING, State.STREAMING, State.RESUMING):
        async with world.unchanged(str(state)):
            assert not await cancelled_create(world, f"in-{state}", Strategy.PAUSED, state)
        await world.check_still()
    await world.orch.resume(NAME)
    await world.check_runs()


@pytest.mark.parametrize("flags", [RevertFlag(0), RevertFlag.PAUSED])
async def test_revert(world: World, flags: RevertFlag) -> None:
    """A revert cancelled in each state leaves the old guest as it was, running; the next one works."""
    await world.create("a")
    await world.check_runs()
    complete = False
    for state in (State.PREPARING, State.LOADING, State.SWAPPING, State.COMMITTING):
        before = await world.everything()
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            await nursery.start(when, world.orch, state, scope.cancel)
            with scope:
                await world.revert("a", flags)
            nursery.cancel_scope.cancel()
        assert scope.cancel_called
        last = (await world.orch.operations(NAME))[-1]
        complete = last.state == State.COMPLETE
        if complete:
            assert state is State.COMMITTING
        else:
            assert last.state == State.ROLLED_BACK
            await world.check_same(before, state)
            await world.check_runs(3)
    if complete and flags:
        assert await world.state() is DomainState.PAUSED
    await world.revert("a")
    await world.check_consistent()


@pytest.mark.window("the rate of the stream")
async def test_interrupt(make_world: MakeWorld) -> None:
    """Ctrl-C's signal, turned into cancellation as the command line does: rolled back."""
    world = await make_world(append=SLOW)

    async def interrupted(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                scope.cancel()

    async with world.unchanged(), trio.open_nursery() as nursery:
        await nursery.start(interrupted, nursery.cancel_scope)
        await nursery.start(when, world.orch, State.STREAMING, lambda: signal.raise_signal(signal.SIGINT))
        await world.create("interrupted", bandwidth=HELD_BANDWIDTH)
    assert not await world.orch.list(NAME)
    await world.check_runs()
