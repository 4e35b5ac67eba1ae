"""Measures what a batch costs snaporch itself: CPU and memory, from a hundred simulated domains to ten thousand.

    scripts/bench batch-scale [--counts 100 300 1000 3000 10000] [--at-once 200] [--out DIR] [--work DIR]

Each row is a process of its own. The domains are simulated (snaporch.testing), one disk each, on a clock that
jumps: what is left is snaporch's own work, and the simulator's. CPU is that of the whole process while the batch
runs, the simulator and SQLite included. Memory is measured twice: the most that the process ever held (peak RSS),
of which the simulated world is a part that grows with the number of domains; and, in a second run, what Python had
allocated for anything but the simulator (tracemalloc), looked at now and then: that is snaporch's. In that run the
simulator forgets the files of a domain that is done, so that nothing of snaporch's making is kept by it.

Rows that are in batch-scale.json already are not measured again, so that it can be done in several goes.

The line that is drawn is fitted to the CPU time by least squares of the relative errors; how far any row is from it
says whether the growth is linear.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import trio
from trio.testing import MockClock

from snaporch import DeviceDisk, DomainDefinition, Orchestrator, open_orchestrator
from snaporch.batch.plan import plan_from
from snaporch.batch.runner import run_batch
from snaporch.batch.store import ItemRecord
from snaporch.catalog import Change
from snaporch.model.domain import DomainRecord, Handle
from snaporch.orchestrator import catalog_of
from snaporch.testing import SimulatedDriver, SimulatedHost, ThreadsHoldTime

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
EPOCH = 1_750_000_000.0
LOOKS = 10  # at the heap, in a run
PAGE = 500  # domains that are made known at once


@attrs.frozen
class Row:
    """What one run came to.

    Attributes:
        count: domains.
        at_once: snapshots at a time.
        cpu: seconds of CPU.
        wall: seconds.
        virtual: seconds on the simulated clock.
        before: RSS when the batch began, in bytes; the domains are known by then.
        peak: the most that RSS has been.
        heap: the most that Python held beside the simulator; None when it was not looked at.
    """

    count: int
    at_once: int
    cpu: float
    wall: float
    virtual: float
    before: int
    peak: int
    heap: int | None = None


# --- one run, in its own process ------------------------------------------------------------------------------


def booted(host: SimulatedHost, name: str) -> DomainRecord:
    """Make a domain that runs."""
    disks = (DeviceDisk("vda", f"/images/{name}.qcow2"),)
    host.add_image(disks[0].path)
    definition = DomainDefinition(name, memory=GIB, disks=disks, driver="simulated")
    return DomainRecord(definition, handle=host.boot(definition))


@attrs.define
class Heap:
    """Looks now and then at what Python holds beside the simulator."""

    host: SimulatedHost
    root: Path
    processes: dict[str, Handle]
    every: int
    most: int = 0
    _seen: int = 0

    def look(self, record: ItemRecord) -> None:
        """See an item that has ended."""
        process = self.processes.pop(record.item.name)
        found = self.host.find(process)
        disks = [drive.image.path for drive in found.drives] if found else []
        self.host.crash(process)
        for path in (*disks, f"{self.root}/{record.item.name}/{record.snapshot}.mem"):
            self.host.disk.remove(path)
        self._seen += 1
        if self._seen % self.every:
            return
        gc.collect()
        traces = tracemalloc.take_snapshot().traces
        held = sum(trace.size for trace in traces if "simulated" not in trace.traceback[0].filename)
        self.most = max(self.most, held)


async def populate(orch: Orchestrator, host: SimulatedHost, count: int) -> dict[str, Handle]:
    """Make the domains known; return their processes."""
    running = {}
    for first in range(0, count, PAGE):
        names = [f"vm{number:05}" for number in range(first, min(first + PAGE, count))]
        records = tuple(booted(host, name) for name in names)
        await catalog_of(orch).write(Change(domains=records))
        running |= {record.name: record.handle for record in records if record.handle}
    return running


async def one(root: Path, count: int, at_once: int, traced: bool) -> Row:
    """Run a batch."""
    host = SimulatedHost()
    data = {"name": "scale", "select": {"globs": ["*"]}, "limits": {"per_host": at_once}}
    async with open_orchestrator(root, drivers={"simulated": SimulatedDriver(host)}) as orch:
        running = await populate(orch, host, count)
        heap = Heap(host, root, running, max(1, count // LOOKS))
        gc.collect()
        before, cpu, wall = rss(), time.process_time(), time.monotonic()
        if traced:
            tracemalloc.start()
        tell = {"tell": heap.look} if traced else {}
        batch = await run_batch(orch, plan_from(data), now=lambda: EPOCH + trio.current_time(), **tell)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    if batch.counts != {"done": count}:
        sys.exit(f"not all were taken: {batch.counts}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    virtual = (batch.ended or 0.0) - batch.begun
    return Row(count, at_once, cpu, wall, virtual, before, peak, heap.most if traced else None)


def rss() -> int:
    """Return how much memory this process has now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def child(options: argparse.Namespace) -> None:
    """Be one run, and print its row."""
    clock = MockClock(autojump_threshold=0)
    count, at_once = options.one
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.work) as place:
        row = trio.run(
            one, Path(place), count, at_once, options.trace, clock=clock, instruments=[ThreadsHoldTime(clock)]
        )
    print(json.dumps(attrs.asdict(row)))


