"""What can wait does not run while a guest stands still for a point.

All of the service is one thread: what answers two hundred followers while a guest is paused lengthens that pause.
So whatever is done for a client passes through here: it waits while a guest stands, and no more than a few pass at
once, so that a pause which begins meets no queue of work that is ready to run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from snaporch.models import Event
from snaporch.states import State

PASSAGES = 4
PATIENCE_SECONDS = 1.0  # a guest that stands longer does not stand for milliseconds' sake
_STANDING = frozenset({State.PAUSING, State.SWITCHING, State.ARMING, State.RESUMING})


@attrs.define(eq=False)
class Quiet:
    """Knows whether a guest stands still for a point."""

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
        """Wait while a guest stands, but not for ever."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while self._standing:
                await self._runs.wait()

    @asynccontextmanager
    async def passage(self) -> AsyncIterator[None]:
        """Run the body while no guest stands, and with few others."""
        async with self._passages:
            await self.wait()
            yield
