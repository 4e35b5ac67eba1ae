"""A guard from snaporch's side: the process `snaporch.drivers.local.guard`, and the pipe to it (the leash)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from snaporch.drivers.base import Guard
from snaporch.drivers.local import guard
from snaporch.errors import OperationFailed

READY_SECONDS = 20.0  # for an interpreter to start, on a busy host
END_SECONDS = 5.0
BEAT_SECONDS = 1.0


class GuardProcess(Guard):
    """A `Guard` that is a process: it performs a driver's action when snaporch dies, or is stopped.

    The heartbeat is sent by Trio's loop, not by a thread: a thread would go on telling that snaporch works while
    the loop, which alone can let the guest run, hangs in a write to a pipe that nobody reads. It is one byte a
    second to a pipe that never blocks, so it takes nothing from a pause.

    Args:
        action: the path of the driver's file.
        arguments: what its function `act` is given.
        fds: descriptors that it is given as well; their numbers, which are the same there, are among the arguments.
    """

    def __init__(self, action: str, arguments: Sequence[str], *, fds: Sequence[int] = ()) -> None:
        self._arguments = (action, *arguments)
        self._fds = tuple(fds)
        self._process: trio.Process | None = None
        self._beating = trio.CancelScope()

    async def post(self) -> None:
        """See Guard; its interpreter has started when this returns, as it would be slow to in the pause."""
        self._process = process = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", guard.__file__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=self._fds,
            start_new_session=True,
        )
        said = b""
        if process.stdout is not None:
            async with process.stdout as output:
                with trio.move_on_after(READY_SECONDS):
                    said = bytes(await output.receive_some())
        if said != guard.READY or not isinstance(process.stdin, trio.lowlevel.FdStream):
            raise OperationFailed("the guard of the pause does not start")
        self._beating = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._beat, process.stdin.fileno(), self._beating, name="heartbeat")

    async def _beat(self, leash: int, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await trio.sleep(BEAT_SECONDS)
                try:
                    os.write(leash, guard.BEAT)
                except BlockingIOError:
                    pass  # the guard is stopped itself
                except OSError:
                    return  # it has acted, or somebody has killed it

    def has_acted(self) -> bool:
        """See Guard: it has ended by itself."""
        return self._process is not None and self._process.poll() == 0

    async def dismiss(self) -> None:
        """See Guard."""
        self._beating.cancel()
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(END_SECONDS):
            with suppress(trio.BrokenResourceError):  # it has ended already
                await process.stdin.send_all(guard.DISMISSED)
            await process.wait()
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()


@asynccontextmanager
async def posted(guard: Guard) -> AsyncIterator[None]:
    """Have a guard ready while the body runs."""
    try:
        await guard.post()
        yield
    finally:
        await guard.dismiss()  # noqa: ASYNC102 - it shields itself, with a deadline
