"""The guard of a QEMU guest, from our side: the process `guard.py`, and the leash that tells it of our death."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from snaporch.drivers.base import Guard, LoadNote, PauseNote, PivotNote
from snaporch.drivers.qmp import guard
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.errors import OperationFailed
from snaporch.model.domain import DiskStatus

READY_SECONDS = 20.0  # for an interpreter to start, on a busy host
END_SECONDS = 5.0


class QemuGuard(Guard):
    """See Guard."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: trio.Process | None = None

    @classmethod
    def of_the_pause(cls, socket: str, note: PauseNote, agent: str) -> QemuGuard:
        """Return one that lets the guest run again; see `Machine.guard`."""
        stream, thawed = "keep" if note.keep_stream else "cancel", agent if note.thaw and agent else "-"
        ends = "-"
        if note.rival is not None:
            rival = QemuProcess.of(note.rival).local
            ends = f"{rival.pid}:{rival.started}"
        row = (str(note.journal.catalog), note.journal.operation) if note.journal is not None else ()
        return cls("pause", socket, stream, thawed, ends, *row)

    @classmethod
    def of_a_pivot(cls, socket: str, job: str, domain: str, disk: DiskStatus, note: PivotNote) -> QemuGuard:
        """Return one that ends a block job that has a disk go over to the image below, as the note says."""
        return cls("pivot", socket, job, str(note.catalog or "-"), domain, disk.target, disk.active)

    @classmethod
    def of_a_load(cls, socket: str, note: LoadNote, nodes: Sequence[str]) -> QemuGuard:
        """Return one that lets a guest run on, or loads what is inside the images on nodes; see `load_guard`."""
        run = "run" if note.run else "stand"
        journal = note.journal
        return cls("load", socket, str(journal.catalog), journal.operation, run, note.tag, note.kept, *nodes)

    async def post(self) -> None:
        """See Guard; its interpreter has started when this returns, as it would be slow to in the pause."""
        self._process = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", guard.__file__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        said = b""
        if self._process.stdout is not None:
            async with self._process.stdout as output:
                with trio.move_on_after(READY_SECONDS):
                    said = bytes(await output.receive_some())
        if said != guard.READY:
            raise OperationFailed("the process that is to guard the pause does not start")

    async def dismiss(self) -> None:
        """See Guard."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(END_SECONDS):
            with suppress(trio.BrokenResourceError):  # somebody has killed it
                await process.stdin.send_all(guard.DISMISSED)
            await process.wait()
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()


@asynccontextmanager
async def posted(guard: Guard) -> AsyncIterator[None]:
    """Have a guard stand by while the body runs."""
    try:
        await guard.post()
        yield
    finally:
        await guard.dismiss()  # noqa: ASYNC102 - it shields itself, with a deadline
