"""A program that dies in the middle of an operation: ``python -m tests.live.dying ROOT WHERE VERB NAME …``.

WHERE is a state, at whose beginning it kills itself, or `after:STEP` or `before:STEP` for a step of the tables. It
says when it died (seconds since the epoch), as the last thing that it does. Where it never gets there, it ends with
status 0.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable

import trio

from snaporch import events
from snaporch.create import Participant
from snaporch.models import CreateFlag, CreateOptions, DomainSnapshot, Event, Strategy
from snaporch.orchestrator import Orchestrator, open_orchestrator
from snaporch.revert import Reverter


def die() -> None:
    """Be killed."""
    os.write(1, f"{time.time():.6f}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(state: str) -> None:
    """Be killed when an operation enters a state."""
    publish = events.Broadcast.publish

    def last(self: events.Broadcast, event: Event) -> None:
        publish(self, event)
        if event.kind == "state" and event.state == state:
            die()

    events.Broadcast.publish = last  # type: ignore[method-assign]


def die_at(place: str, step: str) -> None:
    """Be killed before or after a step."""
    for actor in (Participant, Reverter):
        if (perform := getattr(actor, step, None)) is not None:
            setattr(actor, step, _deadly(perform, place))


def _deadly(perform: Callable[..., Awaitable[None]], place: str) -> Callable[..., Awaitable[None]]:
    async def step(self: object, *key: str) -> None:
        if place == "before":
            die()
        await perform(self, *key)
        die()

    return step


async def operate(orch: Orchestrator, verb: str, name: str, strategy: str = "auto", bandwidth: str = "0") -> None:
    """Do what is to be interrupted."""
    if verb == "revert":
        await orch.revert("guest", name)
    else:
        flags = CreateFlag(0) if strategy == "paused" else CreateFlag.LIVE
        asked = Strategy("auto" if strategy == "paused" else strategy)
        options = CreateOptions(strategy=asked, bandwidth=int(bandwidth))
        await orch.create("guest", DomainSnapshot(name), flags, options)


async def main(*command: str) -> None:
    """Operate until dead."""
    root, where, *arguments = command
    place, _, step = where.partition(":")
    if step:
        die_at(place, step)
    else:
        die_in(where)
    async with open_orchestrator(root) as orch:
        await operate(orch, *arguments)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
