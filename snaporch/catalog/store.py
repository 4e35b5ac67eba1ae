"""The catalog: SQLite in WAL mode, one file under the root.

Rules:

1. A change that belongs together is one `Change`, written in one transaction: a snapshot is never there without the
   domain's new active images, nor an operation complete without its snapshot.
2. What is written is durable on return (synchronous=FULL): the journal is the reverter, it must not lag behind.
3. Writes run in one worker thread at a time; reads at once, on a connection of their own: what is only asked waits
   for no disk. Nothing here is ever called while a guest is paused for a LIVE point.
4. Records are JSON by the one converter; columns are only what is searched for. See `snaporch.catalog.schema`.
5. A record that cannot be read is one record: what lists passes over it, and `unreadable` tells of it. Where it
   would be wrong to go on without it, `UnreadableRecord` is raised.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import attrs
import trio

from snaporch.catalog.links import Found, file_record, find, frozen
from snaporch.catalog.page import Page
from snaporch.catalog.reading import (
    PAGE_BYTES,
    all_records,
    failing,
    in_turns,
    past_checkpoints,
    read_record,
    readable,
)
from snaporch.catalog.reserve import give_up_reserve, make_reserve
from snaporch.catalog.schema import OLD_BATCHES, connect, connect_read_only, connect_reader
from snaporch.catalog.writing import Change, apply, release_claims
from snaporch.errors import InvalidInput, NotFound, SnaporchError, TargetExists, UnreadableRecord
from snaporch.model.domain import DomainRecord
from snaporch.model.finding import Unreadable
from snaporch.model.record import FileRecord, OperationRecord, PastCheckpoint, SnapshotRecord

T = TypeVar("T")

PRUNED_AT_ONCE = 1_000  # rows of the journal that one transaction forgets


@contextmanager
def _only_text() -> Iterator[None]:
    """Refuse a name that is not UTF-8: nothing here has it."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{error.object!r} is not UTF-8, in which names and paths are kept") from None


