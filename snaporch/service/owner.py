"""Who owns a root: one service at most, by the kernel's word; and where its socket is. No HTTP in here."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from snaporch.catalog.lock import release
from snaporch.errors import Refused

LOCK = "service.lock"
SOCKET = "service.sock"


@attrs.frozen
class Owner:
    """The service that owns a root."""

    pid: int
    socket: str


def owner(root: Path) -> Owner | None:
    """Return the service that owns a root; None where there is none, or none that takes anything yet."""
    try:
        fd = os.open(root / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with suppress(ValueError, KeyError, TypeError):
            said = json.loads(os.pread(fd, 4096, 0))
            return Owner(int(said["pid"]), str(said["socket"]))
    finally:
        release(fd)
    return None


@contextmanager
def owned(root: Path) -> Iterator[int]:
    """Own a root while the body runs; yields the lock's descriptor, for `tell`.

    Raises:
        Refused: another service owns it.
    """
    fd = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"a service owns {root} already; stop it first, or use another root") from None
        os.truncate(fd, 0)
        yield fd
    finally:
        release(fd)


def tell(lock: int, socket: str) -> None:
    """Say where the socket is, now that it is."""
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "socket": socket}).encode(), 0)
