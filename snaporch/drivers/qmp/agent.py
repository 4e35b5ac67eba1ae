"""The QEMU guest agent: a program in the guest that freezes and thaws its file systems.

It is reached through a unix socket that QEMU connects to a serial port of the guest. That port knows no beginning
and no end of a connection: an earlier client's request may still be answered to this one. So every conversation
begins with 0xFF, which makes the agent drop half a request, and ``guest-sync-delimited``,
whose answer is found by another 0xFF and a number of snaporch's (QEMU's docs/interop/qemu-ga.rst).

An agent that is not there does not refuse: it says nothing. Everything here therefore has a deadline.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs
import trio

from snaporch.drivers.qmp import transport
from snaporch.errors import CommandRefused, ConnectionGone, HypervisorError, OutcomeUnknown, ProtocolError

_DELIMITER = b"\xff"
_CHUNK = 65536
LINE_LIMIT = 1 << 20
MOST_FROZEN = 1 << 20
SYNC_SECONDS = 10.0  # of an agent that has nothing else to do, on a busy host
FREEZE_SECONDS = 30.0  # for all dirty pages of the guest to reach its disks
CLOCK_SECONDS = 20.0  # for a program in the guest to set its hardware's clock, too, which waits for a full second
CLOCK_TOLERANCE = 2.0  # seconds between the clocks of a host and a guest that was just set: both are busy
THAW_SECONDS = 60.0  # a freeze that took too long must end before it can be undone
RETRY_SECONDS = 0.2


@attrs.define
class Agent:
    """A conversation with a guest's agent; `open_agent` makes one.

    The guest is not trusted: what it says is kept up to `LINE_LIMIT`, and means nothing but what is asked for here.
    """

    label: str
    _stream: trio.abc.Stream
    _received: bytearray = attrs.field(factory=bytearray)

    async def _receive(self) -> None:
        data = await self._stream.receive_some(_CHUNK)
        if not data:
            raise ConnectionGone(f"{self.label}: QEMU has closed the channel of the guest agent")
        self._received += data

    async def _skip_to(self, mark: bytes) -> None:
        """Let go of all up to a mark, and of that."""
        while (at := self._received.find(mark)) < 0:
            self._received.clear()
            await self._receive()
        del self._received[: at + len(mark)]

    async def _line(self) -> Any:
        """Return the value in the next line.

        Raises:
            ProtocolError: it is too long, or no JSON.
        """
        looked = 0
        while (at := self._received.find(b"\n", looked)) < 0:
            looked = len(self._received)
            if looked > LINE_LIMIT:
                self._received.clear()
                raise ProtocolError(f"{self.label}: the guest agent sends a line of more than {LINE_LIMIT:,} bytes")
            await self._receive()
        line = bytes(self._received[:at])
        del self._received[: at + 1]
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise ProtocolError(f"{self.label}: the guest agent sends what is no JSON: {line[:60]!r}") from None

    async def _send(self, command: str, **arguments: Any) -> None:
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        await self._stream.send_all(json.dumps(request).encode() + b"\n")

    async def synchronize(self) -> None:
        """Have the agent ready for a command: nothing that was asked before is answered from here on."""
        number = secrets.randbits(31)
        await self._stream.send_all(_DELIMITER)
        await self._send("guest-sync-delimited", id=number)
        while True:
            await trio.lowlevel.checkpoint()  # whoever sends without end is not all that we do
            await self._skip_to(_DELIMITER)
            with suppress(ProtocolError):  # what was asked by others may be answered still, or half of it
                match await self._line():
                    case {"return": answer} if answer == number:
                        return

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Have the agent carry out a command and return its answer.

        Raises:
            CommandRefused: the agent answered with an error.
            ProtocolError: it answered with what is no answer.
            ConnectionGone: QEMU is gone.
        """
        await self._send(command, **arguments)
        match answer := await self._line():
            case {"error": {"class": str(kind), "desc": str(words)}}:
                raise CommandRefused(self.label, command, kind, words[:1000])
            case {"return": result}:
                return result
        raise ProtocolError(f"{self.label}: the guest agent answers {command} with {answer!r:.60}")