# --- all of them ------------------------------------------------------------------------------------------------


def measure(count: int, at_once: int, work: Path, *, trace: bool) -> Row:
    """Have a process of its own measure one row."""
    command = [sys.executable, __file__, "--work", str(work), "--one", str(count), str(at_once)]
    done = subprocess.run([*command, *(["--trace"] if trace else [])], check=True, capture_output=True, text=True)
    return Row(**json.loads(done.stdout))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and intercept of the line that fits best, each point's error weighed by its own size."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mx = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    my = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    above = sum(w * (x - mx) * (y - my) for w, (x, y) in zip(weights, points, strict=True))
    below = sum(w * (x - mx) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    return above / below, my - above / below * mx


MIB = 2**20


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    names = ("domains", "at once", "CPU s", "CPU ms a snapshot", "wall s")
    names += ("peak RSS MiB", "of it before the batch", "heap without the simulator, most, MiB")
    head = f"| {' | '.join(names)} |\n|{'---:|' * len(names)}\n"
    return head + "".join(
        f"| {row.count:,} | {row.at_once} | {row.cpu:.1f} | {1e3 * row.cpu / row.count:.2f} | {row.wall:.0f} | "
        f"{row.peak / MIB:.0f} | {row.before / MIB:.0f} | {(row.heap or 0) / MIB:.2f} |\n"
        for row in rows
    )


def text(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """Return the document."""
    slope, start = line([(row.count, row.cpu) for row in rows])
    worst = max(abs(row.cpu / (start + slope * row.count) - 1) for row in rows)
    full = [row for row in rows if row.count >= row.at_once] or rows
    heap = [(row.heap or 0) / MIB for row in full]
    return f"""# What a batch costs snaporch itself

Made by `scripts/bench batch-scale`, {time.strftime("%Y-%m-%d", time.gmtime())}: simulated domains of 1 GiB and one
disk, {os.cpu_count()} cores, Python {sys.version.split()[0]}. What each column is, is said in the script's head.

{table(rows)}
Growth from {rows[0].count:,} to {rows[-1].count:,} domains:

- CPU: {1e3 * slope:.2f} ms a snapshot (and {start:.2f} s whatever the number); no row is further than
  {100 * worst:.0f} % from that line.
- Memory of snaporch: {min(heap):.2f} to {max(heap):.2f} MiB from {full[0].count:,} domains on.

{others[0].count:,} domains with other numbers at a time:

{table(others)}
![CPU and memory by the number of domains](batch-scale.png)
"""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw CPU and memory by the number of domains."""
    import matplotlib as mpl  # noqa: PLC0415 - a run by itself does without

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    slope, start = line([(row.count, row.cpu) for row in rows])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
    counts = [row.count for row in rows]
    left.plot(counts, [row.cpu for row in rows], "o", color="#0072b2", label="measured")
    left.plot(counts, [start + slope * n for n in counts], "-", color="#999999", label=f"{1e3 * slope:.1f} ms each")
    left.set(title="CPU of the whole batch, s", xlabel="domains", xscale="log", yscale="log")
    right.plot(counts, [row.peak / MIB for row in rows], "s-", color="#d55e00", label="process, simulator included")
    right.plot(
        counts, [(row.heap or 0) / MIB for row in rows], "o-", color="#0072b2", label="heap without the simulator"
    )
    right.set(title="Most memory, MiB", xlabel="domains", xscale="log", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 300, 1000, 3000, 10_000])
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--others", type=int, nargs="+", default=[20, 50, 100], help="at once, for 1,000 domains")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/evidence/bench")
    parser.add_argument(
        "--work", type=Path, help="where the catalogs are; a file system in memory waits for no disk"
    )
    parser.add_argument("--one", type=int, nargs=2, metavar=("DOMAINS", "AT_ONCE"), help="one run: print its row")
    parser.add_argument("--trace", action="store_true", help="with --one: look at the heap")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the document and the picture."""
    options = arguments()
    if options.one:
        child(options)
        return

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "batch-scale.json"
    known = [Row(**each) for each in json.loads(file.read_text())] if file.exists() else []

    def row(count: int, at_once: int) -> Row:
        for each in known:
            if (each.count, each.at_once) == (count, at_once):
                return each
        plain = measure(count, at_once, options.work, trace=False)
        found = attrs.evolve(plain, heap=measure(count, at_once, options.work, trace=True).heap)
        print(table([found]).splitlines()[-1], flush=True)
        known.append(found)
        file.write_text(json.dumps([attrs.asdict(each) for each in known], indent=1) + "\n")
        return found

    rows = [row(count, options.at_once) for count in options.counts]
    middle: Any = sorted(options.counts)[len(options.counts) // 2]
    others = [row(middle, at_once) for at_once in options.others]
    (options.out / "batch-scale.md").write_text(text(rows, others))
    draw(rows, options.out / "batch-scale.png")


if __name__ == "__main__":
    main()
