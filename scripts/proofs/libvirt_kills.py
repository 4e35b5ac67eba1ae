"""Kills snaporch, libvirtd, QEMU or two of them at every point of operations on libvirt's domains; nothing is lost.

    scripts/proof libvirt-kills [--pair 11.3] [--kind NAME]… [--victim us|libvirtd|…]… [--every N]
                                [--record FILE [--minutes N]] [--out FILE]

The points of an operation are found by doing it once: those of `scripts/proof faults`, and each call to libvirt
that changes something. libvirtd is started again half a second after it was killed, as systemd does it; meanwhile
snaporch, where it lives, goes on. After the kill: the guest runs again with nobody's help, unless its QEMU was
killed; recovery; the operation is complete or undone; the guest runs with memory equal to disks (where QEMU was
killed libvirt has it inactive, and `domain start` boots it with all on its disks that it had said it wrote);
libvirt has the disks, in the running domain and in its definition, and the snapshots that snaporch has; nothing is
left of jobs, capabilities, copies and guards; each snapshot verifies, those that the operation was about are
reverted to; each file has an owner.

With --every N it is only every N-th point. With --record every kill is noted in a file, and not done again. The
table is Markdown. It takes root, and what scripts/setup unpacks.

Exit status: 0 all that must hold holds, 1 not all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import trio
from benchlib.faults import KINDS, Bench, Kind
from benchlib.lab import DOMAIN, Guest, GuestPlan, Qemu, Serial
from benchlib.member import Member, Wrong
from benchlib.tree import files_known
from proofs.faults import Kill, Record

from snaporch import SnaporchError
from snaporch.drivers.local.process import LocalProcess, process_of, wait_gone
from snaporch.guest.build import build_tiny
from snaporch.testing.dying import FAILING, NEVER, Mortals, hypervisors
from tests.conftest import ROOT, _qemus
from tests.libvirt.conftest import VERSIONS
from tests.libvirt.lab import Libvirt, running_libvirt
from tests.libvirt.test_records import check_records
from tests.libvirt.world import LibvirtWorld, open_libvirt_world
from tests.live.world import MIB, SECONDS, processes

PLAN = GuestPlan(ram=64 * MIB, dirty=5, rate=50, touched=16, report=20)
VICTIMS = ("us", "libvirtd", "qemu", "us+libvirtd", "us+qemu", "libvirtd+qemu")
AWAY_SECONDS = 0.5  # of libvirtd, before it is started again
STANDS_SECONDS = 10.0  # a guest that says nothing for so long stands
OPERATIONS = (
    "create background",
    "create paused",
    "revert",
    "delete live",
    "delete live, a middle",
    "delete offline",
    "delete offline, a middle",
    "create background, failing",
    "revert, failing",
    "recover by undoing",
    "recover a revert",
)


@attrs.define
class LibvirtMember(Member):
    """See Member; by libvirt too, all is as snaporch has it."""

    world: LibvirtWorld = attrs.field(kw_only=True)

    def hypervisors(self) -> list[LocalProcess]:
        """See Member."""
        uuid = self.world.daemon.virsh("domuuid", self.world.theirs).strip()
        found = [process_of(pid) for pid in hypervisors(str(self.guest.root), self.domain, uuid)]
        return [each for each in found if each is not None]

    async def check_files(self) -> None:
        """See Member; the overlays lie beside the user's own images."""
        await super().check_files()
        found = {str(path) for path in self.world.directory.glob("*.qcow2")}
        if found != (known := {p for p in await files_known(self._orch, self.domain) if p.endswith(".qcow2")}):
            raise Wrong(f"without an owner: {sorted(found - known)}, gone: {sorted(known - found)}")
        await self._check_libvirt()

    async def _check_libvirt(self) -> None:
        world, disks = self.world, (await self._orch.domain_info(self.domain)).disks
        ours = {disk.target: disk.active for disk in disks}
        for options in ((), ("--inactive",)):
            if (theirs := world.libvirt_disks(*options)) != ours:
                raise Wrong(f"libvirt has {theirs} {' '.join(options)}, and snaporch {ours}")
        try:
            await check_records(world)
        except AssertionError as error:
            raise Wrong(f"libvirt's records: {error}") from None
        if copies := [name for name in world.daemon.virsh("list", "--all", "--name").split() if "copy" in name]:
            raise Wrong(f"copies that are left: {copies}")
        xml = world.virsh("dumpxml")
        if left := [word for word in ("<mirror", "urn:snaporch:merging", "-incoming") if word in xml]:
            raise Wrong(f"left in libvirt's XML: {left}")
        answer = world.virsh("qemu-monitor-command", '{"execute": "query-migrate-capabilities"}')
        set_ = {each["capability"] for each in json.loads(answer)["return"] if each["state"]}
        if "background-snapshot" in set_:
            raise Wrong("QEMU is left with the capability background-snapshot")
        await self._await_none_left()

    async def _await_none_left(self) -> None:
        """Wait for the end of guards and sinks, which notice in a moment that nobody needs them."""
        with trio.move_on_after(SECONDS):
            while left := [w for w in processes(self.world.directory).values() if "qemu" not in w[0]]:  # noqa: ASYNC110
                await trio.sleep(0.05)
            return
        raise Wrong(f"processes that are left: {left}")


