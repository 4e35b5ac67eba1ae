"""A picture of what ran when: an SVG in which each item is a bar; no I/O."""

from __future__ import annotations

from html import escape

import attrs

from snaporch.batch.store import ItemRecord

WIDTH, LEFT, TOP = 1200.0, 8.0, 20.0
TALLEST, SHORTEST = 18.0, 3.0  # of a lane, by how many there are
_HEIGHT = 600.0
_TICKS = 8
_MINUTE, _HOUR = 60.0, 3_600.0


def duration(seconds: float) -> str:
    """Return for example ``12.3 ms``, ``4.56 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < _MINUTE:
        return f"{seconds:.2f} s"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE:.0f} min {seconds % _MINUTE:.0f} s"
    return f"{seconds // _HOUR:.0f} h {seconds % _HOUR // _MINUTE:.0f} min"


def printable(text: str) -> str:
    """Return text without control characters: XML has no way to write most of them, not even escaped."""
    return "".join(each if each.isprintable() else " " for each in text)


@attrs.define
class Timeline:
    """Puts each item into the first lane that is free when it begins.

    Attributes:
        begun: the left edge, in seconds since the epoch.
        ended: the right edge.
    """

    begun: float
    ended: float
    _free: list[float] = attrs.field(factory=list)
    _lanes: int = 0

    @property
    def _tall(self) -> float:
        return max(SHORTEST, min(TALLEST, _HEIGHT / max(1, self._lanes)))

    def _x(self, instant: float) -> float:
        return LEFT + (WIDTH - 2 * LEFT) * (instant - self.begun) / max(self.ended - self.begun, 1e-9)

    def lane(self, record: ItemRecord) -> int | None:
        """Return the lane of an item, None when it never ran. Items come in the order in which they began."""
        if not record.begun:
            return None
        for lane, free in enumerate(self._free):
            if free <= record.begun:
                self._free[lane] = record.ended
                return lane
        self._free.append(record.ended)
        self._lanes = max(self._lanes, len(self._free))
        return len(self._free) - 1

    def head(self) -> str:
        """Return the beginning of the picture, once all lanes are known; bars are placed anew from here on."""
        self._free.clear()
        height = TOP + self._lanes * self._tall + 4
        ticks = ""
        for number in range(_TICKS + 1):
            seconds = (self.ended - self.begun) * number / _TICKS
            x, anchor = self._x(self.begun + seconds), "end" if number == _TICKS else "start"
            ticks += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:.0f}"/>'
            ticks += f'<text x="{x:.1f}" y="12" text-anchor="{anchor}">{duration(seconds)}</text>\n'
        size = f'viewBox="0 0 {WIDTH:.0f} {height:.0f}" width="{WIDTH:.0f}" height="{height:.0f}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{ticks}'

    def bar(self, record: ItemRecord) -> str:
        """Return an item's bar."""
        if (lane := self.lane(record)) is None:
            return ""
        x, wide = self._x(record.begun), max(0.5, self._x(record.ended) - self._x(record.begun))
        y, tall = TOP + lane * self._tall, max(2.0, self._tall - 2)
        told = f"{record.item.name}: {record.end}, {duration(record.ended - record.begun)} {record.error}"
        words = escape(printable(told))
        box = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
        return f'<rect class="{record.end}" {box}><title>{words.strip()}</title></rect>\n'
