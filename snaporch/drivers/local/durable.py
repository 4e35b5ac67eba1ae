"""Files and directories that survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: str) -> None:
    """Make a file, or what a directory lists, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_parent(path: str) -> None:
    """Make a change of a file's directory durable."""
    sync_path(str(Path(path).parent))
