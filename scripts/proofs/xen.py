"""Proves the Xen driver with a real guest under a real Xen, in dom0 of the lab; see tests/xen/in_dom0.

    scripts/proof xen points 30             30 live and 30 other checkpoints under writes, each gone back to
    scripts/proof xen points 30 'not live'  only those: all that a Xen without shadow paging can do
    scripts/proof xen crash                 snaporch, its helper, libxl's, the disks' QEMU killed at each step
    scripts/proof xen odd                   a full disk, a file that is cut short, guests that go down
    scripts/proof xen pause 5               the guest's silence beside that of `xl save -c`
    scripts/proof xen cases [CASE…]         domains that `xl` has started, groups, merges and more
    scripts/proof xen conformance [CHECK…]  the conformance suite's part for Xen's traits
    … --xen 4.20                            on that Xen; by default on 4.17

Each case is a line of JSON, shown as it comes and, with --out FILE, appended to a file; points that the file has
already are not taken again. After --seconds the case that is then under way is the last. At the end a line says
how many were right. Exit status: 0 all were right, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.xen_lab.__main__ import build_lab, home_of, qemu
from scripts.xen_lab.image import ROOT
from scripts.xen_lab.machine import Lab
from scripts.xen_lab.project import CODE, PYTHON, put_project

HOURS = 6 * 3600.0
KINDS = ("live", "not live")


def lines(lab: Lab, command: str) -> Iterator[str]:
    """Yield what a command says in dom0, by lines."""
    rest = ""
    for each in lab.follow(command, HOURS):
        if isinstance(each, int):
            if each:
                yield f"exit status {each}"
            break
        *whole, rest = (rest + each).split("\n")
        yield from whole
    if rest:
        yield rest


def case_of(line: str) -> dict[str, Any] | None:
    """Return what a case came to, where a line says that."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return dict(found) if isinstance(found, dict) else None


def left(wanted: list[str], xen: str, out: Path | None) -> list[str]:
    """Return the arguments of `points` without those that a file has: a count, and perhaps kinds."""
    count, *kinds = wanted
    text = out.read_text() if out is not None and out.exists() else ""
    cases = [case for line in text.splitlines() if (case := case_of(line)) is not None and case["xen"] == xen]
    taken = [sum(case.get("kind") == kind for case in cases) for kind in kinds or KINDS]
    return [str(max(0, int(count) - min(taken))), *kinds]


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/proof xen", description=__doc__)
    parser.add_argument("what", choices=["points", "crash", "odd", "pause", "cases", "conformance"])
    parser.add_argument("more", nargs="*")
    parser.add_argument("--xen", default="4.17")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=HOURS)
    arguments = parser.parse_args()
    build_lab(arguments.xen)
    end = time.monotonic() + arguments.seconds
    if arguments.what == "points":
        arguments.more = left(arguments.more, arguments.xen, arguments.out)
    program, *words = ["proof", arguments.what, *arguments.more]
    if arguments.what in {"cases", "conformance"}:
        program, *words = words
    command = f"cd /{CODE} && {PYTHON} -m tests.xen.in_dom0.{program} {shlex.join(words)} 2>&1"
    right = wrong = 0
    with tempfile.TemporaryDirectory(prefix="xen-lab-", dir=ROOT / ".cache") as place:
        lab = Lab(home_of(arguments.xen), Path(place), qemu())
        try:
            lab.resume()
            put_project(lab)
            for line in lines(lab, command):
                case = case_of(line)
                if case is not None:
                    case |= {"xen": arguments.xen, "load": round(os.getloadavg()[0], 1)}
                    right, wrong = right + bool(case.get("right")), wrong + (not case.get("right"))
                text = json.dumps(case) if case is not None else line
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
                if case is not None and arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.write(text + "\n")
                if case is not None and time.monotonic() > end:
                    break
        finally:
            lab.stop()
    sys.stdout.write(f"{right} right, {wrong} wrong\n")
    return int(bool(wrong) or not right)


if __name__ == "__main__":
    sys.exit(main())