@attrs.define
class Catalog:
    """An open catalog; `open_catalog` makes one."""

    path: Path
    _connection: sqlite3.Connection | None
    _reader: sqlite3.Connection
    _writing: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))
    _without_reserve: bool = True  # as far as is known

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written."""
        return self._connection is None

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` finds; it sees every write that has returned.

        A read waits for no lock and takes microseconds. In a thread it would wait for the interpreter's lock at
        each row, 5 ms each while others keep this one busy.
        """
        await trio.lowlevel.checkpoint()
        with _only_text():
            try:
                return work(self._reader)
            except sqlite3.Error as error:
                raise SnaporchError(f"{self.path}: {error}") from error

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` does in one transaction: all of it, durable on return, or none.

        Raises:
            TargetExists: something of that name is there already.
            SnaporchError: SQLite cannot (disk full, locked for too long), or the catalog is open to be read only.
        """
        if (writer := self._connection) is None:
            raise SnaporchError(f"{self.path} is open to be read only")

        def or_by_the_reserve() -> T:
            if self._without_reserve:
                self._without_reserve = not make_reserve(self.path.parent)
            try:
                return _transaction(writer, work)
            except sqlite3.OperationalError as error:
                if not _is_full(error) or not give_up_reserve(self.path.parent):
                    raise
                self._without_reserve = True
                return _transaction(writer, work)

        try:
            with _only_text():
                return await trio.to_thread.run_sync(or_by_the_reserve, limiter=self._writing)
        except sqlite3.IntegrityError as error:
            raise TargetExists(f"the catalog has it already: {error}") from None
        except sqlite3.Error as error:
            raise SnaporchError(f"{self.path}: {error}") from error

    async def write(self, change: Change) -> None:
        """Apply a change; see `transact`."""
        await self.transact(lambda connection: apply(connection, change))

    async def _rows(self, query: str, *values: object) -> list[tuple[str, ...]]:
        def work(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
            return connection.execute(query, values).fetchall()

        return await self.read(work)

    # --- domains ---

    async def domains(self, after: str = "", limit: int | None = None) -> tuple[DomainRecord, ...]:
        """Return domains that can be read, by name: those after a name, and no more than `limit`."""
        query, found = "SELECT name, record FROM domain WHERE name > ? ORDER BY name LIMIT ?", list[DomainRecord]()
        while rows := await self._rows(query, after, -1 if limit is None else limit - len(found)):
            found += await in_turns(readable([(text,)], DomainRecord) for _, text in rows)
            after = rows[-1][0]
        return tuple(found)

    async def clones(self, domain: str) -> tuple[DomainRecord, ...]:
        """Return the domains that were made from snapshots of one, by name."""
        query = """
            SELECT record FROM domain
            WHERE CASE WHEN json_valid(record) THEN json_extract(record, '$.origin.domain') END = ? ORDER BY name
        """
        return readable(await self._rows(query, domain), DomainRecord)

    async def domain_names(self) -> tuple[str, ...]:
        """Return the names of all domains."""
        return tuple(name for (name,) in await self._rows("SELECT name FROM domain ORDER BY name"))

    def knows(self, domain: str) -> bool:
        """Return whether there is a domain of that name, or nobody can say."""
        try:
            return self._reader.execute("SELECT 1 FROM domain WHERE name = ?", (domain,)).fetchone() is not None
        except sqlite3.Error:
            return True

    async def domain(self, name: str) -> DomainRecord:
        """Return one domain.

        Raises:
            NotFound: there is none of that name.
            UnreadableRecord: its record cannot be read.
        """
        rows = await self._rows("SELECT record FROM domain WHERE name = ?", name)
        if not rows:
            meant = await self._meant(name, "SELECT name FROM domain WHERE true")
            raise NotFound(f"no domain {name!r}; {meant}`snaporch domain list` lists all domains")
        return read_record(rows[0][0], DomainRecord, f"the record of domain {name}")

    async def _meant(self, name: str, query: str, *values: object) -> str:
        """Return a question for a name that is like one that is not there, or an empty string."""
        few = "abs(length(name) - length(?)) <= 3 ORDER BY name LIMIT 1000"
        names = [found for (found,) in await self._rows(f"{query} AND {few}", *values, name)]
        return "".join(f"did you mean {each!r}? " for each in get_close_matches(name, names, 1))

    async def drop_domain(self, name: str) -> None:
        """Forget a domain; its snapshots must be gone."""
        await self.transact(lambda connection: connection.execute("DELETE FROM domain WHERE name = ?", (name,)))

    # --- snapshots ---

    async def snapshots(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """Return all of a domain's snapshots, oldest first.

        Raises:
            UnreadableRecord: one's record cannot be read: what depends on which image is not known then.
        """
        found = await self._find("domain = ?", domain)
        return await in_turns((_whole(found, *row),) for row in found.rows)

    async def readable_snapshots(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """Return those of a domain's snapshots that can be read, oldest first: to be shown."""
        found = await self._find("domain = ?", domain)
        return await in_turns(_readable(found, text) for *_, text in found.rows)

    async def _find(self, where: str, *values: object) -> Found:
        return await self.read(lambda connection: find(connection, where, *values))

    async def has_snapshot(self, domain: str, name: str) -> bool:
        """Return whether a domain has a snapshot of a name, though its record may be one that cannot be read."""
        return bool(await self._rows("SELECT 1 FROM snapshot WHERE domain = ? AND name = ?", domain, name))

    async def paths_of_snapshots(self, domain: str) -> frozenset[str]:
        """Return all files that a domain's snapshots are in; of records that cannot be read, all that they name."""
        found = await self._find("domain = ?", domain)
        return frozenset(path for row in found.rows for path in _paths(found, *row))

    async def newest_point(self, domain: str) -> float:
        """Return the point of a domain's newest snapshot that can be read; 0: it has none."""
        query = (
            "SELECT json_extract(record, '$.point') FROM snapshot WHERE domain = ? AND json_valid(record) "
            "ORDER BY id DESC LIMIT 1"
        )
        row = await self.read(lambda connection: connection.execute(query, (domain,)).fetchone())
        return float(row[0] or 0.0) if row else 0.0

    async def domains_with_expired(self, now: float) -> tuple[str, ...]:
        """Return the domains that have snapshots which are needed no longer at an instant, and are not pinned."""
        query = """
            SELECT DISTINCT domain FROM snapshot
            WHERE CASE WHEN json_valid(record) THEN json_extract(record, '$.expires') END <= ?
                AND NOT json_extract(record, '$.pinned')
            ORDER BY domain
        """
        return tuple(domain for (domain,) in await self._rows(query, now))

    async def checkpoints(self, domain: str, limit: int) -> tuple[PastCheckpoint, ...]:
        """Return how the last few of a domain's snapshots went that have memory, oldest first."""
        return await self.read(lambda connection: past_checkpoints(connection, domain, limit))

    async def snapshots_after(
        self, domain: str, name: str | None, limit: int
    ) -> tuple[list[tuple[str, str]], bool] | None:
        """Return names and records (as JSON, as they were written) of some of `snapshots`, and if there are more.

        Args:
            domain: the domain.
            name: of the one before them, or None; where there is none of that name the answer is None.
            limit: how many at most; fewer where these are large.
        """

        def work(connection: sqlite3.Connection) -> tuple[list[tuple[str, str]], bool] | None:
            query = "SELECT id FROM snapshot WHERE domain = ? AND name = ?"
            last = (0,) if name is None else connection.execute(query, (domain, name)).fetchone()
            if last is None:
                return None
            where = "id IN (SELECT id FROM snapshot WHERE domain = ? AND id > ? ORDER BY id LIMIT ?)"
            rows = find(connection, where, domain, last[0], limit + 1)
            found, size = list[tuple[str, str]](), 0
            for _, _, each, text in rows.rows:
                if len(found) == limit or size >= PAGE_BYTES:
                    return found, True
                found.append((each, rows.whole(text)))
                size += len(found[-1][1])
            return found, False

        return await self.read(work)

    async def snapshot(self, domain: str, name: str) -> SnapshotRecord:
        """Return one snapshot.

        Raises:
            NotFound: the domain or the snapshot is not there.
            UnreadableRecord: its record cannot be read.
        """
        await self.domain(domain)
        found = await self._find("domain = ? AND name = ?", domain, name)
        if not found.rows:
            meant = await self._meant(name, "SELECT name FROM snapshot WHERE domain = ?", domain)
            raise NotFound(
                f"{domain} has no snapshot {name!r}; {meant}`snaporch list {domain}` lists its snapshots"
            )
        return _whole(found, *found.rows[0])

    # --- files ---

    async def sealed(self, paths: Iterable[str]) -> dict[str, FileRecord]:
        """Return the records of those of `paths` that were sealed, by path: what need not be read again."""

        def work(connection: sqlite3.Connection) -> dict[str, FileRecord]:
            found = {}
            for path in set(paths):
                for (text,) in connection.execute("SELECT record FROM sealed WHERE path = ?", (path,)):
                    with suppress(UnreadableRecord):
                        found[path] = file_record(text)
            return found

        return await self.read(work)

    async def frozen_but(self, domains: Collection[str]) -> dict[str, list[tuple[str, str, int]]]:
        """Return, by domain, the files that snapshots of all domains but these are in.

        Each with the name of one of these snapshots, and the inode that it had when it was sealed (0: not known).
        """
        found = await self._find("domain NOT IN (SELECT value FROM json_each(?))", json.dumps(list(domains)))
        return frozen(found)

    async def release_claims(self, operation: str) -> None:
        """Give up the claims of an operation, unless it is in the journal and has not ended."""
        if await self._rows("SELECT 1 FROM claim WHERE operation = ? LIMIT 1", operation):
            await self.transact(lambda connection: release_claims(connection, operation))

    async def is_own(self, path: str) -> bool:
        """Return whether snaporch made a file."""
        return bool(await self._rows("SELECT 1 FROM file WHERE path = ?", path))

    async def own_files(self, domain: str) -> frozenset[str]:
        """Return the paths of the files that snaporch made for a domain."""
        rows = await self._rows("SELECT path FROM file WHERE domain = ?", domain)
        return frozenset(path for (path,) in rows)

    async def newest_files(self, limit: int) -> list[tuple[str, ...]]:
        """Return files that snaporch made last, each with its domain."""
        return await self._rows("SELECT path, domain FROM file ORDER BY rowid DESC LIMIT ?", limit)

    # --- operations ---

    async def operations(self, domain: str | None = None) -> tuple[OperationRecord, ...]:
        """Return operations that can be read, oldest first, of one domain (those of its groups too) or all."""
        if domain is None:
            rows = await self._rows("SELECT record FROM operation ORDER BY begun, id")
        else:
            query = (
                "SELECT record FROM operation_member AS member JOIN operation ON id = member.operation "
                "WHERE domain = ? ORDER BY member.begun, id"
            )
            rows = await self._rows(query, domain)
        return readable(rows, OperationRecord)

    async def operations_page(self, page: Page) -> tuple[OperationRecord, ...]:
        """Return the operations of a page that can be read, newest first."""
        query, values = page.query()
        rows = await self._rows(query, *values)
        return await in_turns(readable([row], OperationRecord) for row in rows)

    async def operations_of(self, identifiers: Iterable[str]) -> dict[str, OperationRecord]:
        """Return those operations that there are, by id."""
        query = "SELECT record FROM operation WHERE id IN (SELECT value FROM json_each(?))"
        rows = await self._rows(query, json.dumps(list(identifiers)))
        return {record.id: record for record in readable(rows, OperationRecord)}

    async def operation(self, identifier: str) -> OperationRecord | None:
        """Return one operation, or None.

        Raises:
            UnreadableRecord: its record cannot be read.
        """
        rows = await self._rows("SELECT record FROM operation WHERE id = ?", identifier)
        return read_record(rows[0][0], OperationRecord, f"the record of operation {identifier}") if rows else None

    async def unfinished(self, domain: str | None = None) -> tuple[tuple[OperationRecord, str], ...]:
        """Return the operations, of one domain or all, that were cut short (or still run), with their plans.

        Those whose records cannot be read are in `unreadable`.
        """
        query = "SELECT record, plan FROM operation WHERE ended IS NULL"
        if domain is None:
            rows = await self._rows(f"{query} ORDER BY begun")
        else:
            query += (
                " AND EXISTS (SELECT 1 FROM operation_member WHERE operation = id AND domain = ?) ORDER BY begun"
            )
            rows = await self._rows(query, domain)
        return tuple((record, plan) for text, plan in rows for record in readable([(text,)], OperationRecord))

    async def unfinished_unreadable(self, domain: str | None = None) -> tuple[Unreadable, ...]:
        """Return those of `unfinished` whose records cannot be read, once for each of their domains."""
        query = (
            "SELECT domain, id, record FROM operation JOIN operation_member ON operation = id "
            "WHERE ended IS NULL AND (? IS NULL OR EXISTS "
            "(SELECT 1 FROM operation_member WHERE operation = id AND domain = ?)) ORDER BY operation.begun"
        )
        rows = await self._rows(query, domain, domain)
        return tuple(failing("operation", OperationRecord, *rows))

    async def prune_journal(self, before: float, most: int) -> int:
        """Forget operations that ended before an instant, and the oldest of those that ended and are beyond `most`.

        And what batches that ended before it have taken, where it is not there any more.

        Returns:
            How many were forgotten; no more than `PRUNED_AT_ONCE` of each at once.
        """

        def work(connection: sqlite3.Connection) -> int:
            query = (
                "DELETE FROM operation WHERE id IN (SELECT id FROM operation WHERE ended IS NOT NULL AND "
                "(ended < ? OR begun < (SELECT begun FROM operation ORDER BY begun DESC LIMIT 1 OFFSET ?)) "
                "ORDER BY begun LIMIT ?)"
            )
            return connection.execute(query, (before, most - 1, PRUNED_AT_ONCE)).rowcount

        def of_batches(connection: sqlite3.Connection) -> int:
            return sum(connection.execute(query, (before, PRUNED_AT_ONCE)).rowcount for query in OLD_BATCHES)

        return await self.transact(work) + await self.transact(of_batches)

    # --- what cannot be read ---

    async def unreadable(self, domain: str | None = None, kind: str | None = None) -> tuple[Unreadable, ...]:
        """Return what there is of one domain, or of all, whose record cannot be read; see `Unreadable.kind`."""
        rows = await self.read(lambda connection: list(all_records(connection, domain, kind)))
        found = await in_turns(failing(*row) for row in rows)
        if kind not in {None, "snapshot"}:
            return found
        there = await self._find("?1 IS NULL OR domain = ?1", domain)
        return found + await in_turns(_failing(there, *row) for row in there.rows)


def _whole(found: Found, _: int, domain: str, name: str, text: str) -> SnapshotRecord:
    """Return a snapshot of those that were found.

    Raises:
        UnreadableRecord: it is none that can be read.
    """
    try:
        return found.snapshot(text)
    except UnreadableRecord as error:
        what = f"the record of snapshot {name} of {domain}"
        raise UnreadableRecord(f"{what} cannot be read: {error}; nothing was touched") from None


def _readable(found: Found, text: str) -> Iterator[SnapshotRecord]:
    with suppress(UnreadableRecord):
        yield found.snapshot(text)


def _paths(found: Found, number: int, _domain: str, _name: str, text: str) -> Iterable[str]:
    """Return the files that a snapshot is in; of a record that cannot be read, all that it names."""
    try:
        return found.snapshot(text).paths
    except UnreadableRecord:
        return found.paths(number, text)


def _failing(found: Found, number: int, domain: str, name: str, text: str) -> Iterator[Unreadable]:
    try:
        found.snapshot(text)
    except UnreadableRecord as error:
        yield Unreadable("snapshot", domain, name, str(error), tuple(sorted(found.paths(number, text))))


def _transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _is_full(error: sqlite3.OperationalError) -> bool:
    """Return whether SQLite may have found no room.

    Where that is for what it maps, it says that it cannot write; where it is for the file of its log, which XFS has
    no room for an inode of, that it cannot open the database.
    """
    code = getattr(error, "sqlite_errorcode", 0)  # errors that SQLite itself has not raised have none
    return code & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}


def _connect_at_any_rate(path: Path) -> sqlite3.Connection:
    """Connect, on a full file system by means of the reserve; that is made again where there is room."""
    try:
        connection = connect(path)
    except sqlite3.OperationalError as error:
        if not _is_full(error) or not give_up_reserve(path.parent):
            raise
        return connect(path)
    make_reserve(path.parent)
    return connection


@asynccontextmanager
async def open_catalog(path: Path, *, read_only: bool = False) -> AsyncIterator[Catalog]:
    """Open a catalog, made or brought to the present schema where needed.

    Args:
        path: the database.
        read_only: write nothing at all, also not where it would have to be made or brought to the present schema:
            it is then read from a copy in memory.
    """
    if read_only:
        with closing(await trio.to_thread.run_sync(connect_read_only, path)) as reader:
            yield Catalog(path, None, reader)
        return
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(closing(await trio.to_thread.run_sync(_connect_at_any_rate, path)))
            reader = stack.enter_context(closing(connect_reader(path)))
        except sqlite3.Error as error:
            raise SnaporchError(f"{path}: {error}") from error
        yield Catalog(path, connection, reader)
