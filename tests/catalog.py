"""Roots that earlier versions have written, for tests."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
NAME = "catalog.sqlite3"


def golden_root(root: Path, version: str = "0.1") -> Path:
    """Make the root of the golden files at a place; return its catalog."""
    (root / "locks").mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(root / NAME)) as connection:
        connection.executescript((GOLDEN / version / "root.sql").read_text())
        connection.execute("PRAGMA journal_mode = WAL")
    return root / NAME


def change(path: Path, query: str, *values: object) -> None:
    """Change a catalog behind everybody's back."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(query, values)


def ask(path: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    """Ask a catalog behind everybody's back."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query, values).fetchall()
