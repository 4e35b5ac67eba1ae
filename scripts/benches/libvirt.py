"""Measures the pause of a checkpoint of libvirt's domains: snaporch's beside virsh's, live and not live.

    scripts/bench libvirt [--rounds 20] [--rates 0,100,400] [--pair 11.3] [--out FILE]

A guest of 512 MiB with 256 MiB of patterns writes so many MB a second to its RAM. In each round each way takes one
checkpoint, one after the other, and the next round begins with another way. Pauses are between QEMU's own STOP and
RESUME events, as libvirt passes them on; a gap is the longest time in which the guest itself could not write; the
wall time of virsh is with `sync FILE` and without. It needs a quiet machine, and takes root.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from snaporch.drivers.libvirt import binding
from snaporch.guest.build import build_tiny
from snaporch.guest.report import parse
from tests.conftest import ROOT, _qemus
from tests.libvirt.conftest import VERSIONS
from tests.libvirt.lab import Libvirt, running_libvirt
from tests.libvirt.world import LibvirtWorld, open_libvirt_world
from tests.live.world import MIB, NAME

WAYS = ("snaporch", "virsh --live", "virsh")
MEMORY, PATTERNS = 512 * MIB, 256
SETTLE_SECONDS = 0.5  # for events and reports that come by another way


@attrs.frozen
class Taken:
    """One checkpoint: milliseconds paused, of the guest's gap; MiB of memory; seconds, and without the sync."""

    pause: float
    gap: float
    size: float
    wall: float
    unsynced: float


class Pauses:
    """Adds up for how long a domain's CPUs stood."""

    def __init__(self, world: LibvirtWorld) -> None:
        libvirt, qemu = binding.load()
        self.connection = libvirt.open(world.daemon.uri)
        self.began, self.seconds = 0.0, 0.0
        domain = self.connection.lookupByName(world.theirs)
        qemu.qemuMonitorEventRegister(self.connection, domain, None, self._heard, None, 0)

    def _heard(self, _c: object, _d: object, name: str, seconds: int, micros: int, _s: str, _o: object) -> None:
        now = seconds + micros * 1e-6
        if name == "STOP":
            self.began = now
        elif name == "RESUME" and self.began:
            self.seconds += now - self.began
            self.began = 0.0


async def take(world: LibvirtWorld, pauses: Pauses, way: str, name: str) -> Taken:
    """Take one checkpoint, and delete it."""
    since, pauses.seconds, began = world.position(), 0.0, time.monotonic()
    memory = world.directory / f"{name}.mem"
    if way == "snaporch":
        await world.create(name, memory_file=str(memory))
        unsynced = time.monotonic() - began
    else:
        words = ["--live"] if way != "virsh" else []
        words += ["--memspec", f"file={memory},snapshot=external"]
        for target in ("vda", "vdb"):
            words += ["--diskspec", f"{target},file={world.directory}/{target}-{name}.qcow2"]
        await trio.to_thread.run_sync(world.virsh, "snapshot-create-as", name, *words)
        unsynced = time.monotonic() - began
        await trio.run_process(["sync", str(memory)])
    wall = time.monotonic() - began
    await trio.sleep(SETTLE_SECONDS)
    gaps = [report.gap_us for report in parse(world.text(since))]
    taken = Taken(pauses.seconds * 1e3, max(gaps, default=0) / 1e3, _mib(memory), wall, unsynced)
    if way != "snaporch":
        await world.orch.sync(NAME)
    await world.orch.delete(NAME, name)
    await world.check_runs(2)
    return taken


def _mib(path: Path) -> float:
    return os.stat(path).st_blocks * 512 / MIB


async def measure(daemon: Libvirt, place: Path, rate: int, rounds: int) -> dict[str, list[Taken]]:
    """Take checkpoints of a guest that writes so many MB a second, in all ways, interleaved."""
    qemu = _qemus()["7.2" if daemon.qemu == "-" else "10.0"]
    found: dict[str, list[Taken]] = {way: [] for way in WAYS}
    append, kernel = f"dirty={rate} ram={PATTERNS}", build_tiny(ROOT / ".cache/guest")
    async with open_libvirt_world(
        place / f"{daemon.version}-{rate}", daemon, qemu, kernel, append=append, memory=MEMORY
    ) as world:
        pauses = Pauses(world)
        for number in range(rounds):
            for turn in range(len(WAYS)):
                way = WAYS[(number + turn) % len(WAYS)]
                found[way].append(await take(world, pauses, way, f"n{number}-{turn}"))
        pauses.connection.close()
    return found


def row(version: str, rate: int, way: str, taken: list[Taken]) -> str:
    """Return a row of the table: medians, of pauses and gaps with their least and greatest."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.0f} [{min(values):.0f}-{max(values):.0f}]"

    middle = [statistics.median(getattr(each, what) for each in taken) for what in ("size", "wall", "unsynced")]
    pause, gap = spread([each.pause for each in taken]), spread([each.gap for each in taken])
    cells = [version, rate, way, len(taken), pause, gap, *(f"{value:.2f}" for value in middle)]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measure, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rates", default="0,100,400", help="MB that the guest writes a second")
    parser.add_argument("--pair", action="append", help="the libvirt of a pair; by default all")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    options = parser.parse_args()
    rows = [
        "| libvirt | MB/s | way | n | pause ms | gap ms | memory MiB | seconds | without sync |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    place = Path(tempfile.mkdtemp(prefix="snaporch-libvirt-"))
    for line in VERSIONS.read_text().splitlines():
        version, prefix, qemu = line.split()
        if options.pair and version not in options.pair:
            continue
        unpacked = ROOT / f".cache/qemu-{qemu}"
        with running_libvirt(version, Path(prefix), str(unpacked) if unpacked.exists() else "-") as daemon:
            for rate in map(int, options.rates.split(",")):
                found = trio.run(measure, daemon, place, rate, options.rounds)
                rows += [row(version, rate, way, taken) for way, taken in found.items()]
                print("\n".join(rows[-len(WAYS) :]), flush=True)
    with suppress(OSError):
        os.rmdir(place)
    print("\n".join(rows))
    if options.out:
        with options.out.open("a") as file:
            file.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
