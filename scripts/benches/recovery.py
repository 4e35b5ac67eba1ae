"""Measures the guard of the pause and what the journal costs.

    scripts/bench recovery [--qemu VERSION] [--kills N] [--rounds N] [--out FILE]

Guard: N times a create is killed (SIGKILL) inside its pause, after each of the pause's commands in turn; how long
is it from the kill until QEMU says that the guest runs again? Nobody but the guard is there to help; `recover`
comes after the measurement.

Journal: N creates as they are and N with a catalog that skips every write but the last take turns on one guest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import trio
from benchlib.faults import Bench, open_bench
from benchlib.lab import CACHE, DOMAIN, Guest, GuestPlan, Qemu, pick, qemus, running_guest, workplace

from snaporch import CreateFlag, DomainSnapshot
from snaporch.catalog import Catalog, Change
from snaporch.drivers.qmp import open_qmp

STEPS = ("pause", "switch", "start_stream", "await_armed")
LIMIT_MS = 250.0
SECONDS = 30.0
RAM = 256 * 2**20


async def kill_in_pause(bench: Bench, step: str) -> float:
    """Kill a create after a step of its pause; return the milliseconds until the guest runs."""
    guest = bench.guest
    async with open_qmp(guest.socket().with_name("query.sock"), label=DOMAIN, timeout=SECONDS) as qmp:
        with qmp.subscribe("RESUME") as events:
            _, said = await bench.run(f"after:{step}#1", "us", "create", "killed", "background")
            with trio.fail_after(SECONDS):
                event = await events.receive()
    await guest.orchestrator.recover()
    guest.check()
    return 1000 * (event.timestamp - float(said.split()[-1]))


@contextmanager
def no_journal() -> Iterator[None]:
    """Have the catalog skip what only the journal wants."""
    write = Catalog.write

    async def skipping(self: Catalog, change: Change) -> None:
        if change.snapshots or change.dropped:
            await write(self, change)

    Catalog.write = skipping  # type: ignore[method-assign]
    try:
        yield
    finally:
        Catalog.write = write  # type: ignore[method-assign]


async def time_create(guest: Guest) -> tuple[float, float]:
    """Create and delete a checkpoint; return the total time and the pause of the create, in milliseconds."""
    name, began = guest.fresh_name(), time.monotonic()
    record = await guest.orchestrator.create(DOMAIN, DomainSnapshot(name), CreateFlag.LIVE)
    total = time.monotonic() - began
    return 1000 * total, 1000 * (record.timings.pause or 0.0)


async def compare(guest: Guest, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Create with and without the journal in turns."""
    found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for number in range(2 * rounds):
        which = "with" if number % 4 in {0, 3} else "without"  # neither is always the second
        with no_journal() if which == "without" else nullcontext():
            found[which].append(await time_create(guest))
        if number % 2:
            await guest.orchestrator.delete(
                DOMAIN, [record.name for record in await guest.orchestrator.list(DOMAIN)]
            )
    guest.check()
    return found


def of(values: list[float]) -> str:
    """Return median, least and greatest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def report(qemu: Qemu, stood: list[float], found: dict[str, list[tuple[float, float]]]) -> str:
    """Return the page."""
    totals = {which: [total for total, _ in runs] for which, runs in found.items()}
    pauses = {which: [pause for _, pause in runs] for which, runs in found.items()}
    late = sum(ms > LIMIT_MS for ms in stood)
    ratio = statistics.median(totals["with"]) / statistics.median(totals["without"])
    paired = statistics.median(a / b for a, b in zip(totals["with"], totals["without"], strict=True))
    return f"""# The guard, and what the journal costs

Written by `scripts/bench recovery {" ".join(sys.argv[1:])}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC;
QEMU {qemu.version}, TCG, a guest of {RAM // 2**20} MiB that dirties 20 MB/s. Medians (least to greatest), in ms.

- {len(stood)} times SIGKILL inside the pause: the guest ran again after {of(stood)};
  {late} times later than the limit of {LIMIT_MS:g} ms.
- {len(totals["with"])} creates with and without the journal, in turns:
  total {of(totals["with"])} to {of(totals["without"])}, {ratio:.3f} times
  ({paired:.3f} as the median of the pairs); the limit is 1.05;
  pause {of(pauses["with"])} to {of(pauses["without"])}.
"""


async def run(options: argparse.Namespace, qemu: Qemu, place: Path) -> str:
    """Measure both."""
    async with running_guest(place, CACHE, qemu, GuestPlan(ram=RAM, dirty=20)) as guest, open_bench(guest) as bench:
        stood = [await kill_in_pause(bench, STEPS[number % len(STEPS)]) for number in range(options.kills)]
        return report(qemu, stood, await compare(guest, options.rounds))


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with workplace(CACHE / "lab") as place:
        page = trio.run(run, options, pick(qemus(CACHE), options.qemu), place)
    print(page)
    if options.out:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
