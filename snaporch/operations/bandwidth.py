"""One bandwidth for several memory streams, shared out anew whenever one begins or ends.

Each stream's rate is set by a task of its own operation: a hypervisor that does not answer delays no other
operation, and its errors are errors of that operation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import trio


@attrs.define(eq=False)
class SharedBandwidth:
    """So many bytes a second for all that stream at one time, in equal parts.

    Attributes:
        total: bytes a second.
    """

    total: int
    _streams: int = 0
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        if self.total <= 0:
            raise ValueError("a shared bandwidth must be more than 0")

    @property
    def share(self) -> int:
        """Bytes a second for each of those that stream now."""
        return max(1, self.total // max(1, self._streams))

    @property
    def next_share(self) -> int:
        """What each will have when another begins."""
        return max(1, self.total // (self._streams + 1))

    def _count(self, change: int) -> None:
        self._streams += change
        self._changed.set()
        self._changed = trio.Event()

    async def during(self, stream: Callable[[], Awaitable[None]], limit: Callable[[int], Awaitable[None]]) -> None:
        """Run `stream`, and call `limit` with its share, at first and whenever that changes.

        Raises:
            Exception: what either of them raises, in a group.
        """
        self._count(1)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, limit)
                await stream()
                nursery.cancel_scope.cancel()
        finally:
            self._count(-1)

    async def _follow(self, limit: Callable[[int], Awaitable[None]]) -> None:
        while True:
            changed = self._changed
            await limit(self.share)
            await changed.wait()
