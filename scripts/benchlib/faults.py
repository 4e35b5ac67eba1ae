"""Operations that are killed at a point, and what must hold afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import trio
from benchlib.lab import DOMAIN, Guest
from benchlib.tree import files_known

from snaporch import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, DomainState, Orchestrator, RevertFlag
from snaporch.drivers.qemu.process import started, wait_gone
from snaporch.guest.report import Report
from snaporch.models import OperationRecord, Process
from snaporch.states import State
from snaporch.testing import dying
from snaporch.testing.dying import FAILING, NEVER, Mortals, hypervisors
from snaporch.testing.outage import FILE_SYSTEMS, Outlet, cut

LATER = "us, later qemu"  # nobody has recovered in between, and the guest has run on
POWER = {f"power, {kind}": kind for kind in FILE_SYSTEMS}
VICTIMS = ("us", "qemu", "both", LATER, *POWER)
SECONDS = 240.0  # for what takes two on a host that does nothing else
NUMBERS = 5
KINDS_OF_FILE = {".qcow2", ".mem", ".sink", ".new"}
MANY = 6  # snapshots: those that kills have left are deleted, all in one


class Wrong(Exception):
    """What must hold does not."""


@attrs.frozen
class Kind:
    """A kind of operation that is killed.

    Attributes:
        name: for the table.
        command: of `snaporch.testing.dying`; NEW is a fresh name, and LAST and BEFORE are snapshots that there are.
        snapshots: how many there are at least; and at most, but for a create.
        runs: whether the domain runs.
        first: for recovery: the command that is killed before it, and where.
        dead: for recovery: QEMU is killed together with that.
        inside: all snapshots are inside the images, else all are in files of their own.
    """

    name: str
    command: tuple[str, ...]
    snapshots: int = 0
    runs: bool = True
    first: tuple[str, tuple[str, ...]] | None = None
    dead: bool = False
    inside: bool = False

    @property
    def alive(self) -> bool:
        """Whether the guest runs when the kill comes."""
        return self.runs and not self.dead

    @property
    def what(self) -> tuple[str, ...]:
        """The operation that is to be complete or undone."""
        return self.first[1] if self.first else self.command


NEW, LAST, BEFORE = "NEW", "LAST", "BEFORE"
RECOVER = ("recover",)
POINT = ("create", NEW, "background")
SLOWLY = str(40 * 2**20)  # bytes a second of a stream that is to outlive us
KINDS = (
    Kind("create background", ("create", NEW, "background")),
    Kind("create precopy", ("create", NEW, "precopy")),
    Kind("create paused", ("create", NEW, "paused")),
    Kind("create internal", ("create", NEW, "internal"), inside=True),
    Kind("revert", ("revert", LAST), 1),
    Kind("revert internal", ("revert", LAST), 1, inside=True),
    Kind("delete live", ("delete", LAST), 1),
    Kind("delete live, a middle", ("delete", BEFORE), 3),
    Kind("delete internal", ("delete", LAST), 1, inside=True),
    Kind("delete offline", ("delete", LAST), 1, runs=False),
    Kind("delete offline, a middle", ("delete", BEFORE), 3, runs=False),
    Kind("create background, failing", (f"{FAILING}create", NEW, "background")),
    Kind("create paused, failing", (f"{FAILING}create", NEW, "paused")),
    Kind("create internal, failing", (f"{FAILING}create", NEW, "internal"), inside=True),
    Kind("revert, failing", (f"{FAILING}revert", LAST), 1),
    Kind("revert internal, failing", (f"{FAILING}revert", LAST), 1, inside=True),
    Kind("recover by undoing", RECOVER, first=("after:resume#1", POINT)),
    Kind("recover by undoing, QEMU dead", RECOVER, first=("after:resume#1", POINT), dead=True),
    Kind("recover by adopting", RECOVER, first=(State.STREAMING, (*POINT, SLOWLY))),
    Kind("recover a revert", RECOVER, 1, first=(State.COMPLETE, ("revert", LAST))),
    Kind("recover a delete", RECOVER, 1, first=("after:block-commit#1", ("delete", LAST))),
    Kind("recover a delete, QEMU dead", RECOVER, 1, first=("after:block-commit#1", ("delete", LAST)), dead=True),
    Kind("recover a middle, QEMU dead", RECOVER, 3, first=("after:block-stream#1", ("delete", BEFORE)), dead=True),
)


@attrs.define
class Bench:
    """A guest on which operations are killed.

    Attributes:
        outlet: where the guest's and the orchestrator's files are, if their power can be cut.
    """

    guest: Guest
    mortals: Mortals
    outlet: Outlet | None = None
    _mark: int = 0

    @property
    def _orch(self) -> Orchestrator:
        return self.guest.orchestrator

    async def names(self) -> list[str]:
        """Return the names of the domain's snapshots."""
        return [record.name for record in await self._orch.list(DOMAIN)]

    async def _last(self) -> OperationRecord | None:
        return next(reversed(await self._orch.operations(DOMAIN)), None)

    async def _state(self) -> DomainState:
        return (await self._orch.domain_info(DOMAIN)).state

    async def run(self, where: str, victim: str, *command: str) -> tuple[int, str]:
        """Run `snaporch.testing.dying` on the guest; return its status and what it said."""
        await self._begin(where, victim, command)
        with trio.fail_after(SECONDS):
            return await self.mortals.ended()

    async def _begin(self, where: str, victim: str, command: Sequence[str]) -> int:
        return await self.mortals.start(str(self.guest.root), DOMAIN, where, victim, *command)

    async def _named(self, command: Sequence[str]) -> tuple[str, ...]:
        """Return a command with real names in it."""
        names = await self.names()
        there = {NEW: self.guest.fresh_name(), **dict(zip((LAST, BEFORE), names[::-1], strict=False))}
        return tuple(there.get(word, word) for word in command)

    async def prepare(self, kind: Kind) -> Kind:
        """Have the domain as the kind wants it, running or not, with snapshots; return it with their names."""
        await self._sort_out(kind)
        if await self._state() is not DomainState.RUNNING:
            mark = self.guest.serial.mark()
            await self._orch.start(DOMAIN)
            # A point in the midst of its boot would be one from which it boots, and so would seem to be none.
            await self.guest.serial.more(mark, 2, SECONDS)
        names = await self.names()
        if superfluous := names[: max(0, len(names) - (kind.snapshots or MANY))]:
            await self._orch.delete(DOMAIN, superfluous)
        while len(names) < kind.snapshots:
            names.append(self.guest.fresh_name())
            await self._take(kind, names[-1])
        if not kind.runs:
            await self._orch.destroy(DOMAIN)
        self._mark = self.guest.serial.mark()
        if not kind.first:
            return attrs.evolve(kind, command=await self._named(kind.command))
        first = (kind.first[0], await self._named(kind.first[1]))
        doomed = self._hypervisors() if kind.dead else []
        status, _ = await self.run(first[0], "both" if kind.dead else "us", *first[1])
        if status != -signal.SIGKILL:
            raise Wrong(f"{first[1]} was not killed at {first[0]}")
        for process in doomed:
            await wait_gone(process)
        return attrs.evolve(kind, first=first)

    async def _sort_out(self, kind: Kind) -> None:
        """Have no snapshots of the other sort: where both are, not each can be gone back to."""
        if any(bool(record.inside) != kind.inside for record in await self._orch.list(DOMAIN)):
            await self._orch.destroy(DOMAIN)
            await self._orch.delete(DOMAIN, await self.names())

    async def _take(self, kind: Kind, name: str) -> None:
        disks = (await self._orch.domain_info(DOMAIN)).disks if kind.inside else ()
        inside = tuple(DiskSnapshot(DeviceDisk(disk.target), external=False) for disk in disks)
        flags = CreateFlag(0) if kind.inside else CreateFlag.LIVE
        await self._orch.create(DOMAIN, DomainSnapshot(name, disks=inside), flags)

    async def trace(self, kind: Kind) -> list[str]:
        """Do an operation with nobody killed, and return all points of it."""
        prepared = await self.prepare(kind)
        status, said = await self.run("trace", "us", *prepared.command)
        if status:
            raise Wrong(f"{kind.name} fails by itself")
        return [line for line in said.splitlines() if "#" in line and " " not in line]

    async def strike(self, kind: Kind, where: str, victim: str) -> str:
        """Kill at a point, recover, check everything, and return how it ended.

        Raises:
            Wrong: something that must hold does not.
        """
        kind = await self.prepare(kind)
        before, last = await self.names(), await self._last()
        if victim in POWER:
            async with self._unplugged() as outer:
                status, _ = await self.run(where, f"{dying.POWER}{outer}", *kind.command)
            return "not reached" if status == NEVER else await self._mend(kind, before, last)
        doomed = self._hypervisors()
        status, _ = await self.run(where, "us" if victim == LATER else victim, *kind.command)
        if status == NEVER:
            return "not reached"
        if status < 0 and victim in {"us", LATER}:
            await self._runs_again(kind)
        if victim == LATER:
            doomed = self._hypervisors()
            for process in doomed:
                os.kill(process.pid, signal.SIGKILL)
        if victim != "us":
            for process in doomed:  # what is dying still counts as running
                await wait_gone(process)
        return await self._mend(kind, before, last)

    @asynccontextmanager
    async def _unplugged(self) -> AsyncIterator[Path]:
        """Give what cuts the power; afterwards it is back, and nobody has recovered yet."""
        if self.outlet is None:
            raise AssertionError("there is no power to cut")
        await self.guest.close()
        try:
            yield self.outlet.outer
        finally:
            self.outlet.restore()
            with trio.move_on_after(SECONDS, shield=True):
                await self.guest.open(recover=False)

    def _cut(self, outer: Path) -> None:
        cut(outer, [process.pid for process in self._hypervisors()])

    def _hypervisors(self) -> list[Process]:
        pids = hypervisors(str(self.guest.root), DOMAIN)
        return [Process(pid, started(pid) or 0, "") for pid in pids]

    async def strike_after(self, kind: Kind, victim: str, seconds: float) -> str:
        """Kill us, or cut the power, so long after the beginning of an operation; as `strike`."""
        kind = await self.prepare(kind)
        before, last = await self.names(), await self._last()

        async def kill(pid: int, outer: Path | None) -> None:
            await trio.sleep(seconds)
            if outer is not None:
                self._cut(outer)
            with suppress(ProcessLookupError):  # it was done just then
                os.kill(pid, signal.SIGKILL)

        async def operate(outer: Path | None = None) -> int:
            pid = await self._begin("never", "us", kind.command)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill, pid, outer)
                status, _ = await self.mortals.ended()
                nursery.cancel_scope.cancel()
            return status

        if victim in POWER:
            async with self._unplugged() as outer:
                status = await operate(outer)
                self._cut(outer)  # also where it was done by then
        elif (status := await operate()) < 0:
            await self._runs_again(kind)
        ended = await self._mend(kind, before, last)
        if status == 0 and ended != "complete" and not kind.command[0].startswith(FAILING):
            raise Wrong(f"it was complete, and now it is {ended}")
        return ended

    async def _runs_again(self, kind: Kind) -> None:
        """See the guest run, with nobody's help."""
        if not kind.alive:
            return
        mark = self.guest.serial.mark()
        try:
            await self.guest.serial.more(mark, 2, SECONDS)
        except trio.TooSlowError:
            raise Wrong("the guest was left standing") from None

    async def _mend(self, kind: Kind, before: list[str], last: OperationRecord | None) -> str:
        """Recover, and check everything."""
        ended = await self._orch.recover()
        if await self._orch.recover():
            raise Wrong("recovery has more to do after it was done")
        if any(record.state not in {State.COMPLETE, State.ROLLED_BACK} for record in ended):
            raise Wrong(f"recovery left {[record.state for record in ended]}")
        now, names = await self._last(), await self.names()
        begun = now is not None and (kind.first is not None or last is None or now.id != last.id)
        complete = begun and now is not None and now.state == State.COMPLETE
        verb, subject = kind.what[0].removeprefix(FAILING), kind.what[1]
        changed = {"create": [*before, subject], "revert": before, "delete": [n for n in before if n != subject]}
        if names != (changed[verb] if complete else before):
            raise Wrong(f"{now and now.state}, and of the snapshots {before} there are {names}")
        await self.well(restored=False, lost=verb == "revert" and complete)
        await self._check_files()
        for name in names if verb == "delete" else {subject}.intersection(names):
            await self._orch.revert(DOMAIN, name, RevertFlag.RUNNING)
            await self.well(restored=True)
        return "complete" if complete else "undone" if begun else "never begun"

    async def well(self, *, restored: bool, lost: bool = True) -> None:
        """Start the guest if it was killed, and see that it runs and its memory and disks are of one instant.

        Args:
            restored: it was gone back to a snapshot.
            lost: what it wrote since may be lost.
        """
        booted, serial = await self._state() is DomainState.INACTIVE, self.guest.serial
        said = [] if lost else serial.reports(self._mark)
        mark = serial.mark()
        if booted:
            await self._orch.start(DOMAIN)
        if await self._state() is not DomainState.RUNNING:
            raise Wrong(f"the guest is {await self._state()}")
        with trio.move_on_after(SECONDS):
            while not _enough(serial.reports(mark)[1:], restored=restored):  # noqa: ASYNC110 - a file tells nobody
                await trio.sleep(0.01)
        reports = serial.reports(mark)[1:]
        if not _enough(reports, restored=restored):
            raise Wrong("the guest is silent")
        # It boots with the newest number that is on its disks.
        if booted and said and (found := serial.reports(mark)[0].seq) < said[-1].seq:
            raise Wrong(f"the guest had written number {said[-1].seq}, and its disks hold {found}")
        troubles = [] if booted else serial.troubles(mark)
        if troubles or reports[-1].errors:
            raise Wrong("; ".join(troubles[:3]) or f"{reports[-1].errors} errors")

    async def _check_files(self) -> None:
        """See that each snapshot is what was saved, and that each file has somebody who knows it."""
        for record in await self._orch.list(DOMAIN):
            report = await self._orch.verify(DOMAIN, record.name)
            if not report.ok:
                raise Wrong(f"{record.name} is damaged: {report.problems}")
        home = self.guest.root / DOMAIN
        found = {str(path) for path in home.iterdir() if path.suffix in KINDS_OF_FILE}
        if unknown := found - await files_known(self._orch, DOMAIN):
            raise Wrong(f"orphans: {sorted(unknown)}")
        if len(runs := [path.name for path in home.iterdir() if path.name.startswith("run-")]) > 1:
            raise Wrong(f"directories of processes that are gone: {runs}")


@asynccontextmanager
async def open_bench(guest: Guest, outlet: Outlet | None = None) -> AsyncIterator[Bench]:
    """Yield a bench around a guest."""
    mortals = Mortals()
    try:
        yield Bench(guest, mortals, outlet)
    finally:
        mortals.close()


def _enough(reports: list[Report], *, restored: bool) -> bool:
    if not reports:
        return False
    first, last = reports[0], reports[-1]
    swept = last.up_ms >= first.up_ms + 500 if restored else True
    return bool(last.errors) or (last.checked > 0 and last.seq >= first.seq + NUMBERS and swept)
