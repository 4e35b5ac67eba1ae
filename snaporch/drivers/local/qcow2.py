"""The header of a qcow2 image and the snapshots inside it, read without QEMU. Nothing is ever written here.

Clusters of a snapshot have a reference of their own: a writer to the image copies them first. So all of a
snapshot can be read while a QEMU has the image open and writes to it: its tables, its data, and its memory, which
is kept behind the end of the disk. The format is that of QEMU's docs/interop/qcow2.txt.

The one thing that may change in a snapshot's tables is the flag that a cluster has no other reference: it is left
out of checksums.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import xxhash

from snaporch.errors import DamagedSnapshot

_MAGIC = 0x514649FB
_HEADER = struct.Struct(">IIQIIQIIQQIIQ")
_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQ")  # of an entry: size of the memory, of the disk
_V3, _FEATURES = 3, struct.Struct(">Q")
_V2_LENGTH, _V3_LENGTH = 72, struct.Struct(">I")
_AT_FEATURES, _AT_ORDER, _AT_LENGTH = 72, 96, 100
_V2_BITS = 16  # of a reference count
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT, _DATA_FILE, _BITMAPS = 0xE2792ACA, 0x44415441, 0x23852875
_BITMAP_LIST = struct.Struct(">IIQQ")
_BITMAP = struct.Struct(">QIIBBHI")
_HAS_DATA_FILE = 1 << 2
_CRYPT = {1: "AES", 2: "LUKS"}
_HEAD = 64 * 1024  # a header and its extensions are in the first cluster; no sane one is longer
_EXTENDED_L2 = 1 << 4
_COPIED, _COMPRESSED = 1 << 63, 1 << 62
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_SECTOR = 512
_NAME, _BITMAPS_BYTES = 1023, 65536 * 1024  # the most that QEMU takes


@attrs.frozen
class Header:
    """What the header of an image says.

    Attributes:
        backing: what it is over, as it is written there, or an empty string.
        backing_format: the format of that; empty: it is not said.
        data_file: the second file that holds the data, as it is written there; empty: there is none.
        encryption: by what it is encrypted, or an empty string.
        bitmaps: names of its persistent bitmaps.
        full: by how many bits its clusters are counted, where no more snapshots inside can be; else empty.
    """

    backing: str = ""
    backing_format: str = ""
    data_file: str = ""
    encryption: str = ""
    bitmaps: tuple[str, ...] = ()
    full: str = ""


@attrs.frozen
class InsideSnapshot:
    """A snapshot as the image's table has it; sizes in bytes."""

    name: str
    table: int
    entries: int
    memory: int
    disk: int


