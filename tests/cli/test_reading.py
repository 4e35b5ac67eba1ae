"""Verbs that only read, on a root of 0.1 with an operation that was cut short, which cannot be changed just now."""

from __future__ import annotations

import fcntl
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from snaporch.cli import execute
from tests.catalog import ask, golden_root

VERBS = [("list", "web"), ("tree", "web"), ("show", "web", "live"), ("operations",)]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
@pytest.mark.parametrize("why", ["an operation of 0.1 runs", "the lock is held"])
def test_a_verb_that_reads_waits_for_nobody(
    verb: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers, and the catalog stays as it is."""
    path = golden_root(tmp_path)
    with (tmp_path / "locks" / "web.lock").open("w") as lock, closing(sqlite3.connect(path)) as other:
        if why == "the lock is held":
            other.execute("BEGIN IMMEDIATE")
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert execute(["--root", str(tmp_path), "--json", *verb]) == 0
    assert json.loads(capsys.readouterr().out)
    assert ask(path, "PRAGMA user_version") == [(5,)]
