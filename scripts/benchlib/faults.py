"""Operations that are killed at a point, and what must hold afterwards."""

from __future__ import annotations

import sys
from contextlib import suppress

import attrs
import trio
from benchlib.lab import DOMAIN, Guest
from benchlib.tree import files_known

from snaporch import CreateFlag, DomainSnapshot, DomainState, Orchestrator, RevertFlag, SnaporchError
from snaporch.guest.report import Report
from snaporch.states import State
from snaporch.testing.dying import NEVER

DYING = [sys.executable, "-m", "snaporch.testing.dying"]
VICTIMS = ("us", "qemu", "both")
SECONDS = 60.0
NUMBERS = 5
KINDS_OF_FILE = {".qcow2", ".mem", ".sink", ".new"}


class Wrong(Exception):
    """What must hold does not."""


@attrs.frozen
class Kind:
    """A kind of operation that is killed.

    Attributes:
        name: for the table.
        command: of `snaporch.testing.dying`; NEW stands for a fresh name.
        snapshots: names that are there before.
        runs: whether the domain runs.
        first: a command that is killed `us` at the point `at`, before this one: for recovery.
        at: see `first`.
    """

    name: str
    command: tuple[str, ...]
    snapshots: tuple[str, ...] = ()
    runs: bool = True
    first: tuple[str, ...] = ()
    at: str = ""


NEW = "new"
KINDS = (
    Kind("create background", ("create", NEW, "background")),
    Kind("create precopy", ("create", NEW, "precopy")),
    Kind("create paused", ("create", NEW, "paused")),
    Kind("revert", ("revert", "a"), ("a",)),
    Kind("delete live", ("delete", "b"), ("a", "b", "c")),
    Kind("delete offline", ("delete", "b"), ("a", "b", "c"), runs=False),
    Kind("recover", ("recover",), first=("create", NEW, "background"), at="after:resume#1"),
)


