"""Runs the tests that hold a window open, again and again, beside programs that keep the machine busy.

    scripts/proof windows [--rounds 20] [--loops 6] [--workers 8] [pytest's arguments…]

Those are the tests with the marker `window`, whose argument says what holds the window open. A test mostly waits
for its guest, or for a guard, so there are more workers than cores: the more there are, the sooner a round is over,
and the less of a core each has. It prints a table: for each test in how many rounds it passed, and the seconds of
the slowest. Exit status: 0 when all have passed in all rounds, 1 when not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import attrs
from benchlib.busy import busy

ROOT = Path(__file__).parents[2]
PYTEST = ("-m", "pytest", "-q", "-m", "window", "--dist", "loadgroup", "-p", "no:cacheprovider")


@attrs.define
class Tally:
    """How a test went: in how many rounds it passed and failed, and the seconds of the slowest."""

    passed: int = 0
    failed: int = 0
    slowest: float = 0.0


def places() -> list[str]:
    """Return the files that such tests are in: each worker collects them, in each round."""
    return sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.window" in path.read_text())


def one_round(words: list[str], tallies: dict[str, Tally]) -> None:
    """Run all of them once, and add up how they went."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        subprocess.run([sys.executable, *PYTEST, f"--junitxml={report}", *words], cwd=ROOT, check=False)
        cases = ET.parse(report).iter("testcase")  # noqa: S314 - pytest has just written it
    for case in cases:
        tally = tallies.setdefault(f"{case.get('classname')}::{case.get('name')}", Tally())
        if case.find("failure") is not None or case.find("error") is not None:
            tally.failed += 1
        else:
            tally.passed += 1
        tally.slowest = max(tally.slowest, float(case.get("time", 0.0)))


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--loops", type=int, default=6)
    parser.add_argument("--workers", type=int, default=8)
    options, words = parser.parse_known_args()
    named = any(word.startswith("tests") for word in words)
    words = ["-n", str(options.workers), *words, *([] if named else places())]
    tallies: dict[str, Tally] = {}
    began = time.monotonic()
    with busy(options.loops):
        for number in range(options.rounds):
            one_round(words, tallies)
            minutes = (time.monotonic() - began) / 60
            print(f"round {number + 1} of {options.rounds}, after {minutes:.0f} min", flush=True)
    print(f"\n{options.rounds} rounds beside {options.loops} busy loops:\n")
    print("| test | passed | failed | slowest, s |\n| --- | ---: | ---: | ---: |")
    for name, tally in sorted(tallies.items()):
        print(f"| `{name}` | {tally.passed} | {tally.failed} | {tally.slowest:.1f} |")
    return 1 if not tallies or any(tally.failed for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
