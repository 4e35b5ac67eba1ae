"""Events for whoever asked for them.

Rules:

1. The reader never waits for a subscriber: a subscriber that does not read loses its own subscription, not the
   connection.
2. An end is never silent: what was buffered is delivered, and then receiving raises why there is no more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from snaporch.errors import ConnectionGone, ProtocolError

if TYPE_CHECKING:
    from types import TracebackType

    from snaporch.qmp.wire import Event

__all__ = ["EVENT_BUFFER", "Subscription"]

# A guest cannot make QEMU send events at will (those that it causes are rate limited), so this many unread ones mean
# a subscriber that has forgotten to read.
EVENT_BUFFER = 10_000


class Subscription:
    """Receives events, as a `trio.MemoryReceiveChannel` does; but it ends by an error.

    Use `QMPClient.subscribe` to get one. Iterating never ends by itself.
    """

    def __init__(self, names: tuple[str, ...], *, label: str) -> None:
        self._names = frozenset(names)
        self._label = label
        self._sender, self._receiver = trio.open_memory_channel[Event_](math.inf)
        self._end: tuple[type[ConnectionGone | ProtocolError], str] | None = None

    def __repr__(self) -> str:
        names = ", ".join(sorted(self._names)) or "all events"
        buffered = self._receiver.statistics().current_buffer_used
        state = "OPEN" if self._end is None else "ENDED"
        return f"<Subscription {self._label} {state}, {names}, {buffered} buffered>"

    async def receive(self) -> Event:
        """Wait for the next event.

        Raises:
            ConnectionGone: the connection is lost and all that came before was received.
            ProtocolError: as ConnectionGone, because garbage came; or too many events were left unread.
            trio.ClosedResourceError: the subscription was closed here.
        """
        try:
            return await self._receiver.receive()
        except trio.EndOfChannel:
            raise self._why() from None

    def receive_nowait(self) -> Event:
        """Return the next event; as `receive`, but raises `trio.WouldBlock` if there is none yet."""
        try:
            return self._receiver.receive_nowait()
        except trio.EndOfChannel:
            raise self._why() from None
