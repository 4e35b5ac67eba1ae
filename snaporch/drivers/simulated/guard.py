"""The guards of a simulated guest: they act when the program that posted them is killed."""

from __future__ import annotations

from collections.abc import Callable

from snaporch.drivers.base import Guard, LoadNote, PauseNote
from snaporch.drivers.qmp.guard import is_complete, may_have_loaded
from snaporch.drivers.simulated.client import Client
from snaporch.drivers.simulated.process import SimulatedProcess


class SimulatedGuard(Guard):
    """See Guard; `act` is given the instant at which it acts."""

    def __init__(self, client: Client, process: SimulatedProcess, act: Callable[[float], None]) -> None:
        self._client = client
        self._process = process
        self._act = act

    def hear(self) -> None:
        """Hear of the death of the program that has posted it; acts at once."""
        self._act(self._process.settle())

    async def post(self) -> None:
        """See Guard."""
        await self._client.call("guard.post", self._process.name, lambda: self._client.on_death.add(self.hear))

    async def dismiss(self) -> None:
        """See Guard."""
        await self._client.call(
            "guard.dismiss", self._process.name, lambda: self._client.on_death.discard(self.hear)
        )


class ReadingGuard(SimulatedGuard):
    """One that has to read the catalog, which the threads of a program that is simulated to be dead still write to.

    So it acts a while later.
    """

    SECONDS = 0.05

    def hear(self) -> None:
        """See SimulatedGuard."""
        self._process.guarded = self._client.host.now() + self.SECONDS, self._act


def load_guard(client: Client, process: SimulatedProcess, note: LoadNote) -> ReadingGuard:
    """See Machine.load_guard."""

    def act(at: float) -> None:
        loaded = may_have_loaded(str(note.journal.catalog), note.journal.operation)
        if loaded is None or process.guest.runs:
            return
        if loaded and process.keeps(note.kept, note.targets):
            process.load_inside(note.tag, note.targets)
            if not note.run:
                return
        process.cont(at)

    return ReadingGuard(client, process, act)


def pause_guard(client: Client, process: SimulatedProcess, note: PauseNote) -> SimulatedGuard:
    """See Machine.guard."""

    def act(at: float) -> None:
        if note.journal is not None and is_complete(str(note.journal.catalog), note.journal.operation):
            return
        if note.rival is not None and (rival := client.host.find(note.rival)) is not None:
            rival.settle()
            rival.end("its guard has ended it")
        if process.ended or process.hung:
            return
        if process.migration is not None and not note.keep_stream:
            process.migration.cancel()
        process.cont(at)
        if note.thaw:
            process.thaw()

    return (SimulatedGuard if note.journal is None else ReadingGuard)(client, process, act)
