"""Traits of storages; see `snaporch.drivers.base.traits`."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from snaporch.drivers.base.values import Binary, ChainCost, Progress, untold
from snaporch.model.archive import Member
from snaporch.model.record import FileRecord
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import DeviceDisk


@runtime_checkable
class OfflineMerges(Protocol):
    """Images that nobody has open can be merged."""

    @abc.abstractmethod
    async def commit_image(self, top: str, base: str, *, options: MergeOptions, progress: Progress) -> None:
        """Merge `top`, and what is between, down into `base`; no process has any of them open."""

    @abc.abstractmethod
    async def rebase(
        self,
        path: str,
        backing: DeviceDisk | None,
        *,
        content: bool,
        options: MergeOptions = MergeOptions(),  # noqa: B008 - an immutable value
        progress: Progress = untold,
    ) -> None:
        """Back an image by another; with `content` what it reads stays, copied up into it where need be."""


@runtime_checkable
class ImagePoints(Protocol):
    """A disk can be kept inside its image."""

    @abc.abstractmethod
    async def inside(self, path: str) -> tuple[str, ...]:
        """Return the names of the snapshots inside an image; none where there can be none. It may be in use.

        Raises:
            Refused: it cannot be read.
        """

    @abc.abstractmethod
    async def save_inside(self, path: str, tag: str) -> None:
        """Keep what an image holds, which no process has open, in a snapshot inside it; durable on return."""

    @abc.abstractmethod
    async def restore_inside(self, path: str, tag: str) -> None:
        """Put an image, which no process has open, back to a snapshot inside it; durable on return. Idempotent.

        What it holds otherwise is lost, and so it is with images that are backed by it.
        """

    @abc.abstractmethod
    async def delete_inside(self, path: str, tag: str) -> None:
        """Delete a snapshot inside an image that no process has open; durable on return. Idempotent."""

    @abc.abstractmethod
    async def seal_inside(self, path: str, tag: str) -> FileRecord:
        """Return the record of a snapshot inside an image, which may be in use: of the bytes that are its own."""

    @abc.abstractmethod
    async def check_inside(self, record: FileRecord, tag: str) -> None:
        """Read a snapshot inside an image, which may be in use, in full, and compare it with its record.

        Raises:
            DamagedSnapshot: it is not there, or not what was saved.
        """

    @abc.abstractmethod
    async def extract_disk(self, path: str, tag: str, copy: str) -> None:
        """Copy the disk in a snapshot inside an image, which may be in use, into a new image without backing.

        Whatever it raises, it has then left no file.

        Raises:
            FileExistsError: there is a file; it is untouched.
        """

    @abc.abstractmethod
    async def extract_memory(self, path: str, tag: str, copy: str) -> None:
        """Copy the memory in a snapshot inside an image to a new memory file; otherwise as `extract_disk`."""


@runtime_checkable
class ChainCosts(Protocol):
    """What a chain costs can be measured."""

    @abc.abstractmethod
    async def read_cost(self, path: str, format_: str) -> ChainCost:
        """Measure what the chain of the image at `path` costs; reads a few MiB of it, from all over the disk."""


@runtime_checkable
class Archives(Protocol):
    """Snapshots go to archives (`snaporch.model.archive`) and come from them."""

    @abc.abstractmethod
    async def copy_image(self, image: DeviceDisk, copy: str, format_: str, progress: Progress) -> None:
        """Copy what an image that nobody writes to reads, its chain included, into a new image without backing.

        Whatever it raises, it has then left no file.

        Raises:
            FileExistsError: there is a file; it is untouched.
        """

    @abc.abstractmethod
    async def pack(
        self, output: str | Binary, manifest: bytes, files: Sequence[tuple[str, FileRecord]], progress: Progress
    ) -> int:
        """Write an archive; return its size in bytes.

        Args:
            output: a file that is there and empty, durable on return; or a stream.
            manifest: its first member.
            files: the other members: the name of each, and the file, which must be as its record says.
            progress: told how far it is.
        """

    @abc.abstractmethod
    async def send(self, file: FileRecord, output: Binary, progress: Progress) -> None:
        """Write a file, which must be as its record says, to a stream."""

    @abc.abstractmethod
    async def name_file(self, part: str, path: str) -> None:
        """Give a file its name; durable on return.

        Raises:
            TargetExists: there is something of that name; it is untouched.
        """

    @abc.abstractmethod
    async def read_manifest(self, path: str) -> bytes:
        """Return an archive's manifest.

        Raises:
            InvalidInput: it cannot be read, or is no archive.
        """

    @abc.abstractmethod
    async def unpack(
        self, path: str, members: Sequence[tuple[Member, str]], progress: Progress
    ) -> Sequence[FileRecord]:
        """Write members of an archive, which may be anybody's, to files that are there and empty; return these.

        Args:
            path: the archive.
            members: all of them in their order, each with its file; with an empty path it is passed over.
            progress: told how far it is.

        Raises:
            DamagedSnapshot: the archive is cut short, or is not what its manifest says.
        """

    @abc.abstractmethod
    async def check_alone(self, path: str) -> None:
        """Check that a qcow2 that may be anybody's refers to no other file and has sound structure.

        Raises:
            DamagedSnapshot: it does, or has not.
        """
