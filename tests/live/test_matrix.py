"""A few kills of the fault matrix; the whole of it takes longer than a suite should (docs/fault-matrix.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
KILLS = 5
SECONDS = 600.0


def test_matrix(tmp_path: Path) -> None:
    """Kills at random instants of random operations: all is complete or undone, and the page says so."""
    record, page = tmp_path / "record", tmp_path / "page.md"
    words = ["--random", str(KILLS), "--record", str(record), "--page", str(page)]
    command = [sys.executable, str(ROOT / "scripts/fault_matrix.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(record.read_text().splitlines()) == KILLS
    assert f"{KILLS} kills: " in page.read_text()
