"""Sends events to all listeners, without ever waiting for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import trio

from snaporch.model.record import Event, EventKind

BUFFER = 1_000  # events that a listener may be behind


@attrs.define
class Broadcast:
    """Copies each event to every listener.

    A listener that is `BUFFER` events behind misses progress events; when even a state cannot be delivered its
    stream ends: it must not believe that it has seen everything.
    """

    _listeners: list[trio.MemorySendChannel[Event]] = attrs.field(factory=list)
    _taps: list[Callable[[Event], None]] = attrs.field(factory=list)

    def publish(self, event: Event) -> None:
        """Deliver an event; returns at once."""
        for hear in self._taps:
            hear(event)
        for listener in tuple(self._listeners):
            try:
                listener.send_nowait(event)
            except trio.BrokenResourceError:
                self._drop(listener)
            except trio.WouldBlock:
                if event.kind is not EventKind.PROGRESS:
                    self._drop(listener)

    def _drop(self, listener: trio.MemorySendChannel[Event]) -> None:
        listener.close()
        self._listeners.remove(listener)

    @contextmanager
    def tapped(self, hear: Callable[[Event], None]) -> Iterator[None]:
        """Call `hear` with every event, in the task in which it happens: it must be quick, and must not raise."""
        self._taps.append(hear)
        try:
            yield
        finally:
            self._taps.remove(hear)

    @contextmanager
    def listen(self) -> Iterator[trio.MemoryReceiveChannel[Event]]:
        """Yield a channel with everything that is published from now on."""
        send, receive = trio.open_memory_channel[Event](BUFFER)
        self._listeners.append(send)
        try:
            with receive:
                yield receive
        finally:
            if send in self._listeners:
                self._drop(send)
