"""Archives of snapshots as tar files: written in one pass, read by one who trusts nothing in them.

A reader takes members one by one, each a plain file whose name and size it knows already from the manifest; nothing
in the tar says where a file goes. Only the block of 512 bytes before a member is parsed, never what extends it.

Everything here runs in worker threads; `moved` is called there, too, and may end the work by raising.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterable
from io import BufferedReader

import xxhash

from snaporch.drivers.base import Binary
from snaporch.drivers.local.durable import identity
from snaporch.errors import DamagedSnapshot, InvalidInput, OperationFailed
from snaporch.model.archive import MANIFEST, Member
from snaporch.model.record import FileRecord

MOST_MANIFEST = 16 * 2**20
_CHUNK = 4 * 2**20

Moved = Callable[[int], None]
"""Told how many bytes more are done."""


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def write(output: Binary, manifest: bytes, files: Iterable[tuple[str, FileRecord]], moved: Moved) -> int:
    """Write an archive; return its size in bytes.

    Raises:
        OperationFailed: a file is not what it is to be.
        OSError: it cannot be read, or `output` cannot be written to.
    """
    total = _put(output, _header(MANIFEST, len(manifest)) + manifest + _padding(len(manifest)))
    for name, file in files:
        total += _put(output, _header(name, file.size))
        total += send(output, file, moved) + _put(output, _padding(file.size))
    return total + _put(output, bytes(2 * tarfile.BLOCKSIZE))


def send(output: Binary, file: FileRecord, moved: Moved) -> int:
    """Write a file to a stream; return its size in bytes; raises as `write`."""
    digest, left = xxhash.xxh3_128(), file.size
    with open(file.path, "rb", buffering=0) as source:
        while left and (chunk := source.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= _put(output, chunk)
            moved(len(chunk))
    if left or f"xxh3-128:{digest.hexdigest()}" != file.checksum:
        raise OperationFailed(f"{file.path} is damaged: it is not what was saved")
    return file.size


def _put(output: Binary, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[output.write(view) or 0 :]
    return len(data)


def read_manifest(path: str) -> bytes:
    """Return an archive's manifest.

    Raises:
        InvalidInput: it cannot be read, or is no archive of snaporch's.
    """
    try:
        with open(path, "rb", opener=_careful) as archive:
            info = _next(archive, path)
            if info.name != MANIFEST or not 0 < info.size <= MOST_MANIFEST:
                raise InvalidInput(f"{path} is no archive of snaporch's: it does not begin with {MANIFEST}")
            return _exactly(archive, info.size, path)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None


def _careful(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)


def unpack(path: str, members: Iterable[tuple[Member, str]], moved: Moved) -> list[FileRecord]:
    """Write members of an archive to files, which are there and empty; durable on return. Return what they are.

    Args:
        path: the archive.
        members: all of them in their order, with the file that each goes to; an empty path: it is passed over.
        moved: see above.

    Raises:
        DamagedSnapshot: the archive is cut short, or is not what its manifest says.
        OSError: a file cannot be written to.
    """
    sealed = []
    with open(path, "rb", opener=_careful) as archive:
        manifest = _next(archive, path)
        archive.seek(manifest.size + len(_padding(manifest.size)), os.SEEK_CUR)
        for member, target in members:
            info = _next(archive, path)
            if (info.name, info.size) != (member.name, member.size):
                raise DamagedSnapshot(f"{path} has {info.name!r:.80} where {member.name} is to be", path)
            if not target:
                archive.seek(member.size + len(_padding(member.size)), os.SEEK_CUR)
                continue
            digest, left = xxhash.xxh3_128(), member.size
            with open(target, "r+b", buffering=0) as file:
                while left:
                    chunk = _exactly(archive, min(left, _CHUNK), path)
                    digest.update(chunk)
                    _put(file, chunk)
                    left -= len(chunk)
                    moved(len(chunk))
                os.fsync(file.fileno())
                written = identity(file.fileno())
            if f"xxh3-128:{digest.hexdigest()}" != member.checksum:
                raise DamagedSnapshot(f"{path} is damaged: {member.name} is not what was saved", path)
            sealed.append(FileRecord(target, member.size, member.checksum, written))
            _exactly(archive, len(_padding(member.size)), path)
        if any(_exactly(archive, tarfile.BLOCKSIZE, path)):
            raise DamagedSnapshot(f"{path} has more in it than its manifest says", path)
    return sealed


def _next(archive: BufferedReader, path: str) -> tarfile.TarInfo:
    """Return what the next block says of a member, which must be a plain file."""
    block = archive.read(tarfile.BLOCKSIZE)
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError):
        raise DamagedSnapshot(f"{path} is no archive of snaporch's, or is damaged", path) from None
    if info.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or info.size < 0:
        raise DamagedSnapshot(f"{path}: {info.name!r:.80} is no plain file", path)
    return info


def _exactly(archive: BufferedReader, size: int, path: str) -> bytes:
    data = archive.read(size)
    if len(data) < size:
        raise DamagedSnapshot(f"{path} is cut short", path)
    return data
