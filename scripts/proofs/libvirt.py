"""Proves that checkpoints of guests that libvirt manages are whole, gone back to by snaporch and by virsh.

    scripts/proof libvirt [--count 50] [--virsh 20] [--pair 11.3] [--minutes 60] [--out FILE]

A guest writes numbers to two disks and patterns to its RAM as fast as it can, and compares all of them all the
time. In each round a checkpoint is taken, the guest writes on, and then it goes back: its own verdict decides, and
the number that it goes on from must be one that it had reached at the point.

    ours       snaporch takes it live, and goes back to it
    reverted   snaporch takes it, `virsh snapshot-revert` goes back to it, `domain sync` follows (11.3 only)
    restored   snaporch takes it, `virsh restore` loads its memory, on overlays of the user's
    taken      `virsh snapshot-create-as --live` takes it, `domain sync` takes it over, snaporch goes back to it

Every snapshot is then verified and deleted. It takes root, and what scripts/setup unpacks. The table is Markdown.

Exit status: 0 all were right, 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import attrs
import trio

from snaporch.errors import SnaporchError
from snaporch.guest.build import build_tiny
from snaporch.guest.report import parse
from tests.conftest import ROOT, _qemus
from tests.libvirt.conftest import VERSIONS
from tests.libvirt.lab import Libvirt, running_libvirt
from tests.libvirt.world import LibvirtWorld, open_libvirt_world
from tests.live.world import HEAVY, NAME

BEYOND = 5  # reports that the guest gives before it goes back: it says the first number itself only in a report
REVERTS = ("11.3",)  # of those that scripts/setup unpacks


@attrs.define
class Tally:
    """What was found of one kind of round.

    Attributes:
        wanted: how many rounds there were to be.
        pauses: of each round, in milliseconds, where snaporch took the checkpoint.
        right: how many were right.
        wrong: a sentence for each that was not.
    """

    wanted: int
    pauses: list[float] = attrs.field(factory=list)
    right: int = 0
    wrong: list[str] = attrs.field(factory=list)


def check(right: bool, words: object) -> None:
    """Raise AssertionError where something is not right."""
    if not right:
        raise AssertionError(words)


async def take(world: LibvirtWorld, name: str, tally: Tally) -> tuple[int, int]:
    """Take a checkpoint by snaporch; return the least and the greatest number that the guest may go on from."""
    before = (await world.reports(1))[0].seq
    record = await world.create(name)
    tally.pauses.append((record.timings.pause or 0.0) * 1e3)
    return before, (await world.reports(BEYOND))[-1].seq


async def judge(world: LibvirtWorld, between: tuple[int, int], since: int) -> None:
    """See that the guest goes on from the point, and that memory and disks are of that one point.

    What it has said since then is of the guest that was left, which was beyond the point, and of the one that is
    back.
    """
    await world.check_consistent()
    least = min(report.seq for report in parse(world.text(since)))
    check(between[0] <= least <= between[1], f"it goes on from {least}, and was at {between} then")


async def ours(world: LibvirtWorld, name: str, tally: Tally) -> None:
    """See the head of this file."""
    between = await take(world, name, tally)
    since = world.position()
    await world.revert(name)
    await judge(world, between, since)


async def reverted(world: LibvirtWorld, name: str, tally: Tally) -> None:
    """See the head of this file; every second one after a revert of snaporch's own."""
    between = await take(world, name, tally)
    if tally.right % 2:
        await world.revert(name)
    since = world.position()
    await trio.to_thread.run_sync(world.virsh, "snapshot-revert", name)
    await judge(world, between, since)
    report = await world.orch.sync(NAME)
    check(report.followed == name, report)


async def restored(world: LibvirtWorld, name: str, tally: Tally) -> None:
    """See the head of this file; afterwards the domain is where it was before that."""
    between = await take(world, name, tally)
    record = next(each for each in await world.orch.list(NAME) if each.name == name)
    await world.orch.destroy(NAME)
    memory = record.snapshot.memory_file
    xml, mine = world.daemon.virsh("save-image-dumpxml", memory, "--security-info"), []
    for disk in record.snapshot.disks:
        mine.append(Path(f"{world.directory}/{disk.disk.target}-mine.qcow2"))
        backing = ["-F", disk.disk.format, "-b", disk.disk.path, str(mine[-1])]
        await trio.run_process([world.qemu.img, "create", "-q", "-f", "qcow2", *backing])
        xml = xml.replace(disk.disk.path, str(mine[-1]))
    changed = world.directory / "mine.xml"
    changed.write_text(xml)
    since = world.position()
    await trio.to_thread.run_sync(world.daemon.virsh, "restore", memory, "--xml", str(changed))
    await judge(world, between, since)
    world.virsh("destroy")
    for path in mine:
        path.unlink()
    await world.start()


