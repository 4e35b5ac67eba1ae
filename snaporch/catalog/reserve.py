"""A small file that is there to be given up: on a full file system the journal can still be written.

What makes room there, a delete, has to be written down before it begins. So some room is kept for that, and is
given up when SQLite finds no other.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NAME = "reserve.bin"
BYTES = 2 << 20
_AMPLE = 16 * BYTES  # that are free beside it, before it is made anew


def make_reserve(root: Path) -> bool:
    """Make the reserve, if it is not there and there is ample room; return whether it is there. Never fails."""
    path = root / NAME
    with suppress(OSError):
        status = os.statvfs(root)
        if not path.exists() and status.f_bavail * status.f_frsize >= _AMPLE:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(fd, 0, BYTES)
            except OSError:
                path.unlink()
            finally:
                os.close(fd)
    return path.exists()


def give_up_reserve(root: Path) -> bool:
    """Return whether there was a reserve; it is gone now."""
    try:
        (root / NAME).unlink()
    except OSError:
        return False
    return True