@attrs.define
class Qcow2:
    """An image that is open for reading; `opened` makes one.

    Attributes:
        path: where it is.
        snapshots: those inside it, by name.
    """

    path: str
    _fd: int
    _cluster: int
    _entry: int
    snapshots: dict[str, InsideSnapshot] = attrs.field(factory=dict)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file.

        Raises:
            DamagedSnapshot: the file ends before them.
        """
        data = os.pread(self._fd, size, offset)
        if not data and size:
            raise DamagedSnapshot(
                f"{self.path} ends before {offset:,}, where a snapshot inside it goes on", self.path
            )
        return data.ljust(size, b"\0")  # the last cluster of a file need not be whole

    def _words(self, offset: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}Q", self.read(offset, 8 * count))

    def _tables(self, snapshot: InsideSnapshot) -> Iterator[tuple[int, ...]]:
        """Yield the second-level tables in order, empty ones as empty."""
        for word in self._words(snapshot.table, snapshot.entries):
            yield self._words(word & _OFFSET, self._cluster // 8) if word & _OFFSET else ()

    def _data(self, word: int) -> bytes | None:
        """Return the cluster that a word of a second-level table stands for, as it is in the file, if any."""
        if word & _COMPRESSED:
            bits = 62 - (self._cluster.bit_length() - 1 - 8)
            offset = word & ((1 << bits) - 1)
            sectors = ((word & (_COMPRESSED - 1)) >> bits) + 1
            return self.read(offset, sectors * _SECTOR - offset % _SECTOR)
        return self.read(word & _OFFSET, self._cluster) if word & _OFFSET else None

    def checksum(self, name: str) -> tuple[int, str]:
        """Return the bytes that a snapshot's tables and clusters take, and their checksum."""
        digest, size = xxhash.xxh3_128(), 0
        for table in self._tables(self.find(name)):
            words = struct.pack(f">{len(table)}Q", *(word & ~_COPIED for word in table))
            digest.update(words or b"\0")
            size += len(words)
            for word in table[:: self._entry // 8]:
                if data := self._data(word):
                    digest.update(data)
                    size += len(data)
        return size, f"xxh3-128:{digest.hexdigest()}"

    def memory(self, name: str) -> Iterator[bytes]:
        """Yield the memory in a snapshot, piece by piece: what a memory file holds."""
        snapshot = self.find(name)
        per_table = self._cluster // self._entry
        first = -(-snapshot.disk // (self._cluster * per_table))  # the disk ends where a table ends
        left = snapshot.memory
        for number, table in enumerate(self._tables(snapshot)):
            for word in (table[:: self._entry // 8] or (0,) * per_table) if number >= first else ():
                if left <= 0:
                    return
                yield (self._data(word) or bytes(self._cluster))[:left]
                left -= self._cluster

    def find(self, name: str) -> InsideSnapshot:
        """Return the entry of a snapshot.

        Raises:
            DamagedSnapshot: there is none.
        """
        if name not in self.snapshots:
            raise DamagedSnapshot(f"{self.path} has no snapshot {name!r} inside any more", self.path)
        return self.snapshots[name]


def _extensions(head: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, offset)
        if not kind:
            return
        offset += _EXTENSION.size
        yield kind, head[offset : offset + length]
        offset += -(-length // 8) * 8


def _text(words: bytes) -> str:
    return os.fsdecode(words)


def _bitmaps(fd: int, extension: bytes) -> Iterator[str]:
    count, _, size, offset = _BITMAP_LIST.unpack_from(extension)
    if size > _BITMAPS_BYTES:
        raise struct.error
    entries, at = os.pread(fd, size, offset), 0
    for _ in range(count):
        *_, name, extra = _BITMAP.unpack_from(entries, at)
        start = at + _BITMAP.size + extra
        yield _text(entries[start : start + name])
        at += -(-(_BITMAP.size + extra + name) // 8) * 8


def header(path: str) -> Header:
    """Return what the header of an image says, which may be in use.

    Raises:
        DamagedSnapshot: it is no qcow2 image, or cannot be read.
        OSError: there is no such file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        head = os.pread(fd, _HEAD, 0)
        magic, version, at, length, _, _, crypt, *_, inside, _ = _HEADER.unpack_from(
            head.ljust(_HEADER.size, b"\0")
        )
        if magic != _MAGIC:
            raise DamagedSnapshot(f"{path} is no qcow2 image", path)
        if length > _NAME:
            raise DamagedSnapshot(f"{path}: the name of its backing file has {length:,} bytes", path)
        new = version >= _V3
        bits = 1 << _V3_LENGTH.unpack_from(head, _AT_ORDER)[0] if new else _V2_BITS
        features = _FEATURES.unpack_from(head, _AT_FEATURES)[0] if new else 0
        found = dict(_extensions(head, _V3_LENGTH.unpack_from(head, _AT_LENGTH)[0] if new else _V2_LENGTH))
        return Header(
            backing=_text(os.pread(fd, length, at)) if at else "",
            backing_format=_text(found.get(_BACKING_FORMAT, b"")),
            data_file=_text(found.get(_DATA_FILE, b"unnamed")) if features & _HAS_DATA_FILE else "",
            encryption=_CRYPT.get(crypt, str(crypt)) if crypt else "",
            bitmaps=tuple(_bitmaps(fd, found[_BITMAPS])) if _BITMAPS in found else (),
            full=f"refcount_bits={bits}" if inside + 2 >= 1 << bits else "",
        )
    except struct.error:
        raise DamagedSnapshot(f"{path}: its header cannot be read", path) from None
    finally:
        os.close(fd)


@contextmanager
def opened(path: str) -> Iterator[Qcow2]:
    """Open an image, which may be in use, and read its table of snapshots.

    Raises:
        DamagedSnapshot: it is no qcow2 image, or cannot be read.
        OSError: there is no such file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        head = os.pread(fd, _HEADER.size + _FEATURES.size, 0)
        (
            magic,
            version,
            *_,
        ) = _HEADER.unpack_from(head.ljust(_HEADER.size, b"\0"))
        if magic != _MAGIC:
            raise DamagedSnapshot(f"{path} is no qcow2 image", path)
        bits, size, count, table = (_HEADER.unpack_from(head)[i] for i in (4, 5, 11, 12))
        features = _FEATURES.unpack_from(head, _HEADER.size)[0] if version >= _V3 else 0
        image = Qcow2(path, fd, 1 << bits, 16 if features & _EXTENDED_L2 else 8)
        image.snapshots = {each.name: each for each in _entries(image, table, count, size)}
        yield image
    except struct.error:
        raise DamagedSnapshot(f"{path}: its table of snapshots cannot be read", path) from None
    finally:
        os.close(fd)


def _entries(image: Qcow2, offset: int, count: int, size: int) -> Iterator[InsideSnapshot]:
    for _ in range(count):
        table, words, id_, name, _, _, _, memory, extra = _ENTRY.unpack(image.read(offset, _ENTRY.size))
        more = image.read(offset + _ENTRY.size, extra)
        disk = size
        if extra >= _EXTRA.size:
            memory, disk = _EXTRA.unpack_from(more)
        start = offset + _ENTRY.size + extra + id_
        words_of_name = image.read(start, name)
        yield InsideSnapshot(words_of_name.decode(errors="replace"), table, words, memory, disk)
        offset += -(-(start - offset + name) // 8) * 8
