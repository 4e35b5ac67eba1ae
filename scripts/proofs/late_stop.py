"""Proves that a late stop holds one instant: in time, about the end, and missed on purpose; the guest judges each.

    scripts/proof late-stop [--count 100] [--qemu VERSION] [--ram MIB]
    scripts/proof late-stop --sabotage      switches the disks whatever the status says: is it found out?

As `scripts/proof soak`, with `--late-stop`. The guest is stopped, by lot: as early as snaporch does it (4 of 10),
about the end of QEMU's set-up (3 of 10), or so late that the point is over (3 of 10).

Exit status: 0 all are consistent, 1 not all.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, DOMAIN, Guest, GuestPlan, Qemu, pick, qemus, running_guest, workplace
from proofs.soak import AFTER, REPORT_MS, Checkpoint, revert

from snaporch import CreateFlag, CreateOptions, DomainSnapshot, SnaporchError, Strategy
from snaporch.drivers.qmp.stream import QemuStream
from snaporch.operations import create, create_plan

A_DOMAIN = 20  # checkpoints; then a fresh one
# By what is intended: by how many seconds the stop comes before the foreseen end, and how often of ten.
LEADS = {"early": (0.005, 0.005), "about the end": (-0.01, 0.005), "too late": (-0.5, -0.1), "plain": (0.0, 0.0)}
SHARES = {"early": 4, "about the end": 3, "too late": 3}


@attrs.define
class Tally:
    """What came out of it, by what was intended."""

    wrong: int = 0
    done: Counter[str] = attrs.field(factory=Counter)
    missed: Counter[str] = attrs.field(factory=Counter)
    pauses: dict[str, list[float]] = attrs.field(factory=dict)

    def lines(self) -> list[str]:
        """Return it in words."""
        found = [f"{sum(self.done.values())} late stops, {self.wrong} of them bad"]
        for kind, count in sorted(self.done.items()):
            found.append(f"{kind}: {count}, of which {self.missed[kind]} missed")
        for kind, pauses in sorted(self.pauses.items()):
            found.append(f"pause {kind}: median {statistics.median(pauses) * 1e3:.1f} ms of {len(pauses)}")
        return found


async def take(guest: Guest, kind: str, chance: random.Random) -> tuple[Checkpoint, bool]:
    """Take a checkpoint; say whether the guest was stopped too late."""
    create.LEAD_SECONDS = chance.uniform(*LEADS[kind])
    (*_, before) = await guest.serial.more(guest.serial.mark(), 1)
    name = guest.fresh_name()
    began = time.monotonic()
    options = CreateOptions(strategy=Strategy.BACKGROUND, late_stop=kind != "plain")
    record = await guest.orchestrator.create(DOMAIN, DomainSnapshot(name), CreateFlag.LIVE, options)
    if kind != "plain" and record.timings.foreseen is None:
        sys.exit(f"the guest was stopped first: {record.reason}")
    after = (await guest.serial.more(guest.serial.mark(), AFTER))[AFTER - 1]
    pause, seconds = record.timings.pause or 0.0, time.monotonic() - began
    return Checkpoint(name, before, after, pause, seconds), record.timings.missed


async def one_domain(guest: Guest, tally: Tally, count: int, chance: random.Random) -> None:
    """Take, and go back to, so many; fewer when one is wrong."""
    for _ in range(2):  # what the set-up takes is known from these; all RAM is there, so that it takes some time
        await take(guest, "plain", chance)
    for _ in range(count):
        (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
        checkpoint, missed = await take(guest, kind, chance)
        tally.done[kind] += 1
        tally.missed[kind] += missed
        tally.pauses.setdefault("after a miss" if missed else "in time", []).append(checkpoint.pause)
        what, trouble = await revert(guest, checkpoint)
        how = f"{kind:13}  {'missed' if missed else 'in time':7}"
        print(f"{sum(tally.done.values()):4}  {how}  {what}  {trouble or 'consistent'}", flush=True)
        if trouble:
            tally.wrong += 1
            return


async def prove(qemu: Qemu, options: argparse.Namespace, place: Path) -> Tally:
    """Take so many late stops."""
    tally, chance = Tally(), random.Random(options.seed)  # noqa: S311 - no secret
    ram = options.ram
    plan = GuestPlan(ram=ram * 2**20, dirty=50, rate=0, touched=32, report=REPORT_MS, extra=("-mem-prealloc",))
    while (left := options.count - sum(tally.done.values())) > 0:
        async with running_guest(place, options.cache, qemu, plan) as guest:
            try:
                await one_domain(guest, tally, min(A_DOMAIN, left), chance)
            except (SnaporchError, trio.TooSlowError) as error:
                tally.wrong += 1
                tally.done["failed"] += 1
                print(f"FAILED: {error or 'the guest is silent'}", flush=True)
    return tally


def sabotage() -> None:
    """Have the disks switched whatever QEMU's status says after the stop."""

    async def unchecked(self: QemuStream, seconds: float) -> bool:
        await self.start()
        await trio.sleep(seconds)
        await self._qmp.execute("stop")
        return True

    QemuStream.start_early = unchecked  # type: ignore[method-assign]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/proof late-stop", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, metavar="N", help="late stops (default: %(default)s)")
    parser.add_argument("--qemu", metavar="VERSION", help="default: the newest; before 10.0 there are none")
    parser.add_argument("--ram", type=int, default=1024, metavar="MIB", help="of the guest (default: %(default)s)")
    parser.add_argument("--sabotage", action="store_true", help="switch the disks though it was too late")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the moments")
    parser.add_argument(
        "--work", type=Path, default=CACHE / "soak", metavar="DIR", help="for guests and their files"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="what scripts/setup has made")
    return parser.parse_args()


def main() -> None:
    """Prove, or find the opposite."""
    options = arguments()
    create_plan.WORTH_SECONDS = -1.0  # a small guest gains nothing, and shows as much
    if options.sabotage:
        sabotage()
    print(f"seed {options.seed}")
    qemu = pick(qemus(options.cache), options.qemu)
    began = time.monotonic()
    with workplace(options.work) as place:
        tally = trio.run(partial(prove, qemu, options, place))
    print(f"QEMU {qemu.version}, {options.ram} MiB, {time.monotonic() - began:.0f} s", *tally.lines(), sep="\n")
    if tally.wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
