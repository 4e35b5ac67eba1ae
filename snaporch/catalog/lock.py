"""One operation a domain at a time, in this process or any other.

The lock is the kernel's: it ends with the process that holds it, however that ends. What the file says is only for
the message to the second one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from snaporch.errors import Busy

_RETRY_SECONDS = 0.1


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(path: Path) -> tuple[str, str]:
    """Return the id of the operation that holds a lock and what it is, as far as it has said so."""
    with suppress(OSError, ValueError):
        said = json.loads(path.read_text())
        return said["operation"], said["running"]
    return "unknown", "an operation"


@asynccontextmanager
async def domain_lock(
    directory: Path, domain: str, operation: str, running: str, *, wait: bool = False
) -> AsyncIterator[None]:
    """Hold the domain's lock.

    Args:
        directory: where lock files are.
        domain: the domain's name.
        operation: id of the operation that wants it.
        running: what that is, for whoever comes second.
        wait: wait for the lock instead of raising.

    Raises:
        Busy: another operation holds it.
    """
    path = directory / f"{domain}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try(fd):
            if not wait:
                raise Busy(domain, *holder(path))
            await trio.sleep(_RETRY_SECONDS)
        with suppress(OSError):  # on a full disk it is not said who holds it, but held it is
            os.truncate(fd, 0)
            os.pwrite(fd, json.dumps({"operation": operation, "running": running}).encode(), 0)
        yield
    finally:
        os.close(fd)
