"""Reads a SQLite database and its write-ahead log into memory: where SQLite itself would have to write beside them.

The log is a header and frames, each a page and what belongs to it (https://www.sqlite.org/fileformat2.html#walformat).
A frame counts when its salts are the header's and its checksum, which goes on from the frame before, is right; what
comes after the last frame that ends a transaction was never committed.
"""

from __future__ import annotations

import os
import sqlite3
import struct
from pathlib import Path

_HEADER, _FRAME = 32, 24
_MAGIC = 0x377F0682  # the last bit says in which order the words are that checksums are made of
_LEGACY = b"\x01\x01"  # bytes 18 and 19 of a database that has no log
_TRIES = 10


def in_memory(path: Path) -> sqlite3.Connection:
    """Return a connection to a copy, in memory, of a database as its last transaction left it.

    Raises:
        sqlite3.Error: it is no database, or changes all the time.
        OSError: it cannot be read.
    """
    for _ in range(_TRIES):
        before = _stamps(path)
        database = path.read_bytes()
        wal = _wal(path)
        log = wal.read_bytes() if wal.exists() else b""
        if _stamps(path) == before:
            connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            connection.deserialize(_applied(database, log))
            return connection
    raise sqlite3.OperationalError("it is written to all the time")


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _stamps(path: Path) -> list[tuple[int, ...]]:
    found = list[tuple[int, ...]]()
    for each in (path, _wal(path)):
        stat = os.stat(each) if each.exists() else None
        found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else ())
    return found


def _applied(database: bytes, log: bytes) -> bytes:
    """Return a database with the committed pages of its log in it, marked as one that has none."""
    pages, count, size = _committed(log)
    image = bytearray(database)
    if count:
        image = image[: count * size].ljust(count * size, b"\0")
    for number, content in pages.items():
        if number <= count:
            image[(number - 1) * size : number * size] = content
    if image:
        image[18:20] = _LEGACY
    return bytes(image)


def _committed(log: bytes) -> tuple[dict[int, bytes], int, int]:
    """Return the pages that a log's transactions wrote, how many pages the database has, and a page's size."""
    if len(log) < _HEADER:
        return {}, 0, 0
    magic, _, size, _, *salts, first, second = struct.unpack(">8I", log[:_HEADER])
    order = ">" if magic & 1 else "<"
    if magic & ~1 != _MAGIC or _checksum(log[:24], order, (0, 0)) != (first, second):
        return {}, 0, 0
    sums, pages, pending, count = (first, second), dict[int, bytes](), dict[int, bytes](), 0
    for at in range(_HEADER, len(log) - _FRAME - size + 1, _FRAME + size):
        number, total, *rest = struct.unpack(">6I", log[at : at + _FRAME])
        content = log[at + _FRAME : at + _FRAME + size]
        sums = _checksum(content, order, _checksum(log[at : at + 8], order, sums))
        if rest[:2] != salts or tuple(rest[2:]) != sums:
            break
        pending[number] = content
        if total:
            pages.update(pending)
            pending, count = {}, total
    return pages, count, size


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        one = (one + even + two) & 0xFFFFFFFF
        two = (two + odd + one) & 0xFFFFFFFF
    return one, two
