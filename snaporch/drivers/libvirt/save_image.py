"""The header that libvirt writes before a guest's memory; no I/O.

With it ``virsh restore`` takes snaporch's memory files, and snaporch loads libvirt's.
It is ``virQEMUSaveHeader`` of src/qemu/qemu_saveimage.h and has 92 bytes: a magic, then in the host's byte order
the version, the length of what follows, whether the guest ran, the compression, where a cookie begins, and zeros.
The XML of the domain follows, with a zero byte, and zeros up to where the memory stream begins.
"""

from __future__ import annotations

import struct

import attrs

from snaporch.errors import DamagedSnapshot, Unsupported

MAGIC = b"LibvirtQemudSave"
UNFINISHED = b"LibvirtQemudPart"
OFFSET = 256 * 1024  # of the stream in files of ours: whole blocks for O_DIRECT, and room for any XML
_FORMAT = "=16s5I"
LENGTH = 92
_VERSION = 2
_COMPRESSIONS = {1: "gzip", 2: "bzip2", 3: "xz", 4: "lzop", 5: "zstd", 6: "sparse"}


@attrs.frozen
class SaveImage:
    """What a header says.

    Attributes:
        xml: of the domain at the point.
        offset: where the memory stream begins, in bytes.
        was_running: the guest ran at the point.
    """

    xml: str
    offset: int
    was_running: bool


def header(xml: str, *, running: bool) -> bytes:
    """Return the bytes before the memory stream of a file of ours.

    Raises:
        Unsupported: the XML is too long.
    """
    text = xml.encode() + b"\0"
    if LENGTH + len(text) > OFFSET:
        raise Unsupported(f"libvirt's XML of the domain has {len(text):,} bytes: more than fit before its memory")
    head = struct.pack(_FORMAT, MAGIC, _VERSION, OFFSET - LENGTH, int(running), 0, 0)
    return (head.ljust(LENGTH, b"\0") + text).ljust(OFFSET, b"\0")


def read_header(start: bytes, path: str) -> SaveImage:
    """Return what the first bytes of a memory file say.

    Args:
        start: at least `OFFSET` bytes, or all that the file has.
        path: of the file, for errors.

    Raises:
        DamagedSnapshot: it is no header, or an unfinished one.
        Unsupported: the memory is compressed, or of another version.
    """
    if len(start) < LENGTH:
        raise DamagedSnapshot(f"{path} is too short for a memory file of libvirt's", path)
    magic, version, length, running, compression, cookie = struct.unpack_from(_FORMAT, start)
    if magic == UNFINISHED:
        raise DamagedSnapshot(f"{path} was never finished: libvirt was interrupted while it saved", path)
    if magic != MAGIC:
        raise DamagedSnapshot(f"{path} is no memory file of libvirt's: it does not begin as one", path)
    if version != _VERSION:
        raise Unsupported(f"{path} is a memory file of version {version}; snaporch reads version {_VERSION}")
    if compression:
        kind = _COMPRESSIONS.get(compression, f"format {compression}")
        raise Unsupported(f"{path} is compressed ({kind}); snaporch loads memory that is not")
    end = LENGTH + (cookie or length)
    text, _, _ = start[LENGTH:end].partition(b"\0")
    return SaveImage(text.decode(), LENGTH + length, bool(running))
