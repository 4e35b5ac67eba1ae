"""A short run of scripts/proof attack: 300 requests, connections, images and lines, and nothing was wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_short_attack() -> None:
    """A hundred harmful requests of each role, while root asks: no 5xx, no escape, root is answered."""
    options = ["--requests", "100", "--connections", "100", "--images", "300", "--patience", "60"]
    command = [sys.executable, "-m", "proofs.attack", *options]
    done = subprocess.run(
        command,
        cwd=ROOT / "scripts",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "nothing was wrong" in done.stdout) == (0, True), done.stdout + done.stderr
