"""Operations that are killed at a point, and how they end."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, DOMAIN, Guest, Serial, made
from benchlib.member import SECONDS, Member, Wrong

from snaporch import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, Orchestrator, RevertFlag
from snaporch.drivers.local.process import LocalProcess, wait_gone
from snaporch.engine.states import State
from snaporch.model.record import OperationRecord
from snaporch.testing import dying
from snaporch.testing.dying import FAILING, NEVER, Mortals
from snaporch.testing.outage import FILE_SYSTEMS, Outlet, cut

OTHER = "other"  # the second domain of a group
LATER = "us, later qemu"  # nobody has recovered in between, and the guest has run on
POWER = {f"power, {kind}": kind for kind in FILE_SYSTEMS}
VICTIMS = ("us", "qemu", "both", LATER, *POWER)
MANY = 6  # snapshots: those that kills have left are deleted, all in one


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
        group: it is on two domains, and the QEMU that is killed is that of one.
    """

    name: str
    command: tuple[str, ...]
    snapshots: int = 0
    runs: bool = True
    first: tuple[str, tuple[str, ...]] | None = None
    dead: bool = False
    inside: bool = False
    group: bool = False

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
    Kind("create a group", POINT, group=True),
    Kind("create a group, paused", ("create", NEW, "paused"), group=True),
    Kind("create a group, failing", (f"{FAILING}create", NEW, "background"), group=True),
    Kind("revert a group", ("revert", LAST), 1, group=True),
    Kind("revert a group, failing", (f"{FAILING}revert", LAST), 1, group=True),
    Kind("delete a group", ("delete", LAST), 1, group=True),
)


