"""Proves that a service does not grow: a thousand creates and deletes, snapshots of one domain, and domains.

    scripts/proof long-run [--parts domains creates snapshots] [--creates 1000] [--snapshots 1000]
                           [--domains 1000] [--running 20] [--awake 2] [--out FILE]

One `snaporch serve`, as it is installed, on real images and real QEMUs. First domains are defined and some started:
a few of these run a guest that writes, the others only while a checkpoint is taken, for twenty guests at work under
TCG would leave the service no CPU. Then checkpoints are taken of all that have a process and deleted again, four at
a time; and then one domain that does not run gets snapshot after snapshot, which are deleted as one in the end.
What is left out of `--parts` is not done: without `domains` there are only those that the other parts need.

Before and after each part the service's memory, descriptors and threads are noted, all processes and their memory,
and all files. The service keeps the answers of the last thousand operations, so its memory is compared with that
after half of the creates and deletes, everything else with what was before a part.

Exit status: 0 when after each part all is as it was before it, but for a tenth of memory; 1 when not.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, Qemu, pick, qemus, workplace

from snaporch import CreateFlag, DeleteFlag, DeviceDisk, DomainDefinition, DomainSnapshot, open_client
from snaporch.client import Client
from snaporch.guest.build import build_tiny

MIB = 2**20
PARTS = ("domains", "creates", "snapshots")
SIDE_BY_SIDE = 4
ROUNDS = 10  # of the creates and deletes, after each of which all is noted
MORE_MEMORY = 1.1
DEEP = "deep"
GUEST_RAM = 32 * MIB


@attrs.frozen
class Gauge:
    """What there is at a moment: of the service, of it and its guests together, and of files."""

    when: str
    memory: int
    descriptors: int
    threads: int
    processes: int
    guests_memory: int
    files: int
    catalog: int

    @property
    def row(self) -> str:
        """As a row of a table."""
        return (
            f"| {self.when} | {self.memory / MIB:.1f} | {self.descriptors} | {self.threads} | {self.processes} | "
            f"{self.guests_memory / MIB:.0f} | {self.files} | {self.catalog / MIB:.1f} |"
        )


HEAD = (
    "| | memory, MiB | descriptors | threads | processes | guests' memory, MiB | files | catalog, MiB |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
)


@attrs.define
class Lab:
    """A service, by its process, and the place of everything.

    Attributes:
        place: where everything is.
        service: the service's process.
        qemu: runs the guests.
        gauges: what was noted, in order.
        lines: what else is to be told.
    """

    place: Path
    service: subprocess.Popen[bytes]
    qemu: Qemu
    gauges: list[Gauge] = attrs.field(factory=list)
    lines: list[str] = attrs.field(factory=list)

    @property
    def root(self) -> Path:
        """The service's."""
        return self.place / "root"

    def note(self, when: str) -> Gauge:
        """Note and print what there is now."""
        pids = self.processes()
        own, status = self.service.pid, Path(f"/proc/{self.service.pid}/status").read_text()
        gauge = Gauge(
            when,
            resident(own),
            len(os.listdir(f"/proc/{own}/fd")),
            int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
            len(pids),
            sum(resident(pid) for pid in pids if pid != own),
            sum(len(files) for _, _, files in os.walk(self.place)),
            sum(path.stat().st_size for path in self.root.glob("catalog.sqlite3*")),
        )
        self.gauges.append(gauge)
        print(gauge.row, flush=True)
        return gauge

    def processes(self) -> list[int]:
        """Return all processes that were started with something of this place: the service, guests, helpers."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal() and int(entry) != os.getpid():
                try:
                    command = Path(f"/proc/{entry}/cmdline").read_bytes()
                except OSError:
                    continue
                if os.fsencode(self.place) in command:
                    found.append(int(entry))
        return found

    def say(self, line: str) -> None:
        """Keep and print a line."""
        self.lines.append(line)
        print(line, flush=True)


def resident(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 when it has just gone."""
    try:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return 0


