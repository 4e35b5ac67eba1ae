"""Proves that the snapshots of a group are of one instant, by two guests that send one another numbered messages.

    scripts/proof groups --count 50 [--qemu VERSION]
    scripts/proof groups --count 10 --sabotage     one after the other, while they run: is that found out?
    scripts/proof groups --pauses 10 [--members 4]  the pause of a group, to that of its members alone

Both guests go back to the point and are paused there; then their memory says what each has sent and heard up to it.
A violation is a number that one has heard and the other has not sent. Afterwards they run on, joined by a new
cable, hear one another, find nothing wrong with their memory and disks, and the group is deleted while they run.

With --record, results are kept; --page writes all that are kept.

Exit status: 0 there are no violations (with --sabotage: there are), 1 otherwise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio
from benchlib.lab import CACHE, Qemu, pick, qemus, workplace
from benchlib.linked import Linked, linked_guests

from snaporch import CreateFlag, DomainSnapshot, RevertFlag, SnapshotRecord
from snaporch.guest.build import build_tiny
from snaporch.guest.report import parse, parse_errors
from snaporch.model.convert import dumps, loads

MESSAGES = 100  # that each hears after a revert
LIVE = CreateFlag.LIVE
MEMBER: dict[str, Any] = {
    "memory": 256 * 2**20,
    "append": "rate=200 dirty=10 ram=128 report=50",
}  # whose pause is measured


@attrs.frozen
class Proof:
    """What was found of so many points.

    Attributes:
        qemu: its version.
        date: when.
        sabotage: they were taken one after the other.
        seed: of the moments.
        points: how many were looked at.
        violations: a line for each point that has any.
        pauses: of each point the longest pause of a member, in seconds.
    """

    qemu: str
    date: str
    sabotage: bool
    seed: int
    points: int = 0
    violations: tuple[str, ...] = ()
    pauses: tuple[float, ...] = ()


@attrs.frozen
class Round:
    """Pauses in seconds: of each member alone, of each in the group, and from the first stop to the last resume."""

    alone: tuple[float, ...]
    together: tuple[float, ...]
    span: float


@attrs.frozen
class Pauses:
    """What was measured of so many groups."""

    qemu: str
    date: str
    members: int
    rounds: tuple[Round, ...]


@attrs.frozen
class Kept:
    """A line of the record: one of the two."""

    proof: Proof | None = None
    pauses: Pauses | None = None


# --- one instant --------------------------------------------------------------------------------------------------


async def take(guests: Linked, name: str, *, sabotage: bool) -> list[SnapshotRecord]:
    """Take a group, or, as a sabotage, each by itself while the others run."""
    snapshot = DomainSnapshot(name)
    if sabotage:
        return [await guests.orch.create(each, snapshot, LIVE) for each in guests.names]
    return list(await guests.orch.create_group(guests.names, snapshot, LIVE))


async def go_back(guests: Linked, name: str, *, sabotage: bool) -> None:
    """Have all guests go back to their points, paused."""
    for together in [[each] for each in guests.names] if sabotage else [guests.names]:
        await guests.orch.revert_group(together, name, RevertFlag.PAUSED)


def check_guests(guests: Linked) -> None:
    """End the program when a guest has found its memory and its disks to be of two instants."""
    for name in guests.names:
        text = guests.log(name).read_text(errors="replace")
        if parse_errors(text) or parse(text)[-1].errors:
            sys.exit(f"{name} is not well: {parse_errors(text)[-3:]}")


async def one_point(guests: Linked, proof: Proof, chance: random.Random) -> Proof:
    """Take a point, go back to it, and look."""
    name = f"g{proof.points + 1}"
    async with guests.cables():
        await guests.talk(MESSAGES)
        await trio.sleep(chance.uniform(0.0, 0.1))
        records = await take(guests, name, sabotage=proof.sabotage)
        await guests.talk()
    await go_back(guests, name, sabotage=proof.sabotage)
    found = await guests.violations()
    pause = max(record.timings.pause or 0.0 for record in records)
    told = {each: await guests.link(each) for each in guests.names}
    said = "  ".join(f"{each}: sent {link.sent}, heard {link.heard}" for each, link in told.items())
    print(f"{proof.points + 1:4}  pause {pause * 1e3:6.1f} ms  {said}  {found or 'one instant'}", flush=True)
    for each in guests.names:
        await guests.orch.resume(each)
    if not proof.sabotage:
        async with guests.cables():
            await guests.talk(MESSAGES)
        check_guests(guests)
        await guests.orch.delete_group(guests.names, name)
    return attrs.evolve(
        proof,
        points=proof.points + 1,
        violations=(*proof.violations, *([f"{name}: {'; '.join(found)}"] if found else [])),
        pauses=(*proof.pauses, pause),
    )


async def prove(place: Path, qemu: Qemu, proof: Proof, count: int) -> Proof:
    """Look at so many points; after a sabotage the guests begin anew, as they have heard what is not to be."""
    chance = random.Random(proof.seed)  # noqa: S311 - no secret
    kernel = build_tiny(CACHE / "guest")
    while proof.points < count:
        home = place / f"from-{proof.points}"
        home.mkdir()
        async with linked_guests(home, kernel, qemu.emulator, qemu.img) as guests:
            for _ in range(1 if proof.sabotage else count):
                proof = await one_point(guests, proof, chance)
    return proof


# --- pauses -------------------------------------------------------------------------------------------------------


def times(record: SnapshotRecord) -> tuple[float, float]:
    """Return when a guest was stopped and when it ran on, by its hypervisor's own events."""
    if record.timings.pause is None:
        raise AssertionError("they run")
    return record.point, record.point + record.timings.pause