async def taken(world: LibvirtWorld, name: str, _tally: Tally) -> None:
    """See the head of this file."""
    before = (await world.reports(1))[0].seq
    words = ["--live", "--memspec", f"file={world.directory}/{name}.mem,snapshot=external"]
    for target in ("vda", "vdb"):
        words += ["--diskspec", f"{target},file={world.directory}/{target}-{name}.qcow2"]
    await trio.to_thread.run_sync(world.virsh, "snapshot-create-as", name, *words)
    after = (await world.reports(BEYOND))[-1].seq
    report = await world.orch.sync(NAME)
    check(report.imported == (name,), report)
    since = world.position()
    await world.revert(name)
    await judge(world, (before, after), since)


KINDS: dict[str, Callable[[LibvirtWorld, str, Tally], Awaitable[None]]] = {
    "ours": ours,
    "reverted": reverted,
    "restored": restored,
    "taken": taken,
}


async def prove(daemon: Libvirt, place: Path, tallies: dict[str, Tally], until: float) -> None:
    """Go through all rounds, one of each kind after the other, until there are enough or the time is over."""
    qemu = _qemus()["7.2" if daemon.qemu == "-" else "10.0"]
    kernel = build_tiny(ROOT / ".cache/guest")
    async with open_libvirt_world(place / daemon.version, daemon, qemu, kernel, append=HEAVY) as world:
        while time.monotonic() < until:
            due = [k for k, t in tallies.items() if t.right + len(t.wrong) < t.wanted]
            if not due:
                return
            kind = min(due, key=lambda k: tallies[k].right / tallies[k].wanted)
            await one_round(world, kind, tallies[kind])
            if tallies[kind].wrong:
                return


async def one_round(world: LibvirtWorld, kind: str, tally: Tally) -> None:
    """Do one round, verify, delete, and count it."""
    name, began = f"{kind}-{tally.right + 1}", time.monotonic()
    try:
        await KINDS[kind](world, name, tally)
        report = await world.orch.verify(NAME, name)
        check(report.ok, report.problems)
        await world.orch.delete(NAME, name)
        await world.check_runs(2)
        tally.right += 1
        said = "right"
    except (AssertionError, SnaporchError) as error:
        said = f"WRONG: {type(error).__name__}: {error}"
        tally.wrong.append(f"{name}: {said}")
    print(f"{world.daemon.version:5} {name:14} {time.monotonic() - began:6.1f} s  {said[:2000]}", flush=True)


def table(found: dict[str, dict[str, Tally]]) -> str:
    """Return what was found as a table in Markdown."""
    rows = ["| libvirt | round | right | of | pause in ms: median [least-most] |", "|---|---|---|---|---|"]
    for version, tallies in found.items():
        for kind, tally in tallies.items():
            p = tally.pauses
            pause = f"{statistics.median(p):.0f} [{min(p):.0f}-{max(p):.0f}]" if p else ""
            rows.append(f"| {version} | {kind} | {tally.right} | {tally.right + len(tally.wrong)} | {pause} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Prove, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="rounds by snaporch alone, on each pair")
    parser.add_argument("--virsh", type=int, default=20, help="rounds of each other kind")
    parser.add_argument("--pair", action="append", help="the libvirt of a pair; by default all")
    parser.add_argument("--minutes", type=float, default=600, help="stop after that, on each pair")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    options, found = parser.parse_args(), dict[str, dict[str, Tally]]()
    for line in VERSIONS.read_text().splitlines():
        version, prefix, qemu = line.split()
        if options.pair and version not in options.pair:
            continue
        tallies = {kind: Tally(options.count if kind == "ours" else options.virsh) for kind in KINDS}
        if version not in REVERTS:
            del tallies["reverted"]
        found[version] = {kind: tally for kind, tally in tallies.items() if tally.wanted}
        unpacked = ROOT / f".cache/qemu-{qemu}"
        place = Path(tempfile.mkdtemp(prefix="snaporch-libvirt-"))
        with running_libvirt(version, Path(prefix), str(unpacked) if unpacked.exists() else "-") as daemon:
            until = time.monotonic() + options.minutes * 60
            trio.run(partial(prove, daemon, place, found[version], until))
        with suppress(OSError):
            os.rmdir(place)
    print(table(found))
    if options.out:
        with options.out.open("a") as file:
            file.write(table(found))
    sys.exit(any(tally.wrong for tallies in found.values() for tally in tallies.values()))


if __name__ == "__main__":
    main()
