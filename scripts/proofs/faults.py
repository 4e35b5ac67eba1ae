"""Kills snaporch, QEMU or both, or cuts the power, at every point of every operation; checks that nothing is lost.

    scripts/proof faults [--qemu VERSION] [--kind NAME]… [--victim us|qemu|both|…]… [--random N --seed N]
                         [--every N] [--record FILE [--minutes N]] [--page FILE]

The points of an operation are found by doing it once: each call of a step of the tables, of a compensation, of
the journal, of what a delete is made of, and of commands that are sent to QEMU in the midst of a step, so a new
step is in the matrix without anyone remembering. The kill comes after each point, which is before the next, and
once before the first: of snaporch, of QEMU, of both at once; of snaporch, the guest runs on, and then of QEMU,
before anybody recovers; or the power is cut, of a disk (with ext4, XFS or btrfs) that forgets whatever it was not
told to flush, see `snaporch.testing.outage`, which wants root. Of a group it is the QEMU of one that is killed (a
while later, those of both). After it: recovery; the operation is complete or undone, for all of a group; the guest
runs with memory equal to disks (booted first where QEMU was killed, and all is on its disks that it had said it
wrote); each snapshot verifies, those that the operation was about are reverted to; each file has an owner. With
--random the kills are at random instants of random operations instead.

With --every N it is only every N-th point of each kind.

With --record every kill is noted in a file, and those that are noted there are not done again: what takes hours can
be done in parts. --page writes what is noted.

Exit status: 0 all that must hold holds, 1 not all.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import attrs
import trio
from benchlib.faults import KINDS, POWER, VICTIMS, Bench, Kind, open_bench
from benchlib.lab import CACHE, GuestPlan, Qemu, pick, qemus, running_guest, workplace
from benchlib.member import Wrong

from snaporch import SnaporchError
from snaporch.testing.outage import powered

PLAN = GuestPlan(ram=64 * 2**20, dirty=5, rate=50, touched=16, report=20, filled=4)
RANDOM = "at random"


@attrs.frozen
class Kill:
    """One kill and how it ended.

    Attributes:
        qemu: version.
        kind: of operation.
        point: where; at random: when.
        victim: one of VICTIMS.
        ended: complete, undone, never begun, not reached, or what was wrong.
        group: kind, or RANDOM.
    """

    qemu: str
    kind: str
    point: str
    victim: str
    ended: str
    group: str

    @property
    def wrong(self) -> bool:
        """Whether something that must hold did not."""
        return self.ended.startswith("WRONG")


@attrs.define
class Record:
    """The kills that were done, in a file where one is given; and how long more may be done."""

    path: Path | None
    end: float
    kills: list[Kill] = attrs.field(factory=list)

    def load(self) -> None:
        """Read what is noted."""
        if self.path is not None and self.path.exists():
            self.kills = [Kill(**json.loads(line)) for line in self.path.read_text().splitlines()]

    def note(self, kill: Kill) -> None:
        """Note one."""
        self.kills.append(kill)
        print(f"{len(self.kills):4}  {kill.kind:24} {kill.point:28} {kill.victim:14} {kill.ended}", flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(f"{json.dumps(attrs.asdict(kill))}\n")

    def has(self, qemu: str, group: str, point: str, victim: str) -> bool:
        """Return whether a kill was done."""
        wanted = (qemu, group, point, victim)
        return any((kill.qemu, kill.group, kill.point, kill.victim) == wanted for kill in self.kills)

    @property
    def over(self) -> bool:
        """Whether there is no time for more."""
        return time.monotonic() > self.end


async def every_point(bench: Bench, kind: Kind, victims: Sequence[str], record: Record, step: int) -> None:
    """Kill at every point of a kind of operation, or at every so many-th."""
    points = await bench.trace(kind)
    for where in [f"before:{points[0]}", *(f"after:{point}" for point in points)][::step]:
        for victim in victims:
            point, version = where.replace(":", " "), bench.guest.qemu.version
            if (victim != "us" and victim not in POWER and not kind.runs) or record.has(
                version, kind.name, point, victim
            ):
                continue
            if record.over:
                return
            try:
                ended = await bench.strike(kind, where, victim)
            except (Wrong, SnaporchError, trio.TooSlowError) as error:
                ended = f"WRONG: {error or 'hangs'}"
            record.note(Kill(version, kind.name, point, victim, ended, kind.name))


async def at_random(
    bench: Bench, kinds: Sequence[Kind], victim: str, options: argparse.Namespace, record: Record
) -> None:
    """Kill us, or cut the power, at random instants of random operations."""
    version, spans, seed, count = bench.guest.qemu.version, {}, options.seed, options.random
    done = sum((kill.group, kill.qemu, kill.victim) == (RANDOM, version, victim) for kill in record.kills)
    for number in range(done + 1, count + 1):
        if record.over:
            return
        chance = random.Random(f"{seed} {number}")  # noqa: S311 - no secret
        kind = chance.choice(kinds)
        if kind.name not in spans:
            prepared, began = await bench.prepare(kind), time.monotonic()
            await bench.run("never", "us", *prepared.command)
            spans[kind.name] = time.monotonic() - began
        delay = chance.uniform(0.0, 1.0) * spans[kind.name]
        try:
            ended = await bench.strike_after(kind, victim, delay)
        except (Wrong, SnaporchError, trio.TooSlowError) as error:
            ended = f"WRONG: {error or 'hangs'}"
        record.note(Kill(version, kind.name, f"after {delay * 1e6:.0f} µs", victim, ended, RANDOM))


@asynccontextmanager
async def opened(fs: str | None, qemu: Qemu, place: Path, *, group: bool = False) -> AsyncIterator[Bench]:
    """Yield a bench with a fresh guest, a group of two if it is for one.

    Args:
        fs: they are on a file system of that kind, whose power can be cut.
        qemu: which.
        place: where their files are without that, and their logs.
        group: there is another guest.
    """
    with ExitStack() as stack:
        outlet = stack.enter_context(powered(fs)) if fs else None
        home, log, other = (outlet.place if outlet else place), place / "guest.log", place / "other.log"
        for path in (log, other):
            path.unlink(missing_ok=True)
        async with (
            running_guest(home, CACHE, qemu, PLAN, log) as guest,
            open_bench(guest, outlet, other=other if group else None) as bench,
        ):
            yield bench


async def run(options: argparse.Namespace, qemu: Qemu, place: Path, record: Record) -> None:
    """Do what was asked for."""
    kinds = [kind for kind in KINDS if not options.kind or kind.name in options.kind]
    victims: dict[str | None, list[str]] = {}
    for victim in options.victim:
        victims.setdefault(POWER.get(victim), []).append(victim)
    for fs, some in victims.items():
        if options.random:
            # Points inside the images are not among other kinds: while they are there, they bar what those want.
            chosen = [kind for kind in kinds if not kind.first and not kind.inside and not kind.group]
            async with opened(fs, qemu, place) as bench:
                for victim in some:
                    await at_random(bench, chosen, victim, options, record)
            continue
        for kind in kinds:
            if not record.over:
                async with opened(fs, qemu, place, group=kind.group) as bench:
                    await every_point(bench, kind, some, record, options.every)


def _counts(kills: Iterable[Kill]) -> str:
    ends = Counter(kill.ended.split(":")[0] for kill in kills)
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


def _table(kills: Sequence[Kill]) -> list[str]:
    """Return the kills of one kind, a point a line."""
    victims = [victim for victim in VICTIMS if any(kill.victim == victim for kill in kills)]
    lines = [f"| killed | {' | '.join(victims)} |", "| --- |" + " --- |" * len(victims)]
    for point in dict.fromkeys(kill.point for kill in kills):
        cells = {kill.victim: kill.ended for kill in kills if kill.point == point}
        lines.append(f"| {point} | {' | '.join(cells.get(victim, '') for victim in victims)} |")
    return lines


def page(kills: Sequence[Kill]) -> str:
    """Return all that is noted, as Markdown."""
    wrong = [kill for kill in kills if kill.wrong]
    lines = [
        "# The fault matrix",
        "",
        "Written by `scripts/proof faults`, which says what is done and what is checked. Each cell is a SIGKILL of",
        "snaporch (us), of QEMU, or of both, at once or QEMU a while later, or a loss of power of the disk that",
        "everything is on, with a file system of that kind, on a real guest: *complete*, *undone* or *never begun*",
        "is how the operation had ended after recovery; *not reached* is a point that this run did not come by.",
        "A group is of two guests: the QEMU of one is killed, or a while later those of both.",
        "",
        f"{len(kills)} kills: {_counts(kills)}. Wrong: {len(wrong)}.",
        "",
        *(f"- {kill.kind}, {kill.point}, {kill.victim}, QEMU {kill.qemu}: {kill.ended}" for kill in wrong),
        *([""] if wrong else []),
        "| QEMU | operation | kills | ended |",
        "| --- | --- | ---: | --- |",
    ]
    groups: dict[tuple[str, str], list[Kill]] = {}
    for kill in kills:
        groups.setdefault((kill.qemu, kill.group), []).append(kill)
    for (version, group), found in sorted(groups.items(), key=lambda item: _order(*item[0])):
        lines.append(f"| {version} | {group} | {len(found)} | {_counts(found)} |")
    for (version, group), found in sorted(groups.items(), key=lambda item: _order(*item[0])):
        table = _table_at_random(found) if group == RANDOM else _table(found)
        lines += ["", f"## {group}, QEMU {version}", "", *table]
    return "\n".join(lines) + "\n"


def _table_at_random(kills: Sequence[Kill]) -> list[str]:
    lines = [
        "| operation | killed | kills | earliest | latest | ended |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for kind, victim in dict.fromkeys((kill.kind, kill.victim) for kill in kills):
        found = [kill for kill in kills if (kill.kind, kill.victim) == (kind, victim)]
        when = sorted(int(kill.point.split()[1]) for kill in found)
        lines.append(f"| {kind} | {victim} | {len(found)} | {when[0]} µs | {when[-1]} µs | {_counts(found)} |")
    return lines


def _order(version: str, group: str) -> tuple[list[int], int]:
    names = [*(kind.name for kind in KINDS), RANDOM]
    return [-int(number) for number in version.split(".")], names.index(group)


def main() -> int:
    """Kill, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu")
    parser.add_argument("--kind", action="append", choices=[kind.name for kind in KINDS])
    parser.add_argument("--victim", action="append", choices=VICTIMS)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    if not options.victim:
        options.victim = ["us"] if options.random else VICTIMS
    qemu = pick(qemus(CACHE), options.qemu)
    record = Record(options.record, time.monotonic() + 60 * options.minutes)
    record.load()
    with workplace(CACHE / "lab") as place:
        trio.run(run, options, qemu, place, record)
    wrong = [kill for kill in record.kills if kill.wrong]
    print(f"{len(record.kills)} kills, {len(wrong)} wrong", *wrong, sep="\n")
    if options.page:
        options.page.write_text(page(record.kills))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
