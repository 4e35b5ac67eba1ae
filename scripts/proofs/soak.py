"""Proves that checkpoints hold one instant: by reverting to each, and the guest's own word.

    scripts/proof soak --count 100 --strategy background [--qemu VERSION] [--dirty 50] [--disks 2]
    scripts/proof soak --all            100 background, 20 precopy, 20 paused, on each QEMU
    scripts/proof soak --sabotage       takes them wrongly on purpose: are they found out?

The guest writes a number durably to every disk in turn, as fast as it can, reads all back and compares them with
what its memory says they must hold (snaporch/guest/workload.c). Checkpoints are taken at random moments, a few in a
row, and reverted to, the last one first; the guest goes on from each, so that they branch. One is consistent when
after the revert the guest

- comes back with a clock and a number that lie between its reports before and after the create;
- does not begin anew, and finds no error in 50 further numbers on every disk and in all of its patterned RAM.

Exit status: 0 all are consistent, 1 not all.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, DOMAIN, Guest, GuestPlan, Qemu, pick, qemus, running_guest, workplace

from snaporch import CreateFlag, CreateOptions, DomainSnapshot, SnaporchError, Strategy
from snaporch.drivers.qmp.stream import QemuStream
from snaporch.guest.report import Report, count_starts, parse, parse_errors

ALL = {Strategy.BACKGROUND: 100, Strategy.PRECOPY: 20, Strategy.PAUSED: 20}
A_DOMAIN = 25  # checkpoints; then a fresh one, which keeps chains short and the disk empty
IN_A_ROW = 3  # at most, before they are reverted to
AFTER = 2  # reports after the create: the point is surely behind the last of them
LATE_MS = (
    300  # by the guest's clock, which runs on while a busy host has no time for a guest that has just come back
)
NUMBERS = 50  # that the guest has to write and compare after a revert
SWEEP = 32  # MiB of RAM that the guest's sweep compares in a second
WORD_SECONDS = 15.0
REPORT_MS = 20


@attrs.frozen
class Job:
    """What is proved: so many checkpoints of a strategy on a QEMU."""

    qemu: Qemu
    strategy: Strategy
    count: int
    plan: GuestPlan


@attrs.frozen
class Checkpoint:
    """One that is to be reverted to; its point lies between the reports `before` and `after`."""

    name: str
    before: Report
    after: Report
    pause: float
    seconds: float


@attrs.define
class Tally:
    """What came out of a job."""

    job: Job
    consistent: int = 0
    wrong: int = 0
    pauses: list[float] = attrs.field(factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """How many were checked."""
        return self.consistent + self.wrong

    def count(self, what: str, trouble: str) -> None:
        """Note one checkpoint's result and print it."""
        if trouble:
            self.wrong += 1
        else:
            self.consistent += 1
        print(f"{self.done:4}/{self.job.count}  {what}  {trouble or 'consistent'}", flush=True)

    def summary(self) -> str:
        """Return the result in a line."""
        job = self.job
        return (
            f"{self.consistent} of {job.count} consistent: {job.strategy}, QEMU {job.qemu.version}, "
            f"{job.plan.disks} disks, {job.plan.dirty} MB/s dirtied, {self.seconds:.0f} s"
        )


async def take(guest: Guest, strategy: Strategy, chance: random.Random) -> Checkpoint:
    """Take a checkpoint at a random moment, and let the guest go on a little."""
    serial = guest.serial
    (*_, before) = await serial.more(serial.mark(), 1)
    await trio.sleep(chance.uniform(0.0, 0.15))
    name = guest.fresh_name()
    paused = strategy is Strategy.PAUSED
    options = CreateOptions() if paused else CreateOptions(strategy=strategy)
    began = time.monotonic()
    record = await guest.orchestrator.create(
        DOMAIN, DomainSnapshot(name), CreateFlag(0) if paused else CreateFlag.LIVE, options
    )
    seconds = time.monotonic() - began
    if record.strategy is not strategy:
        sys.exit(f"asked for {strategy}, got {record.strategy}: {record.reason}")
    after = (await serial.more(serial.mark(), AFTER))[AFTER - 1]
    return Checkpoint(name, before, after, record.timings.pause or 0.0, seconds)


