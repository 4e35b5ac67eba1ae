"""The index of a memory file: where each page of the guest's RAM is in it; no I/O but that of the index itself.

A memory file is QEMU's migration stream, which is read from its beginning to its end. With the index it can be read
by page: so a guest can run before its memory is loaded (`pages`). `Builder` makes it of the stream as it passes by,
without a second look at any byte, or later of the file.

What is understood is the stream of an x86 machine with pages of 4 KiB:

    QEVM, version | configuration | RAM, start: its blocks | RAM, parts: pages | devices | end | a description

A page is eight bytes (address and flags, big-endian), the name of its block where that is another than the last
page's, and its contents, or a single zero. Of a page that is there twice the last one counts. Everything else is
`NotUnderstood`: QEMU can load such a file, and only QEMU can.

The index is a cache: it is made anew from the memory file where it is missing, or not what it should be.

    MAGIC (8 bytes) | length of the JSON (4, big-endian) | JSON | checksums | by block: kinds, offsets | xxh3-128

Numbers behind the JSON are as in this host's memory. The last 16 bytes are the checksum of all before them.

It imports only what it needs, and nothing of snaporch: the sink uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from array import array
from collections.abc import Callable, Generator
from itertools import starmap
from typing import Any

import xxhash

MAGIC = b"SPINDEX1"
PAGE = 4096
STRIDE = PAGE + 8  # from page to page of one block, in the stream
BLOCK = 256 * 1024  # of the file, each with a checksum of its own
ABSENT, ZERO, FULL = 0, 1, 2  # kinds of pages
TAIL_BYTES = 64 * 2**20  # more than the state of any machine's devices
_CONTINUES, _IS_ZERO, _IS_PAGE, _SIZE, _END = 0x20, 0x02, 0x08, 0x04, 0x10
_FLAGS = 0xFFF
_MOST = 512  # pages looked at at a time
_HEADS = struct.Struct(">Q4096x")
_ZEROS = struct.Struct(">Qx")
_DIGEST_BYTES = 16
_START, _PART, _LAST, _DEVICE, _SETUP, _COMMAND, _FOOTER = 1, 2, 3, 4, 7, 8, 0x7E
_SWITCHOVER = 11  # the one command that QEMU puts into a file: 10.0 says that it switches over

_Parser = Generator[None, None, None]
_Bytes = Generator[None, None, bytes]


class NotUnderstood(ValueError):
    """This is no stream of which an index can be made, or no index; in words."""


class OtherFile(ValueError):
    """The memory file is not the one that was saved."""


class Ram:
    """One block of the guest's RAM.

    Attributes:
        name: QEMU's, for example ``pc.ram``.
        kinds: of each page: `ABSENT`, `ZERO` or `FULL`.
        offsets: of each full page: where its contents are in the file.
    """

    def __init__(self, name: str, pages: int) -> None:
        self.name = name
        self.kinds = bytearray(pages)
        self.offsets = array("q", [0]) * pages


class Index:
    """An index.

    Attributes:
        size: of the memory file, in bytes.
        checksum: the memory file's, as `FileRecord.checksum`.
        section: QEMU's number for RAM in the stream.
        head: the range of the file that has version and configuration.
        setup: that of the blocks of RAM.
        devices: that of the state of all devices.
        rams: the blocks.
        sums: xxh3-64 of each `BLOCK` of the file.
    """

    def __init__(self, size: int, checksum: str) -> None:
        self.size = size
        self.checksum = checksum
        self.section = 0
        self.head = (0, 0)
        self.setup = (0, 0)
        self.devices = (0, 0)
        self.rams: list[Ram] = []
        self.sums = array("Q")

    def parts(self) -> list[bytes | bytearray | array[int]]:
        """Return what its file consists of, but for the checksum at the end."""
        facts = {
            "order": sys.byteorder,
            "page": PAGE,
            "block": BLOCK,
            "size": self.size,
            "checksum": self.checksum,
            "section": self.section,
            "head": self.head,
            "setup": self.setup,
            "devices": self.devices,
            "rams": [[ram.name, len(ram.kinds)] for ram in self.rams],
        }
        text = json.dumps(facts).encode()
        text += b" " * (-len(text) % 8)
        parts: list[bytes | bytearray | array[int]] = [MAGIC + struct.pack(">I", len(text)) + text, self.sums]
        for ram in self.rams:
            parts += [ram.kinds, ram.offsets]
        return parts


def save(index: Index, path: str) -> None:
    """Write an index to a new file, durable but for its directory; leave no file on an error."""
    digest = xxhash.xxh3_128()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            for part in index.parts():
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def load(path: str) -> Index:
    """Read an index.

    Raises:
        NotUnderstood: it is none, or of another version, or damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = memoryview(file.read())
    if data[: len(MAGIC)] != MAGIC or len(data) < len(MAGIC) + 4 + _DIGEST_BYTES:
        raise NotUnderstood(f"{path} is no index of this version")
    if xxhash.xxh3_128_digest(data[:-_DIGEST_BYTES]) != data[-_DIGEST_BYTES:]:
        raise NotUnderstood(f"{path} is damaged")
    (length,) = struct.unpack_from(">I", data, len(MAGIC))
    at = len(MAGIC) + 4
    facts: dict[str, Any] = json.loads(bytes(data[at : at + length]))
    if (facts["order"], facts["page"], facts["block"]) != (sys.byteorder, PAGE, BLOCK):
        raise NotUnderstood(f"{path} was made by another kind of host")
    at += length
    index = Index(facts["size"], facts["checksum"])
    index.section = facts["section"]
    index.head, index.setup, index.devices = (tuple(facts[name]) for name in ("head", "setup", "devices"))
    blocks = -(-index.size // BLOCK)
    index.sums.frombytes(data[at : at + 8 * blocks])
    at += 8 * blocks
    for name, pages in facts["rams"]:
        ram = Ram(name, 0)
        ram.kinds = bytearray(data[at : at + pages])
        ram.offsets.frombytes(data[at + pages : at + 9 * pages])
        at += 9 * pages
        index.rams.append(ram)
    return index


class Builder:
    """Makes an index of a stream, as the stream is passed to `feed`.

    Attributes:
        why_not: why there will be none; empty so far.
    """

    def __init__(self) -> None:
        self.why_not = ""
        self._index = Index(0, "")
        self._view = memoryview(b"")
        self._at = 0
        self._base = 0
        self._seen = 0
        self._tail = bytearray()
        self._tail_start = 0
        self._block = xxhash.xxh3_64()
        self._summed = 0  # bytes of it
        self._ram: Ram | None = None  # of the last page; it may be another part's
        self._parser = self._parse()
        next(self._parser)

    def feed(self, view: memoryview) -> None:
        """Take the next bytes of the stream."""
        if self.why_not:
            return
        self._sum(view)
        self._base, self._view, self._at = self._seen, view, 0
        self._seen += len(view)
        try:
            next(self._parser)
        except NotUnderstood as error:
            self.why_not = str(error)
        except (LookupError, ValueError, struct.error):
            self.why_not = "the stream is not what QEMU writes"
        except (MemoryError, OverflowError):
            self.why_not = "its RAM is too large for an index on this host"
        finally:
            self._view = memoryview(b"")  # its buffer is used again

    def _sum(self, view: memoryview) -> None:
        while view:
            piece = view[: BLOCK - self._summed]
            self._block.update(piece)
            self._summed += len(piece)
            view = view[len(piece) :]
            if self._summed == BLOCK:
                self._end_block()

    def _end_block(self) -> None:
        self._index.sums.append(self._block.intdigest())
        self._block.reset()
        self._summed = 0

    def finish(self, checksum: str) -> Index:
        """Return the index; the whole stream has been passed, and has this checksum.

        Raises:
            NotUnderstood: there can be none.
        """
        index = self._index
        if self.why_not:
            raise NotUnderstood(self.why_not)
        if not self._tail_start:
            raise NotUnderstood("the stream has no end")
        if self._summed:
            self._end_block()
        index.size, index.checksum = self._seen, checksum
        index.devices = (self._tail_start, self._tail_start + self._end_of_devices())
        for ram in index.rams:
            if ABSENT in ram.kinds:
                raise NotUnderstood(f"the stream does not have all pages of {ram.name}")
        return index

    def _end_of_devices(self) -> int:
        """Return where the end mark is, which the description follows: devices do not say how long they are."""
        tail = self._tail
        found = tail.rfind(b"\x00\x06")
        while found >= 0:
            start = found + 6
            if start <= len(tail) and start + struct.unpack_from(">I", tail, found + 2)[0] == len(tail):
                with contextlib.suppress(ValueError):
                    if "devices" in json.loads(tail[start:]):
                        return found
            found = tail.rfind(b"\x00\x06", 0, found)
        raise NotUnderstood("the stream does not end in a description of its devices")

    # The stream, piece by piece. Each `yield` waits for the next one.

    def _take(self, count: int) -> _Bytes:
        """Return the next bytes."""
        found = bytes(self._view[self._at : self._at + count])
        self._at += len(found)
        while len(found) < count:
            yield
            more = bytes(self._view[: count - len(found)])
            self._at = len(more)
            found += more
        return found

    def _skip(self, count: int) -> _Parser:
        while self._at + count > len(self._view):
            count -= len(self._view) - self._at
            self._at = len(self._view)
            yield
        self._at += count

    @property
    def _position(self) -> int:
        return self._base + self._at

    def _number(self, count: int) -> Generator[None, None, int]:
        return int.from_bytes((yield from self._take(count)), "big")

    def _name(self) -> Generator[None, None, str]:
        length = yield from self._number(1)
        return (yield from self._take(length)).decode()

    def _parse(self) -> _Parser:
        index = self._index
        yield
        if (yield from self._take(8)) != b"QEVM\0\0\0\x03":
            raise NotUnderstood("it is no stream of QEMU's, or of another version")
        kind = yield from self._number(1)
        if kind == _SETUP:
            yield from self._skip((yield from self._number(4)))
            kind = yield from self._number(1)
        index.head = (0, self._position - 1)
        if kind != _START:
            raise NotUnderstood(f"something else than RAM comes first (section {kind})")
        yield from self._start()
        index.setup = (index.head[1], self._position)
        while (kind := (yield from self._number(1))) != _DEVICE:
            yield from self._section(kind)
        self._tail_start = self._position - 1
        self._tail += bytes([kind])
        while True:
            self._tail += self._view[self._at :]
            self._at = len(self._view)
            if len(self._tail) > TAIL_BYTES:
                raise NotUnderstood("the devices have more state than any machine is known to have")
            yield

    def _start(self) -> _Parser:
        """Read which blocks there are."""
        index = self._index
        index.section = yield from self._number(4)
        if (name := (yield from self._name())) != "ram":
            raise NotUnderstood(f"{name} is saved while the guest runs, too")
        yield from self._skip(8)  # instance and version
        total = yield from self._number(8)
        if total & _FLAGS != _SIZE:
            raise NotUnderstood(f"its RAM is listed in another way ({total & _FLAGS:#x})")
        total &= ~_FLAGS
        while total > 0:
            name = yield from self._name()
            size = yield from self._number(8)
            if size % PAGE or size > total:
                raise NotUnderstood(f"{name} has no whole pages")
            index.rams.append(Ram(name, size // PAGE))
            total -= size
        if (yield from self._number(8)) != _END:
            raise NotUnderstood("its blocks of RAM have more than a size")
        yield from self._footer()

    def _footer(self) -> _Parser:
        if (yield from self._take(5)) != struct.pack(">BI", _FOOTER, self._index.section):
            raise NotUnderstood("a section does not end where it should")

    def _section(self, kind: int) -> _Parser:
        if kind == _COMMAND:
            command = yield from self._number(2)
            length = yield from self._number(2)
            if command != _SWITCHOVER:
                raise NotUnderstood(f"it has a command ({command})")
            yield from self._skip(length)
            return
        if kind not in {_PART, _LAST} or (yield from self._number(4)) != self._index.section:
            raise NotUnderstood(f"something else than RAM is saved page by page (section {kind})")
        yield from self._pages()
        yield from self._footer()

    def _pages(self) -> _Parser:
        """Read the pages of one part."""
        rams = {ram.name: ram for ram in self._index.rams}
        while (word := (yield from self._number(8))) != _END:
            flags = word & _FLAGS
            if not flags & _CONTINUES:
                self._ram = rams[(yield from self._name())] if flags in {_IS_PAGE, _IS_ZERO} else None
            ram = self._ram
            if ram is None or flags & ~_CONTINUES not in {_IS_PAGE, _IS_ZERO}:
                raise NotUnderstood(f"a page is saved in another way ({flags:#x})")
            page = word // PAGE
            if flags & _IS_PAGE:
                ram.kinds[page], ram.offsets[page] = FULL, self._position
                yield from self._skip(PAGE)
                self._run(ram, page + 1)
            else:
                if (yield from self._take(1)) != b"\0":
                    raise NotUnderstood("a page is filled with something else than zeros")
                ram.kinds[page] = ZERO
                self._zeros(ram, page + 1)

    def _run(self, ram: Ram, page: int) -> None:
        """Read full pages for as long as each is the one after the last one, many at a time."""
        many = 8
        while True:
            view, at = self._view, self._at
            count = min(many, (len(view) - at) // STRIDE, len(ram.kinds) - page)
            if count <= 0:
                return
            heads = [head for (head,) in _HEADS.iter_unpack(view[at : at + count * STRIDE])]
            good = _matching(heads, page * PAGE | _IS_PAGE | _CONTINUES)
            start = self._base + at + 8
            ram.kinds[page : page + good] = bytes([FULL]) * good
            ram.offsets[page : page + good] = array("q", range(start, start + good * STRIDE, STRIDE))
            self._at += good * STRIDE
            page += good
            if good < count:
                return
            many = min(2 * many, _MOST)

    def _zeros(self, ram: Ram, page: int) -> None:
        """Read zero pages likewise."""
        many = 8
        while True:
            view, at = self._view, self._at
            count = min(many, (len(view) - at) // _ZEROS.size, len(ram.kinds) - page)
            if count <= 0:
                return
            piece = view[at : at + count * _ZEROS.size]
            heads = [head for (head,) in _ZEROS.iter_unpack(piece)]
            good = _matching(heads, page * PAGE | _IS_ZERO | _CONTINUES)
            fills = bytes(piece[8 : good * _ZEROS.size : _ZEROS.size])
            if any(fills):
                raise NotUnderstood("a page is filled with something else than zeros")
            ram.kinds[page : page + good] = bytes([ZERO]) * good
            self._at += good * _ZEROS.size
            page += good
            if good < count:
                return
            many = min(2 * many, _MOST)


def _matching(heads: list[int], first: int) -> int:
    """Return how many numbers, from the beginning, go up from `first` page by page."""
    wanted = list(range(first, first + len(heads) * PAGE, PAGE))
    if heads == wanted:
        return len(heads)
    return list(starmap(int.__eq__, zip(heads, wanted, strict=True))).index(False)


def build(path: str, checksum: str, given_up: Callable[[], bool] = bool) -> Index:
    """Make an index of a memory file, all of which is read in any case.

    Args:
        path: where it is.
        checksum: what it must have, as `FileRecord.checksum`.
        given_up: asked again and again whether nobody wants the index any more.

    Raises:
        OtherFile: it has another checksum.
        NotUnderstood: there can be none.
        OSError: the file cannot be read.
    """
    builder, digest, buffer = Builder(), xxhash.xxh3_128(), memoryview(bytearray(8 * BLOCK))
    with open(path, "rb", buffering=0) as file:
        while filled := _fill(file.fileno(), buffer):
            digest.update(buffer[:filled])
            builder.feed(buffer[:filled])
            if given_up():
                raise NotUnderstood("it was given up")
    if (found := f"xxh3-128:{digest.hexdigest()}") != checksum:
        raise OtherFile(f"{path} is damaged: its checksum is not what was saved")
    return builder.finish(found)


def _fill(fd: int, buffer: memoryview) -> int:
    filled = 0
    while filled < len(buffer) and (count := os.readv(fd, [buffer[filled:]])):
        filled += count
    return filled