async def one_round(guests: Linked, number: int) -> Round:
    """Take each alone, one after the other, and then all together; all of them run all the time."""
    alone = [await guests.orch.create(name, DomainSnapshot(f"s{number}"), LIVE) for name in guests.names]
    group = await guests.orch.create_group(guests.names, DomainSnapshot(f"g{number}"), LIVE)
    stopped, resumed = zip(*map(times, group), strict=True)
    found = Round(
        tuple(record.timings.pause or 0.0 for record in alone),
        tuple(record.timings.pause or 0.0 for record in group),
        max(resumed) - min(stopped),
    )
    row = " ".join(f"{pause * 1e3:6.1f}" for pause in (*found.alone, *found.together, found.span))
    print(f"{number + 1:4}  alone, together, span, ms: {row}", flush=True)
    await guests.orch.delete_group(guests.names, f"g{number}")
    for name in guests.names:
        await guests.orch.delete(name, f"s{number}")
    return found


async def measure(place: Path, qemu: Qemu, count: int, members: int) -> Pauses:
    """Measure so many rounds."""
    names, kernel = [f"m{number}" for number in range(members)], build_tiny(CACHE / "guest")
    async with linked_guests(place, kernel, qemu.emulator, qemu.img, names=names, **MEMBER) as guests:
        rounds = [await one_round(guests, number) for number in range(count)]
    return Pauses(qemu.version, today(), members, tuple(rounds))


# --- the page -----------------------------------------------------------------------------------------------------


def today() -> str:
    """Return the date."""
    return datetime.now(UTC).date().isoformat()


PAGE = """\
# Groups: one instant, and one pause

Made by `scripts/proof groups` (TCG, 2 cores; see the script for what is compared).

Two guests send one another a number every millisecond. At the point, when they have gone back to it and are paused,
a violation is a number that one has heard and the other has not sent. A sabotage takes the two one after the other,
while they run: so much is found when they are not of one instant.

| QEMU | taken | points | violations | longest pause of a member, ms | |
| --- | --- | ---: | ---: | --- | --- |
{proofs}

The pause of a group, against creates of the same guests alone in the same run, all of them running all the time
({memory} MiB each, `{append}`). Medians of the rounds, in ms; the ratios are medians of each round's.

| QEMU | members | rounds | slowest alone | sum of all alone | longest in the group | first stop to last resume | \
group to slowest | group to sum | |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
{pauses}

The best possible ratio to the slowest is 1. Arming is work of a member's hypervisor, which goes through all of its
RAM: with more members than cores they take turns, and four on two cores cannot do much better than 2. One taken
alone had the others' running guests beside it.
"""