@attrs.define
class LibvirtBench(Bench):
    """See Bench."""

    world: LibvirtWorld = attrs.field(kw_only=True)

    async def strike(self, kind: Kind, where: str, victim: str) -> str:
        """See Bench; libvirtd is another one that may be killed."""
        kind = await self.prepare(kind)
        before, last, victims = await self._names(), await self._last(), victim.split("+")
        doomed = self.members[0].hypervisors() if "qemu" in victims else []
        if (daemon := self.world.daemon.process) is None:
            raise AssertionError("libvirtd is kept running")
        words = victim.replace("libvirtd", str(daemon.pid))
        status, _ = await self.run(where, words, *kind.command)
        if status == NEVER:
            return "not reached"
        if "libvirtd" in victims:
            await self._is_back(daemon.pid)
        if "qemu" in victims:
            for process in doomed:  # what is dying still counts as running
                await wait_gone(process)
        stood = "qemu" not in victims and kind.alive and not await self._runs(kind)
        ended = await self._mend(kind, before, last)
        return f"{ended}, stood" if stood else ended

    async def _runs(self, kind: Kind) -> bool:
        """Return whether the guest runs with nobody's help; only in a revert it may not."""
        if kind.what[0].removeprefix(FAILING) != "revert":
            await self._run_again(kind)
            return True
        serial = self.members[0].serial
        with trio.move_on_after(STANDS_SECONDS):
            await serial.more(serial.mark(), 2, SECONDS)
            return True
        return False

    async def _is_back(self, old: int) -> None:
        with trio.fail_after(SECONDS):
            while not self._answers(old):  # noqa: ASYNC110 - another process
                await trio.sleep(0.05)

    def _answers(self, old: int) -> bool:
        """Return whether another daemon than the one of before does."""
        daemon, words = self.world.daemon, ("-q", "-c", "qemu:///system", "domstate", self.world.theirs)
        there = daemon.process is not None and daemon.process.pid != old
        return there and daemon.run("virsh", *words).returncode == 0