def of_the_restored(reports: Sequence[Report]) -> Sequence[Report]:
    """Return the reports after the guest's clock went back.

    The first is left out: it may be put together from the halves of two, the old guest's and the new one's.
    """
    for place, (one, next_one) in enumerate(pairwise(reports)):
        if next_one.up_ms < one.up_ms:
            return reports[place + 2 :]
    return ()


def heard_enough(reports: Sequence[Report]) -> bool:
    """Say whether the restored guest has written and compared enough, or has found an error."""
    if not reports:
        return False
    first, last = reports[0], reports[-1]
    swept = (last.up_ms - first.up_ms) * SWEEP > last.ram_mb * 1000
    return bool(last.errors) or (swept and last.seq >= first.seq + NUMBERS)


def trouble_in(text: str, checkpoint: Checkpoint) -> str:
    """Return what is wrong with a restored guest, given what was said since before the revert."""
    reports = of_the_restored(parse(text))
    if count_starts(text):
        return "INCONSISTENT: the guest began anew"
    if reports and reports[-1].errors:
        why = parse_errors(text)
        return f"INCONSISTENT: {reports[-1].errors} errors{': ' + why[-1] if why else ''}"
    if not heard_enough(reports):
        return "INCONSISTENT: the guest is silent"
    before, after, found = checkpoint.before, checkpoint.after, reports[0]
    # By the clock: how many numbers it has written since the point depends on the disk, then and now.
    if found.seq < before.seq or not before.up_ms <= found.up_ms <= after.up_ms + LATE_MS:
        return f"INCONSISTENT: came back at {found.up_ms} ms, not between {before.up_ms} and {after.up_ms}"
    return ""


async def revert(guest: Guest, checkpoint: Checkpoint) -> tuple[str, str]:
    """Go back to a checkpoint; return what happened, and what is wrong with it."""
    serial = guest.serial
    mark = serial.mark()
    await serial.more(mark, 1)  # of the guest that is to go: what comes back shows by its clock
    began = time.monotonic()
    await guest.orchestrator.revert(DOMAIN, checkpoint.name)
    seconds = time.monotonic() - began
    with trio.move_on_after(WORD_SECONDS):
        while not heard_enough(of_the_restored(serial.reports(mark))):  # noqa: ASYNC110 - as in benchlib/lab.py
            await trio.sleep(0.01)
    text = serial.since(mark)
    restored = of_the_restored(parse(text))
    numbers = f"{restored[0].seq}…{restored[-1].seq}" if restored else "none"
    what = (
        f"{checkpoint.name:5} pause {checkpoint.pause * 1e3:6.1f} ms  create {checkpoint.seconds:.2f} s  "
        f"revert {seconds:.2f} s  numbers {numbers:13}"
    )
    return what, trouble_in(text, checkpoint)


async def one_domain(guest: Guest, tally: Tally, chance: random.Random) -> None:
    """Take and check some checkpoints on one guest; fewer, when one of them is wrong: it is not sane then."""
    job = tally.job
    wanted = min(tally.done + A_DOMAIN, job.count)
    while tally.done < wanted:
        sane = tally.wrong
        batch = min(chance.randint(1, IN_A_ROW), wanted - tally.done)
        taken = [await take(guest, job.strategy, chance) for _ in range(batch)]
        for checkpoint in reversed(taken):
            tally.pauses.append(checkpoint.pause)
            tally.count(*await revert(guest, checkpoint))
        if tally.wrong > sane:
            return


