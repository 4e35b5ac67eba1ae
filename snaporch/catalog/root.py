"""The directory that holds the catalog and, by default, all files."""

from __future__ import annotations

import os
from pathlib import Path

from snaporch.errors import InvalidInput
from snaporch.model.names import check_text

MOST_ROOT_BYTES = 480  # SQLite takes 512, with what it adds to the catalog's name


def default_root() -> Path:
    """Return ``$SNAPORCH_ROOT``, or the place for a user's (root: the system's) state."""
    if root := os.environ.get("SNAPORCH_ROOT"):
        return Path(root)
    if os.geteuid() == 0:
        return Path("/var/lib/snaporch")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "snaporch"


def real_root(root: Path | str | None) -> Path:
    """Return a root, `default_root` when None, by its one name: files in it have one name, however it is reached.

    Raises:
        InvalidInput: it cannot be one.
    """
    found = Path(os.path.realpath(root or default_root()))
    check_text(str(found), "root")
    if len(os.fsencode(found)) > MOST_ROOT_BYTES:
        raise InvalidInput(f"root: {found} is too long: SQLite opens a path of up to {MOST_ROOT_BYTES} bytes")
    return found
