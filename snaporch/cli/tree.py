"""The snapshot tree for people, as a graph of lines: one a snapshot, however many there are and however deep.

A snapshot's line is below its parent's. The child with the most descendants goes on in the parent's column; the
others bend out of it, each before that. So no line is further to the right than the logarithm of their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
from rich.console import Console, ConsoleOptions
from rich.text import Text

from snaporch.model.record import SnapshotRecord

_SIGNS = ("●", "├─", "│ ")
_ASCII = ("*", "|-", "| ")


@attrs.frozen
class Row:
    """A line: the columns left of the snapshot's sign, which go on (False) or bend (True); the snapshot."""

    columns: tuple[bool, ...]
    record: SnapshotRecord


def rows(records: Sequence[SnapshotRecord]) -> Iterator[Row]:
    """Yield the lines; a snapshot whose parent is not among `records` begins a tree of its own."""
    names = {record.name for record in records}
    children: dict[str | None, list[SnapshotRecord]] = {}
    for record in records:
        children.setdefault(record.parent if record.parent in names else None, []).append(record)
    sizes = _sizes(children)
    stack: list[tuple[SnapshotRecord | None, tuple[bool, ...], bool]] = [(None, (), False)]
    while stack:
        above, columns, bends = stack.pop()
        if above is not None:
            yield Row((*columns[:-1], True) if bends else columns, above)
        below = children.get(above.name if above is not None else None, [])
        if below:
            main = max(below, key=lambda each: sizes[each.name])
            stack.append((main, columns, False))
            stack += [(each, (*columns, False), True) for each in reversed(below) if each is not main]


def _sizes(children: dict[str | None, list[SnapshotRecord]]) -> dict[str, int]:
    """Return how many snapshots there are in the tree that each one begins."""
    order, at = list(children.get(None, [])), 0
    while at < len(order):
        order += children.get(order[at].name, [])
        at += 1
    sizes: dict[str, int] = {}
    for record in reversed(order):
        sizes[record.name] = 1 + sum(sizes[child.name] for child in children.get(record.name, []))
    return sizes


@attrs.frozen
class Drawing:
    """What rich prints.

    Attributes:
        heading: the first line.
        records: the snapshots.
        label: makes the text of one.
    """

    heading: Text
    records: Sequence[SnapshotRecord]
    label: Callable[[SnapshotRecord], Text]

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Text]:
        dot, bend, bar = _ASCII if options.ascii_only else _SIGNS
        yield self.heading
        for row in rows(self.records):
            left = "".join(bend if bends else bar for bends in row.columns)
            yield Text.assemble((f"{left}{dot} ", "dim"), self.label(row.record))
