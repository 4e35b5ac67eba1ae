"""Xenstore, as far as it is read: which domains there are, what belongs to them, and when one ends."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from snaporch.drivers.xen.wire import Decoder, Kind, Message, encode
from snaporch.errors import ConnectionGone, HypervisorError

SOCKETS = ("/run/xenstored/socket", "/var/run/xenstored/socket")
DEVICE = "/dev/xen/xenbus"  # where xenstored runs elsewhere: in a domain of its own, say
RELEASE = "@releaseDomain"  # fires when a domain is destroyed, and when it shuts down or suspends itself
_CHUNK = 8192


@attrs.define
class Xenstore:
    """A connection; `open_xenstore` gives one. One task at a time uses it."""

    _stream: trio.abc.Stream
    _decoder: Decoder = attrs.field(factory=Decoder)
    _messages: deque[Message] = attrs.field(factory=deque)
    _events: deque[tuple[str, ...]] = attrs.field(factory=deque)
    _number: int = 0

    async def _next(self) -> Message:
        while not self._messages:
            try:
                data = await self._stream.receive_some(_CHUNK)
            except trio.BrokenResourceError as error:
                raise ConnectionGone(f"xenstore: the connection is lost ({error})") from error
            if not data:
                raise ConnectionGone("xenstore: the connection is lost")
            for message in self._decoder.feed(bytes(data)):
                if message.kind == Kind.EVENT:
                    self._events.append(message.strings)
                else:
                    self._messages.append(message)
            if self._events and not self._messages:
                return Message(Kind.EVENT, 0, b"")
        return self._messages.popleft()

    async def _ask(self, kind: Kind, *strings: str, value: bytes = b"") -> Message | None:
        """Return the answer; None: there is no such path."""
        self._number += 1
        number = self._number
        await self._stream.send_all(encode(kind, number, *strings, value=value))
        while (answer := await self._next()).id != number:
            pass  # an event, or the answer to one who was cancelled
        if answer.kind != Kind.ERROR:
            return answer
        if (word := answer.strings[0]) == "ENOENT":
            return None
        raise HypervisorError(f"xenstore: {kind.name.lower()} {strings[0]}: {word}")

    async def read(self, path: str) -> str:
        """Return a value; an empty string where there is none."""
        answer = await self._ask(Kind.READ, path)
        return answer.body.decode(errors="surrogateescape") if answer is not None else ""

    async def write(self, path: str, value: str) -> None:
        """Write a value."""
        await self._ask(Kind.WRITE, path, value=value.encode())

    async def names(self, path: str) -> tuple[str, ...]:
        """Return the names below a path; none where there is nothing."""
        answer = await self._ask(Kind.DIRECTORY, path)
        return answer.strings if answer is not None else ()

    async def watch(self, path: str) -> None:
        """Have `event` return when something changes at a path or below; it fires once at first."""
        await self._ask(Kind.WATCH, path, path)

    async def event(self) -> str:
        """Return the path of the next event."""
        while not self._events:
            await self._next()
        return self._events.popleft()[0]

    # --- domains

    async def domids(self) -> tuple[int, ...]:
        """Return the ids of all domains but dom0."""
        return tuple(sorted(int(name) for name in await self.names("/local/domain") if name not in {"0", ""}))

    async def uuid(self, domid: int) -> str:
        """Return a domain's uuid; an empty string where there is no such domain."""
        return (await self.read(f"/local/domain/{domid}/vm")).removeprefix("/vm/")

    async def domid(self, uuid: str) -> int | None:
        """Return the id of the domain of a uuid."""
        for domid in await self.domids():
            if await self.uuid(domid) == uuid:
                return domid
        return None

    async def name(self, domid: int) -> str:
        """Return a domain's name."""
        return await self.read(f"/local/domain/{domid}/name")

    async def disks_process(self, domid: int) -> int | None:
        """Return the process of the QEMU that serves a domain's disks."""
        found = await self.read(f"/local/domain/{domid}/image/device-model-pid")
        return int(found) if found.isdecimal() else None


async def _connected() -> trio.abc.Stream:
    for path in SOCKETS:
        if Path(path).exists():
            return await trio.open_unix_socket(path)
    return trio.lowlevel.FdStream(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))


@asynccontextmanager
async def open_xenstore() -> AsyncIterator[Xenstore]:
    """Connect to xenstore.

    Raises:
        ConnectionGone: there is none here, or it may not be read.
    """
    try:
        stream = await _connected()
    except OSError as error:
        raise ConnectionGone(
            f"xenstore cannot be reached ({error.strerror}): is this dom0 of a Xen host, and are you root there?"
        ) from error
    async with stream:
        yield Xenstore(stream)
