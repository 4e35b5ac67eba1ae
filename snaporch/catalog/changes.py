"""What has changed in the catalog, by numbers that only grow: from it an inventory can be kept up to date.

A domain or snapshot is in it once, at the number of its last change; one that is gone stays as such. The numbers
are written in the same transaction as the change itself, by whichever process, and hold for good.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import attrs

from snaporch.catalog.reading import PAGE_BYTES
from snaporch.catalog.store import Catalog

KEPT = (
    1_000_000  # numbers back from the newest, up to which what is gone is told of; the schema's triggers forget it
)
_LEFT_OUT = {"domain": ("handle", "template", "shape"), "snapshot": ("images", "template")}


@attrs.frozen
class CatalogChange:
    """A domain or snapshot as it is now, or that it is gone.

    Attributes:
        revision: the number of its last change.
        kind: ``domain`` or ``snapshot``.
        domain: the domain's name.
        name: the snapshot's.
        gone: there is none of that name any more.
        record: as the catalog has it, without chains of images and processes; None where it is gone, or cannot be
            read.
    """

    revision: int
    kind: str
    domain: str
    name: str = ""
    gone: bool = False
    record: Mapping[str, Any] | None = None


@attrs.frozen
class Changes:
    """A page of changes.

    Attributes:
        items: oldest first.
        revision: what comes after these is asked for by this number.
        more: there are more already.
        gap: what is gone may be missing: forget what is known, and begin with 0.
    """

    items: tuple[CatalogChange, ...]
    revision: int
    more: bool = False
    gap: bool = False


async def newest(catalog: Catalog) -> int:
    """Return the number of the last change."""
    return await catalog.read(_newest)


def _newest(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(revision), 0) FROM change").fetchone()[0])


async def changes(catalog: Catalog, after: int, limit: int) -> Changes:
    """Return no more than `limit` changes that came after a number."""

    def work(connection: sqlite3.Connection) -> Changes:
        last = _newest(connection)
        if 0 < after < last - KEPT or after > last:
            return Changes((), 0, gap=True)
        query = "SELECT revision, kind, domain, name, gone FROM change WHERE revision > ? ORDER BY revision LIMIT ?"
        rows = connection.execute(query, (after, limit + 1)).fetchall()
        items, size = list[CatalogChange](), 0
        for number, kind, domain, name, gone in rows[:limit]:
            text = _text(connection, kind, domain, name)
            items.append(CatalogChange(number, kind, domain, name, bool(gone), _record(kind, text)))
            if (size := size + len(text)) >= PAGE_BYTES:
                break
        return Changes(tuple(items), items[-1].revision if items else after, more=len(rows) > len(items))

    return await catalog.read(work)


def _text(connection: sqlite3.Connection, kind: str, domain: str, name: str) -> str:
    query, values = "SELECT record FROM domain WHERE name = ?", (domain,)
    if kind == "snapshot":
        query, values = "SELECT record FROM snapshot WHERE domain = ? AND name = ?", (domain, name)  # type: ignore[assignment]
    row = connection.execute(query, values).fetchone()
    return str(row[0]) if row else ""


def _record(kind: str, text: str) -> Mapping[str, Any] | None:
    with suppress(ValueError):
        record = json.loads(text)
        if isinstance(record, dict):
            return {key: value for key, value in record.items() if key not in _LEFT_OUT[kind]}
    return None
