"""Measures how long a guest waits while a snapshot is deleted under its writes.

    scripts/bench delete [--qemu VERSION] [--rounds N] [--bulk MB] [--out FILE]

A guest writes 20 MB/s, durably, and says itself how long the slowest request to its disks took and how long its CPU
did not run. In each round these take turns, in an order drawn anew, each over an image of as many seconds' writes:

- nothing       no merge at all: what the host does to the guest by itself
- bare          block-commit and job-complete over QMP, with nothing around them
- snaporch      Orchestrator.delete

once for the image that the guest writes to (the merge ends with a pivot), once for one below it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, DOMAIN, Guest, GuestPlan, Qemu, pick, qemus, remove, running_guest, workplace

from snaporch import CreateFlag, DomainSnapshot
from snaporch.drivers.qmp import QMPClient, open_qmp

RAM = 128 * 2**20
WRITE_SECONDS = 2.0  # of writes that are then merged
LIMIT_MS = 100.0
SECONDS = 120.0
WORDS = {"active": "the image that the guest writes to", "middle": "an image below it"}


@attrs.frozen
class Waited:
    """What a guest says of one go, in milliseconds; the last is how long the merge took."""

    io: float
    gap: float
    took: float


async def measured(guest: Guest, act: Callable[[], Awaitable[object]]) -> Waited:
    """Do something, and return how long the guest waited meanwhile."""
    serial, mark, began = guest.serial, guest.serial.mark(), time.monotonic()
    await act()
    took = time.monotonic() - began
    there = len(serial.reports(mark))
    reports = await serial.more(mark, there + 2)  # the one that is under way, and whatever hangs over it
    guest.check()
    return Waited(max(r.io_us for r in reports) / 1e3, max(r.gap_us for r in reports) / 1e3, 1e3 * took)


async def nothing(guest: Guest, _: str) -> Waited:
    """Look on."""

    async def look_on() -> None:
        await trio.sleep(WRITE_SECONDS)

    return await measured(guest, look_on)


async def ours(guest: Guest, kind: str) -> Waited:
    """Delete a snapshot of ours."""
    names = [guest.fresh_name() for _ in range(1 if kind == "active" else 2)]
    for name in names:
        await guest.orchestrator.create(DOMAIN, DomainSnapshot(name), CreateFlag.LIVE)
        await trio.sleep(WRITE_SECONDS)
    found = await measured(guest, lambda: guest.orchestrator.delete(DOMAIN, names[0]))
    for name in names[1:]:
        await guest.orchestrator.delete(DOMAIN, name)
    return found


async def bare(guest: Guest, kind: str) -> Waited:
    """Commit every disk's overlay by QMP alone, one after the other."""
    async with open_qmp(guest.socket(), label=DOMAIN, timeout=SECONDS) as qmp:
        layers = [await overlay(guest, qmp, level) for level in range(1 if kind == "active" else 2)]
        with qmp.subscribe("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as events:

            async def commit(layer: list[tuple[str, str, str]], *, active: bool) -> None:
                for base, node, top in layer:
                    arguments = {"device": top, "base-node": base, "job-id": "bare"}
                    await qmp.execute("block-commit", arguments | ({} if active else {"top-node": node}))
                    if active:
                        await events.receive()
                        await qmp.execute("job-complete", {"id": "bare"})
                    await events.receive()
                    await qmp.execute("blockdev-del", {"node-name": node})

            tops = [node for _, node, _ in layers[-1]]
            lowest = [(base, node, top) for (base, node, _), top in zip(layers[0], tops, strict=True)]
            found = await measured(guest, lambda: commit(lowest, active=kind == "active"))
            if kind == "middle":
                rest = [(base, top, top) for (base, _, _), top in zip(layers[0], tops, strict=True)]
                await commit(rest, active=True)
    for path in guest.place.glob("bare-*.qcow2"):
        remove(path)
    return found


async def overlay(guest: Guest, qmp: QMPClient, level: int) -> list[tuple[str, str, str]]:
    """Put every disk on a fresh overlay, let the guest write, and return (base, overlay, overlay) nodes."""
    actions, layer = [], []
    for number, block in enumerate(await qmp.execute("query-block")):
        path, node = guest.place / f"bare-{level}-{number}.qcow2", f"bare-{level}-{number}"
        image, base = block["inserted"]["image"], block["inserted"]["node-name"]
        backing = ["-u", "-b", image["filename"], "-F", image["format"]]
        command = [guest.qemu.img, "create", "-q", "-f", "qcow2", *backing, str(path), str(image["virtual-size"])]
        subprocess.run(command, check=True)  # noqa: ASYNC221 - nothing else runs meanwhile
        file = {"driver": "file", "filename": str(path)}
        await qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file, "backing": None})
        actions.append({"type": "blockdev-snapshot", "data": {"node": base, "overlay": node}})
        layer.append((base, node, node))
    await qmp.execute("transaction", {"actions": actions})
    await trio.sleep(WRITE_SECONDS)
    return layer


