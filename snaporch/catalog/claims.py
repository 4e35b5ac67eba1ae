"""Claims of images, as rows: who has which image, and whether it writes to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping

import attrs

from snaporch.errors import Busy

Dead = Callable[[str, int, int, str], bool]
_UNFINISHED = "SELECT 1 FROM operation WHERE id = ? AND ended IS NULL"


@attrs.frozen
class Claimer:
    """The operation that claims, and its process.

    Attributes:
        operation: its id.
        domain: the domain, or the domains, that it is about.
        running: what it does, in words.
        pid: of the process.
        started: when that process was started, in ticks since the boot; None where it is gone.
        boot: the boot's id.
    """

    operation: str
    domain: str
    running: str
    pid: int
    started: int | None
    boot: str


def take_claims(
    connection: sqlite3.Connection, claimer: Claimer, images: Mapping[str, str], *, write: bool, dead: Dead
) -> None:
    """Claim images, in one transaction with the look at all other claims; see `snaporch.operations.claims`.

    Args:
        connection: in a transaction.
        claimer: who claims.
        images: identity to path.
        write: they are written to or removed.
        dead: says whether an operation's process (its id, its start, its boot) is gone.

    Raises:
        Busy: another operation has claimed one, and one of the two writes.
    """
    _drop_dead(connection, dead)
    query = "SELECT operation, running, domain FROM claim WHERE image = ? AND operation <> ? AND (written OR ?)"
    for identity, path in images.items():
        found = connection.execute(query, (identity, claimer.operation, write)).fetchone()
        if found is not None:
            other, running, domain = found
            raise Busy(domain, other, f"{running}, which needs {path} as it is,")
    operation, *rest = attrs.astuple(claimer)
    connection.executemany(
        "INSERT INTO claim VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
        "written = written OR excluded.written, pid = excluded.pid, started = excluded.started, boot = "
        "excluded.boot",
        [(operation, identity, path, write, *rest) for identity, path in images.items()],
    )


def _drop_dead(connection: sqlite3.Connection, dead: Dead) -> None:
    rows = connection.execute("SELECT DISTINCT operation, pid, started, boot FROM claim").fetchall()
    for operation, *process in rows:
        if dead(operation, *process) and connection.execute(_UNFINISHED, (operation,)).fetchone() is None:
            connection.execute("DELETE FROM claim WHERE operation = ?", (operation,))
