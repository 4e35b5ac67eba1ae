"""Chains of images in the catalog: each link once, whatever snapshots are above it.

A snapshot names all images under its disks. In a line of a thousand snapshots that is half a million names, nearly
all of them again and again. So a row of `link` is one image as it was sealed, and what is below it. A snapshot's
record has the number of the first link where `images` has a list elsewhere, and rows of `image` say the same, for
what searches. Numbers are never used again. Links that nothing stands on go with the snapshots that stood there.

A record of an earlier schema has its lists in it, and stays so until it is written anew.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import attrs

from snaporch.catalog.reading import paths_in
from snaporch.errors import UnreadableRecord
from snaporch.model.convert import converter, dumps, loads
from snaporch.model.record import FileRecord, SnapshotRecord

NOTHING = 0  # below the last image of a chain; and what an empty chain begins with


@attrs.frozen
class Link:
    """An image as it was sealed, and what is below it.

    Attributes:
        text: the record, as it is stored.
        below: the number of the next link; NOTHING: there is none.
    """

    text: str
    below: int

    @property
    def file(self) -> FileRecord | None:
        """The record; None: it cannot be read."""
        try:
            return file_record(self.text)
        except UnreadableRecord:
            return None


@lru_cache(maxsize=100_000)  # about 50 MB
def file_record(text: str) -> FileRecord:
    """Return an image's record: the same one for the same text, whoever has it.

    Raises:
        UnreadableRecord: it is none that can be read.
    """
    return loads(text, FileRecord)


@attrs.frozen
class Found:
    """Rows of snapshots, and all links under them, of one moment.

    Attributes:
        rows: id, domain, name and record of each.
        links: by number.
        heads: by the snapshot's id, the first links of its chains.
    """

    rows: Sequence[tuple[int, str, str, str]]
    links: Mapping[int, Link]
    heads: Mapping[int, Sequence[int]]

    def snapshot(self, text: str) -> SnapshotRecord:
        """Return a snapshot's record with its chains.

        Raises:
            UnreadableRecord: it is none that can be read, or an image of it is none.
        """
        document, heads = _opened(text)
        if not heads:
            return loads(text, SnapshotRecord)
        images = document["images"]
        listed = {target: chain for target, chain in images.items() if target not in heads}
        record = loads(json.dumps(document | {"images": listed}), SnapshotRecord)
        chains = record.images | {target: tuple(self._chain(head)) for target, head in heads.items()}
        return attrs.evolve(record, images={target: chains[target] for target in images})

    def _chain(self, head: int) -> Iterator[FileRecord]:
        for link in self._below(head):
            file = link.file if link is not None else None
            if file is None:
                raise UnreadableRecord("an image of its chains is not in the catalog, or cannot be read there")
            yield file

    def _below(self, head: int) -> Iterator[Link | None]:
        while head != NOTHING:
            link = self.links.get(head)
            yield link
            head = link.below if link is not None else NOTHING

    def whole(self, text: str) -> str:
        """Return a snapshot's record with its chains in it, as those are that an earlier schema had."""
        document, heads = _opened(text)
        if not heads:
            return text
        chains = {
            target: [
                json.loads(link.text) for link in self._below(head) if link is not None and link.file is not None
            ]
            for target, head in heads.items()
        }
        return json.dumps(document | {"images": document["images"] | chains})

    def paths(self, number: int, text: str) -> set[str]:
        """Return all that a snapshot's record names, as far as can be seen: it may be one that cannot be read."""
        below = (link for head in self.heads.get(number, ()) for link in self._below(head) if link is not None)
        return {path for each in (text, *(link.text for link in below)) for path in paths_in(each)}


def find(connection: sqlite3.Connection, where: str, *values: object) -> Found:
    """Return the snapshots of which a clause holds, which has no input in it, in the order of their ids."""
    with _one_moment(connection):
        query = f"SELECT id, domain, name, record FROM snapshot WHERE {where} ORDER BY id"  # noqa: S608
        rows = connection.execute(query, values).fetchall()
        ids = json.dumps([row[0] for row in rows])
        heads: dict[int, list[int]] = {}
        for number, head in connection.execute(_HEADS, (ids,)):
            heads.setdefault(number, []).append(head)
        links = {number: Link(text, below) for number, text, below in connection.execute(_LINKS, (ids,))}
    return Found(rows, links, heads)


_HEADS = "SELECT snapshot, link FROM image WHERE snapshot IN (SELECT value FROM json_each(?))"
_LINKS = """
    WITH RECURSIVE needed (id) AS (
        SELECT link FROM image WHERE snapshot IN (SELECT value FROM json_each(?))
        UNION SELECT link.below FROM link JOIN needed ON link.id = needed.id
    )
    SELECT link.id, link.record, link.below FROM link JOIN needed ON link.id = needed.id
"""


