"""A few kills of the fault matrix; the whole takes longer than a suite should (docs/evidence/fault-matrix.md).

The power is cut in the operations that depend most on what is synced: merges, which write to images without syncing
their times, and streams, which remove files beside the memory file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
KILLS = 5
SECONDS = 600.0


def matrix(*words: str) -> None:
    """Run the matrix; whatever is wrong fails."""
    command = [sys.executable, "-m", "proofs.faults", *words]
    done = subprocess.run(
        command, cwd=ROOT / "scripts", capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_at_random(tmp_path: Path) -> None:
    """Kills at random instants of random operations: all is complete or undone, and the page says so."""
    record, page = tmp_path / "record", tmp_path / "page.md"
    victims = ["--victim", "us", "--victim", "power, btrfs"]
    matrix("--random", str(KILLS), *victims, "--record", str(record), "--page", str(page))
    assert len(record.read_text().splitlines()) == 2 * KILLS
    assert f"{2 * KILLS} kills: " in page.read_text()


@pytest.mark.parametrize(
    ("fs", "kind", "every"), [("ext4", "delete live, a middle", 3), ("btrfs", "create paused", 2)]
)
def test_power(fs: str, kind: str, every: int) -> None:
    """The power is cut after every so many-th step: all is complete or undone, no file is damaged or left over."""
    matrix("--victim", f"power, {fs}", "--kind", kind, "--every", str(every))
