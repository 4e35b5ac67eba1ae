"""A program of its own that gives a guest its memory while it runs: ``python pages.py MEMORY INDEX STATUS FD HOW``.

QEMU is the destination of a postcopy migration, and this program its source, at the other end of the socket FD. It
sends the state of the devices, with which the guest can run, then each page that the guest waits for, with those
behind it, and in the time between all the others. MEMORY is the memory file, INDEX says where the pages are in it
(`index`). It outlives snaporch, and ends when QEMU has everything, or is gone.

HOW is ``begin``; or ``resume`` where an earlier one was killed: QEMU then waits, and says what it has.

Each block of MEMORY is compared with its checksum before anything of it is sent, and sent as it was compared. What
is not what was saved is not sent: this program ends, and the guest waits, until somebody ends it.

STATUS is a file that is there already, of BYTES, for JSON: ``state`` (`LOADING`, `LOADED`, `DAMAGED` or `FAILED`),
``done`` and ``total`` in bytes, ``beat``, which grows every second at least unless a read hangs, ``error``.

The rules of the protocol, from QEMU's source (7.2 and 10.0):

1. At least one block is discarded before QEMU listens: else it waits for ever.
2. No page is sent twice: the second would take the place of what the guest has written.
3. A zero page is sent only when it is asked for: the others become so by themselves at the end.
4. The buffer of the socket is small: what is in it is sent before the next page that is asked for.

It imports only what it needs, and nothing of snaporch.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from snaporch.drivers.qmp import index
    from snaporch.drivers.qmp.index import Index, Ram
else:
    index = ModuleType("index")
    SourceFileLoader("index", os.path.join(os.path.dirname(os.path.abspath(__file__)), "index.py")).exec_module(
        index
    )

READY = b"ready"  # said on standard output
BEGIN, RESUME = "begin", "resume"
BYTES = 4096
LOADING, LOADED, DAMAGED, FAILED = "loading", "loaded", "damaged", "failed"

AHEAD = 16  # pages that are sent with one that is asked for
CHUNK = 32  # pages that are sent at a time when none is
QUIET = 0.001  # seconds without a question, after one, before others are sent
BUFFER = 64 * 1024  # of the socket
BEAT = 0.5  # seconds
KEPT = 32  # blocks of the file, 8 MiB
LAST_SECONDS = 60.0  # for QEMU to say that it has everything
GREETING_SECONDS = 20.0  # for QEMU to say what it has

_CONTINUES, _IS_ZERO, _IS_PAGE, _END = 0x20, 0x02, 0x08, 0x10
_PART, _LAST, _COMMAND, _FOOTER = 2, 3, 8, 0x7E
_OPEN_RETURN, _ADVISE, _LISTEN, _RUN, _DISCARD, _PACKAGED, _RESUME, _RECEIVED = 1, 3, 4, 5, 6, 7, 9, 10
_SHUT, _ASK_NAMED, _ASK, _RECEIVED_BITMAP, _RESUMED = 1, 3, 4, 5, 6
_SAID = struct.Struct(">HH")  # what QEMU says: its kind, and the length of what follows
_BITMAP_END = 0x0123456789ABCDEF
_SENT = 3  # a kind of page, after those of the index


class Damaged(Exception):
    """A block of the memory file is not what was saved."""


class Gone(Exception):
    """QEMU is gone, or wants nothing more from us."""


class Status:
    """What others see of the work."""

    def __init__(self, path: str, total: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._total, self._beat, self._next = total, 0, 0.0
        self.done = 0

    def beat(self) -> None:
        """Tell, once in a while, how far it is."""
        if time.monotonic() >= self._next:
            self.tell(LOADING)

    def tell(self, state: str, error: str = "") -> None:
        """Tell of it."""
        self._beat += 1
        self._next = time.monotonic() + BEAT
        said = {"state": state, "done": self.done, "total": self._total, "beat": self._beat, "error": error[:999]}
        with contextlib.suppress(OSError):  # the directory may be on a file system that has no room any more
            os.pwrite(self._fd, json.dumps(said).encode().ljust(BYTES), 0)


class Blocks:
    """The memory file, block by block, each compared with its checksum before anything of it is given."""

    def __init__(self, path: str, index_: Index) -> None:
        self._path, self._sums = path, index_.sums
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if (size := os.fstat(self._fd).st_size) != index_.size:
            raise Damaged(f"{path} has {size:,} bytes instead of {index_.size:,}")
        self._kept: OrderedDict[int, memoryview] = OrderedDict()

    def _block(self, number: int) -> memoryview:
        if (found := self._kept.get(number)) is not None:
            return found
        data = os.pread(self._fd, index.BLOCK, number * index.BLOCK)
        if xxhash.xxh3_64_intdigest(data) != self._sums[number]:
            raise Damaged(f"{self._path} is not what was saved, from byte {number * index.BLOCK:,} on")
        while len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        self._kept[number] = memoryview(data)
        return self._kept[number]

    def read(self, start: int, end: int) -> list[memoryview]:
        """Return a range of the file, in pieces."""
        pieces = []
        while start < end:
            number, at = divmod(start, index.BLOCK)
            piece = self._block(number)[at : at + end - start]
            pieces.append(piece)
            start += len(piece)
        return pieces


def _part(section: int, *records: bytes | memoryview, kind: int = _PART) -> list[bytes | memoryview]:
    """Return a section with pages."""
    return [
        struct.pack(">BI", kind, section),
        *records,
        struct.pack(">QBI", _END, _FOOTER, section),
    ]


def _head(ram: Ram, page: int, flags: int) -> bytes:
    name = ram.name.encode()
    return struct.pack(">QB", page * index.PAGE | flags, len(name)) + name


def command(number: int, payload: bytes = b"") -> bytes:
    """Return a command to QEMU."""
    return struct.pack(">BHH", _COMMAND, number, len(payload)) + payload


class Server:
    """The source of the migration."""

    def __init__(self, index_: Index, blocks: Blocks, channel: socket.socket, status: Status) -> None:
        self.index, self.blocks, self.channel, self.status = index_, blocks, channel, status
        self.rams = {ram.name: ram for ram in index_.rams}
        self._unread = b""
        self._asked: list[tuple[Ram, int, int]] = []
        self._ram: Ram | None = None  # of the last question
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        channel.settimeout(BEAT)

    # What is sent.

    def _send(self, *pieces: bytes | memoryview) -> None:
        views = [memoryview(piece) for piece in pieces if len(piece)]
        while views:
            try:
                sent = self.channel.sendmsg(views[:512])
            except TimeoutError:  # QEMU has not come to it yet
                self.status.beat()
                continue
            except OSError as error:
                raise Gone from error
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def begin(self) -> None:
        """Send all that QEMU needs to let the guest run."""
        each = self.index
        main = max(each.rams, key=lambda ram: len(ram.kinds)).name.encode()
        discard = struct.pack(">BB", 0, len(main)) + main + b"\0" + struct.pack(">QQ", 0, index.PAGE)
        devices = b"".join(self.blocks.read(*each.devices))
        package = command(_LISTEN) + devices + command(_RUN)
        self._send(
            *self.blocks.read(*each.head),
            command(_OPEN_RETURN),
            command(_ADVISE, struct.pack(">QQ", index.PAGE, index.PAGE)),
            *self.blocks.read(*each.setup),
            command(_DISCARD, discard),
            command(_PACKAGED, struct.pack(">I", len(package))),
            package,
        )

    def resume(self) -> None:
        """Ask QEMU which pages it has, and go on from there."""
        deadline = time.monotonic() + GREETING_SECONDS
        for ram in self.index.rams:
            name = ram.name.encode()
            self._send(command(_RECEIVED, bytes([len(name)]) + name))
            while self._message(deadline)[0] != _RECEIVED_BITMAP:
                pass
            size = int.from_bytes(self._exactly(8, deadline), "big")
            bitmap = int.from_bytes(self._exactly(size, deadline), "little")
            if int.from_bytes(self._exactly(8, deadline), "big") != _BITMAP_END:
                raise Gone("QEMU did not say which pages it has")
            pages = len(ram.kinds)
            there = f"{bitmap:0{pages}b}"[::-1]
            at = there.find("1")
            while 0 <= at < pages:
                self.status.beat()
                end = there.find("0", at)
                end = pages if end < 0 else min(end, pages)
                self._mark(ram, at, end - at)
                at = there.find("1", end)
        self._send(command(_RESUME))
        while self._message(deadline)[0] != _RESUMED:
            pass

    def _mark(self, ram: Ram, page: int, count: int) -> None:
        self.status.done += index.PAGE * ram.kinds.count(index.FULL, page, page + count)
        ram.kinds[page : page + count] = bytes([_SENT]) * count

    def _together(self, ram: Ram, page: int, most: int) -> int:
        """Return how many full pages, from one on, lie one after the other in the file, and are to be sent."""
        piece = ram.kinds[page : page + most]
        count = len(piece) - len(piece.lstrip(bytes([index.FULL])))
        start = ram.offsets[page]
        wanted = array("q", range(start, start + count * index.STRIDE, index.STRIDE))
        found = ram.offsets[page : page + count]
        if found == wanted:
            return count
        return next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)

    def _full(self, ram: Ram, page: int, most: int) -> int:
        """Send full pages, as they are in the file; return how many."""
        count = self._together(ram, page, most)
        start = ram.offsets[page]
        pieces = self.blocks.read(start, start + count * index.STRIDE - 8)
        self._mark(ram, page, count)
        self._send(*_part(self.index.section, _head(ram, page, _IS_PAGE), *pieces))
        return count

    def _answer(self) -> None:
        asked, self._asked = self._asked, []
        for ram, page, count in asked:
            for each in range(page, min(page + max(1, count), len(ram.kinds))):
                if ram.kinds[each] == index.FULL:
                    self._full(ram, each, AHEAD)
                elif ram.kinds[each] == index.ZERO:
                    self._mark(ram, each, 1)
                    self._send(*_part(self.index.section, _head(ram, each, _IS_ZERO), b"\0"))

    # What QEMU says.

    def _receive(self, timeout: float) -> bool:
        if not self._poll.poll(timeout * 1000):
            return False
        try:
            data = self.channel.recv(1 << 16)
        except OSError as error:
            raise Gone from error
        if not data:
            raise Gone
        self._unread += data
        return True

    def _exactly(self, count: int, deadline: float) -> bytes:
        while len(self._unread) < count:
            self.status.beat()
            if not self._receive(BEAT) and time.monotonic() > deadline:
                raise Gone("QEMU does not answer")
        found, self._unread = self._unread[:count], self._unread[count:]
        return found

    def _message(self, deadline: float) -> tuple[int, bytes]:
        kind, length = _SAID.unpack(self._exactly(_SAID.size, deadline))
        payload = self._exactly(length, deadline)
        self._note(kind, payload)
        return kind, payload

    def _note(self, kind: int, payload: bytes) -> None:
        if kind in {_ASK, _ASK_NAMED}:
            start, length = struct.unpack_from(">QI", payload)
            if kind == _ASK_NAMED:
                self._ram = self.rams[payload[13 : 13 + payload[12]].decode()]
            if self._ram is not None:
                self._asked.append((self._ram, start // index.PAGE, length // index.PAGE))
        elif kind == _SHUT:
            raise Gone

    def _listen(self, timeout: float) -> None:
        """Take what QEMU has said, waiting a moment for it."""
        while self._receive(timeout):
            timeout = 0
        start = _SAID.size
        while len(self._unread) >= start:
            kind, length = _SAID.unpack_from(self._unread)
            if len(self._unread) < start + length:
                return
            payload, self._unread = self._unread[start : start + length], self._unread[start + length :]
            self._note(kind, payload)

    def serve(self) -> None:
        """Send everything: first what is asked for."""
        rest, wait = self._rest(), QUIET
        while True:
            self.status.beat()
            self._listen(wait)
            if self._asked:
                self._answer()
                wait = QUIET
            elif next(rest, None) is None:
                break
            else:
                wait = 0
        self._send(*_part(self.index.section, kind=_LAST), b"\0")
        deadline = time.monotonic() + LAST_SECONDS
        with contextlib.suppress(Gone):
            while time.monotonic() < deadline:
                self.status.beat()
                self._listen(BEAT)

    def _rest(self) -> Iterator[int]:
        """Send pages that nobody has asked for, some at a time."""
        for ram in self.index.rams:
            page = ram.kinds.find(index.FULL)
            while page >= 0:
                yield self._full(ram, page, CHUNK)
                page = ram.kinds.find(index.FULL, page)


def main() -> None:
    """See the head of this file."""
    memory, index_file, place, fd, how = sys.argv[1:]
    channel = socket.socket(fileno=int(fd))
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    status = Status(place, 0)
    try:
        found = index.load(index_file)
        total = index.PAGE * sum(ram.kinds.count(index.FULL) for ram in found.rams)
        status = Status(place, total)
        server = Server(found, Blocks(memory, found), channel, status)
        status.tell(LOADING)
        _say(READY)
        if how == RESUME:
            server.resume()
        else:
            server.begin()
        server.serve()
    except Gone as error:
        status.tell(FAILED, str(error) or "QEMU has ended the connection")
    except Damaged as error:
        status.tell(DAMAGED, str(error))
    except (OSError, ValueError, LookupError, struct.error) as error:
        status.tell(FAILED, str(error))
        _say(str(error).encode())
    else:
        status.tell(LOADED)
        return
    sys.exit(1)


def _say(words: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(1, words)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


if __name__ == "__main__":
    main()
