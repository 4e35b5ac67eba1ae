"""Proves that a service does not grow: a thousand creates and deletes, snapshots of one domain, and domains.

    scripts/proof long-run [--creates 1000] [--snapshots 1000] [--domains 1000] [--running 20] [--out FILE]

One `snaporch serve`, as it is installed, on real images and, for those that run, real QEMUs with a guest that
writes. First all domains are defined, and some started. Then checkpoints are taken of these and deleted again, four
at a time, and then one domain that does not run gets snapshot after snapshot, which are deleted as one in the end.
Before and after each part the service's memory, descriptors and threads are noted, all processes and their memory,
and all files.

The service keeps the answers of the last thousand operations, so its memory is compared with that after half of the
creates and deletes, everything else with what was before them.

Exit status: 0 when after the creates and deletes all is as it was, but for a tenth of memory; 1 when not.
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


async def define(lab: Lab, client: Client, count: int, running: int) -> list[str]:
    """Define so many domains, and start the first few; return the names of these."""
    first = lab.place / "first.qcow2"
    await trio.run_process([lab.qemu.img, "create", "-q", "-f", "qcow2", str(first), "16M"])
    image, names = first.read_bytes(), [f"vm{number}" for number in range(count - 1)]
    for name in (*names, DEEP):
        path = lab.place / "images" / f"{name}.qcow2"
        path.write_bytes(image)
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
    for name in names[:running]:
        await client.start(name)
    began = time.monotonic()
    seen = await client.domains()
    lab.say(
        f"`GET /v1/domains` of {len(seen):,} domains, {running} of them running: {time.monotonic() - began:.2f} s"
    )
    return names[:running]


async def take_and_delete(client: Client, names: Sequence[str], count: int, took: list[float]) -> None:
    """Take checkpoints of the domains in turn, so many in all, and delete each."""
    left = iter(range(count))

    async def worker(first: int) -> None:
        mine = [name for place, name in enumerate(names) if place % SIDE_BY_SIDE == first]
        for number in left:
            name, began = mine[number % len(mine)], time.monotonic()
            await client.create(name, DomainSnapshot(f"s{number}"), CreateFlag.LIVE)
            await client.delete(name, f"s{number}")
            took.append(time.monotonic() - began)

    async with trio.open_nursery() as nursery:
        for first in range(min(SIDE_BY_SIDE, len(names))):
            nursery.start_soon(worker, first)


async def deepen(lab: Lab, client: Client, count: int) -> None:
    """Take so many snapshots of one domain, look at them, and delete them all."""
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
    lab.note("after their deletion")


async def story(lab: Lab, options: argparse.Namespace) -> list[str]:
    """Do everything; return what is not as it should be."""
    async with open_client(lab.root) as client:
        lab.note("empty")
        names = await define(lab, client, options.domains, options.running)
        lab.note(f"{options.domains:,} domains, {options.running} running")
        took: list[float] = []
        await take_and_delete(client, names, 2 * len(names), took)
        before = halfway = lab.note("after two of each")
        took.clear()
        for part in range(1, ROUNDS + 1):
            await take_and_delete(client, names, options.creates // ROUNDS, took)
            after = lab.note(f"after {len(took):,} creates and deletes")
            halfway = after if part == ROUNDS // 2 else halfway
            print(f"{part}/{ROUNDS}: {statistics.median(took):.2f} s", flush=True)
        lab.say(f"a create and its delete, {SIDE_BY_SIDE} at a time: {statistics.median(took):.2f} s in the median")
        await deepen(lab, client, options.snapshots)
        for name in names:
            await client.destroy(name)
        lab.note("all guests ended")
    wrong = [
        f"{name}: {getattr(before, name)} before, {getattr(after, name)} after"
        for name in ("descriptors", "processes", "files")
        if getattr(after, name) > getattr(before, name)
    ]
    if after.memory > halfway.memory * MORE_MEMORY:
        wrong.append(f"memory: {halfway.memory / MIB:.1f} MiB halfway, {after.memory / MIB:.1f} MiB after")
    return wrong


def main() -> int:
    """Run it all and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--creates", type=int, default=1_000)
    parser.add_argument("--snapshots", type=int, default=1_000)
    parser.add_argument("--domains", type=int, default=1_000)
    parser.add_argument("--running", type=int, default=20)
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
