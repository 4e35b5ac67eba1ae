"""The catalog: SQLite in WAL mode, one file under the root.

Rules:

1. A change that belongs together is one `Change`, written in one transaction: a snapshot is never there without the
   domain's new active images, nor an operation complete without its snapshot.
2. What is written is durable on return (synchronous=FULL): the journal is the reverter, it must not lag behind.
3. Writes run in one worker thread at a time; reads at once, on a connection of their own: what is only asked waits
   for no disk. Nothing here is ever called while a guest stands for a LIVE point.
4. Records are JSON by the one converter; columns are only what is searched for. A schema has a version
   (``user_version``) and each step from one to the next is an entry of `_MIGRATIONS`, never changed once released.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from itertools import chain
from pathlib import Path
from typing import TypeVar

import attrs
import trio

from snaporch.errors import NotFound, SnaporchError, TargetExists
from snaporch.model.convert import dumps, loads
from snaporch.model.domain import DomainRecord
from snaporch.model.record import FileRecord, OperationRecord, PastCheckpoint, SnapshotRecord
from snaporch.model.request import Strategy

T = TypeVar("T")

_BUSY_MS = 10_000  # another process may be in its transaction; they are all short
_MIGRATIONS = (
    """
    CREATE TABLE domain (name TEXT PRIMARY KEY, record TEXT NOT NULL);
    CREATE TABLE snapshot (
        id INTEGER PRIMARY KEY,
        domain TEXT NOT NULL REFERENCES domain (name),
        name TEXT NOT NULL,
        record TEXT NOT NULL,
        UNIQUE (domain, name)
    );
    CREATE TABLE operation (
        id TEXT PRIMARY KEY,
        domain TEXT NOT NULL,
        begun REAL NOT NULL,
        ended REAL,
        record TEXT NOT NULL,
        plan TEXT NOT NULL DEFAULT ''
    );
    CREATE INDEX operation_domain ON operation (domain, begun);
    CREATE TABLE file (path TEXT PRIMARY KEY, domain TEXT NOT NULL, operation TEXT NOT NULL);
    """,
    # What one operation asks takes the same time whatever else is in the catalog.
    """
    CREATE TABLE sealed (path TEXT PRIMARY KEY, record TEXT NOT NULL);
    INSERT OR REPLACE INTO sealed
        SELECT json_extract(image.value, '$.path'), image.value
        FROM snapshot, json_each(snapshot.record, '$.images') AS chain, json_each(chain.value) AS image
        ORDER BY snapshot.id;
    CREATE INDEX operation_unfinished ON operation (domain) WHERE ended IS NULL;
    CREATE INDEX snapshot_name ON snapshot (name);
    """,
    """
    CREATE TABLE batch (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, begun REAL NOT NULL, ended REAL, record TEXT NOT NULL
    );
    CREATE INDEX batch_name ON batch (name, begun);
    CREATE TABLE batch_item (
        batch TEXT NOT NULL REFERENCES batch (id),
        position INTEGER NOT NULL,
        name TEXT NOT NULL,
        snapshot TEXT NOT NULL,
        state TEXT NOT NULL,
        record TEXT NOT NULL,
        PRIMARY KEY (batch, position)
    ) WITHOUT ROWID;
    CREATE INDEX batch_item_state ON batch_item (batch, state, position);
    CREATE INDEX batch_item_name ON batch_item (name);
    """,
    # Operations on several domains have all names in one; they are few, and a domain's are looked for among them.
    """
    CREATE INDEX operation_group ON operation (ended, domain) WHERE instr(domain, ',') > 0
    """,
    # Pages of operations; and what the idempotency keys of a service's clients stand for.
    """
    CREATE INDEX operation_begun ON operation (begun, id);
    CREATE TABLE idempotency (
        caller TEXT NOT NULL,
        key TEXT NOT NULL,
        request TEXT NOT NULL,
        operation TEXT NOT NULL,
        used REAL NOT NULL,
        PRIMARY KEY (caller, key)
    ) WITHOUT ROWID;
    CREATE INDEX idempotency_used ON idempotency (used)
    """,
    # Which images operations read or write while they last: see snaporch.operations.claims.
    """
    CREATE TABLE claim (
        operation TEXT NOT NULL,
        image TEXT NOT NULL,
        path TEXT NOT NULL,
        written INTEGER NOT NULL,
        domain TEXT NOT NULL,
        running TEXT NOT NULL,
        pid INTEGER NOT NULL,
        started INTEGER NOT NULL,
        boot TEXT NOT NULL,
        PRIMARY KEY (operation, image)
    ) WITHOUT ROWID;
    CREATE INDEX claim_image ON claim (image)
    """,
)


@attrs.frozen
class Change:
    """What one transaction changes; everything has a default that changes nothing.

    Attributes:
        domains: written, new or not.
        snapshots: added.
        updated: snapshots that are there, written anew.
        dropped: (domain, name) of snapshots that go.
        operation: written, new or not.
        plan: the operation's plan as JSON, when it is new.
        files: by domain, paths of files that the operation made: snaporch's own from now on.
        gone: paths that are no longer there.
    """

    domains: tuple[DomainRecord, ...] = ()
    snapshots: tuple[SnapshotRecord, ...] = ()
    updated: tuple[SnapshotRecord, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    operation: OperationRecord | None = None
    plan: str | None = None
    files: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    gone: tuple[str, ...] = ()


def merged(changes: Sequence[Change]) -> Change:
    """Make one transaction of what several participants of one operation change."""
    return Change(
        domains=tuple(chain.from_iterable(change.domains for change in changes)),
        snapshots=tuple(chain.from_iterable(change.snapshots for change in changes)),
        files=dict(chain.from_iterable(change.files.items() for change in changes)),
    )


def _connect(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # SQLite would use the umask
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    _migrate(connection, path)
    return connection


def _connect_reader(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    connection.execute("PRAGMA query_only = ON")
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(_MIGRATIONS):
        connection.execute("ROLLBACK")
        connection.close()
        raise SnaporchError(f"{path} was written by a newer snaporch (schema {version}); use that one")
    for step in _MIGRATIONS[version:]:
        for statement in step.split(";"):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
    connection.execute("COMMIT")


def _apply(connection: sqlite3.Connection, change: Change) -> None:
    run = connection.execute
    for domain in change.domains:
        run("INSERT OR IGNORE INTO domain VALUES (?, '')", (domain.name,))
        run("UPDATE domain SET record = ? WHERE name = ?", (dumps(domain), domain.name))
    for snapshot in change.snapshots:
        run(
            "INSERT INTO snapshot (domain, name, record) VALUES (?, ?, ?)",
            (snapshot.domain, snapshot.name, dumps(snapshot)),
        )
    for record in change.updated:
        run(
            "UPDATE snapshot SET record = ? WHERE domain = ? AND name = ?",
            (dumps(record), record.domain, record.name),
        )
    seals = [(file.path, dumps(file)) for file in files_of((*change.snapshots, *change.updated))]
    connection.executemany("INSERT OR REPLACE INTO sealed VALUES (?, ?)", seals)
    connection.executemany("DELETE FROM snapshot WHERE domain = ? AND name = ?", change.dropped)
    if (op := change.operation) is not None:
        run(
            "INSERT OR IGNORE INTO operation (id, domain, begun, record) VALUES (?, ?, ?, '')",
            (op.id, op.domain, op.begun),
        )
        run("UPDATE operation SET ended = ?, record = ? WHERE id = ?", (op.ended, dumps(op), op.id))
        if op.ended is not None:
            run("DELETE FROM claim WHERE operation = ?", (op.id,))
        if change.plan is not None:
            run("UPDATE operation SET plan = ? WHERE id = ?", (change.plan, op.id))
        files = [(path, domain, op.id) for domain, paths in change.files.items() for path in paths]
        connection.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", files)
    connection.executemany("DELETE FROM file WHERE path = ?", [(path,) for path in change.gone])
    connection.executemany("DELETE FROM sealed WHERE path = ?", [(path,) for path in change.gone])


def files_of(snapshots: Iterable[SnapshotRecord]) -> Iterator[FileRecord]:
    """Yield the records of all images that snapshots are kept in."""
    return (file for record in snapshots for file in record.frozen)


def _release_claims(connection: sqlite3.Connection, operation: str) -> None:
    unfinished = "SELECT 1 FROM operation WHERE id = claim.operation AND ended IS NULL"
    query = f"DELETE FROM claim WHERE operation = ? AND NOT EXISTS ({unfinished})"  # noqa: S608 - there is no input in it
    connection.execute(query, (operation,))


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
            json_extract(record, '$.timings.pause')
        FROM snapshot WHERE domain = ? AND json_extract(record, '$.snapshot.memory') ORDER BY id DESC LIMIT ?
    """
    rows = connection.execute(query, (domain, limit)).fetchall()
    return tuple(PastCheckpoint(Strategy(strategy), *rest) for strategy, *rest in reversed(rows))


