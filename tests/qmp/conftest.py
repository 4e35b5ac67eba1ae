"""The other side of a QMP connection, in the test's hands."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from snaporch.drivers.qmp import QMPClient, open_qmp_stream

GREETING = {"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}

Connect = Callable[..., AbstractAsyncContextManager[tuple[QMPClient, Any]]]


class Peer:
    """What QEMU would do, step by step."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._unread = b""

    async def receive(self) -> dict[str, Any]:
        """Return the next command."""
        while b"\n" not in self._unread:
            data = await self.stream.receive_some()
            assert data, "the client went away"
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        command: dict[str, Any] = json.loads(line)
        return command

    async def send(self, *messages: dict[str, Any] | bytes) -> None:
        """Send all messages in one go; bytes go as they are."""
        lines = [m if isinstance(m, bytes) else json.dumps(m).encode() + b"\r\n" for m in messages]
        await self.stream.send_all(b"".join(lines))

    async def answer(self, command: dict[str, Any], value: Any = None) -> None:
        """Reply to a command."""
        await self.send({"return": {} if value is None else value, "id": command["id"]})

    async def event(self, *names: str) -> None:
        """Send events."""
        timestamp = {"seconds": 1, "microseconds": 500_000}
        await self.send(*({"event": name, "timestamp": timestamp} for name in names))


@pytest.fixture
def connect() -> Connect:
    """Open a negotiated client over a memory stream; gives the client and its peer."""

    @asynccontextmanager
    async def connected(timeout: float = 10.0) -> AsyncIterator[tuple[QMPClient, Peer]]:
        ours, theirs = trio.testing.memory_stream_pair()
        peer = Peer(theirs)

        sender = ours.send_stream
        assert isinstance(sender, trio.testing.MemorySendStream)
        # Memory streams are joined by a hook; ours runs after it, once. It is no task, because a nursery here would
        # wrap what the tests want to see unwrapped.
        pump = sender.send_all_hook
        assert pump is not None

        async def negotiate() -> None:
            sender.send_all_hook = pump
            await pump()
            await peer.answer(await peer.receive())

        sender.send_all_hook = negotiate
        await peer.send(GREETING)
        async with open_qmp_stream(ours, label="web1", timeout=timeout) as client:
            yield client, peer

    return connected
