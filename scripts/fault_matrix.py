"""Kills snaporch, QEMU or both at every point of every operation, and checks that nothing is lost.

    scripts/fault-matrix [--qemu VERSION] [--kind NAME]… [--victim us|qemu|both]… [--random N --seed N] [--out FILE]

The points of an operation are found by doing it once: each call of a step of the tables, of a compensation, of the
journal, and of what a delete is made of, so a new step is in the matrix without anyone remembering. After each
kill: recovery; the operation is complete or undone; the guest runs with memory equal to disks (booted first where
QEMU was killed); each snapshot that there is verifies and is reverted to; each file has an owner. With --random
the kills are at random instants instead.

Exit status: 0 all that must hold holds, 1 not all.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio
from benchlib.faults import DYING, KINDS, VICTIMS, Bench, Kind, Wrong
from benchlib.lab import CACHE, DOMAIN, GuestPlan, Qemu, pick, qemus, running_guest, workplace

from snaporch import SnaporchError

PLAN = GuestPlan(ram=96 * 2**20, dirty=20, rate=100, touched=16, report=20)
# A kill after each point; one before the first is all that these leave out.
PLACES = ("after",)


@attrs.define
class Table:
    """What was found: by kind, by point, by victim, how it ended."""

    cells: dict[str, dict[str, dict[str, str]]] = attrs.field(factory=dict)
    wrong: list[str] = attrs.field(factory=list)
    count: int = 0

    def note(self, kind: str, point: str, victim: str, ended: str) -> None:
        """Note one kill."""
        self.cells.setdefault(kind, {}).setdefault(point, {})[victim] = ended
        self.count += 1
        print(f"{self.count:4}  {kind:18} {point:28} {victim:5} {ended}", flush=True)
        if ended.startswith("WRONG"):
            self.wrong.append(f"{kind}, {point}, {victim}: {ended}")

    def markdown(self) -> list[str]:
        """Return it as tables."""
        lines = []
        for kind, points in self.cells.items():
            ends = Counter(end.split(":")[0] for cells in points.values() for end in cells.values())
            counts = ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
            victims = [v for v in VICTIMS if any(v in cells for cells in points.values())]
            lines += [f"### {kind}: {sum(ends.values())} kills, {counts}", ""]
            lines += [f"| killed | {' | '.join(victims)} |", "| --- |" + " --- |" * len(victims)]
            lines += [f"| {p} | {' | '.join(cells.get(v, '') for v in victims)} |" for p, cells in points.items()]
            lines.append("")
        return lines


async def every_point(bench: Bench, kind: Kind, victims: Sequence[str], table: Table) -> None:
    """Kill at every point of a kind of operation."""
    points = await bench.trace(kind)
    for where in [f"before:{points[0]}", *(f"{place}:{point}" for place in PLACES for point in points)]:
        for victim in victims:
            if victim == "us" or kind.runs:
                await one(bench, kind, where, victim, table)


async def one(bench: Bench, kind: Kind, where: str, victim: str, table: Table) -> None:
    """Kill once."""
    try:
        ended = await bench.strike(kind, where, victim)
    except (Wrong, SnaporchError, trio.TooSlowError) as error:
        ended = f"WRONG: {error or 'hangs'}"
    table.note(kind.name, where.replace(":", " "), victim, ended)


async def at_random(bench: Bench, kinds: Sequence[Kind], count: int, seed: int, table: Table) -> None:
    """Kill us at random instants of random operations."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    spans: dict[str, float] = {}
    for number in range(count):
        kind = chance.choice(kinds)
        await bench.prepare(kind)
        if kind.name not in spans:
            began = time.monotonic()
            await bench.run("trace", "us", *kind.command)
            spans[kind.name] = time.monotonic() - began
            await bench.prepare(kind)
        before, delay = await bench.picture(), chance.uniform(0.3, 1.0) * spans[kind.name]
        words = [*DYING, str(bench.guest.place / "root"), DOMAIN, "never", "us", *kind.command]
        process = await trio.lowlevel.open_process(words)
        with trio.move_on_after(delay):
            await process.wait()
        process.kill()
        await process.wait()
        try:
            if kind.runs and kind.command[0] != "revert":
                await bench.runs_again()
            ended = await bench.mend(kind, before)
        except (Wrong, SnaporchError, trio.TooSlowError) as error:
            ended = f"WRONG: {error or 'hangs'}"
        table.note(kind.name, f"#{number + 1} after {delay * 1000:.3f} ms", "us", ended)


async def run(options: argparse.Namespace, qemu: Qemu, place: Path) -> Table:
    """Do what was asked for."""
    table = Table()
    kinds = [kind for kind in KINDS if not options.kind or kind.name in options.kind]
    if options.random:
        async with running_guest(place, CACHE, qemu, PLAN) as guest:
            await at_random(Bench(guest), [k for k in kinds if not k.first], options.random, options.seed, table)
        return table
    for kind in kinds:
        async with running_guest(place, CACHE, qemu, PLAN) as guest:
            await every_point(Bench(guest), kind, options.victim or VICTIMS, table)
    return table


def main() -> int:
    """Kill, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu")
    parser.add_argument("--kind", action="append", choices=[kind.name for kind in KINDS])
    parser.add_argument("--victim", action="append", choices=VICTIMS)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    qemu, began = pick(qemus(CACHE), options.qemu), time.monotonic()
    with workplace(CACHE / "lab") as place:
        table = trio.run(run, options, qemu, place)
    minutes = (time.monotonic() - began) / 60
    words = f"QEMU {qemu.version}: {table.count} kills in {minutes:.0f} minutes, {len(table.wrong)} not as promised"
    print(words, *table.wrong, sep="\n")
    if options.out:
        command = f"`scripts/fault-matrix {' '.join(sys.argv[1:])}`"
        head = ["# The fault matrix", "", f"Written by {command}.", "", words + ".", "", *table.wrong, ""]
        options.out.write_text("\n".join([*head, *table.markdown()]))
    return 1 if table.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
