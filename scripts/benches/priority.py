"""Measures the pause of a create with and without real-time priority, on a quiet host and on a busy one.

    scripts/bench priority [--rounds N] [--busy N] [--qemu VERSION] [--out FILE]

Creates with and without take turns on one guest, so that whatever else the host does strikes both. The busy half of
the run has programs beside it that only compute.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

import trio
from benchlib.busy import busy
from benchlib.lab import CACHE, DOMAIN, ROOT, Guest, GuestPlan, Qemu, pick, qemus, running_guest, workplace

from snaporch import CreateFlag, DomainSnapshot, open_orchestrator

PLAN = GuestPlan(ram=256 * 2**20, dirty=20, rate=200, touched=64, report=20)
Pauses = dict[bool, list[float]]


async def pauses(guest: Guest, rounds: int) -> Pauses:
    """Create and delete again, in turns with and without; return the pauses in seconds."""
    found: Pauses = {True: [], False: []}
    for number in range(rounds):
        for realtime in (True, False) if number % 2 else (False, True):
            async with open_orchestrator(guest.orchestrator.root, realtime=realtime) as orchestrator:
                record = await orchestrator.create(DOMAIN, DomainSnapshot("point"), CreateFlag.LIVE)
                found[realtime].append(record.timings.pause or 0.0)
                await orchestrator.delete(DOMAIN, "point")
    return found


async def measure(options: argparse.Namespace, place: Path, qemu: Qemu) -> list[tuple[int, Pauses]]:
    """Return how many programs computed beside it, and the pauses."""
    found = []
    async with running_guest(place, CACHE, qemu, PLAN) as guest:
        for count in (0, options.busy):
            with busy(count):
                found.append((count, await pauses(guest, options.rounds)))
    return found


def page(found: list[tuple[int, Pauses]], options: argparse.Namespace, qemu: Qemu) -> str:
    """Return what was found as Markdown."""
    lines = [
        "# Real-time priority, and the pause",
        "",
        f"`scripts/bench priority`: QEMU {qemu.version} under TCG, {os.cpu_count()} CPUs, a guest of 256 MiB that",
        f"writes 20 MB/s, {options.rounds} background creates with and {options.rounds} without, in turns. In ms.",
        "",
        "| programs that compute beside it | priority | median | 90 % | most |",
        "|---:|---|---:|---:|---:|",
    ]
    for count, by_priority in found:
        for realtime, seconds in by_priority.items():
            ordered = [second * 1000 for second in sorted(seconds)]
            figures = statistics.median(ordered), ordered[int(len(ordered) * 0.9)], ordered[-1]
            words = " | ".join(f"{figure:.1f}" for figure in figures)
            lines.append(f"| {count} | {'real-time' if realtime else 'none'} | {words} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--busy", type=int, default=3, help="programs that compute, in the second half")
    parser.add_argument("--qemu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/evidence/bench/priority.md")
    options = parser.parse_args()
    qemu = pick(qemus(CACHE), options.qemu)
    with workplace(CACHE / "lab") as place:
        text = page(trio.run(partial(measure, options, place, qemu)), options, qemu)
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
