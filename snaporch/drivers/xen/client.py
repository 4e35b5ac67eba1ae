"""The helper from our side: started for each connection, asked one thing at a time, ended with the connection."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.local.process import LocalProcess, kill, process_of, wait_gone
from snaporch.errors import CommandRefused, ConnectionGone, Unsupported

PROGRAM = Path(__file__).with_name("helper.py")
END_SECONDS = 30.0  # from the end of its input: it may have a guest to let run
_CHUNK = 1 << 16
_REPEATABLE = frozenset(
    ["hello", "info", "config", "header", "memory", "pause", "run", "rename", "tell", "destroy"]
)


@attrs.define
class Answers:
    """Lines of the helper, put together: no I/O."""

    _rest: bytes = b""
    _ready: dict[int, dict[str, Any]] = attrs.field(factory=dict)

    def feed(self, data: bytes) -> None:
        """Take bytes as they come."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self._ready[answer["id"]] = answer

    def take(self, number: int) -> dict[str, Any] | None:
        """Return the answer of a request, if it is there."""
        return self._ready.pop(number, None)

    def has(self, number: int) -> bool:
        """Return whether the answer of a request is there."""
        return number in self._ready


@attrs.define
class _Program:
    """The helper's process, its pipes, and the last number that another one before it was asked."""

    process: LocalProcess
    requests: trio.lowlevel.FdStream
    answers: trio.lowlevel.FdStream
    after: int = 0


def _spawn() -> _Program:
    """Start a helper; it ends by itself when its pipes are closed, with whoever holds them."""
    asked, ask = os.pipe2(os.O_CLOEXEC)
    answers, answer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", str(PROGRAM)],
            os.environ,
            setsid=True,  # what ends our group leaves it, so that it can let a guest run
            file_actions=[
                (os.POSIX_SPAWN_DUP2, asked, 0),
                (os.POSIX_SPAWN_DUP2, answer, 1),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
    finally:
        os.close(asked)
        os.close(answer)
    process = process_of(pid) or LocalProcess(pid, 0)
    return _Program(process, trio.lowlevel.FdStream(ask), trio.lowlevel.FdStream(answers))


@attrs.define
class HelperClient:
    """A helper that runs; `open_helper` gives one. Any number of tasks may use it."""

    label: str
    _program: _Program = attrs.field(factory=_spawn)
    _answers: Answers = attrs.field(factory=Answers)
    _number: int = 0
    _sending: trio.Lock = attrs.field(factory=trio.Lock)
    _reading: trio.Lock = attrs.field(factory=trio.Lock)

    async def send(self, do: str, **arguments: Any) -> int:
        """Ask for something, and return the number by which `receive` gives the answer."""
        self._number += 1
        number = self._number
        await self._send({"id": number, "do": do, **arguments})
        return number

    async def _send(self, request: dict[str, Any]) -> None:
        # Whole or not at all: half a line would swallow the next.
        with trio.CancelScope(shield=True):
            async with self._sending:
                try:
                    await self._program.requests.send_all(json.dumps(request).encode() + b"\n")
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    raise ConnectionGone(f"{self.label}: the helper that calls libxl is gone") from None

    async def receive(self, number: int) -> Any:
        """Return the answer to a request.

        Raises:
            CommandRefused: libxl says no; with its last words.
            ConnectionGone: the helper is gone.
        """
        while (answer := self._answers.take(number)) is None:
            if number <= self._program.after:
                raise ConnectionGone(f"{self.label}: the helper that calls libxl has died")
            async with self._reading:
                if not self._answers.has(number):  # else another task has read it
                    await self._read()
        if (error := answer.get("error")) is None:
            return answer["ok"]
        words = error["words"] or f"libxl says {error['code']}"
        raise CommandRefused(self.label, error["call"], str(error["code"]), words)

    async def _read(self) -> None:
        data = await self._program.answers.receive_some(_CHUNK)
        if not data:
            raise ConnectionGone(f"{self.label}: the helper that calls libxl has died")
        self._answers.feed(bytes(data))

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Ask for something and return the answer; as `receive`.

        Where the helper has died, another is asked what can be asked twice: a guest must not be left suspended.
        """
        program = self._program
        try:
            return await self.receive(await self.send(do, **arguments))
        except ConnectionGone:
            if do not in _REPEATABLE:
                raise
        await self._replace(program)
        return await self.receive(await self.send(do, **arguments))

    async def _replace(self, broken: _Program) -> None:
        """Start another helper, unless another task just has."""
        async with self._reading:
            if self._program is not broken:
                return
            await kill(broken.process)
            await broken.requests.aclose()
            await broken.answers.aclose()
            self._program, self._answers = attrs.evolve(_spawn(), after=self._number), Answers()

    async def abort(self) -> None:
        """Have it end a save that is under way; the save's own answer then comes."""
        await self._send({"do": "abort"})

    async def close(self) -> None:
        """End it, and return when it is gone."""
        with trio.move_on_after(END_SECONDS, shield=True) as scope:
            await self._program.requests.aclose()
            await wait_gone(self._program.process)
        with trio.CancelScope(shield=True):
            if scope.cancelled_caught:
                await kill(self._program.process)
            await self._program.answers.aclose()


@attrs.define
class SharedHelper:
    """A helper for short questions: started by the first, and kept for as long as snaporch runs."""

    label: str = "xen"
    _client: HelperClient | None = None

    async def ask(self, do: str, **arguments: Any) -> Any:
        """See HelperClient."""
        if self._client is None:
            self._client = HelperClient(self.label)
        try:
            return await self._client.ask(do, **arguments)
        except ConnectionGone as error:
            self._client = None
            raise Unsupported(f"libxl does not work here: {error}; is this dom0 of a Xen host?") from error


@asynccontextmanager
async def open_helper(label: str) -> AsyncIterator[HelperClient]:
    """Start a helper, which ends with the body and with us."""
    client = HelperClient(label)
    try:
        yield client
    finally:
        await client.close()  # noqa: ASYNC102 - it shields itself, with a deadline
