"""Measures how long it takes until a guest runs again at a point, by its size: with all memory loaded, and lazily.

    scripts/bench revert [--qemu VERSION] [--ram MIB,…] [--rounds N]

The guest has filled all of its RAM with what nothing compresses. In each round the two take turns. Told are, in
milliseconds, the median and the range: from the call to the new guest's first instruction (QEMU's own RESUME), how
long no guest ran, and all of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import trio
from benchlib.lab import CACHE, DOMAIN, GuestPlan, pick, qemus, running_guest, workplace

from snaporch import CreateFlag, DomainSnapshot, RevertFlag
from snaporch.drivers.base import Machine
from snaporch.operations.revert import Reverter

MIB = 2**20
WAYS = {"all first": RevertFlag(0), "lazy": RevertFlag.LAZY}


class Started:
    """When a new guest ran first, by the host's clock."""

    def __init__(self) -> None:
        self.at = 0.0
        let_run = Reverter.let_run

        async def noted(reverter: Reverter, machine: Machine) -> None:
            await let_run(reverter, machine)
            self.at = reverter.started or 0.0

        Reverter.let_run = noted  # type: ignore[method-assign]


async def measure(place: Path, version: str | None, sizes: list[int], rounds: int) -> None:
    """Print a table."""
    started, qemu = Started(), pick(qemus(CACHE), version)
    print(f"QEMU {qemu.version}, {rounds} rounds, milliseconds: median (least to most)")
    for size in sizes:
        found = defaultdict[str, list[tuple[float, ...]]](list)
        async with running_guest(place, CACHE, qemu, GuestPlan(ram=size * MIB, dirty=0)) as guest:
            await guest.orchestrator.create(DOMAIN, DomainSnapshot("point"), CreateFlag.LIVE)
            for number in range(rounds):
                for way in list(WAYS)[:: 1 if number % 2 else -1]:
                    mark, began = guest.serial.mark(), time.time()
                    back = await guest.orchestrator.revert(DOMAIN, "point", WAYS[way])
                    if back.lazy != (way == "lazy"):
                        sys.exit(f"it was not {way}: {back.lazy_reason}")
                    times = (started.at - began, back.outage_seconds or 0.0, back.total_seconds)
                    found[way].append(tuple(1e3 * each for each in times))
                    await guest.serial.more(mark, 3)
                    if troubles := guest.serial.troubles(mark):
                        sys.exit(f"the guest is not well: {troubles[0]}")
        for way, rows in found.items():
            cells = [
                f"{what} {statistics.median(column):.0f} ({min(column):.0f} to {max(column):.0f})"
                for what, column in zip(("runs after", "outage", "all"), zip(*rows, strict=True), strict=True)
            ]
            print(f"{size} MiB, {way}: {', '.join(cells)}", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="scripts/bench revert", description=__doc__.partition("\n")[0])
    parser.add_argument("--qemu", metavar="VERSION", help="7.2 or 10.0; default: the newest")
    parser.add_argument("--ram", default="256,1024", metavar="MIB,…", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=CACHE / "bench", metavar="DIR", help="for guests and memory files"
    )
    options = parser.parse_args()
    with workplace(options.work) as place:
        trio.run(measure, place, options.qemu, [int(word) for word in options.ram.split(",")], options.rounds)


if __name__ == "__main__":
    main()
