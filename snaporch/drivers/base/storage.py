"""Where images and memory files live."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import ClassVar

from snaporch.drivers.base.values import ImageStatus, Trait
from snaporch.images.kinds import Traced
from snaporch.model.record import FileRecord
from snaporch.model.reserved import check_in_root
from snaporch.model.rfc import DeviceDisk


class Storage(abc.ABC):
    """Where images and memory files live. Paths are absolute; files are made 0600, directories 0700."""

    traits: ClassVar[frozenset[Trait]] = frozenset()
    """What it can do beside this."""

    @abc.abstractmethod
    async def exists(self, path: str) -> bool:
        """Return whether there is anything at `path`."""

    async def check_place(self, root: str, domain: str, path: str, what: str) -> None:
        """Refuse a path that is in the root and not in the domain's directory there, or is one of its own names.

        Args:
            root: the root.
            domain: whose request names the path.
            path: absolute.
            what: what it is for.

        Raises:
            InvalidInput: the path is such a one.
        """
        if PurePath(path).is_relative_to(root):
            check_in_root(PurePath(path).relative_to(root), domain, what)

    async def check_memory_place(self, path: str) -> None:  # noqa: B027 - anywhere, mostly
        """Refuse a place for a memory file.

        Raises:
            Unsupported: memory could not be kept from others there.
        """

    @property
    def no_copies(self) -> str:
        """Why no copies of images are made, or an empty string."""
        return ""

    async def check_given(self, path: str, what: str, format_: str = "") -> None:  # noqa: B027 - as far as it can tell
        """Refuse a file of a definition that is not there, cannot be read, or is not of its format.

        Args:
            path: the file.
            what: what it is for.
            format_: of an image.

        Raises:
            InvalidInput: the path is such a one.
        """

    @abc.abstractmethod
    async def check_writable(self, directory: str) -> None:
        """Raise Refused when files cannot be made in `directory`; makes nothing."""

    @abc.abstractmethod
    async def make_directory(self, directory: str) -> None:
        """Make a directory and its parents, where they are missing."""

    @abc.abstractmethod
    async def free(self, directory: str) -> tuple[str, int]:
        """Return an id of the file system that `directory` is (or will be) on, and the bytes free in it."""

    @abc.abstractmethod
    async def chain(self, path: str, format_: str, *, still: bool = False) -> tuple[DeviceDisk, ...]:
        """Return the chain of the image at `path`, itself first.

        Raises:
            Refused: a link is missing or is no image; or, where it is to be `still`, a process has one of them open
                for writing.
        """

    @abc.abstractmethod
    async def inspect(self, path: str, format_: str) -> tuple[ImageStatus, ...]:
        """Return the chain of the image at `path`, itself first, with sizes; as `chain`."""

    @abc.abstractmethod
    async def trace(self, path: str, format_: str) -> tuple[Traced, ...]:
        """Return every file that a reader of the image at `path` reads, the image itself first, as it is now.

        Raises:
            Refused: one cannot be looked at, or is not what it is said to be.
        """

    @abc.abstractmethod
    async def identities(self, paths: Collection[str]) -> Mapping[str, str]:
        """Return what files are (`Traced.identity`), by path; those that are not there are left out.

        Raises:
            Refused: one cannot be looked at.
        """

    async def is_read_only(self, path: str) -> bool:  # noqa: ARG002 - where none are
        """Return whether a file is on a file system that cannot be written to."""
        return False

    async def openers(self, identities: Collection[str]) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002 - see below
        """Return, by identity, the other processes that have a file open, as far as they can be seen."""
        return {}

    async def mark(self, path: str, root: str) -> None:  # noqa: B027 - nothing where there are no marks
        """Mark an image as frozen for a root directory, for others to see, where it can be marked. Idempotent."""

    async def unmark(self, path: str, root: str) -> None:  # noqa: B027 - as above
        """Take a root's mark off an image. Idempotent."""

    async def marks(self, path: str) -> tuple[str, ...]:  # noqa: ARG002 - as above
        """Return the root directories for which an image is marked as frozen."""
        return ()

    @abc.abstractmethod
    async def check_image(self, path: str, format_: str) -> None:
        """Check the structure of an image that nothing writes to.

        Raises:
            DamagedSnapshot: it has errors (leaked clusters are none).
        """

    @abc.abstractmethod
    async def virtual_size(self, path: str, format_: str) -> int:
        """Return the size of the disk in an image, in bytes."""

    @abc.abstractmethod
    async def make_file(self, path: str) -> None:
        """Make an empty file, durable on return; whatever it raises, it has then left no file.

        Raises:
            FileExistsError: there is a file; it is untouched.
        """

    @abc.abstractmethod
    async def make_overlay(
        self, path: str, base: DeviceDisk, size: int, owner: tuple[int, int] | None = None
    ) -> None:
        """Make an empty qcow2 over `base`, durable on return; whatever it raises, it has then left no file.

        With an `owner` it is that user's and that group's.

        Raises:
            FileExistsError: there is a file; it is untouched.
        """

    @abc.abstractmethod
    async def commit_overlay(self, path: str) -> None:
        """Merge an overlay, which no process has open, into its backing image; the overlay is then empty.

        Raises:
            OperationFailed: it cannot: a process has it open, or a file is missing.
        """

    async def release(self, paths: Collection[str]) -> None:  # noqa: B027 - nothing where all is done by ourselves
        """End programs that snaporch had started to work on files, and that its crash has left running."""

    @abc.abstractmethod
    async def remove(self, path: str) -> None:
        """Unlink a file, if it is there; durable on return."""

    async def write_back(self, paths: Collection[str]) -> None:  # noqa: B027 - nothing where nothing is cached
        """Have what hypervisors have written to images, and not synced, go to disk, as far as that can be done.

        A guest that is paused next then need not wait for it. What cannot be synced is passed over.
        """

    @abc.abstractmethod
    async def seal(self, path: str, known: FileRecord | None = None) -> FileRecord:
        """Make a file durable and return its record, `known` itself where that is still true."""

    @abc.abstractmethod
    async def check(self, record: FileRecord, *, thorough: bool = False) -> None:
        """Compare a file with its record; `thorough` reads it even when nothing seems to have touched it.

        Raises:
            DamagedSnapshot: it is missing, or its size or checksum differs.
        """
