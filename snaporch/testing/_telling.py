"""Checks of what is told of an operation: its events and its times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import trio

from snaporch.engine.states import TERMINAL, TRANSITIONS, State
from snaporch.model.record import Event, EventKind
from snaporch.model.request import Strategy
from snaporch.testing._support import can_be_saved, cancelled_in, expect, revert, take
from snaporch.testing._world import World


async def check_events(world: World) -> None:
    """The events of every operation are a legal way through its states, from the first to a terminal one."""
    domain, orchestrator = world.domain, world.orchestrator
    async with orchestrator.events() as events:
        for strategy in (Strategy.AUTO, Strategy.PRECOPY, Strategy.PAUSED):
            await take(world, f"as-{strategy}", strategy)
        await cancelled_in(world, State.PREPARING, partial(take, world, "never"))
        await revert(world, "as-auto")
        by_operation = check_told(events)
    known = [record.id for record in await orchestrator.operations(domain)]
    expect(list(by_operation) == known, "events and catalog do not know the same operations")


def check_told(events: trio.MemoryReceiveChannel[Event]) -> dict[str, list[Event]]:
    """Check what has been told of operations that are over; return it by operation."""
    by_operation: dict[str, list[Event]] = {}
    while events.statistics().current_buffer_used:
        event = events.receive_nowait()
        by_operation.setdefault(event.operation, []).append(event)
    for told in by_operation.values():
        _check_way([State(event.state) for event in told if event.kind is EventKind.STATE])
        _check_progress([event for event in told if event.kind is EventKind.PROGRESS])
    return by_operation


def _check_way(states: Sequence[State]) -> None:
    way = " ".join(states)
    for before, after in zip([State.NEW, *states], states, strict=False):
        expect(after in TRANSITIONS[before].values(), f"{before} to {after} is not legal: {way}")
    expect(states[-1:] and states[-1] in TERMINAL, f"it never ended: {way}")


def _check_progress(events: Sequence[Event]) -> None:
    for before, after in pairwise(events):
        expect(before.done <= after.done, f"progress went back from {before.done} to {after.done}")


async def check_timings(world: World) -> None:
    """The pause is the hypervisor's own account; it is longer than nothing and shorter than the whole."""
    for strategy in (Strategy.AUTO, Strategy.PRECOPY, Strategy.PAUSED):
        timings = (await take(world, f"as-{strategy}", strategy)).timings
        expect(timings.pause is not None, f"{strategy}: a running guest was never paused")
        expect(
            0 < (timings.pause or 0) < timings.total, f"{strategy}: paused for {timings.pause} of {timings.total} s"
        )
        expect(
            sum(timings.phases.values()) <= timings.total, f"{strategy}: phases longer than the whole: {timings}"
        )
    await world.orchestrator.pause(world.domain)
    if not await can_be_saved(world):
        return
    timings = (await take(world, "of-paused")).timings
    expect(timings.pause is None, f"an already paused guest was paused for {timings.pause} s")
    await world.check_still()
