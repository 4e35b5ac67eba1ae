"""The catalog's schema, the way from an earlier one to it, and how connections are opened.

A schema has a number (``user_version``), and each step from one to the next is an entry of `_MIGRATIONS`, never
changed once released. Before the first step the catalog is copied beside itself, as it was;
docs/reference/versions.md says how to go back. A catalog of a newer schema is refused, untouched.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from snaporch.catalog.copied import in_memory
from snaporch.catalog.lock import holder, release
from snaporch.drivers.local.durable import sync_parent, sync_path
from snaporch.errors import Busy, Refused, SnaporchError

CATALOG = "catalog.sqlite3"
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
    # The domains of an operation are rows; ids are long, and their beginnings, which name nodes and files, differ;
    # snapshots and domains have ids that are never used again. What guards of snaporch 0.1 that are still at work
    # ask for stays where it is: `$.state` of operation.record by id, and `$.active` of domain.record by name.
    """
    CREATE TABLE operation_member (
        domain TEXT NOT NULL,
        begun REAL NOT NULL,
        operation TEXT NOT NULL REFERENCES operation (id) ON DELETE CASCADE,
        PRIMARY KEY (domain, begun, operation)
    ) WITHOUT ROWID;
    INSERT INTO operation_member
        WITH RECURSIVE part (id, begun, name, rest) AS (
            SELECT id, begun, '', domain || ',' FROM operation
            UNION ALL
            SELECT id, begun, substr(rest, 1, instr(rest, ',') - 1), substr(rest, instr(rest, ',') + 1)
                FROM part WHERE rest <> ''
        )
        SELECT name, begun, id FROM part WHERE name <> '';
    CREATE INDEX operation_member_operation ON operation_member (operation);
    DROP INDEX operation_domain;
    DROP INDEX operation_group;
    DROP INDEX operation_unfinished;
    ALTER TABLE operation DROP COLUMN domain;
    CREATE INDEX operation_unfinished ON operation (begun) WHERE ended IS NULL;
    CREATE UNIQUE INDEX operation_short ON operation (substr(id, 1, 11));
    ALTER TABLE snapshot ADD COLUMN uid TEXT NOT NULL DEFAULT '';
    UPDATE snapshot SET uid = new_id();
    UPDATE snapshot SET record = json_set(record, '$.id', uid) WHERE json_valid(record);
    CREATE UNIQUE INDEX snapshot_uid ON snapshot (uid);
    UPDATE domain SET record = json_set(record, '$.uuid', new_uuid()) WHERE json_valid(record)
    """,
    # What has changed, newest last, each domain and snapshot once: see snaporch.catalog.changes. And what was
    # answered to a request with an idempotency key.
    """
    CREATE TABLE change (
        revision INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        domain TEXT NOT NULL,
        name TEXT NOT NULL,
        gone INTEGER NOT NULL,
        UNIQUE (kind, domain, name)
    );
    INSERT INTO change (kind, domain, name, gone) SELECT 'domain', name, '', 0 FROM domain ORDER BY name;
    INSERT INTO change (kind, domain, name, gone)
        SELECT 'snapshot', domain, name, 0 FROM snapshot ORDER BY id;
    CREATE TRIGGER domain_insert AFTER INSERT ON domain BEGIN
        DELETE FROM change WHERE kind = 'domain' AND domain = NEW.name AND name = '';
        INSERT INTO change (kind, domain, name, gone) VALUES ('domain', NEW.name, '', 0);
    END;
    CREATE TRIGGER domain_update AFTER UPDATE ON domain BEGIN
        DELETE FROM change WHERE kind = 'domain' AND domain = NEW.name AND name = '';
        INSERT INTO change (kind, domain, name, gone) VALUES ('domain', NEW.name, '', 0);
    END;
    CREATE TRIGGER domain_delete AFTER DELETE ON domain BEGIN
        DELETE FROM change WHERE kind = 'domain' AND domain = OLD.name AND name = '';
        INSERT INTO change (kind, domain, name, gone) VALUES ('domain', OLD.name, '', 1);
        DELETE FROM change WHERE revision < (SELECT max(revision) FROM change) - 1000000 AND gone;
    END;
    CREATE TRIGGER snapshot_insert AFTER INSERT ON snapshot BEGIN
        DELETE FROM change WHERE kind = 'snapshot' AND domain = NEW.domain AND name = NEW.name;
        INSERT INTO change (kind, domain, name, gone) VALUES ('snapshot', NEW.domain, NEW.name, 0);
    END;
    CREATE TRIGGER snapshot_update AFTER UPDATE ON snapshot BEGIN
        DELETE FROM change WHERE kind = 'snapshot' AND domain = NEW.domain AND name = NEW.name;
        INSERT INTO change (kind, domain, name, gone) VALUES ('snapshot', NEW.domain, NEW.name, 0);
    END;
    CREATE TRIGGER snapshot_delete AFTER DELETE ON snapshot BEGIN
        DELETE FROM change WHERE kind = 'snapshot' AND domain = OLD.domain AND name = OLD.name;
        INSERT INTO change (kind, domain, name, gone) VALUES ('snapshot', OLD.domain, OLD.name, 1);
        DELETE FROM change WHERE revision < (SELECT max(revision) FROM change) - 1000000 AND gone;
    END;
    ALTER TABLE idempotency ADD COLUMN status INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE idempotency ADD COLUMN answer TEXT NOT NULL DEFAULT ''
    """,
    # Chains of images, each link once: see snaporch.catalog.links.
    """
    CREATE TABLE link (
        id INTEGER PRIMARY KEY AUTOINCREMENT, below INTEGER NOT NULL, record TEXT NOT NULL, UNIQUE (below, record)
    );
    CREATE TABLE image (
        snapshot INTEGER NOT NULL REFERENCES snapshot (id) ON DELETE CASCADE,
        target TEXT NOT NULL,
        link INTEGER NOT NULL,
        PRIMARY KEY (snapshot, target)
    ) WITHOUT ROWID;
    CREATE INDEX image_link ON image (link)
    """,
)

# What batches have taken is needed for as long as it is there, by retention; and of each plan the last batches, by
# its schedule: when it ran, and took everything.
OLD_BATCHES = (
    """
    DELETE FROM batch_item WHERE (batch, position) IN (
        SELECT item.batch, item.position FROM batch_item AS item JOIN batch ON batch.id = item.batch
        WHERE batch.ended < ? AND NOT EXISTS (
            SELECT 1 FROM json_each(CASE WHEN json_valid(item.record) THEN item.record ELSE '{}' END, '$.ids')
            JOIN snapshot ON snapshot.uid = value
        ) LIMIT ?
    )
    """,
    """
    DELETE FROM batch WHERE id IN (
        SELECT id FROM batch AS old WHERE ended < ? AND NOT EXISTS (SELECT 1 FROM batch_item WHERE batch = old.id)
        AND EXISTS (
            SELECT 1 FROM batch AS later WHERE later.name = old.name AND later.begun > old.begun
            AND json_extract(later.record, '$.stage') = 'complete'
            AND (json_extract(later.record, '$.due') > 0 OR json_extract(old.record, '$.due') = 0)
        ) LIMIT ?
    )
    """,
)


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection that writes, to a catalog that is made, or brought to the present schema, where needed.

    Raises:
        SnaporchError: a newer snaporch has written it; or SQLite cannot.
        Busy: it is of an earlier schema, and a snaporch of that version is at work on it.
    """
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # SQLite would use the umask
    connection = _opened(str(path))
    try:
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        check_version(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Return a connection that only reads, beside one that writes."""
    connection = _opened(str(path))
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    connection.execute("PRAGMA query_only = ON")
    return connection


def can_be_written(path: Path) -> bool:
    """Return whether a catalog can be written to this moment: nobody else holds its lock, and there is room."""
    with suppress(sqlite3.Error), closing(_opened(f"{path.absolute().as_uri()}?mode=rw")) as connection:
        connection.execute("PRAGMA busy_timeout = 0")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA user_version = {_version(connection)}")
        connection.execute("COMMIT")
        return True
    return False


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Return a connection to a catalog whose files are not written to: their directory may be read-only, or full.

    A catalog of an earlier schema, and one that SQLite cannot read so, is read from a copy in memory.

    Raises:
        SnaporchError: there is none; a newer snaporch has written it; or it cannot be read.
    """
    if not path.exists():
        return _migrated(_opened(":memory:"))
    try:
        connection = _read_in_place(path)
        check_version(connection, path)
        if _version(connection) == len(_MIGRATIONS):
            return connection
        connection.close()
        copy = in_memory(path)
    except sqlite3.Error as error:
        raise SnaporchError(f"{path} cannot be read: {error}") from error
    return _migrated(copy)


def _read_in_place(path: Path) -> sqlite3.Connection:
    """Open a catalog where it is, or a copy of it in memory.

    SQLite needs shared memory beside a database whose `-wal` is in use, and cannot make it in a directory that is
    read-only. Without a `-wal` nothing but the database counts. With one, it counts too: to read only the database
    would be to read old data.
    """
    with suppress(sqlite3.OperationalError):
        return _tried(_opened(f"{path.absolute().as_uri()}?mode=ro"))
    wal = path.with_name(f"{path.name}-wal")
    if not wal.exists() or wal.stat().st_size == 0:
        with suppress(sqlite3.OperationalError):
            return _tried(_opened(f"{path.absolute().as_uri()}?mode=ro&immutable=1"))
    return in_memory(path)


def _tried(connection: sqlite3.Connection) -> sqlite3.Connection:
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _opened(name: str) -> sqlite3.Connection:
    return sqlite3.connect(name, isolation_level=None, check_same_thread=False, uri=name.startswith("file:"))


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a catalog of a newer schema.

    Raises:
        Refused: it is.
    """
    if (version := _version(connection)) > len(_MIGRATIONS):
        raise Refused(
            f"{path} was written by a newer snaporch (schema {version}; this one knows {len(_MIGRATIONS)}): use "
            "that one; nothing was touched"
        )


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    if _version(connection) == len(_MIGRATIONS):
        return
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        _check_nobody_works(path.parent)
        keep_copy(connection, path)
    _migrated(connection)


def _migrated(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Bring a catalog to the present schema, in one transaction."""
    connection.create_function("new_id", 0, lambda: secrets.token_hex(16))
    connection.create_function("new_uuid", 0, lambda: str(uuid.uuid4()))
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in _MIGRATIONS[_version(connection) :]:
            for statement in _statements(step):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return connection


def _statements(step: str) -> Iterator[str]:
    """Yield the statements of a step; those of a trigger are one."""
    text = ""
    for part in step.split(";"):
        text += f"{part};"
        if sqlite3.complete_statement(text):
            yield text
            text = ""


def keep_copy(connection: sqlite3.Connection, path: Path) -> Path:
    """Copy a catalog as it is beside itself, durably; a copy of that schema that is there already is kept."""
    copy = path.with_name(f"{path.name}.schema-{_version(connection)}")
    if copy.exists():
        copy = path.with_name(f"{copy.name}-{secrets.token_hex(4)}")
    new = path.with_name(f"{copy.name}.new")
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    connection.execute("VACUUM INTO ?", (str(new),))
    sync_path(str(new))
    new.rename(copy)
    sync_parent(str(copy))
    return copy


def _check_nobody_works(root: Path) -> None:
    """Refuse while another process works on the root: one of the earlier version could not go on.

    Raises:
        Busy: it does.
    """
    for lock in sorted(root.glob("locks/*.lock")):
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(lock.stem, *holder(lock)) from None
        finally:
            release(fd)


def images_behind(path: Path, root: str, above: str) -> frozenset[str]:
    """Return the images that an image may lead to, by its domain's definition; for a worker thread.

    These are the images that were in the chains of the domain's disks when it was defined, and no other domain's:
    whoever may write to an image may exchange it.

    Args:
        path: the catalog.
        root: the root.
        above: the image.
    """
    query = """
        SELECT name, json_extract(record, '$.reads'), json_extract(record, '$.definition.disks'),
            json_extract(record, '$.active'), EXISTS (SELECT 1 FROM file WHERE path = ? AND domain = name)
        FROM domain WHERE json_valid(record)
    """
    found: set[str] = set()
    with closing(connect_reader(path)) as connection:
        for name, reads, disks, active, own in connection.execute(query, (above,)):
            named = {disk["path"] for disk in json.loads(disks or "[]")}
            known = set(json.loads(reads or "[]")) or {os.path.realpath(each) for each in named}
            on = {disk["path"] for disk in json.loads(active or "{}").values()}
            if own or above in named | known | on or above.startswith(f"{root}/{name}/"):
                found |= known
    return frozenset(found)
