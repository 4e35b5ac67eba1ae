"""An image and what backs it, read from its own header: nothing is probed, started or connected to.

The format of the first image is told; that of each image below is what the one above says. An image that says
nothing about it, or names something that is no file, is not followed here: `Unread` says so.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator

import attrs

from snaporch.drivers.local.names import file_named
from snaporch.errors import Refused

_MAGIC = 0x514649FB
_HEADER = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_EXTERNAL_DATA = 1 << 2
_NAME_BYTES = 1023
_HEAD_BYTES = 64 * 1024
_SMALLEST_CLUSTER, _LARGEST_CLUSTER = 9, 21
MOST_LINKS = 2_000


class Unread(Refused):
    """An image names something below it that only the hypervisor's own tools understand."""


@attrs.frozen
class Link:
    """One file of a lineage.

    Attributes:
        path: absolute, as the one above names it.
        format: ``qcow2`` or ``raw``.
        virtual_size: what a guest sees, in bytes.
        status: of the file as it was opened.
        backing: the path of the image below; empty: none.
        backing_format: of that; empty where the image does not say.
        data_file: where its data is, if that is another file.
    """

    path: str
    format: str
    virtual_size: int
    status: os.stat_result
    backing: str = ""
    backing_format: str = ""
    data_file: str = ""


Look = Callable[[str, Link | None], None]
"""Called with each path before it is opened, and with the link that names it."""


def lineage(path: str, format_: str, before: Look | None = None) -> tuple[Link, ...]:
    """Return an image and all below it, the topmost first.

    Args:
        path: the image.
        format_: ``qcow2`` or ``raw``.
        before: may refuse a path.

    Raises:
        Unread: one names something that is no file, or does not say its format.
        Refused: one is no image, cannot be read, or leads to itself.
    """
    return tuple(_links(os.path.abspath(path), format_, before))


def _links(path: str, format_: str, before: Look | None) -> Iterator[Link]:
    above: Link | None = None
    seen: set[tuple[int, int]] = set()
    while path:
        if before is not None:
            before(path, above)
        link = _read(path, format_)
        if (key := (link.status.st_dev, link.status.st_ino)) in seen or len(seen) >= MOST_LINKS:
            raise Refused(f"cannot read image {path}: it leads to itself, or to more than {MOST_LINKS:,} images")
        seen.add(key)
        if link.data_file and before is not None:
            before(link.data_file, link)
        yield link
        if link.backing and link.backing_format not in {"qcow2", "raw"}:
            what = f"{link.backing_format!r}" if link.backing_format else "of no format that it names"
            raise Unread(
                f"{link.path} is backed by {link.backing}, {what}: `qemu-img rebase -u -F FORMAT -b "
                f"{link.backing} {link.path}` says which it is, qcow2 or raw"
            )
        above, path, format_ = link, link.backing, link.backing_format


def _read(path: str, format_: str) -> Link:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise Refused(f"cannot read image {path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise Refused(f"cannot read image {path}: it is neither a file nor a block device")
        if format_ == "raw":
            return Link(path, format_, os.lseek(fd, 0, os.SEEK_END), status)
        return _qcow2(fd, path, status)
    except (struct.error, UnicodeDecodeError, ValueError):
        raise Refused(f"cannot read image {path}: it is no {format_} image, or is damaged") from None
    except OSError as error:
        raise Refused(f"cannot read image {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def _qcow2(fd: int, path: str, status: os.stat_result) -> Link:
    head = os.pread(fd, _HEAD_BYTES, 0)
    magic, version, where, length, bits, size = _HEADER.unpack_from(head)[:6]
    if magic != _MAGIC or version not in {2, 3} or not _SMALLEST_CLUSTER <= bits <= _LARGEST_CLUSTER:
        raise ValueError("no qcow2")
    if length > _NAME_BYTES or (where and where + length > 1 << bits):
        raise ValueError("a name beyond the header")
    features, begin = 0, _HEADER.size
    if version > 2:  # noqa: PLR2004 - the version from which on there are features
        features, *_, begin = _V3.unpack_from(head, _HEADER.size)
    extensions = dict(_extensions(head, begin))
    name = os.pread(fd, length, where).decode() if where else ""
    data = _beside(path, extensions.get(_DATA_FILE, b"").decode()) if features & _EXTERNAL_DATA else ""
    if features & _EXTERNAL_DATA and not data:
        raise Unread(f"{path} keeps its data in another file and does not say which")
    backing = _beside(path, name) if name else ""
    return Link(path, "qcow2", size, status, backing, extensions.get(_BACKING_FORMAT, b"").decode(), data)


def _extensions(head: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, offset)
        offset += _EXTENSION.size
        if kind == 0 or offset + length > len(head):
            return
        yield kind, head[offset : offset + length]
        offset += -(-length // 8) * 8


def _beside(path: str, name: str) -> str:
    """Return the path that a name in an image stands for, as the hypervisor reads it.

    Raises:
        Unread: it is a protocol's, or JSON, and no file's.
    """
    if not name or "\0" in name:
        return ""
    if ":" in name.partition("/")[0]:
        raise Unread(f"{path} leads to {name[:60]!r}, which is no file")
    return file_named(name, os.path.dirname(path))
