"""Claims: the images that an operation reads or writes while it runs, visible to all processes on one root.

The lock of a domain keeps two operations on *it* apart. Two domains may share images: one operation may merge an
image that another domain is about to start on. So an operation claims images before its last look at their readers:

- define, start, attach, create, revert and verify claim for reading the images of their disks;
- merges claim for writing the images that they write to or remove.

The claim is one transaction with the look at all other claims; the second operation finds the first one's claim, or
its result. A conflicting claim is Busy. A claim ends with its operation, in the same transaction. The claim of a
process that is gone is dropped by the next operation, unless its operation is in the journal and has not ended: an
interrupted operation keeps its images until it is recovered or given up.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping

from snaporch.drivers.local.process import boot, started
from snaporch.engine.context import Context, at_work
from snaporch.engine.run import Operation
from snaporch.errors import Busy

_UNFINISHED = "SELECT 1 FROM operation WHERE id = ? AND ended IS NULL"


def _dead(operation: str, pid: int, began: int, booted: str) -> bool:
    if pid == os.getpid() and booted == boot():
        return operation not in at_work
    return booted != boot() or started(pid) != began


def _drop_dead(connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT DISTINCT operation, pid, started, boot FROM claim").fetchall()
    for operation, *process in rows:
        if _dead(operation, *process) and connection.execute(_UNFINISHED, (operation,)).fetchone() is None:
            connection.execute("DELETE FROM claim WHERE operation = ?", (operation,))


def _take(connection: sqlite3.Connection, operation: Operation, images: Mapping[str, str], *, write: bool) -> None:
    _drop_dead(connection)
    query = "SELECT operation, running, domain FROM claim WHERE image = ? AND operation <> ? AND (written OR ?)"
    for identity in images:
        found = connection.execute(query, (identity, operation.id, write)).fetchone()
        if found is not None:
            other, running, domain = found
            raise Busy(domain, other, f"{running}, which needs {images[identity]} as it is,")
    what = f"{operation.kind} {operation.subject}".strip()
    rows = [
        (operation.id, identity, path, write, operation.who, what, os.getpid(), started(os.getpid()), boot())
        for identity, path in images.items()
    ]
    connection.executemany(
        "INSERT INTO claim VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
        "written = written OR excluded.written, pid = excluded.pid, started = excluded.started, boot = "
        "excluded.boot",
        rows,
    )


async def claim(context: Context, operation: Operation, images: Mapping[str, str], *, write: bool) -> None:
    """Claim images for an operation, more of them each time that it is called; under its lock, with which they end.

    Args:
        context: the orchestrator's.
        operation: whose claim it is.
        images: identity to path.
        write: they are written to or removed: nobody else may even read them.

    Raises:
        Busy: another operation has claimed one, and one of the two writes; nothing more is then claimed.
    """
    if images:
        await context.catalog.transact(lambda connection: _take(connection, operation, images, write=write))
