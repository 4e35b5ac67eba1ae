"""Attaches to QEMUs with command lines made at random, goes back in each, and compares what QEMU reports.

    scripts/proof command-lines [--lines 50] [--seed N] [--qemu VERSION]

Disks in many spellings (-blockdev as JSON and as key=value, the file inside or a node of its own, chains as libvirt
writes them; -drive; short forms), devices, networks and logs are put together at random. Each QEMU is started with
its CPUs stopped, attached to, taken a checkpoint of and taken back to it. What the new one reports must equal what
the first one did, or some step must have been refused while the first one was as before.

Exit status: 0 when all is so, 1 when not.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import trio
from benchlib.command_lines import Maker, is_wrong, tried
from benchlib.lab import CACHE, pick, qemus


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311 - no secret
    parser.add_argument("--qemu", default="")
    options = parser.parse_args()
    found: Counter[str] = Counter()
    wrong, known = 0, qemus(CACHE)
    for number in range(options.lines):
        chosen = pick(known, options.qemu) if options.qemu else list(known.values())[number % len(known)]
        with tempfile.TemporaryDirectory() as place:
            maker = Maker(Path(place), chosen, random.Random(options.seed + number))  # noqa: S311 - no secret
            words = maker.line()
            outcome = trio.run(tried, Path(place), chosen, words)
        found[outcome.partition(":")[0]] += 1
        if is_wrong(outcome):
            wrong += 1
            print(
                f"{options.seed + number}, QEMU {chosen.version}: {outcome}\n  {' '.join(words)}", file=sys.stderr
            )
        print(f"{number + 1} of {options.lines}: {dict(found)}", flush=True)
    print(f"seed {options.seed}: {dict(found)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.chdir("/")
    sys.exit(main())