def proof_row(proof: Proof) -> str:
    """Return a row of the first table."""
    pauses = [1e3 * pause for pause in proof.pauses]
    how = "one after the other (sabotage)" if proof.sabotage else "group"
    spread = f"{min(pauses):.1f} to {max(pauses):.1f}, median {statistics.median(pauses):.1f}"
    found = f"{proof.points} | {len(proof.violations)} | {spread}"
    return f"| {proof.qemu} | {how} | {found} | {proof.date}, seed {proof.seed} |"


def pauses_row(found: Pauses) -> str:
    """Return a row of the second table."""
    rounds, median = found.rounds, statistics.median
    slowest, sums = [max(each.alone) for each in rounds], [sum(each.alone) for each in rounds]
    group, spans = [max(each.together) for each in rounds], [each.span for each in rounds]
    figures = " | ".join(f"{1e3 * median(cell):.1f}" for cell in (slowest, sums, group, spans))
    ratios = [median([a / b for a, b in zip(group, alone, strict=True)]) for alone in (slowest, sums)]
    told = f"{found.members} | {len(rounds)} | {figures} | **{ratios[0]:.2f}** | {ratios[1]:.2f}"
    return f"| {found.qemu} | {told} | {found.date} |"


def page(record: Sequence[Kept]) -> str:
    """Return the page, in Markdown."""
    return PAGE.format(
        proofs="\n".join(proof_row(kept.proof) for kept in record if kept.proof),
        pauses="\n".join(pauses_row(kept.pauses) for kept in record if kept.pauses),
        memory=MEMBER["memory"] // 2**20,
        append=MEMBER["append"],
    )


# --- the program --------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/proof groups", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50, metavar="N", help="points (default: %(default)s)")
    parser.add_argument("--qemu", metavar="VERSION", help="7.2 or 10.0; default: the newest")
    parser.add_argument("--sabotage", action="store_true", help="take them one after the other, while they run")
    parser.add_argument("--pauses", type=int, default=0, metavar="N", help="measure pauses, in so many rounds")
    parser.add_argument("--members", type=int, default=4, help="of the group whose pauses are measured")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the moments")
    parser.add_argument("--work", type=Path, default=CACHE / "soak", metavar="DIR", help="for guests and files")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add the result to this file, one a line")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write all that is kept as Markdown")
    return parser.parse_args()


def keep(options: argparse.Namespace, kept: Kept) -> None:
    """Add to the record, and write the page."""
    record = [kept]
    if options.record:
        with options.record.open("a") as file:
            file.write(f"{dumps(kept)}\n")
        record = [loads(line, Kept) for line in options.record.read_text().splitlines()]
    if options.page:
        options.page.write_text(page(record))


def main() -> None:
    """Prove, or find the opposite."""
    options = arguments()
    qemu = pick(qemus(CACHE), options.qemu)
    with workplace(options.work) as place:
        if options.pauses:
            found = trio.run(measure, place, qemu, options.pauses, options.members)
            print(pauses_row(found))
            keep(options, Kept(pauses=found))
            return
        proof = Proof(qemu.version, today(), options.sabotage, options.seed)
        proof = trio.run(partial(prove, place, qemu, proof, options.count))
    print(proof_row(proof))
    keep(options, Kept(proof=proof))
    if bool(proof.violations) is not options.sabotage:
        sys.exit(1)


if __name__ == "__main__":
    main()