def frozen(found: Found) -> dict[str, list[tuple[str, str, int]]]:
    """Return, by domain, the images that snapshots are in: the name of one of these, the path, and the inode.

    The inode is the one that it had when it was sealed; 0: that is not known. Each link is looked at once.
    """
    files: dict[str, dict[tuple[str, int], str]] = {}
    seen = set[tuple[str, int]]()
    for number, domain, name, text in found.rows:
        for each in _files_of(found, number, domain, text, seen):
            files.setdefault(domain, {}).setdefault(each, name)
    return {domain: [(name, *each) for each, name in there.items()] for domain, there in files.items()}


def _files_of(
    found: Found, number: int, domain: str, text: str, seen: set[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    try:
        document = json.loads(text)
        listed = [file for chain in document["images"].values() if not isinstance(chain, int) for file in chain]
        yield from ((file["path"], _inode(file)) for file in listed)
        yield from ((file["path"], 0) for file in document["inside"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        yield from ((path, 0) for path in found.paths(number, text))
    for head in found.heads.get(number, ()):
        link = head
        while link != NOTHING and (domain, link) not in seen and (there := found.links.get(link)) is not None:
            seen.add((domain, link))
            if (file := there.file) is not None:
                yield file.path, file.identity[1] if file.identity else 0
            else:
                yield from ((path, 0) for path in paths_in(there.text))
            link = there.below


def _inode(file: Mapping[str, Any]) -> int:
    return int((file.get("identity") or [0, 0])[1])


@contextmanager
def _one_moment(connection: sqlite3.Connection) -> Iterator[None]:
    """Have all that is read be of one moment: a link that goes meanwhile is not missed."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")  # there is nothing to be kept


def _opened(text: str) -> tuple[dict[str, Any], Mapping[str, int]]:
    """Return a record's document, and by target the first links of its chains; nothing of what has none."""
    try:
        document = json.loads(text)
        heads = {target: head for target, head in document["images"].items() if type(head) is int}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}, {}
    return document, heads


@attrs.define
class Writing:
    """Puts chains of images into the catalog, within a transaction that is open."""

    connection: sqlite3.Connection
    _numbers: dict[tuple[int, FileRecord], int] = attrs.field(factory=dict)

    def packed(self, record: SnapshotRecord) -> tuple[str, Mapping[str, int]]:
        """Return a record as it is stored, and by target the first links of its chains."""
        heads = {target: self._head(chain) for target, chain in record.images.items()}
        document = converter.unstructure(attrs.evolve(record, images={}))
        return json.dumps(document | {"images": heads}), heads

    def _head(self, chain: Sequence[FileRecord]) -> int:
        number = NOTHING
        for file in reversed(chain):
            number = self._number(number, file)
        return number

    def _number(self, below: int, file: FileRecord) -> int:
        if (known := self._numbers.get((below, file))) is not None:
            return known
        row = (below, dumps(file))
        self.connection.execute("INSERT OR IGNORE INTO link (below, record) VALUES (?, ?)", row)
        query = "SELECT id FROM link WHERE below = ? AND record = ?"
        (number,) = self.connection.execute(query, row).fetchone()
        self._numbers[below, file] = int(number)
        return int(number)

    def heads(self, domain: str, name: str) -> tuple[int, ...]:
        """Return the first links of the chains of a snapshot that is there."""
        query = "SELECT link FROM image JOIN snapshot ON snapshot = snapshot.id WHERE domain = ? AND name = ?"
        return tuple(head for (head,) in self.connection.execute(query, (domain, name)))

    def hold(self, domain: str, name: str, heads: Mapping[str, int]) -> None:
        """Note which links a snapshot stands on, in place of those of before."""
        (snapshot,) = self.connection.execute(
            "SELECT id FROM snapshot WHERE domain = ? AND name = ?", (domain, name)
        ).fetchone()
        self.connection.execute("DELETE FROM image WHERE snapshot = ?", (snapshot,))
        rows = [(snapshot, target, head) for target, head in heads.items()]
        self.connection.executemany("INSERT INTO image VALUES (?, ?, ?)", rows)

    def drop(self, heads: Iterable[int]) -> None:
        """Forget links from these on down, as far as nothing stands on them."""
        query = """
            DELETE FROM link WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM image WHERE link = ?1)
                AND NOT EXISTS (SELECT 1 FROM link WHERE below = ?1) RETURNING below
        """
        for head in heads:
            number = head
            while number != NOTHING and (row := self.connection.execute(query, (number,)).fetchone()) is not None:
                number = row[0]
        self._numbers.clear()