CONTENDERS = {"nothing": nothing, "bare": bare, "snaporch": ours}
Found = dict[tuple[str, str], list[Waited]]


async def measure(qemu: Qemu, place: Path, options: argparse.Namespace) -> Found:
    """Let all take turns."""
    found: Found = {}
    chance = random.Random(1)  # noqa: S311 - no secret
    plan = GuestPlan(ram=RAM, dirty=20, rate=50, touched=16, report=20, bulk=options.bulk)
    async with AsyncExitStack() as stack:
        guest = await stack.enter_async_context(running_guest(place, CACHE, qemu, plan))
        for number in range(options.rounds + 1):
            turns = [(kind, who) for kind in WORDS for who in CONTENDERS]
            for kind, who in chance.sample(turns, len(turns)):
                waited = await CONTENDERS[who](guest, kind)
                if number:  # the first round is for the host's caches
                    found.setdefault((kind, who), []).append(waited)
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
    return found


def of(values: list[float]) -> str:
    """Return median and greatest."""
    return f"{statistics.median(values):.1f} | {max(values):.1f}"


def table(found: Found, kind: str) -> str:
    """Return the rows of one kind of merge."""
    rows = []
    for who in CONTENDERS:
        runs = found[kind, who]
        values = [of([getattr(run, name) for run in runs]) for name in ("io", "gap", "took")]
        rows.append(f"| {who} | {' | '.join(values)} |")
    return "\n".join(rows)


def verdict(found: Found, kind: str) -> str:
    """Return how much longer a guest waits for ours than for the bare one."""
    runs = {who: [max(run.io, run.gap) for run in found[kind, who]] for who in CONTENDERS}
    median = statistics.median(runs["snaporch"]) - statistics.median(runs["bare"])
    worst = max(runs["snaporch"]) - max(runs["bare"])
    kept = "kept" if worst < LIMIT_MS else "NOT KEPT"
    return (
        f"Merging {WORDS[kind]}: the longest stall differs from the bare one's by {median:+.1f} ms in the median, "
        f"by {worst:+.1f} ms at the worst; the limit is {LIMIT_MS:g} ms: {kept}."
    )


def page(qemu: Qemu, found: Found, options: argparse.Namespace) -> str:
    """Return all of it."""
    head = "| | request median | worst | CPU median | worst | merge median | worst |\n|---|--:|--:|--:|--:|--:|--:|"
    parts = [f"### Merging {WORDS[kind]}\n\n{head}\n{table(found, kind)}" for kind in WORDS]
    said = " ".join(sys.argv[1:])
    return f"""## QEMU {qemu.version}

Written by `scripts/bench delete {said}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: TCG, a guest of
{RAM // 2**20} MiB that writes {options.bulk} MB/s to its disks, durably, in writes of 256 KiB, and dirties 20 MB/s
of RAM; {options.rounds} rounds, each merge of {WRITE_SECONDS:g} s of writes. Milliseconds by the guest's clock: the
slowest *request* to a disk (flush included), the longest time that its *CPU* did not run; and by ours how long the
*merge* took.

{chr(10).join(f"- {verdict(found, kind)}" for kind in WORDS)}

{(chr(10) * 2).join(parts)}
"""


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu", help="7.2 or 10.0; default: the newest")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--bulk", type=int, default=20, help="MB/s (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append to this page")
    options = parser.parse_args()
    qemu = pick(qemus(CACHE), options.qemu)
    with workplace(CACHE / "lab") as place:
        found = trio.run(measure, qemu, place, options)
    text = page(qemu, found, options)
    print(text)
    if options.out:
        with options.out.open("a") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