async def define(lab: Lab, client: Client, count: int, running: int, awake: int) -> list[str]:
    """Define so many domains, and start the first few, most of them paused; return the names of these."""
    first = lab.place / "first.qcow2"
    await trio.run_process([lab.qemu.img, "create", "-q", "-f", "qcow2", str(first), "16M"])
    image, names, took = first.read_bytes(), [f"vm{number}" for number in range(count - 1)], list[float]()
    for name in (*names, DEEP):
        path = lab.place / "images" / f"{name}.qcow2"
        path.write_bytes(image)
        began = time.monotonic()
        await client.define(
            DomainDefinition(
                name,
                memory=GUEST_RAM,
                accel="tcg",
                kernel=str(lab.place / "kernel"),
                append="rate=2 ram=1 report=5000",
                emulator=lab.qemu.emulator,
                disks=(DeviceDisk("vda", str(path)),),
            )
        )
        took.append(time.monotonic() - began)
    few = max(1, min(10, len(took)))
    first_ones, last_ones = statistics.median(took[:few]), statistics.median(took[-few:])
    lab.say(f"a definition of the first {few}: {first_ones:.3f} s; of the last {few}: {last_ones:.3f} s")
    for number, name in enumerate(names[:running]):
        await client.start(name, paused=number >= awake)
    began = time.monotonic()
    seen = await client.domains()
    lab.say(
        f"`GET /v1/domains` of {len(seen):,} domains, {running} of them running: {time.monotonic() - began:.2f} s"
    )
    return names[:running]


async def take_and_delete(client: Client, names: Sequence[str], awake: int, count: int, took: list[float]) -> None:
    """Take live checkpoints of the domains in turn, so many in all, and delete each; most run for that only."""
    left, running = iter(range(count)), frozenset(names[:awake])

    async def worker(first: int) -> None:
        mine = [name for place, name in enumerate(names) if place % SIDE_BY_SIDE == first]
        for number in left:
            name, began = mine[number % len(mine)], time.monotonic()
            if name not in running:
                await client.resume(name)  # QEMU saves no memory that has not run since the last time
            await client.create(name, DomainSnapshot(f"s{number}"), CreateFlag.LIVE)
            if name not in running:
                await client.pause(name)
            await client.delete(name, f"s{number}")
            took.append(time.monotonic() - began)

    async with trio.open_nursery() as nursery:
        for first in range(min(SIDE_BY_SIDE, len(names))):
            nursery.start_soon(worker, first)


async def deepen(lab: Lab, client: Client, count: int) -> Gauge:
    """Take so many snapshots of one domain, look at them, and delete them all; return what there is then."""
    took = []
    for number in range(count):
        began = time.monotonic()
        await client.create(DEEP, DomainSnapshot(f"s{number}", memory=False), CreateFlag.DISK_ONLY)
        took.append(time.monotonic() - began)
        if number % 100 == 99:  # noqa: PLR2004 - every hundredth
            print(f"{number + 1} snapshots: {statistics.median(took[-10:]):.2f} s each", flush=True)
    lab.note(f"{count:,} snapshots in one domain")
    first, last = statistics.median(took[:10]), statistics.median(took[-10:])
    lab.say(f"a create of the first ten: {first:.2f} s; of the last ten: {last:.2f} s")
    began = time.monotonic()
    seen = await client.list(DEEP)
    lab.say(f"a list of {len(seen):,} snapshots: {time.monotonic() - began:.2f} s")
    began = time.monotonic()
    await client.delete(DEEP, "s0", DeleteFlag.CHILDREN)
    lab.say(f"their deletion as one: {time.monotonic() - began:.2f} s")
    return lab.note("after their deletion")