async def prove(job: Job, place: Path, cache: Path, seed: int) -> Tally:
    """Do a job."""
    tally = Tally(job)
    chance = random.Random(seed)  # noqa: S311 - no secret
    began = time.monotonic()
    while tally.done < job.count:
        async with running_guest(place, cache, job.qemu, job.plan) as guest:
            try:
                await one_domain(guest, tally, chance)
            except (SnaporchError, trio.TooSlowError) as error:
                tally.count("", f"FAILED: {error or 'the guest is silent'}")
        tally.seconds = time.monotonic() - began
    return tally


def sabotage(how: str) -> None:
    """Have background checkpoints resume the guest before the point is held."""

    async def too_early(self: QemuStream) -> None:
        events = self._events
        while how == "active" and (await events.receive()).data.get("status") == "setup":
            pass

    QemuStream.armed = too_early  # type: ignore[method-assign]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/proof soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, metavar="N", help="checkpoints (default: %(default)s)")
    parser.add_argument(
        "--strategy", type=Strategy, choices=list(ALL), default=Strategy.BACKGROUND, help="default: %(default)s"
    )
    parser.add_argument("--qemu", metavar="VERSION", help="7.2 or 10.0; default: the newest")
    parser.add_argument("--dirty", type=int, default=50, metavar="MB/s", help="default: %(default)s")
    parser.add_argument("--disks", type=int, default=2, choices=range(1, 5), help="default: %(default)s")
    parser.add_argument("--ram", type=int, default=128, metavar="MIB", help="of the guest (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="100 background, 20 precopy, 20 paused, on each QEMU")
    parser.add_argument(
        "--sabotage",
        nargs="?",
        const="at-once",
        choices=["at-once", "active"],
        help="resume the guest before the point: at once, or when the status says active",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the result there, as a Markdown table")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the moments")
    parser.add_argument(
        "--work", type=Path, default=CACHE / "soak", metavar="DIR", help="for guests and their files"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="what scripts/setup has made")
    return parser.parse_args()


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return what is to be proved."""
    plan = GuestPlan(
        ram=options.ram * 2**20,
        dirty=options.dirty,
        rate=0,
        touched=options.ram // 8,
        report=REPORT_MS,
        disks=options.disks,
    )
    found = qemus(options.cache)
    if options.all:
        return [Job(qemu, strategy, count, plan) for qemu in found.values() for strategy, count in ALL.items()]
    return [Job(pick(found, options.qemu), options.strategy, options.count, plan)]


def markdown(tallies: Sequence[Tally], seed: int) -> str:
    """Return the results as a table."""
    lines = [
        "| QEMU | strategy | consistent | of | pause ms, least to greatest |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for tally in tallies:
        job, pauses = tally.job, [pause * 1e3 for pause in tally.pauses] or [0.0]
        lines.append(
            f"| {job.qemu.version} | {job.strategy} | {tally.consistent} | {job.count} | "
            f"{min(pauses):.1f} to {max(pauses):.1f} |"
        )
    plan = tallies[0].job.plan
    what = f"{plan.disks} disks, {plan.ram >> 20} MiB, {plan.dirty} MB/s dirtied, seed {seed}"
    return (
        "\n".join([*lines, "", f"`scripts/proof soak`, {time.strftime('%Y-%m-%d', time.gmtime())}: {what}."]) + "\n"
    )


def main() -> None:
    """Prove, or find the opposite."""
    options = arguments()
    if options.sabotage:
        sabotage(options.sabotage)
    print(f"seed {options.seed}")
    tallies: list[Tally] = []
    with workplace(options.work) as place:
        for job in jobs(options):
            tallies.append(trio.run(partial(prove, job, place, options.cache, options.seed)))
            print(tallies[-1].summary(), flush=True)
    if len(tallies) > 1:
        print("", *(tally.summary() for tally in tallies), sep="\n")
    if options.report:
        options.report.write_text(markdown(tallies, options.seed))
    if any(tally.wrong for tally in tallies):
        sys.exit(1)


if __name__ == "__main__":
    main()