@attrs.define
class Catalog:
    """An open catalog; `open_catalog` makes one."""

    path: Path
    _connection: sqlite3.Connection
    _reader: sqlite3.Connection
    _writing: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` finds; it sees every write that has returned.

        A read waits for no lock and takes microseconds. In a thread it would wait for the interpreter's lock at
        each row, 5 ms each while others keep this one busy.
        """
        await trio.lowlevel.checkpoint()
        return work(self._reader)

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` does in one transaction: all of it, durable on return, or none.

        Raises:
            TargetExists: something of that name is there already.
            SnaporchError: SQLite cannot (disk full, locked for too long).
        """

        def transaction(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

        try:
            return await trio.to_thread.run_sync(transaction, self._connection, limiter=self._writing)
        except sqlite3.IntegrityError as error:
            raise TargetExists(f"the catalog has it already: {error}") from None
        except sqlite3.Error as error:
            raise SnaporchError(f"{self.path}: {error}") from error

    async def write(self, change: Change) -> None:
        """Apply a change; see `transact`."""
        await self.transact(lambda connection: _apply(connection, change))

    async def _rows(self, query: str, *values: object) -> list[tuple[str, ...]]:
        def work(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
            return connection.execute(query, values).fetchall()

        return await self.read(work)

    async def domains(self) -> tuple[DomainRecord, ...]:
        """Return all domains, by name."""
        rows = await self._rows("SELECT record FROM domain ORDER BY name")
        return tuple(loads(text, DomainRecord) for (text,) in rows)

    async def domain(self, name: str) -> DomainRecord:
        """Return one domain.

        Raises:
            NotFound: there is none of that name.
        """
        rows = await self._rows("SELECT record FROM domain WHERE name = ?", name)
        if not rows:
            raise NotFound(f"no domain {name!r}; `snaporch domain list` shows those that there are")
        return loads(rows[0][0], DomainRecord)

    async def drop_domain(self, name: str) -> None:
        """Forget a domain; its snapshots must be gone."""
        await self.transact(lambda connection: connection.execute("DELETE FROM domain WHERE name = ?", (name,)))

    async def snapshots(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """Return a domain's snapshots, oldest first."""
        rows = await self._rows("SELECT record FROM snapshot WHERE domain = ? ORDER BY id", domain)
        return tuple(loads(text, SnapshotRecord) for (text,) in rows)

    async def checkpoints(self, domain: str, limit: int) -> tuple[PastCheckpoint, ...]:
        """Return how the last few of a domain's snapshots went that have memory, oldest first."""
        return await self.read(lambda connection: past_checkpoints(connection, domain, limit))

    async def snapshots_after(
        self, domain: str, name: str | None, limit: int
    ) -> tuple[tuple[str, str], ...] | None:
        """Return names and records (as JSON, as they were written) of no more than `limit` of `snapshots`.

        Args:
            domain: the domain.
            name: of the one before them, or None; where there is none of that name the answer is None.
            limit: how many.
        """

        def work(connection: sqlite3.Connection) -> tuple[tuple[str, str], ...] | None:
            query = "SELECT id FROM snapshot WHERE domain = ? AND name = ?"
            last = (0,) if name is None else connection.execute(query, (domain, name)).fetchone()
            if last is None:
                return None
            query = "SELECT name, record FROM snapshot WHERE domain = ? AND id > ? ORDER BY id LIMIT ?"
            return tuple(connection.execute(query, (domain, last[0], limit)))

        return await self.read(work)

    async def snapshot(self, domain: str, name: str) -> SnapshotRecord:
        """Return one snapshot.

        Raises:
            NotFound: the domain or the snapshot is not there.
        """
        await self.domain(domain)
        rows = await self._rows("SELECT record FROM snapshot WHERE domain = ? AND name = ?", domain, name)
        if not rows:
            raise NotFound(f"{domain} has no snapshot {name!r}; `snaporch list {domain}` shows those that it has")
        return loads(rows[0][0], SnapshotRecord)

    async def sealed(self, paths: Iterable[str]) -> dict[str, FileRecord]:
        """Return the records of those of `paths` that were sealed, by path: what need not be read again."""

        def work(connection: sqlite3.Connection) -> dict[str, FileRecord]:
            query = "SELECT record FROM sealed WHERE path = ?"
            found = ((path, connection.execute(query, (path,)).fetchone()) for path in set(paths))
            return {path: loads(row[0], FileRecord) for path, row in found if row is not None}

        return await self.read(work)

    async def frozen_but(self, domains: Collection[str]) -> dict[str, list[tuple[str, str, int]]]:
        """Return, by domain, the files that snapshots of all domains but these are in.

        Each with the snapshot's name, and the inode that it had when it was sealed (0: not known).
        """
        query = """
            SELECT DISTINCT s.domain, s.name, json_extract(image.value, '$.path'),
                coalesce(json_extract(image.value, '$.identity[1]'), 0)
            FROM snapshot AS s, json_each(s.record, '$.images') AS chain, json_each(chain.value) AS image
            WHERE s.domain NOT IN (SELECT value FROM json_each(?1))
            UNION SELECT s.domain, s.name, json_extract(image.value, '$.path'), 0
            FROM snapshot AS s, json_each(s.record, '$.inside') AS image
            WHERE s.domain NOT IN (SELECT value FROM json_each(?1))
        """

        def work(connection: sqlite3.Connection) -> dict[str, list[tuple[str, str, int]]]:
            found: dict[str, list[tuple[str, str, int]]] = {}
            for domain, *row in connection.execute(query, (json.dumps(list(domains)),)):
                found.setdefault(domain, []).append((row[0], row[1], row[2]))
            return found

        return await self.read(work)

    async def release_claims(self, operation: str) -> None:
        """Give up the claims of an operation, unless it is in the journal and has not ended."""
        if await self._rows("SELECT 1 FROM claim WHERE operation = ? LIMIT 1", operation):
            await self.transact(lambda connection: _release_claims(connection, operation))

    async def own_files(self, domain: str) -> frozenset[str]:
        """Return the paths of the files that snaporch made for a domain."""
        rows = await self._rows("SELECT path FROM file WHERE domain = ?", domain)
        return frozenset(path for (path,) in rows)

    async def operations(self, domain: str | None = None) -> tuple[OperationRecord, ...]:
        """Return operations, oldest first, of one domain (those of its groups too) or all."""
        rows = await self._operations("record", "", domain)
        return tuple(loads(text, OperationRecord) for (text,) in rows)

    async def operations_after(
        self, position: tuple[float, str], limit: int, domain: str | None = None, but: Iterable[str] = ()
    ) -> tuple[OperationRecord, ...]:
        """Return no more than `limit` operations, oldest first, as `operations` does.

        Args:
            position: when the last one before them began, and its id.
            limit: how many.
            domain: of this one only.
            but: ids of operations that are left out.
        """
        query = (
            "SELECT record FROM operation WHERE (begun, id) > (?, ?) AND id NOT IN (SELECT value FROM json_each(?))"
            " AND (? IS NULL OR instr(',' || domain || ',', ',' || ? || ',') > 0) ORDER BY begun, id LIMIT ?"
        )
        rows = await self._rows(query, *position, json.dumps(list(but)), domain, domain, limit)
        return tuple(loads(text, OperationRecord) for (text,) in rows)

    async def operations_of(self, identifiers: Iterable[str]) -> dict[str, OperationRecord]:
        """Return those operations that there are, by id."""
        query = "SELECT record FROM operation WHERE id IN (SELECT value FROM json_each(?))"
        rows = await self._rows(query, json.dumps(list(identifiers)))
        return {record.id: record for record in (loads(text, OperationRecord) for (text,) in rows)}

    async def operation(self, identifier: str) -> OperationRecord | None:
        """Return one operation, or None."""
        rows = await self._rows("SELECT record FROM operation WHERE id = ?", identifier)
        return loads(rows[0][0], OperationRecord) if rows else None

    async def unfinished(self, domain: str | None = None) -> tuple[tuple[OperationRecord, str], ...]:
        """Return the operations, of one domain or all, that were cut short (or still run), with their plans."""
        rows = await self._operations("record, plan", "AND ended IS NULL", domain)
        return tuple((loads(text, OperationRecord), plan) for text, plan in rows)

    async def _operations(self, columns: str, condition: str, domain: str | None) -> list[tuple[str, ...]]:
        alone = f"SELECT {columns}, begun FROM operation WHERE"  # noqa: S608 - there is no input in it
        if domain is None:
            return [row[:-1] for row in await self._rows(f"{alone} TRUE {condition} ORDER BY begun")]
        group = f"{alone} instr(domain, ',') > 0 AND instr(',' || domain || ',', ',' || ? || ',') > 0 {condition}"
        query = f"{alone} domain = ? {condition} UNION ALL {group} ORDER BY begun"
        return [row[:-1] for row in await self._rows(query, domain, domain)]


@asynccontextmanager
async def open_catalog(path: Path) -> AsyncIterator[Catalog]:
    """Open a catalog, made or brought to the present schema where needed."""
    connection = await trio.to_thread.run_sync(_connect, path)
    with closing(connection), closing(_connect_reader(path)) as reader:
        yield Catalog(path, connection, reader)