@attrs.define
class Bench:
    """A guest, or a group of two, on which operations are killed.

    Attributes:
        members: the domains.
        outlet: where the guest's and the orchestrator's files are, if their power can be cut.
    """

    guest: Guest
    mortals: Mortals
    members: tuple[Member, ...]
    outlet: Outlet | None = None

    @property
    def _orch(self) -> Orchestrator:
        return self.guest.orchestrator

    @property
    def _domains(self) -> tuple[str, ...]:
        return tuple(member.domain for member in self.members)

    async def _names(self) -> list[str]:
        """Return the names of the snapshots, which all members have."""
        found = [await member.names() for member in self.members]
        if any(names != found[0] for names in found):
            raise Wrong(f"one has what the other has not: {found}")
        return found[0]

    async def _last(self) -> OperationRecord | None:
        """Return the newest operation, which was on all members."""
        found = [await member.last() for member in self.members]
        if any(last != found[0] for last in found):
            raise Wrong(f"one was operated on without the other: {found}")
        return found[0]

    async def run(self, where: str, victim: str, *command: str) -> tuple[int, str]:
        """Run `snaporch.testing.dying` on the guest; return its status and what it said."""
        await self._begin(where, victim, command)
        with trio.fail_after(SECONDS):
            return await self.mortals.ended()

    async def _begin(self, where: str, victim: str, command: Sequence[str]) -> int:
        return await self.mortals.start(
            str(self.guest.root), ",".join(sorted(self._domains)), where, victim, *command
        )

    async def _named(self, command: Sequence[str]) -> tuple[str, ...]:
        """Return a command with real names in it."""
        names = await self._names()
        there = {NEW: self.guest.fresh_name(), **dict(zip((LAST, BEFORE), names[::-1], strict=False))}
        return tuple(there.get(word, word) for word in command)

    async def prepare(self, kind: Kind) -> Kind:
        """Have the domain as the kind wants it, running or not, with snapshots; return it with their names."""
        await self._sort_out(kind)
        for member in self.members:
            await member.boot()
        names = await self._names()
        if superfluous := names[: max(0, len(names) - (kind.snapshots or MANY))]:
            await self._orch.delete_group(self._domains, superfluous)
        while len(names) < kind.snapshots:
            names.append(self.guest.fresh_name())
            await self._take(kind, names[-1])
        for member in self.members:
            if not kind.runs:
                await self._orch.destroy(member.domain)
            member.begin()
        if not kind.first:
            return attrs.evolve(kind, command=await self._named(kind.command))
        first = (kind.first[0], await self._named(kind.first[1]))
        doomed = self.members[0].hypervisors() if kind.dead else []
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
            await self._orch.delete(DOMAIN, await self._names())

    async def _take(self, kind: Kind, name: str) -> None:
        disks = (await self._orch.domain_info(DOMAIN)).disks if kind.inside else ()
        inside = tuple(DiskSnapshot(DeviceDisk(disk.target), external=False) for disk in disks)
        flags = CreateFlag(0) if kind.inside else CreateFlag.LIVE
        await self._orch.create_group(self._domains, DomainSnapshot(name, disks=inside), flags)

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
        before, last = await self._names(), await self._last()
        if victim in POWER:
            async with self._unplugged() as outer:
                status, _ = await self.run(where, f"{dying.POWER}{outer}", *kind.command)
            return "not reached" if status == NEVER else await self._mend(kind, before, last)
        doomed = self.members[0].hypervisors()
        status, _ = await self.run(where, "us" if victim == LATER else victim, *kind.command)
        if status == NEVER:
            return "not reached"
        if status < 0 and victim in {"us", LATER}:
            await self._run_again(kind)
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

    def _hypervisors(self) -> list[LocalProcess]:
        return [process for member in self.members for process in member.hypervisors()]

    async def strike_after(self, kind: Kind, victim: str, seconds: float) -> str:
        """Kill us, or cut the power, so long after the beginning of an operation; as `strike`."""
        kind = await self.prepare(kind)
        before, last = await self._names(), await self._last()

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
            await self._run_again(kind)
        ended = await self._mend(kind, before, last)
        if status == 0 and ended != "complete" and not kind.command[0].startswith(FAILING):
            raise Wrong(f"it was complete, and now it is {ended}")
        return ended

    async def _run_again(self, kind: Kind) -> None:
        for member in self.members if kind.alive else ():
            await member.runs_again()

    async def _mend(self, kind: Kind, before: list[str], last: OperationRecord | None) -> str:
        """Recover, and check everything."""
        ended = await self._orch.recover()
        if await self._orch.recover():
            raise Wrong("recovery has more to do after it was done")
        if any(record.state not in {State.COMPLETE, State.ROLLED_BACK} for record in ended):
            raise Wrong(f"recovery left {[record.state for record in ended]}")
        now, names = await self._last(), await self._names()
        begun = now is not None and (kind.first is not None or last is None or now.id != last.id)
        complete = begun and now is not None and now.state == State.COMPLETE
        verb, subject = kind.what[0].removeprefix(FAILING), kind.what[1]
        changed = {"create": [*before, subject], "revert": before, "delete": [n for n in before if n != subject]}
        if names != (changed[verb] if complete else before):
            raise Wrong(f"{now and now.state}, and of the snapshots {before} there are {names}")
        for member in self.members:
            await member.well(restored=False, lost=verb == "revert" and complete)
            await member.check_files()
        for name in names if verb == "delete" else {subject}.intersection(names):
            await self._orch.revert_group(self._domains, name, RevertFlag.RUNNING)
            for member in self.members:
                await member.well(restored=True)
        return "complete" if complete else "undone" if begun else "never begun"


@asynccontextmanager
async def open_bench(
    guest: Guest, outlet: Outlet | None = None, *, other: Path | None = None
) -> AsyncIterator[Bench]:
    """Yield a bench around a guest; with another beside it if there is a fresh file `other` for what that says."""
    mortals, members = Mortals(), [Member(guest, DOMAIN, guest.serial)]
    async with AsyncExitStack() as stack:
        stack.callback(mortals.close)
        if other is not None:
            definition = await made(OTHER, guest.place, CACHE, guest.qemu, guest.plan)
            await guest.orchestrator.define(attrs.evolve(definition, serial=str(other)))
            members.append(Member(guest, OTHER, Serial(other)))
            stack.push_async_callback(guest.destroy, OTHER)
            await members[-1].boot()
        yield Bench(guest, mortals, tuple(members), outlet)
