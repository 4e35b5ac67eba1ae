"""The guards of a simulated guest: they act when the program that posted them is killed."""

from __future__ import annotations

import abc
from collections.abc import Callable

from snaporch.drivers.base import Guard, LoadNote
from snaporch.drivers.qemu.guard import may_have_loaded
from snaporch.drivers.simulated.client import Client
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.models import Process


class SimulatedGuard(Guard):
    """See Guard."""

    def __init__(self, client: Client, process: SimulatedProcess) -> None:
        self._client = client
        self._process = process

    @abc.abstractmethod
    def hear(self) -> None:
        """Hear of the death of the program that has posted it."""

    async def post(self) -> None:
        """See Guard."""
        await self._client.call("guard.post", self._process.name, lambda: self._client.on_death.add(self.hear))

    async def dismiss(self) -> None:
        """See Guard."""
        await self._client.call(
            "guard.dismiss", self._process.name, lambda: self._client.on_death.discard(self.hear)
        )


class PauseGuard(SimulatedGuard):
    """See Machine.guard."""

    def __init__(
        self, client: Client, process: SimulatedProcess, *, keep_stream: bool, rival: Process | None, thaw: bool
    ) -> None:
        super().__init__(client, process)
        self._keep_stream = keep_stream
        self._rival = rival
        self._thaw = thaw

    def hear(self) -> None:
        """See SimulatedGuard; acts at once."""
        if self._rival is not None and (rival := self._client.host.find(self._rival)) is not None:
            rival.settle()
            rival.end("its guard has ended it")
        self._process.settle()
        if self._process.ended or self._process.hung:
            return
        migration = self._process.migration
        if migration is not None and not self._keep_stream:
            migration.cancel()
        self._process.cont()
        if self._thaw:
            self._process.thaw()


class ReadingGuard(SimulatedGuard):
    """One that has to read the catalog, which the threads of a program that is simulated to be dead still write to.

    So it acts a while later: `act` is given that instant.
    """

    SECONDS = 0.05

    def __init__(self, client: Client, process: SimulatedProcess, act: Callable[[float], None]) -> None:
        super().__init__(client, process)
        self._act = act

    def hear(self) -> None:
        """See SimulatedGuard."""
        self._process.guarded = self._client.host.now() + self.SECONDS, self._act


def load_guard(client: Client, process: SimulatedProcess, note: LoadNote) -> ReadingGuard:
    """See Machine.load_guard."""

    def act(at: float) -> None:
        loaded = may_have_loaded(str(note.catalog), note.operation)
        if loaded is None or process.guest.runs:
            return
        if loaded and process.keeps(note.kept, note.targets):
            process.load_inside(note.tag, note.targets)
            if not note.run:
                return
        process.cont(at)

    return ReadingGuard(client, process, act)
