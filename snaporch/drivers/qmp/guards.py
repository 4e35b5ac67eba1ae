"""The guards of a QEMU guest, from snaporch's side: their arguments. What they do is in `guard`."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from snaporch.drivers.base import Guard, LoadNote, PauseNote, PivotNote
from snaporch.drivers.local.leash import GuardProcess
from snaporch.drivers.qmp import guard
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.drivers.qmp.protocol import QMP


def whose(path: str, peer: int | None) -> str:
    """Return a socket's path as guards take it, with the process that has to listen there, if that matters."""
    return path if peer is None else f"{peer}:{path}"


@attrs.frozen
class Reach:
    """How a guard reaches a QEMU.

    Attributes:
        qmp: snaporch's connection.
        socket: the monitor that the connection is to, as `whose` has it.
        aside: a second monitor's socket, or an empty string.
        agent: the guest agent's socket, likewise, or an empty string.
    """

    qmp: QMP
    socket: str
    aside: str
    agent: str

    def pause(self, note: PauseNote) -> Guard:
        """Return a guard that lets the guest run again; see `Machine.guard`."""
        ends = QemuProcess.of(note.rival).local if note.rival is not None else None
        rival = f"{ends.pid}:{ends.started}" if ends is not None else "-"
        agent = self.agent if note.thaw and self.agent else "-"
        stream = "keep" if note.keep_stream else "cancel"
        return self._guard("pause", stream, agent, rival, str(note.verdict or "-"))

    def pivot(self, job: str, note: PivotNote) -> Guard:
        """Return a guard that ends a block job that has a disk go over to the image below, as the note says."""
        return self._guard("pivot", job, str(note.verdict))

    def load(self, note: LoadNote, nodes: Sequence[str]) -> Guard:
        """Return a guard of a guest that goes back to what is inside the images on nodes; see `load_guard`."""
        run = "run" if note.run else "stand"
        return self._guard("load", str(note.verdict), run, note.tag, note.kept, *nodes)

    def _guard(self, what: str, *arguments: str) -> Guard:
        fd = self.qmp.fileno()
        words = (what, self.socket, self.aside or "-", "-" if fd is None else str(fd), *arguments)
        return GuardProcess(guard.__file__, words, fds=() if fd is None else (fd,))
