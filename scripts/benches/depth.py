"""Measures what a long chain of images costs: to open, to read, in QEMU's memory; and what a flatten gives back.

    scripts/bench depth [--qemu VERSION] [--out FILE]

Each image of a chain holds its own part of a disk, as after a snapshot each; half of the disk is in the base. The
figures of `snaporch doctor` are got in the same way (`Storage.read_cost`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, Qemu, pick, qemus, workplace

from snaporch.drivers.base import untold
from snaporch.drivers.local.files import LocalStorage
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import DeviceDisk

DEPTHS = (1, 2, 5, 10, 20, 50, 100, 200, 400)
SIZE = 2**30
CLUSTER = 2**16
PARTS = 8  # clusters of its own that each image over the base has
ROUNDS = 3


@attrs.frozen
class Cost:
    """What was found of one chain.

    Attributes:
        depth: images.
        opens: milliseconds that opening it takes.
        reads: microseconds that reading 64 KiB takes.
        boots: milliseconds until a QEMU with it answers.
        memory: MiB that such a QEMU has in RAM.
        look: milliseconds that it takes to look at all its headers, as every operation does.
    """

    depth: int
    opens: float
    reads: float
    boots: float
    memory: float
    look: float


def write(qemu: Qemu, path: Path, offset: int, count: int, step: int) -> None:
    """Write clusters into an image."""
    options = ["-w", "-f", "qcow2", "-c", str(count), "-s", str(CLUSTER), "-S", str(step), "-o", str(offset)]
    subprocess.run([qemu.img, "bench", *options, str(path)], check=True, capture_output=True)


def make_chain(qemu: Qemu, place: Path, depth: int) -> list[Path]:
    """Make a chain, base first."""
    chain = [place / f"{number}.qcow2" for number in range(depth)]
    for number, path in enumerate(chain):
        subprocess.run([qemu.img, "create", "-q", "-f", "qcow2", str(path), str(SIZE)], check=True)
        if number:  # put over the others only now: to write through all of them takes longer from image to image
            write(qemu, path, number * PARTS * CLUSTER, PARTS, CLUSTER)
            below = ["-b", str(chain[number - 1]), "-F", "qcow2"]
            subprocess.run([qemu.img, "rebase", "-u", "-f", "qcow2", *below, str(path)], check=True)
        else:
            write(qemu, path, 0, SIZE // CLUSTER // 2, 2 * CLUSTER)
    return chain


def boot(qemu: Qemu, path: Path) -> tuple[float, float]:
    """Start a QEMU on a chain; return the milliseconds until it answers, and its MiB of RAM."""
    file = {"driver": "file", "filename": str(path)}
    device = json.dumps({"driver": "qcow2", "node-name": "disk", "file": file})
    began = time.monotonic()
    command = [qemu.emulator, "-nodefaults", "-display", "none", "-S", "-machine", "q35", "-blockdev", device]
    command += ["-device", "virtio-blk-pci,drive=disk", "-qmp", "stdio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdin is None or process.stdout is None:
            raise AssertionError
        process.stdout.readline()
        took = time.monotonic() - began
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        process.stdin.write(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        process.stdin.flush()
    return 1000 * took, resident / 1024


async def measure(qemu: Qemu, path: Path) -> Cost:
    """Measure one chain."""
    storage, found = LocalStorage(qemu.img), []
    for _ in range(ROUNDS):
        cost = await storage.read_cost(str(path), "qcow2")
        began = time.monotonic()
        depth = len(await storage.inspect(str(path), "qcow2"))
        look = time.monotonic() - began
        boots, memory = boot(qemu, path)
        found.append(Cost(depth, 1e3 * cost.open_seconds, 1e6 * cost.read_seconds, boots, memory, 1e3 * look))
    best = {field.name: min(getattr(each, field.name) for each in found) for field in attrs.fields(Cost)}
    return Cost(**best)


async def run(qemu: Qemu, place: Path) -> tuple[list[Cost], Cost, float]:
    """Measure chains of all depths, and the longest once more when it is flat."""
    chain = make_chain(qemu, place, DEPTHS[-1])
    costs = [await measure(qemu, chain[depth - 1]) for depth in DEPTHS]
    began = time.monotonic()
    base = DeviceDisk("", str(chain[0]))
    await LocalStorage(qemu.img).rebase(str(chain[-1]), base, content=True, options=MergeOptions(), progress=untold)
    return costs, await measure(qemu, chain[-1]), time.monotonic() - began


def row(cost: Cost, note: str = "") -> str:
    """Return one row."""
    values = f"{cost.opens:.1f} | {cost.reads:.0f} | {cost.boots:.0f} | {cost.memory:.0f} | {cost.look:.0f}"
    return f"| {cost.depth}{note} | {values} |"


def page(qemu: Qemu, costs: list[Cost], flat: Cost, took: float) -> str:
    """Return all of it."""
    rows = "\n".join([*(row(cost) for cost in costs), row(flat, f" (the {costs[-1].depth}, flattened)")])
    first, last = costs[0], costs[-1]
    images = last.depth - first.depth
    return f"""## QEMU {qemu.version}

Written by `scripts/bench depth {" ".join(sys.argv[1:])}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: a disk of
1 GiB, half of it in the base, {PARTS * CLUSTER // 1024} KiB in each image over it; the least of {ROUNDS}.

| images | open, ms | read of 64 KiB, µs | QEMU is up, ms | QEMU's RAM, MiB | look at all, ms |
|--:|--:|--:|--:|--:|--:|
{rows}

An image more costs {(last.boots - first.boots) / images:.2f} ms of a start,
{(last.memory - first.memory) / images:.2f} MiB of QEMU's RAM,
{(last.reads - first.reads) / images:.2f} µs of each read of what is in the base, and
{(last.look - first.look) / images:.2f} ms of each look that snaporch takes.
Flattening the {last.depth} onto their base took {took:.1f} s.
"""


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu", help="7.2 or 10.0; default: the newest")
    parser.add_argument("--out", type=Path, help="append to this page")
    options = parser.parse_args()
    qemu = pick(qemus(CACHE), options.qemu)
    with workplace(CACHE / "lab") as place:
        text = page(qemu, *trio.run(run, qemu, place))
    print(text)
    if options.out:
        with options.out.open("a") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
