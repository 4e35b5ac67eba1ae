"""Archives of snapshots, for files of this host: `snaporch.drivers.local.archive`, in worker threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import trio

from snaporch.drivers.base import Archives, Binary, Progress
from snaporch.drivers.local import archive
from snaporch.drivers.local.durable import sync_parent
from snaporch.drivers.local.look import looked_at
from snaporch.errors import TargetExists
from snaporch.model.archive import Member
from snaporch.model.record import FileRecord


class Packing(Archives):
    """The part of a storage that packs and unpacks archives."""

    async def pack(
        self, output: str | Binary, manifest: bytes, files: Sequence[tuple[str, FileRecord]], progress: Progress
    ) -> int:
        """See Archives."""
        moved = _told(progress, sum(file.size for _, file in files))
        return await trio.to_thread.run_sync(_pack, output, manifest, files, moved, abandon_on_cancel=True)

    async def send(self, file: FileRecord, output: Binary, progress: Progress) -> None:
        """See Archives."""
        await trio.to_thread.run_sync(
            archive.send, output, file, _told(progress, file.size), abandon_on_cancel=True
        )

    async def name_file(self, part: str, path: str) -> None:
        """See Archives."""
        await trio.to_thread.run_sync(_name_file, part, path)

    async def read_manifest(self, path: str) -> bytes:
        """See Archives."""
        return await looked_at(path, partial(archive.read_manifest, path))

    async def unpack(
        self, path: str, members: Sequence[tuple[Member, str]], progress: Progress
    ) -> list[FileRecord]:
        """See Archives."""
        moved = _told(progress, sum(member.size for member, target in members if target))
        return await trio.to_thread.run_sync(archive.unpack, path, members, moved)


def _told(progress: Progress, total: int) -> Callable[[int], None]:
    """Return what a worker thread calls with the bytes that are done: it tells of it, and ends when cancelled."""
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        trio.from_thread.check_cancelled()
        trio.from_thread.run_sync(progress, done, total)

    return moved


def _pack(
    output: str | Binary, manifest: bytes, files: Sequence[tuple[str, FileRecord]], moved: Callable[[int], None]
) -> int:
    if not isinstance(output, str):
        return archive.write(output, manifest, files, moved)
    with open(output, "r+b", buffering=0) as file:
        size = archive.write(file, manifest, files, moved)
        os.fsync(file.fileno())
    return size


def _name_file(part: str, path: str) -> None:
    try:
        os.link(part, path, follow_symlinks=False)
    except FileExistsError:
        raise TargetExists(f"{path} exists, and no file is ever overwritten: choose another name") from None
    except OSError:  # the file system has no hard links
        if os.path.lexists(path):
            raise TargetExists(f"{path} exists, and no file is ever overwritten: choose another name") from None
        os.rename(part, path)
    else:
        os.unlink(part)
    sync_parent(path)
