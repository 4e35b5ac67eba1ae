"""Clients' idempotency keys and their answers: in the catalog, so that they outlive a restart."""

from __future__ import annotations

import sqlite3
import time
import zlib

import attrs

from snaporch.catalog import Catalog
from snaporch.errors import InvalidInput

KEPT_SECONDS = 30 * 86_400.0  # a client that has not asked again by then has given up
LONG = 4_096  # characters of an answer, from which on it is compressed: it names all images under its disks


def check_same(key: str, first: str, request: str) -> None:
    """Refuse a key that was used for something else.

    Raises:
        InvalidInput: it was.
    """
    if first != request:
        raise InvalidInput(f"the idempotency key {key!r} was used for another request; choose another")


@attrs.frozen
class Kept:
    """What a key stands for: an operation, and what was answered when that had ended; status 0: it had not."""

    operation: str
    status: int
    answer: str


async def keep(catalog: Catalog, caller: str, key: str, request: str, operation: str) -> None:
    """Note, durably, which operation a key stands for; keys that are too old go."""

    def work(connection: sqlite3.Connection) -> None:
        now = time.time()
        connection.execute("DELETE FROM idempotency WHERE used < ?", (now - KEPT_SECONDS,))
        row = (caller, key, request, operation, now)
        connection.execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?, 0, '')", row)

    await catalog.transact(work)


async def keep_answer(catalog: Catalog, operation: str, status: int, answer: str) -> None:
    """Note, durably, what is answered to the request that has begun an operation, now that this has ended."""
    query = "UPDATE idempotency SET status = ?, answer = ? WHERE operation = ?"
    stored = zlib.compress(answer.encode()) if len(answer) > LONG else answer
    await catalog.transact(lambda connection: connection.execute(query, (status, stored, operation)))


async def kept(catalog: Catalog, caller: str, key: str, request: str) -> Kept | None:
    """Return what a key stands for, or None.

    Raises:
        InvalidInput: the key was used for something else.
    """

    def work(connection: sqlite3.Connection) -> tuple[str, str, int, str | bytes] | None:
        query = (
            "SELECT request, operation, status, answer FROM idempotency WHERE caller = ? AND key = ? AND used >= ?"
        )
        row: tuple[str, str, int, str | bytes] | None = connection.execute(
            query, (caller, key, time.time() - KEPT_SECONDS)
        ).fetchone()
        return row

    if (found := await catalog.read(work)) is None:
        return None
    said, operation, status, answer = found
    check_same(key, said, request)
    return Kept(operation, status, answer if isinstance(answer, str) else zlib.decompress(answer).decode())
