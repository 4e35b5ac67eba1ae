"""Requests that can wait do not run while a guest is paused for a point.

All of the service is one thread: what answers two hundred followers while a guest is paused lengthens that pause.
So a request waits, before anything is done for it, while a guest is paused; but a moment only: among many creates
one guest or another is always paused. Those who follow events can wait longer: they pass one after the other, so
that what comes meanwhile, a request or an answer of a hypervisor, meets no queue of work that is ready to run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from snaporch.engine.states import State
from snaporch.model.record import Event

PASSAGES = 2  # followers at once
PATIENCE_SECONDS = 0.02  # a point takes milliseconds, and a request is to be answered in 50
_STANDING = frozenset({State.PAUSING, State.SWITCHING, State.ARMING, State.RESUMING})


@attrs.define(eq=False)
class Quiet:
    """Knows whether a guest is paused for a point."""

    _standing: set[str] = attrs.field(factory=set)
    _passages: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(PASSAGES))
    _runs: trio.Event = attrs.field(factory=trio.Event)

    def hear(self, event: Event) -> None:
        """Take note of what happens."""
        if event.state in _STANDING:
            self._standing.add(event.operation)
        else:
            self._standing.discard(event.operation)
            if not self._standing:
                self._runs.set()
                self._runs = trio.Event()

    async def wait(self) -> None:
        """Wait while a guest is paused, but not for long."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while self._standing:
                await self._runs.wait()

    @asynccontextmanager
    async def passage(self) -> AsyncIterator[None]:
        """Run the body of a follower while no guest is paused, if that is soon, and beside few others."""
        async with self._passages:
            await self.wait()
            yield
