"""A domain on which operations are killed, alone or together with others, and what must hold for it afterwards."""

from __future__ import annotations

import attrs
import trio
from benchlib.lab import Guest, Serial
from benchlib.tree import files_known

from snaporch import DomainState, Orchestrator
from snaporch.drivers.local.process import LocalProcess, process_of
from snaporch.guest.report import Report
from snaporch.model.record import OperationRecord
from snaporch.testing.dying import hypervisors

SECONDS = 240.0  # for what takes two on a host that does nothing else
NUMBERS = 5
KINDS_OF_FILE = {".qcow2", ".mem", ".sink", ".index", ".new"}


class Wrong(Exception):
    """What must hold does not."""


@attrs.define
class Member:
    """A domain of a guest's orchestrator, and what it says."""

    guest: Guest
    domain: str
    serial: Serial
    _mark: int = 0

    @property
    def _orch(self) -> Orchestrator:
        return self.guest.orchestrator

    async def names(self) -> list[str]:
        """Return the names of its snapshots."""
        return [record.name for record in await self._orch.list(self.domain)]

    async def last(self) -> OperationRecord | None:
        """Return its newest operation."""
        return next(reversed(await self._orch.operations(self.domain)), None)

    async def state(self) -> DomainState:
        """Return how it is."""
        return (await self._orch.domain_info(self.domain)).state

    def hypervisors(self) -> list[LocalProcess]:
        """Return the processes that run it, of which nobody but the kernel may know."""
        return [
            found
            for pid in hypervisors(str(self.guest.root), self.domain)
            if (found := process_of(pid)) is not None
        ]

    async def boot(self) -> None:
        """Have it run."""
        if await self.state() is not DomainState.RUNNING:
            mark = self.serial.mark()
            await self._orch.start(self.domain)
            # A point in the midst of its boot would be one from which it boots, and so would seem to be none.
            await self.serial.more(mark, 2, SECONDS)

    def begin(self) -> None:
        """Take note that the operation begins that is killed."""
        self._mark = self.serial.mark()

    async def runs_again(self) -> None:
        """See the guest run, with nobody's help."""
        mark = self.serial.mark()
        try:
            await self.serial.more(mark, 2, SECONDS)
        except trio.TooSlowError:
            raise Wrong(f"{self.domain} was left standing") from None

    async def well(self, *, restored: bool, lost: bool = True) -> None:
        """Start the guest if it was killed, and see that it runs and its memory and disks are of one instant.

        Args:
            restored: it was gone back to a snapshot.
            lost: what it wrote since may be lost.
        """
        booted, serial = await self.state() is DomainState.INACTIVE, self.serial
        said = [] if lost else serial.reports(self._mark)
        mark = serial.mark()
        if booted:
            await self._orch.start(self.domain)
        if await self.state() is not DomainState.RUNNING:
            raise Wrong(f"{self.domain} is {await self.state()}")
        with trio.move_on_after(SECONDS):
            while not _enough(serial.reports(mark)[1:], restored=restored):  # noqa: ASYNC110 - a file tells nobody
                await trio.sleep(0.01)
        reports = serial.reports(mark)[1:]
        if not _enough(reports, restored=restored):
            raise Wrong(f"{self.domain} is silent")
        # It boots with the newest number that is on its disks.
        if booted and said and (found := serial.reports(mark)[0].seq) < said[-1].seq:
            raise Wrong(f"{self.domain} had written number {said[-1].seq}, and its disks hold {found}")
        troubles = [] if booted else serial.troubles(mark)
        if troubles or reports[-1].errors:
            raise Wrong("; ".join(troubles[:3]) or f"{reports[-1].errors} errors")

    async def check_files(self) -> None:
        """See that each snapshot is what was saved, and that each file has somebody who knows it."""
        for record in await self._orch.list(self.domain):
            report = await self._orch.verify(self.domain, record.name)
            if not report.ok:
                raise Wrong(f"{record.name} is damaged: {report.problems}")
        home = self.guest.root / self.domain
        found = {str(path) for path in home.iterdir() if path.suffix in KINDS_OF_FILE}
        if unknown := found - await files_known(self._orch, self.domain):
            raise Wrong(f"orphans: {sorted(unknown)}")
        if len(runs := [path.name for path in home.iterdir() if path.name.startswith("run-")]) > 1:
            raise Wrong(f"directories of processes that are gone: {runs}")


def _enough(reports: list[Report], *, restored: bool) -> bool:
    if not reports:
        return False
    first, last = reports[0], reports[-1]
    swept = last.up_ms >= first.up_ms + 500 if restored else True
    return bool(last.errors) or (last.checked > 0 and last.seq >= first.seq + NUMBERS and swept)
