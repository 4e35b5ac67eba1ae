"""Records out of rows: those that can be read, and those that cannot."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import trio

from snaporch.errors import UnreadableRecord
from snaporch.model.convert import loads
from snaporch.model.domain import DomainRecord
from snaporch.model.finding import Unreadable
from snaporch.model.record import OperationRecord, PastCheckpoint
from snaporch.model.request import Strategy

T = TypeVar("T")

PAGE_BYTES = 2 << 20  # of records, from which on a page has no more: each names all images under its disks
_PATH = re.compile(r'"/(?:[^"\\]|\\.)*"')  # a string of JSON that begins as a path does


def past_checkpoints(connection: sqlite3.Connection, domain: str, limit: int) -> tuple[PastCheckpoint, ...]:
    """See `Catalog.checkpoints`; whole records, which name all images under their disks, would be slow to read."""
    query = """
        SELECT json_extract(record, '$.strategy'),
            coalesce(
                json_extract(record, '$.memory.size'),
                (SELECT sum(json_extract(value, '$.size')) FROM json_each(record, '$.inside')),
                0
            ),
            json_extract(record, '$.timings.total'),
            json_extract(record, '$.timings.pause'),
            coalesce(json_extract(record, '$.way_back.way'), ''),
            json_extract(record, '$.timings.setup')
        FROM snapshot
        WHERE domain = ? AND CASE WHEN json_valid(record) THEN json_extract(record, '$.snapshot.memory') END
        ORDER BY id DESC LIMIT ?
    """
    rows = connection.execute(query, (domain, limit)).fetchall()
    return tuple(PastCheckpoint(Strategy(strategy), *rest) for strategy, *rest in reversed(rows))


def read_record(text: str, kind: type[T], what: str) -> T:
    """Return a record.

    Raises:
        UnreadableRecord: it is none that can be read; the error begins with `what`.
    """
    try:
        return loads(text, kind)
    except UnreadableRecord as error:
        raise UnreadableRecord(f"{what} cannot be read: {error}; nothing was touched") from None


def readable(rows: Iterable[tuple[str, ...]], kind: type[T]) -> tuple[T, ...]:
    """Return what can be read of rows of one column; what cannot is told by `Catalog.unreadable`."""
    found = []
    for (text,) in rows:
        with suppress(UnreadableRecord):
            found.append(loads(text, kind))
    return tuple(found)


_NAMED = {  # what has records, beside snapshots: the domains that they are of, and their names
    "domain": (DomainRecord, "SELECT name AS owner, name, record FROM domain"),
    "operation": (
        OperationRecord,
        "SELECT domain AS owner, id AS name, record FROM operation_member JOIN operation ON operation = id",
    ),
}


def all_records(
    connection: sqlite3.Connection, domain: str | None, kind: str | None
) -> Iterator[tuple[str, type[Any], tuple[str, ...]]]:
    """Yield what is looked at by `Catalog.unreadable`: what each is, its class, and its row (see `failing`)."""
    for what, (class_, query) in _NAMED.items():
        if kind in {None, what}:
            where = "?1 IS NULL OR owner = ?1"
            rows = connection.execute(f"SELECT * FROM ({query}) WHERE {where} ORDER BY owner, name", (domain,))  # noqa: S608 - no input
            yield from ((what, class_, row) for row in rows)


def failing(what: str, kind: type[Any], *rows: tuple[str, ...]) -> Iterator[Unreadable]:
    """Yield what cannot be read of rows of a domain's name, a name, and a record."""
    for owner, name, text in rows:
        try:
            loads(text, kind)
        except UnreadableRecord as error:
            yield Unreadable(what, owner, name, str(error), tuple(sorted(paths_in(text))))


async def in_turns(found: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """Return all that is found, piece by piece, between which others get their turn: a record may be long."""
    everything: list[T] = []
    for piece in found:
        everything += piece
        await trio.lowlevel.checkpoint()
    return tuple(everything)


def paths_in(text: str) -> Iterator[str]:
    """Yield every path that a record names, as far as can be seen: it may be no JSON at all."""
    for found in set(_PATH.findall(text)):
        with suppress(ValueError):
            yield json.loads(found)
