"""The guards of a simulated guest: they act when the program that posted them is killed, or is stopped."""

from __future__ import annotations

from collections.abc import Callable

from snaporch.drivers.base import Guard, LoadNote, PauseNote, PivotNote
from snaporch.drivers.local.guard import SILENCE, decide
from snaporch.drivers.simulated.client import Client
from snaporch.drivers.simulated.process import SimulatedProcess

UNDONE = "undone"
END = "end"


class SimulatedGuard(Guard):
    """See Guard; `act` is given the instant, and whether who posted it is dead; it returns whether all is done."""

    def __init__(self, client: Client, process: SimulatedProcess, act: Callable[[float, bool], bool]) -> None:
        self._client = client
        self._process = process
        self._act = act
        self._acted = False

    def _lose_patience(self, at: float) -> None:
        self._acted = self._act(at, False)

    def hear(self) -> None:
        """Hear of the death of the program that has posted it; acts at once."""
        if not self._acted:
            self._acted = self._act(self._process.settle(), True)

    def miss(self) -> None:
        """Begin to hear nothing of it."""
        self._process.guarded[self] = self._client.host.now() + SILENCE, self._lose_patience

    def hear_again(self) -> None:
        """Hear of it again; what is late by then has been done."""
        self._process.settle()
        self._process.guarded.pop(self, None)

    async def post(self) -> None:
        """See Guard."""
        self._acted = False
        await self._client.call("guard.post", self._process.name, lambda: self._client.guards.add(self))

    def has_acted(self) -> bool:
        """See Guard."""
        return self._acted

    async def dismiss(self) -> None:
        """See Guard."""
        await self._client.call("guard.dismiss", self._process.name, lambda: self._client.guards.discard(self))


def load_guard(client: Client, process: SimulatedProcess, note: LoadNote) -> SimulatedGuard:
    """See Machine.load_guard."""

    def act(at: float, _dead: bool) -> bool:
        word, keeps = decide(str(note.verdict), UNDONE), process.keeps(note.kept, note.targets)
        if process.guest.runs:
            return True
        if word == "put-back" and keeps:
            process.load_inside(note.kept, note.targets)
            process.delete_inside(note.kept, note.targets)
        elif word == "load" and keeps:
            process.load_inside(note.tag, note.targets)
            if not note.run:
                return True
        process.cont(at)
        return True

    return SimulatedGuard(client, process, act)


def pause_guard(client: Client, process: SimulatedProcess, note: PauseNote) -> SimulatedGuard:
    """See Machine.guard."""

    def act(at: float, dead: bool) -> bool:
        word = decide(str(note.verdict), UNDONE) if note.verdict is not None else UNDONE
        if word == "complete":
            return True
        if word == END and not dead:
            return False
        if note.rival is not None and (rival := client.host.find(note.rival)) is not None:
            rival.settle()
            rival.end("its guard has ended it")
        if process.ended or process.hung:
            return True
        if word == END:
            decide(str(note.verdict), UNDONE, over=END)
        if process.migration is not None and not note.keep_stream:
            process.migration.cancel()
        process.cont(at)
        if note.thaw:
            process.thaw()
        return True

    return SimulatedGuard(client, process, act)


def pivot_guard(client: Client, process: SimulatedProcess, note: PivotNote) -> SimulatedGuard:
    """Return a guard for the time in which what a guest writes to a disk is held up."""

    def act(at: float, _dead: bool) -> bool:
        if process.pivot is not None:
            process.end_pivot(moved=decide(str(note.verdict), "stay") != "stay", at=at)
        return True

    return SimulatedGuard(client, process, act)
