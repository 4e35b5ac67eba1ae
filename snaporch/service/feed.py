"""What happens, numbered: a ring that any number of followers read, each at its own pace.

1. An event gets its number and its bytes once, however many read it; a follower is one number.
2. Nothing waits for a follower. One that is further behind than the ring is long is told so, by a `gap`.
3. A number means something only together with the boot that gave it: after a restart there is a gap, too.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any

import attrs
import trio

from snaporch.model.convert import dumps
from snaporch.model.record import Event

CAPACITY = 10_000  # events, of about 300 bytes
MOST_DIGITS = 20
GAP, DRAINING = "gap", "draining"


def is_number(text: str) -> bool:
    """Return whether a text from outside is a whole number of a size that anything here has."""
    return len(text) <= MOST_DIGITS and text.isdecimal()


@attrs.frozen
class Entry:
    """An event in the ring: its number, its domains, and the bytes that are sent for it."""

    number: int
    domains: tuple[str, ...]
    frame: bytes


def frame(identifier: str, kind: str, data: str) -> bytes:
    """Return a server-sent event; `data` is JSON, and so has no line breaks."""
    return f"id: {identifier}\nevent: {kind}\ndata: {data}\n\n".encode()


@attrs.define(eq=False)
class Feed:
    """The ring.

    Attributes:
        boot: tells this ring's numbers from those of another start of the service.
    """

    boot: str = attrs.field(factory=lambda: secrets.token_hex(4))
    capacity: int = CAPACITY
    draining: bool = False
    _ring: deque[Entry] = attrs.field(factory=deque)
    _next: int = 1
    _more: trio.Event = attrs.field(factory=trio.Event)

    def publish(self, event: Event) -> None:
        """Give an event its number; returns at once."""
        number = self._next
        self._next += 1
        self._ring.append(Entry(number, event.domains, frame(f"{self.boot}-{number}", event.kind, dumps(event))))
        if len(self._ring) > self.capacity:
            self._ring.popleft()
        self._wake()

    def drain(self) -> None:
        """Let every follower come to its end."""
        self.draining = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = trio.Event()

    def since(self, number: int) -> Sequence[Entry]:
        """Return the entries from a number on."""
        behind = min(self._next - number, len(self._ring))
        return [self._ring[index] for index in range(len(self._ring) - behind, len(self._ring))]

    def follow(self, last: str | None = None, domain: str | None = None) -> Follower:
        """Return a follower: from now on, or from after the event with the id `last`."""
        follower = Follower(self, self._next, domain)
        if last is not None:
            boot, _, number = last.partition("-")
            if boot == self.boot and is_number(number) and int(number) < self._next:
                follower.position = int(number) + 1
            else:
                follower.lost = True
        return follower


@attrs.define(eq=False)
class Follower:
    """One who reads the ring.

    Attributes:
        position: the number that comes next.
        domain: only events of this one.
        lost: there is a gap before `position` that must be told.
    """

    feed: Feed
    position: int
    domain: str | None = None
    lost: bool = False

    def take(self) -> bytes:
        """Return what there is for it now; empty when there is nothing."""
        oldest = self.feed._ring[0].number if self.feed._ring else self.feed._next  # noqa: SLF001 - one of two
        if self.position < oldest:
            self.position, self.lost = oldest, True
        entries = self.feed.since(self.position)
        before = self.position - 1
        self.position += len(entries)
        frames = [entry.frame for entry in entries if self.domain in {None, *entry.domains}]
        if self.lost:
            self.lost = False
            frames.insert(0, frame(f"{self.feed.boot}-{before}", GAP, _data(boot=self.feed.boot, next=before + 1)))
        return b"".join(frames)

    async def more(self) -> bool:
        """Wait until there is something; False when there never will be: the service stops."""
        while self.position >= self.feed._next and not self.lost:  # noqa: SLF001
            if self.feed.draining:
                return False
            await self.feed._more.wait()  # noqa: SLF001
        return True

    def farewell(self) -> bytes:
        """Return the last event of all."""
        return frame(f"{self.feed.boot}-{self.position - 1}", DRAINING, "{}")


def _data(**values: Any) -> str:
    return json.dumps(values)
