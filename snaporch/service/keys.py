"""What clients' idempotency keys stand for: in the catalog, so that they hold across a restart."""

from __future__ import annotations

import sqlite3
import time

from snaporch.catalog import Catalog
from snaporch.errors import InvalidInput

KEPT_SECONDS = 86_400.0  # whoever has not asked again by then has given up


def check_same(key: str, first: str, request: str) -> None:
    """Refuse a key that was used for something else.

    Raises:
        InvalidInput: it was.
    """
    if first != request:
        raise InvalidInput(f"the idempotency key {key!r} was used for another request; choose another")


async def keep(catalog: Catalog, caller: str, key: str, request: str, operation: str) -> None:
    """Note, durably, which operation a key stands for; keys that are too old go."""

    def work(connection: sqlite3.Connection) -> None:
        now = time.time()
        connection.execute("DELETE FROM idempotency WHERE used < ?", (now - KEPT_SECONDS,))
        row = (caller, key, request, operation, now)
        connection.execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?)", row)

    await catalog.transact(work)


async def kept(catalog: Catalog, caller: str, key: str, request: str) -> str | None:
    """Return the id of the operation that a key stands for, or None.

    Raises:
        InvalidInput: the key was used for something else.
    """

    def work(connection: sqlite3.Connection) -> tuple[str, str] | None:
        query = "SELECT request, operation FROM idempotency WHERE caller = ? AND key = ? AND used >= ?"
        row: tuple[str, str] | None = connection.execute(
            query, (caller, key, time.time() - KEPT_SECONDS)
        ).fetchone()
        return row

    if (found := await catalog.read(work)) is None:
        return None
    check_same(key, found[0], request)
    return found[1]
