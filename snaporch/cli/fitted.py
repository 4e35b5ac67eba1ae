"""A list for people in which no name is folded or cut: where the terminal is narrow, columns are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
from rich.console import Console, ConsoleOptions
from rich.text import Text

_GAP = 2
_LEAST = 12  # columns that free text is worth showing in


@attrs.frozen
class Fitted:
    """Rows of cells.

    Attributes:
        columns: their headings.
        rows: the cells of each row.
        less: headings in the order in which they are left out; those that are not among them stay.
        text: the heading of the last column, where that is free text: it is cut to the room that is left for it.
        only: the headings that were asked for: these, in this order, whole, however narrow the terminal is.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[str | Text, ...]]
    less: tuple[str, ...]
    text: str = ""
    only: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield a line for each row."""
        table = [[Text(heading, "bold") for heading in self.columns], *(self._cells(row) for row in self.rows)]
        widths = [max(row[place].cell_len for row in table) for place in range(len(self.columns))]
        shown = [self.columns.index(heading) for heading in self.only] or list(range(len(self.columns)))
        room = (
            None if options.no_wrap or self.only else options.max_width
        )  # all that there is, if not for a terminal
        for heading in self.less if room is not None else ():
            over = sum(widths[place] + _GAP for place in shown) - _GAP - (room or 0)
            place = self.columns.index(heading)
            if over > 0 and heading == self.text and widths[place] - over >= _LEAST:
                widths[place] -= over
            elif over > 0:
                shown.remove(place)
        for row in table:
            yield _line([(row[place], widths[place]) for place in shown])

    def _cells(self, row: tuple[str | Text, ...]) -> list[Text]:
        return [cell if isinstance(cell, Text) else Text(cell) for cell in row]


def _line(cells: Sequence[tuple[Text, int]]) -> Text:
    line = Text(no_wrap=True, overflow="ignore")
    for cell, width in cells:
        part = cell.copy()
        part.truncate(width + _GAP if cell.cell_len <= width else width, overflow="ellipsis", pad=True)
        if cell.cell_len > width:
            part.append(" " * _GAP)
        line.append_text(part)
    line.rstrip()
    return line