@asynccontextmanager
async def kept_running(daemon: Libvirt) -> AsyncIterator[None]:
    """Start libvirtd again whenever it ends."""

    async def keep() -> None:
        while True:
            if daemon.process is not None and daemon.process.poll() is not None:
                await trio.sleep(AWAY_SECONDS)
                await trio.to_thread.run_sync(daemon.start)
            await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened(daemon: Libvirt, place: Path) -> AsyncIterator[LibvirtBench]:
    """Yield a bench with a guest that a libvirtd manages, which is started again whenever it ends."""
    found = _qemus()["7.2" if daemon.qemu == "-" else "10.0"]
    kernel, append = build_tiny(ROOT / ".cache/guest"), "rate=50 dirty=5 report=20"
    async with (
        kept_running(daemon),
        open_libvirt_world(place, daemon, found, kernel, append=append, memory=PLAN.ram) as world,
    ):
        qemu = Qemu(f"{found.version}", found.emulator, found.img)
        guest = Guest(world.directory, Serial(world.log), PLAN, qemu, orchestrator=world.orch)
        member, mortals = LibvirtMember(guest, DOMAIN, guest.serial, world=world), Mortals()
        try:
            yield LibvirtBench(guest, mortals, (member,), world=world)
        finally:
            mortals.close()


async def prove(daemon: Libvirt, place: Path, options: argparse.Namespace, record: Record) -> None:
    """Kill at every point of every kind."""
    for kind in [kind for kind in KINDS if kind.name in (options.kind or OPERATIONS)]:
        due: list[tuple[str, str]] | None = None
        while (due is None or due) and not record.over:
            async with opened(daemon, place / "w") as bench:
                if due is None:
                    points = await bench.trace(kind)
                    places = [f"before:{points[0]}", *(f"after:{point}" for point in points)][:: options.every]
                    due = [(where, victim) for where in places for victim in options.victim or VICTIMS]
                await strike_all(bench, kind, due, record)


async def strike_all(bench: LibvirtBench, kind: Kind, due: list[tuple[str, str]], record: Record) -> None:
    """Kill until nothing is due, or until something is wrong: then what follows needs a guest that is well."""
    while due and not record.over:
        (where, victim), version, ended = due.pop(0), bench.guest.qemu.version, ""
        point = where.replace(":", " ")
        if ("qemu" in victim and not kind.runs) or record.has(version, kind.name, point, victim):
            continue
        try:
            ended = await bench.strike(kind, where, victim)
        except (Wrong, SnaporchError, AssertionError, trio.TooSlowError) as error:
            ended = f"WRONG: {error or 'hangs'}"
        record.note(Kill(version, kind.name, point, victim, ended, kind.name))
        if ended.startswith("WRONG"):
            return


def table(kills: Sequence[Kill]) -> str:
    """Return what was found as a table in Markdown."""
    pairs = {line.split()[2]: line.split()[0] for line in VERSIONS.read_text().splitlines()}
    rows = ["| libvirt | operation | killed | kills | ended |", "|---|---|---|---|---|"]
    for group in dict.fromkeys((kill.qemu, kill.kind, kill.victim) for kill in kills):
        found = [kill.ended.split(":")[0] for kill in kills if (kill.qemu, kill.kind, kill.victim) == group]
        ends = ", ".join(f"{count} {end}" for end, count in sorted(Counter(found).items()))
        rows.append(f"| {pairs.get(group[0], group[0])} | {group[1]} | {group[2]} | {len(found)} | {ends} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Kill, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", action="append", help="the libvirt of a pair; by default all")
    parser.add_argument("--kind", action="append", choices=OPERATIONS)
    parser.add_argument("--victim", action="append", choices=VICTIMS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    options = parser.parse_args()
    record = Record(options.record, time.monotonic() + 60 * options.minutes)
    record.load()
    for line in VERSIONS.read_text().splitlines():
        version, prefix, qemu = line.split()
        if options.pair and version not in options.pair:
            continue
        unpacked = ROOT / f".cache/qemu-{qemu}"
        place = Path(tempfile.mkdtemp(prefix="snaporch-libvirt-"))
        with running_libvirt(version, Path(prefix), str(unpacked) if unpacked.exists() else "-") as daemon:
            trio.run(partial(prove, daemon, place, options, record))
        with suppress(OSError):
            os.rmdir(place)
    wrong = [kill for kill in record.kills if kill.wrong]
    print(table(record.kills), f"{len(record.kills)} kills, {len(wrong)} wrong", *wrong, sep="\n")
    if options.out:
        with options.out.open("a") as file:
            file.write(table(record.kills))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
