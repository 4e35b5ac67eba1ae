"""What one transaction changes, and the SQL that does it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import attrs

from snaporch.catalog.links import Writing
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainRecord
from snaporch.model.names import new_id, new_uuid
from snaporch.model.record import FileRecord, OperationRecord, SnapshotRecord


@attrs.frozen
class Change:
    """What one transaction changes; everything has a default that changes nothing.

    Attributes:
        domains: written, new or not.
        snapshots: added.
        updated: snapshots that are there, written anew.
        dropped: (domain, name) of snapshots that go.
        renamed: (domain, name, new name) of snapshots that are there; done before all else.
        operation: written.
        begins: the operation is a new one.
        plan: the operation's plan as JSON, when it is new or has changed.
        files: by domain, paths of files that the operation made: snaporch's own from now on.
        gone: paths that are no longer there.
    """

    domains: tuple[DomainRecord, ...] = ()
    snapshots: tuple[SnapshotRecord, ...] = ()
    updated: tuple[SnapshotRecord, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str, str], ...] = ()
    operation: OperationRecord | None = None
    begins: bool = False
    plan: str | None = None
    files: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    gone: tuple[str, ...] = ()


def merged(changes: Sequence[Change]) -> Change:
    """Make one transaction of what several participants of one operation change."""
    return Change(
        domains=tuple(chain.from_iterable(change.domains for change in changes)),
        snapshots=tuple(chain.from_iterable(change.snapshots for change in changes)),
        updated=tuple(chain.from_iterable(change.updated for change in changes)),
        files=dict(chain.from_iterable(change.files.items() for change in changes)),
    )


def apply(connection: sqlite3.Connection, change: Change) -> None:
    """Do it, within a transaction that is open."""
    run = connection.execute
    for names in change.renamed:
        _rename(connection, *names)
    for domain in change.domains:
        run("INSERT OR IGNORE INTO domain VALUES (?, '')", (domain.name,))
        run("UPDATE domain SET record = ? WHERE name = ?", (dumps(_with_uuid(connection, domain)), domain.name))
    writing = Writing(connection)
    for snapshot in change.snapshots:
        whole = attrs.evolve(snapshot, id=snapshot.id or new_id())
        text, heads = writing.packed(whole)
        run(
            "INSERT INTO snapshot (domain, name, record, uid) VALUES (?, ?, ?, ?)",
            (snapshot.domain, snapshot.name, text, whole.id),
        )
        writing.hold(snapshot.domain, snapshot.name, heads)
    left = list[int]()
    for record in change.updated:
        text, heads = writing.packed(record)
        key = (record.domain, record.name)
        query = "UPDATE snapshot SET record = json_set(?, '$.id', uid) WHERE domain = ? AND name = ?"
        if run(query, (text, *key)).rowcount:
            left += writing.heads(*key)
            writing.hold(*key, heads)
        else:
            left += heads.values()
    seals = [(file.path, dumps(file)) for file in dict.fromkeys(files_of((*change.snapshots, *change.updated)))]
    connection.executemany("INSERT OR REPLACE INTO sealed VALUES (?, ?)", seals)
    left += [head for each in change.dropped for head in writing.heads(*each)]
    connection.executemany("DELETE FROM snapshot WHERE domain = ? AND name = ?", change.dropped)
    writing.drop(left)
    if (op := change.operation) is not None:
        _put_operation(connection, op, change.plan, begins=change.begins)
    by = op.id if op is not None else ""
    files = [(path, domain, by) for domain, paths in change.files.items() for path in paths]
    connection.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", files)
    connection.executemany("DELETE FROM file WHERE path = ?", [(path,) for path in change.gone])
    connection.executemany("DELETE FROM sealed WHERE path = ?", [(path,) for path in change.gone])


def _rename(connection: sqlite3.Connection, domain: str, name: str, new_name: str) -> None:
    """Give a snapshot's row another name; what batches have taken under the old one is found under the new one."""
    query = (
        "UPDATE batch_item SET snapshot = ?, record = json_set(record, '$.snapshot', ?) "
        "WHERE snapshot = ? AND json_valid(record) AND EXISTS (SELECT 1 "
        "FROM json_each(batch_item.record, '$.ids') JOIN snapshot ON snapshot.uid = value "
        "WHERE snapshot.domain = ? AND snapshot.name = ?)"
    )
    connection.execute(query, (new_name, new_name, name, domain, name))
    connection.execute("UPDATE snapshot SET name = ? WHERE domain = ? AND name = ?", (new_name, domain, name))
    gone = "INSERT OR REPLACE INTO change (kind, domain, name, gone) VALUES ('snapshot', ?, ?, 1)"
    connection.execute(gone, (domain, name))


def _with_uuid(connection: sqlite3.Connection, domain: DomainRecord) -> DomainRecord:
    """Return a domain's record with its id: one that an operation of snaporch 0.1 has kept in its plan has none."""
    if domain.uuid:
        return domain
    query = "SELECT json_extract(record, '$.uuid') FROM domain WHERE name = ? AND json_valid(record)"
    (known,) = connection.execute(query, (domain.name,)).fetchone() or ("",)
    return attrs.evolve(domain, uuid=known or new_uuid())


def _put_operation(connection: sqlite3.Connection, op: OperationRecord, plan: str | None, *, begins: bool) -> None:
    """Write an operation's row; it never takes the place of another one's, even of the same id."""
    known = 0
    if not begins:
        row = (op.ended, dumps(op), op.id, op.begun)
        query = "UPDATE operation SET ended = ?, record = ? WHERE id = ? AND begun = ?"
        known = connection.execute(query, row).rowcount
    if not known:
        query = "INSERT INTO operation (id, begun, ended, record) VALUES (?, ?, ?, ?)"
        connection.execute(query, (op.id, op.begun, op.ended, dumps(op)))
        rows = [(domain, op.begun, op.id) for domain in op.domains]
        connection.executemany("INSERT INTO operation_member VALUES (?, ?, ?)", rows)
    if op.ended is not None:
        plan = ""  # nobody goes on with it
        connection.execute("DELETE FROM claim WHERE operation = ?", (op.id,))
    if plan is not None:
        connection.execute("UPDATE operation SET plan = ? WHERE id = ?", (plan, op.id))


def files_of(snapshots: Iterable[SnapshotRecord]) -> Iterator[FileRecord]:
    """Yield the records of all images that snapshots are kept in."""
    return (file for record in snapshots for file in record.frozen)


def release_claims(connection: sqlite3.Connection, operation: str) -> None:
    """See `Catalog.release_claims`."""
    unfinished = "SELECT 1 FROM operation WHERE id = claim.operation AND ended IS NULL"
    query = f"DELETE FROM claim WHERE operation = ? AND NOT EXISTS ({unfinished})"  # noqa: S608 - there is no input in it
    connection.execute(query, (operation,))