async def story(lab: Lab, options: argparse.Namespace) -> list[str]:
    """Do everything; return what is not as it should be."""
    async with open_client(lab.root) as client:
        lab.note("empty")
        running = options.running if {"domains", "creates"} & set(options.parts) else 0
        count = options.domains if "domains" in options.parts else running + 1
        names, wrong = await define(lab, client, count, running, options.awake), list[str]()
        lab.note(f"{count:,} domains, {running} with a process")
        if "creates" in options.parts:
            wrong += await repeat(lab, client, names, options)
        if "snapshots" in options.parts:
            before = lab.note("before the snapshots")
            after = await deepen(lab, client, options.snapshots)
            wrong += grown(before, after)
        for name in names:
            await client.destroy(name)
        lab.note("all guests ended")
    return wrong


async def repeat(lab: Lab, client: Client, names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Take and delete so many checkpoints; return what has grown."""
    took: list[float] = []
    await take_and_delete(client, names, options.awake, 2 * len(names), took)
    before = halfway = after = lab.note("after two of each")
    took.clear()
    for part in range(1, ROUNDS + 1):
        await take_and_delete(client, names, options.awake, options.creates // ROUNDS, took)
        after = lab.note(f"after {len(took):,} creates and deletes")
        halfway = after if part == ROUNDS // 2 else halfway
        print(f"{part}/{ROUNDS}: {statistics.median(took):.2f} s", flush=True)
    lab.say(f"a create and its delete, {SIDE_BY_SIDE} at a time: {statistics.median(took):.2f} s in the median")
    wrong = grown(before, after)
    if after.memory > halfway.memory * MORE_MEMORY:
        wrong.append(f"memory: {halfway.memory / MIB:.1f} MiB halfway, {after.memory / MIB:.1f} MiB after")
    return wrong


def grown(before: Gauge, after: Gauge) -> list[str]:
    """Return what there is more of than before."""
    return [
        f"{name}, {after.when}: {getattr(before, name)} before, {getattr(after, name)} after"
        for name in ("descriptors", "processes", "files")
        if getattr(after, name) > getattr(before, name)
    ]


def main() -> int:
    """Run it all and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--creates", type=int, default=1_000)
    parser.add_argument("--snapshots", type=int, default=1_000)
    parser.add_argument("--domains", type=int, default=1_000)
    parser.add_argument("--running", type=int, default=20, help="domains with a process")
    parser.add_argument("--awake", type=int, default=2, help="of these, whose guests are not paused")
    parser.add_argument("--qemu")
    parser.add_argument("--out", type=Path, help="where the tables go, as Markdown")
    options = parser.parse_args()
    qemu = pick(qemus(CACHE), options.qemu)
    with workplace((CACHE / "lab").resolve()) as place:
        for directory in (place / "root", place / "images"):
            directory.mkdir(mode=0o700)
        (place / "kernel").write_bytes(build_tiny(CACHE / "guest").read_bytes())
        (place / "root/service.toml").write_text(f'directories = ["{place}"]\n')
        path = f"{Path(qemu.img).parent}:{os.environ['PATH']}"
        command = [sys.executable, "-m", "snaporch", "--root", str(place / "root"), "serve"]
        with (
            open(place / "log", "wb") as log,
            subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, "PATH": path}) as service,
        ):
            lab = Lab(place, service, qemu)
            try:
                while b'"ready"' not in (place / "log").read_bytes():
                    time.sleep(0.1)
                print("\n".join(HEAD), flush=True)
                wrong = trio.run(story, lab, options)
            finally:
                service.send_signal(signal.SIGTERM)
                service.wait(60)
                left = lab.processes()
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
        wrong += [f"{len(left)} processes are left"] if left else []
        wrong += [
            line for line in (place / "log").read_text().splitlines() if "defect" in line or '"error"' in line
        ][:9]
    if options.out:
        rows = (*HEAD, *(gauge.row for gauge in lab.gauges), "", *(f"- {line}" for line in lab.lines))
        options.out.write_text("\n".join(rows) + "\n")
    print("\n".join(wrong) or "it is flat", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