@attrs.define
class Bench:
    """A guest on which operations are killed."""

    guest: Guest

    @property
    def _orch(self) -> Orchestrator:
        return self.guest.orchestrator

    async def names(self) -> list[str]:
        """Return the names of the domain's snapshots."""
        return [record.name for record in await self._orch.list(DOMAIN)]

    async def picture(self) -> tuple[list[str], str]:
        """Return the names of the domain's snapshots, and the id of its last operation."""
        operations = await self._orch.operations(DOMAIN)
        return await self.names(), operations[-1].id if operations and operations[-1].ended is not None else ""

    async def _state(self) -> DomainState:
        return (await self._orch.domain_info(DOMAIN)).state

    async def run(self, *command: str) -> tuple[int, str]:
        """Run `snaporch.testing.dying` on the guest; return its status and what it said."""
        words = [*DYING, str(self.guest.place / "root"), DOMAIN, *command]
        with trio.fail_after(SECONDS):
            done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
        return done.returncode, done.stdout.decode()

    async def prepare(self, kind: Kind) -> None:
        """Have the domain as the kind wants it: running or not, with its snapshots and no other."""
        if await self._state() is not DomainState.RUNNING:
            await self._orch.start(DOMAIN)
        for name in reversed(await self.names()):
            if name not in kind.snapshots:
                await self._orch.delete(DOMAIN, name)
        for name in kind.snapshots:
            if name not in await self.names():
                for later in reversed(kind.snapshots[kind.snapshots.index(name) :]):
                    with suppress(SnaporchError):
                        await self._orch.delete(DOMAIN, later)
                await self._orch.create(DOMAIN, DomainSnapshot(name), CreateFlag.LIVE)
                await self.well(restored=False)
        if not kind.runs:
            await self._orch.destroy(DOMAIN)
        if kind.first:
            await self.run(kind.at, "us", *kind.first)

    async def trace(self, kind: Kind) -> list[str]:
        """Do an operation with nobody killed, and return all points of it."""
        await self.prepare(kind)
        status, said = await self.run("trace", "us", *kind.command)
        if status:
            raise Wrong(f"{kind.name} fails by itself")
        return said.split()

    async def strike(self, kind: Kind, where: str, victim: str) -> str:
        """Kill at a point, recover, check everything, and return how it ended.

        Raises:
            Wrong: something that must hold does not.
        """
        await self.prepare(kind)
        before = await self.picture()
        status, _ = await self.run(where, victim, *kind.command)
        if status == NEVER:
            return "not reached"
        if status < 0 and victim == "us" and kind.runs and kind.command[0] != "revert":
            await self.runs_again()
        return await self.mend(kind, before)

    async def runs_again(self) -> None:
        """See the guest run, with nobody's help."""
        mark = self.guest.serial.mark()
        try:
            await self.guest.serial.more(mark, 2, 10)
        except trio.TooSlowError:
            raise Wrong("the guest was left standing") from None

    async def mend(self, kind: Kind, before: tuple[list[str], str]) -> str:
        """Recover, and check everything."""
        ended = await self._orch.recover()
        if await self._orch.recover():
            raise Wrong("recovery has more to do after it was done")
        if any(record.state not in {State.COMPLETE, State.ROLLED_BACK} for record in ended):
            raise Wrong(f"recovery left {[record.state for record in ended]}")
        last = (await self._orch.operations(DOMAIN))[-1]
        names, begun = await self.names(), last.id != before[1]
        self._check_outcome(kind, last.state if begun else State.ROLLED_BACK, before[0], names)
        await self.well(restored=False)
        await self._check_files()
        for name in names:
            await self._orch.revert(DOMAIN, name, RevertFlag.RUNNING)
            await self.well(restored=True)
        await self._check_files()
        if not begun:
            return "never begun"
        return "complete" if last.state == State.COMPLETE else "undone"

    def _check_outcome(self, kind: Kind, state: str, before: list[str], names: list[str]) -> None:
        """See that the catalog has what the operation's end says."""
        verb = kind.command[0] if not kind.first else kind.first[0]
        changed = {"create": [*before, NEW], "revert": before, "delete": [n for n in before if n != "b"]}[verb]
        wanted = changed if state == State.COMPLETE else before
        if names != wanted:
            raise Wrong(f"{state}, and the snapshots are {names} in place of {wanted}")

    async def well(self, *, restored: bool) -> None:
        """Start the guest if it was killed, and see that it runs and its memory and disks are of one instant."""
        booted = await self._state() is DomainState.INACTIVE
        if booted:
            await self._orch.start(DOMAIN)
        if await self._state() is not DomainState.RUNNING:
            raise Wrong(f"the guest is {await self._state()}")
        serial = self.guest.serial
        mark = serial.mark()
        with trio.move_on_after(SECONDS):
            while not _enough(serial.reports(mark)[1:], restored=restored):  # noqa: ASYNC110 - a file tells nobody
                await trio.sleep(0.01)
        reports = serial.reports(mark)[1:]
        if not _enough(reports, restored=restored):
            raise Wrong("the guest is silent")
        troubles = [] if booted else serial.troubles(mark)
        if troubles or reports[-1].errors:
            raise Wrong("; ".join(troubles[:3]) or f"{reports[-1].errors} errors")

    async def _check_files(self) -> None:
        """See that each snapshot is what was saved, and that each file has somebody who knows it."""
        for record in await self._orch.list(DOMAIN):
            report = await self._orch.verify(DOMAIN, record.name)
            if not report.ok:
                raise Wrong(f"{record.name} is damaged: {report.problems}")
        home = self.guest.place / "root" / DOMAIN
        found = {str(path) for path in home.iterdir() if path.suffix in KINDS_OF_FILE}
        if unknown := found - await files_known(self._orch, DOMAIN):
            raise Wrong(f"orphans: {sorted(unknown)}")
        if len(runs := [path.name for path in home.iterdir() if path.name.startswith("run-")]) > 1:
            raise Wrong(f"directories of processes that are gone: {runs}")


def _enough(reports: list[Report], *, restored: bool) -> bool:
    if not reports:
        return False
    first, last = reports[0], reports[-1]
    swept = last.up_ms >= first.up_ms + 500 if restored else True
    return bool(last.errors) or (last.checked > 0 and last.seq >= first.seq + NUMBERS and swept)
