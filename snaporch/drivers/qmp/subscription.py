"""Events for their subscribers.

Rules:

1. The reader never waits for a subscriber: a subscriber that does not read loses its own subscription, not
   the connection.
2. An end is never silent: what was buffered is delivered, and then receiving raises why there is no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from snaporch.drivers.qmp.wire import Event
from snaporch.errors import ConnectionGone, ProtocolError

if TYPE_CHECKING:
    from typing import Self

__all__ = ["EVENT_BUFFER", "Subscription"]

# QEMU limits the rate of those events that a guest can cause at will, so this many unread ones mean a
# subscriber that has forgotten to read.
EVENT_BUFFER = 10_000


class Subscription:
    """Receives events as a `trio.MemoryReceiveChannel` does, but ends by an error.

    `QMPClient.subscribe` gives one. Iterating never ends by itself.
    """

    def __init__(self, names: tuple[str, ...], *, label: str) -> None:
        self._names = frozenset(names)
        self._label = label
        self._sender, self._receiver = trio.open_memory_channel[Event](EVENT_BUFFER)
        self._end: ConnectionGone | ProtocolError | None = None

    def __repr__(self) -> str:
        names = ", ".join(sorted(self._names)) or "all events"
        buffered = self._receiver.statistics().current_buffer_used
        return f"<Subscription {self._label} {'ENDED' if self._end else 'OPEN'}, {names}, {buffered} buffered>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await self.receive()

    async def receive(self) -> Event:
        """Wait for the next event.

        Raises:
            ConnectionGone: the connection is lost and all that came before was received.
            ProtocolError: as ConnectionGone, because garbage came; or too many events were left unread.
            trio.ClosedResourceError: the subscription was left.
        """
        try:
            return await self._receiver.receive()
        except trio.EndOfChannel:
            raise self._why() from self._end

    def receive_nowait(self) -> Event:
        """Return the next event; as `receive`, but raises `trio.WouldBlock` if there is none yet."""
        try:
            return self._receiver.receive_nowait()
        except trio.EndOfChannel:
            raise self._why() from self._end

    def _why(self) -> ConnectionGone | ProtocolError:
        # A new error each time: one that is raised twice collects the tracebacks of both.
        if self._end is None:  # pragma: no cover - the sender is closed by _finish alone
            raise AssertionError
        return type(self._end)(str(self._end))

    def _deliver(self, event: Event) -> None:
        if self._end is not None or (self._names and event.name not in self._names):
            return
        try:
            self._sender.send_nowait(event)
        except trio.WouldBlock:
            self._finish(ProtocolError(f"{self._label}: {EVENT_BUFFER:,} events were not read; more were dropped"))

    def _finish(self, why: ConnectionGone | ProtocolError) -> None:
        if self._end is None:
            self._end = why
            self._sender.close()

    def _leave(self) -> None:
        self._sender.close()
        self._receiver.close()
