"""Measures snaporch's creates against bare QEMU: pause, stall, time, size.

    scripts/bench pause [--quick | --targets] [--unsynced MIB] [--qemu VERSION] [--out DIR]

Writes results.json (every run), results.md (tables) and pause.png, and says whether the targets are met. See
benchlib/measure.py for how it measures and benchlib/floor.py for what it compares with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, ROOT, pick, qemus, workplace
from benchlib.measure import BACKGROUND, FILE, FLOOR, LATE, MATRIX, NOTHING, PAUSED, PRECOPY, UNSYNCED, Bench, Cell
from benchlib.plot import draw
from benchlib.report import (
    PAUSE_CELL,
    STALL_CELL,
    TARGET_RUNS,
    look_at_machine,
    markdown,
    milliseconds,
    select,
    table,
    targets,
)

GIB = 2**30
PAUSE_RATE, STALL_RATE = 50, 100  # MB/s, at which the targets are given
DISK_BYTES, DISK_BLOCK = 512 * 2**20, 4 * 2**20


def numbers(text: str) -> list[float]:
    """Read a list such as 0.5,1,2."""
    return [float(word) for word in text.split(",")]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench pause", description=__doc__.partition("\n")[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="a few minutes: fewer sizes, rates and runs")
    how.add_argument(
        "--targets", action="store_true", help=f"only the cells of the targets, {TARGET_RUNS} runs each"
    )
    parser.add_argument("--qemu", metavar="VERSION", help="7.2 or 10.0; default: the newest")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/evidence/bench", metavar="DIR", help="default: docs/evidence/bench"
    )
    parser.add_argument(
        "--work", type=Path, default=CACHE / "bench", metavar="DIR", help="for guests and memory files"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=23,
        help="rounds of the matrix are left out when time runs short (%(default)s)",
    )
    parser.add_argument("--ram", type=numbers, metavar="GIB,…", help="of the matrix")
    parser.add_argument("--dirty", type=numbers, metavar="MB/s,…", help="of the matrix")
    parser.add_argument("--runs", type=int, metavar="N", help="of each contender in a cell of the matrix")
    parser.add_argument(
        "--unsynced",
        type=int,
        default=0,
        metavar="MIB",
        help="also a guest with so much written and not synced",
    )
    parser.add_argument("--target-runs", type=int, metavar="N", help=f"default {TARGET_RUNS}, with --quick 5")
    parser.add_argument("--target-ram", type=float, default=1, metavar="GIB", help="to try the script out")
    parser.add_argument("--cache", type=Path, default=CACHE, help="what scripts/setup has made")
    return parser.parse_args()


def plan(options: argparse.Namespace, *, can_file: bool) -> list[Cell]:
    """Return what to measure: the targets first, so that none is left out for want of time."""
    runs = options.target_runs or (5 if options.quick else TARGET_RUNS)
    ram = int(options.target_ram * GIB)
    file = (FILE,) if can_file else ()
    cells = [
        Cell(PAUSE_CELL, ram, PAUSE_RATE, (BACKGROUND, FLOOR, PRECOPY), runs),
        Cell(STALL_CELL, ram, STALL_RATE, (BACKGROUND, *file, NOTHING), runs),
    ]
    sizes = options.ram or ([0.5, 1] if options.quick else [0.5, 1, 2])
    rates = options.dirty or ([0, 100] if options.quick else [0, 20, 100, 400])
    contenders = (BACKGROUND, LATE, FLOOR, PRECOPY, PAUSED, *file, NOTHING)
    rounds = options.runs or (1 if options.quick else 3)
    if not options.targets:
        matrix = itertools.product(sizes, rates)
        cells += [Cell(MATRIX, int(size * GIB), int(rate), contenders, rounds) for size, rate in matrix]
    if options.unsynced:
        pausing = (BACKGROUND, LATE, FLOOR, PRECOPY)
        cells += [Cell(UNSYNCED, int(size * GIB), 0, pausing, rounds, options.unsynced) for size in sizes]
    return cells


def disk_speed(place: Path) -> float:
    """Return the bytes a second of one long O_DIRECT write with its fsync."""
    path = place / "speed"
    block = mmap.mmap(-1, DISK_BLOCK)
    block.write(os.urandom(DISK_BLOCK))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    began = time.monotonic()
    try:
        for _ in range(DISK_BYTES // DISK_BLOCK):
            os.write(fd, block)
        os.fsync(fd)
    finally:
        os.close(fd)
        path.unlink()
    return DISK_BYTES / (time.monotonic() - began)


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, write, sum up."""
    options = arguments()
    found = qemus(options.cache)
    qemu = pick(found, options.qemu)
    can_file = int(qemu.version.partition(".")[0]) > 8  # noqa: PLR2004 - file: came with 8.2
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    with workplace(options.work) as place:
        machine = look_at_machine(qemu, disk_speed(place), shlex.join(["scripts/bench", "pause", *sys.argv[1:]]))
        bench = Bench(qemu, place, options.cache, began + options.minutes * 60)
        try:
            trio.run(partial(bench.cells, plan(options, can_file=can_file), say))
        except KeyboardInterrupt:
            say("interrupted: writing what there is")
    machine = attrs.evolve(machine, seconds=time.monotonic() - began)
    document = {"machine": attrs.asdict(machine), "runs": [attrs.asdict(run) for run in bench.runs]}
    (options.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "results.md").write_text(markdown(machine, bench.runs))
    draw_one(options, bench, machine.qemu)
    print("\n".join(table(("target", "limit", "found", "n", ""), rows(bench))))
    quiet = [run.gap for run in select(bench.runs, NOTHING)]
    if quiet:
        print(f"\nwithout any snapshot the guest itself misses up to {milliseconds(max(quiet))} ms at a time")


def rows(bench: Bench) -> list[list[str]]:
    """Return the targets as rows."""
    return [[t.name, t.wanted, t.found, t.n, t.verdict] for t in targets(bench.runs)]


def draw_one(options: argparse.Namespace, bench: Bench, qemu: str) -> None:
    """Draw the size of RAM that is nearest to that of the targets."""
    matrix = [run for run in bench.runs if run.purpose == MATRIX]
    if not matrix:
        return
    ram = min({run.ram for run in matrix}, key=lambda size: abs(size - GIB))
    version = qemu.removeprefix("QEMU emulator version ").partition(" ")[0]
    subtitle = (
        f"{ram / GIB:g} GiB guest, two qcow2 disks, QEMU {version} (TCG); medians, bars from least to greatest"
    )
    draw([run for run in matrix if run.ram == ram], options.out / "pause.png", subtitle)


if __name__ == "__main__":
    main()
