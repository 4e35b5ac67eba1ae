"""The scripts in scripts/examples, as they stand, on a guest that `with-guest` boots for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snaporch.batch.plan import load_plan

EXAMPLES = Path(__file__).parents[2] / "scripts/examples"
SECONDS = 120.0

pytestmark = pytest.mark.live


def with_guest(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a guest; its directory is in `tmp_path`."""
    words = [sys.executable, str(EXAMPLES / "with-guest"), *command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SNAPORCH_")}
    environment |= {"TMPDIR": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(EXAMPLES.parents[1])
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_nightly(tmp_path: Path) -> None:
    """It rehearses, takes, prunes and reports; the plan is put where the service finds it."""
    assert load_plan(EXAMPLES / "nightly.toml").schedule is not None
    script = f"'{EXAMPLES}/nightly' && snaporch list guest && ls $SNAPORCH_ROOT/plans/reports"
    done = with_guest(tmp_path, "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert "plan nightly is well" in done.stdout
    assert "nightly: 1 done" in done.stdout
    assert "complete: 1 done" in done.stdout
    assert done.stdout.count("nightly-") >= 5  # the batch's name, its snapshot, three reports


CHECKED = """
before=$(wc -c < $GUEST_LOG)
'{examples}/before-upgrade' guest "$1" "$2"
echo "status $?"
snaporch list guest
until (($(tail -c +$before $GUEST_LOG | grep -c seq=) > 5)); do sleep 0.05; done
tail -n 2 $GUEST_LOG | head -n 1  # the last line may be half written yet
"""


@pytest.mark.parametrize(
    ("upgrade", "check", "status"),
    [("true", "grep -q seq= $GUEST_LOG", 0), ("echo ruin > $GUEST_INPUT", "false", 1)],
)
def test_before_upgrade(tmp_path: Path, upgrade: str, check: str, status: int) -> None:
    """All is well: no checkpoint is left. The guest ruins itself and the check fails: it is as it was before."""
    done = with_guest(tmp_path, "bash", "-c", CHECKED.format(examples=EXAMPLES), "-", upgrade, check)
    assert f"status {status}" in done.stdout, done.stderr
    assert ("is upgraded" in done.stdout) == (status == 0)
    assert ("taking guest back" in done.stderr) == (status == 1)
    assert "errors=0" in done.stdout.splitlines()[-1]


def test_fuzz_and_revert(tmp_path: Path) -> None:
    """The third round ruins the guest, and is found; the next begins from the same state as the first."""
    command = [str(EXAMPLES / "fuzz-and-revert"), "guest", "4", sys.executable, str(EXAMPLES / "ruin-sometimes")]
    done = with_guest(tmp_path, sys.executable, *command)
    assert done.returncode == 1, done.stderr
    assert (
        "round 3: found something\nround 4: nothing\n1 finding(s)\n  snaporch revert guest finding-3" in done.stdout
    )
