"""Which item of a batch is next, within the limits; no I/O.

Items wait in their order, but one whose storage directories are all taken does not hold up those behind it.
"""

from __future__ import annotations

from collections import Counter, deque

import attrs

from snaporch.batch.plan import Limits
from snaporch.batch.select import Item


@attrs.define
class Slots:
    """Who waits and what is taken.

    Attributes:
        limits: a plan's.
        running: items that have a slot.
        busy: by storage directory, items that use it.
    """

    limits: Limits
    running: int = 0
    busy: Counter[str] = attrs.field(factory=Counter)
    _waiting: deque[Item] = attrs.field(factory=deque)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: Item) -> None:
        """Let an item wait."""
        self._waiting.append(item)

    def take(self) -> Item | None:
        """Give the first item that fits its slot; None when none does."""
        if self.running >= self.limits.per_host:
            return None
        for index, item in enumerate(self._waiting):
            if self._fits(item):
                del self._waiting[index]
                self.running += 1
                self.busy.update(item.places)
                return item
        return None

    def _fits(self, item: Item) -> bool:
        most = self.limits.per_directory
        return most is None or all(self.busy[place] < most for place in item.places)

    def give_back(self, item: Item) -> None:
        """Take back an item's slot."""
        self.running -= 1
        self.busy.subtract(item.places)

    def clear(self) -> None:
        """Let nobody wait any more."""
        self._waiting.clear()