@asynccontextmanager
async def open_agent(path: str, label: str, peer: int | None = None) -> AsyncIterator[Agent]:
    """Connect to a guest's agent and synchronize with it.

    Args:
        path: the socket.
        label: the domain's name, for errors.
        peer: the QEMU that has to listen there; None: whoever does.

    Raises:
        ConnectionGone: there is no such channel, or it is another process's.
        HypervisorError: nothing answers within `SYNC_SECONDS`.
    """
    async with await transport.connect(path, label=label, timeout=SYNC_SECONDS, listener=peer) as stream:
        agent = Agent(label, stream)
        try:
            with trio.move_on_after(SYNC_SECONDS) as scope:
                await agent.synchronize()
            if scope.cancelled_caught:
                raise HypervisorError(f"{label}: no guest agent answers: qemu-guest-agent must run in the guest")
            yield agent
        except trio.BrokenResourceError as error:
            raise ConnectionGone(f"{label}: the channel of the guest agent broke") from error


async def freeze(path: str, label: str, peer: int | None = None) -> int:
    """Freeze all of a guest's file systems and return how many these are; to be thawed whatever this raises.

    Raises:
        OutcomeUnknown: it has not answered in time.
        ProtocolError: it has answered with what is no answer.
        CommandRefused: the agent could not, and has thawed what it had frozen.
    """
    async with open_agent(path, label, peer) as agent:
        with trio.move_on_after(FREEZE_SECONDS):
            frozen = await agent.execute("guest-fsfreeze-freeze")
            if type(frozen) is not int or not 0 <= frozen <= MOST_FROZEN:
                raise ProtocolError(f"{label}: the guest agent has frozen {frozen!r:.60} file systems")
            return frozen
    raise OutcomeUnknown(label, "guest-fsfreeze-freeze", FREEZE_SECONDS)


async def thaw(path: str, label: str, peer: int | None = None) -> None:
    """Thaw all of a guest's file systems, if they are frozen; tries again until `THAW_SECONDS` are over.

    Raises:
        HypervisorError: it could not.
    """
    failure: HypervisorError = OutcomeUnknown(label, "guest-fsfreeze-thaw", THAW_SECONDS)
    with trio.move_on_after(THAW_SECONDS):
        while True:
            try:
                async with open_agent(path, label, peer) as agent:
                    if await agent.execute("guest-fsfreeze-status") != "thawed":
                        await agent.execute("guest-fsfreeze-thaw")
                    return
            except ConnectionGone:
                raise
            except HypervisorError as error:
                failure = error
            await trio.sleep(RETRY_SECONDS)
    raise failure


async def set_clock(path: str, label: str, peer: int | None = None) -> float:
    """Set a guest's clock to the host's, and return by how many seconds it is then behind.

    Raises:
        OutcomeUnknown: the agent has not answered in time.
        ProtocolError: it has answered with what is no time.
        CommandRefused: it cannot tell the time.
    """
    with trio.move_on_after(CLOCK_SECONDS):
        async with open_agent(path, label, peer) as agent:
            refused = None
            try:
                await agent.execute("guest-set-time", time=time.time_ns())
            except CommandRefused as error:  # having set the clock, perhaps, and not the hardware's
                refused = error
            found = await agent.execute("guest-get-time")
            if type(found) is not int:
                raise ProtocolError(f"{label}: the guest agent says that it is {found!r:.60}")
            behind = time.time() - found / 1e9
            if refused is not None and abs(behind) > CLOCK_TOLERANCE:
                raise refused
            return behind
    raise OutcomeUnknown(label, "guest-set-time", CLOCK_SECONDS)
