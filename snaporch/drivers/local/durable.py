"""Files and directories that survive a power cut, and whether a file was written to since."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def sync_path(path: str) -> None:
    """Make a file, or what a directory lists, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # what is in its place may be a pipe
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_parent(path: str) -> None:
    """Make a change of a file's directory durable."""
    sync_path(str(Path(path).parent))


def identity(path: str | int) -> tuple[int, ...]:
    """Return what changes whenever a file is written to: device, inode, size, mtime and ctime in nanoseconds.

    Of what a path names, or of an open file. Nothing at all for a block device: it can be written to by many ways
    that leave no trace, so it is always read.
    """
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
