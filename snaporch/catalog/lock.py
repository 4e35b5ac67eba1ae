"""One operation a domain at a time, in this process or any other.

The lock is the kernel's: it ends with the process that holds it, however that ends. What the file says is only for
the message to the second one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import AsyncIterator, Callable
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


def release(fd: int) -> None:
    """Release a lock and close its file.

    Closing alone is too late: a process that is just being started has a copy of all open files until it runs its
    program.
    """
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def holder(path: Path) -> tuple[str, str]:
    """Return the id of the operation that holds a lock and what it is, as far as it has said so."""
    with suppress(OSError, ValueError):
        said = json.loads(path.read_text())
        return said["operation"], said["running"]
    return "unknown", "an operation"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_at(path: Path, fd: int) -> bool:
    """Return whether an open file is still the one of that name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


@asynccontextmanager
async def domain_lock(
    directory: Path,
    domain: str,
    operation: str,
    running: str,
    *,
    wait: bool = False,
    keep: Callable[[], bool] = lambda: True,
) -> AsyncIterator[None]:
    """Hold the domain's lock.

    Args:
        directory: where lock files are.
        domain: the domain's name.
        operation: id of the operation that wants it.
        running: what the operation is, for the error of a second one.
        wait: wait for the lock instead of raising.
        keep: asked at the end: whether there is a domain of that name, whose file stays.

    Raises:
        Busy: another operation holds it.
    """
    path = directory / f"{domain}.lock"
    fd = _open(path)
    try:
        while not _try(fd) or not _is_at(path, fd):
            if not _is_at(path, fd):  # the domain is gone, and its file with it
                os.close(fd)
                fd = _open(path)
            elif wait:
                await trio.sleep(_RETRY_SECONDS)
            else:
                raise Busy(domain, *holder(path))
        with suppress(OSError):  # on a full disk it is not said who holds it, but held it is
            os.truncate(fd, 0)
            os.pwrite(fd, json.dumps({"operation": operation, "running": running}).encode(), 0)
        try:
            yield
        finally:
            if not keep():
                with suppress(OSError):
                    path.unlink()
    finally:
        release(fd)
