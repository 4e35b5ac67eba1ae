"""The file systems of a simulated host: images and memory files by path, in memory, with limited space.

What a file holds is one number (see `guest`), so a file of any size costs a few hundred bytes here.

Rule 1: space is taken when a file grows and given back when it is removed; ENOSPC is an OSError, as everywhere.
Rule 2: an image is *frozen* from the moment an overlay over it is opened by a machine until that overlay is merged
        or removed. Writing to a frozen image is a bug in snaporch and raises AssertionError.
Rule 3: nothing here knows of time or of Trio.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import attrs
import xxhash

from snaporch.errors import DamagedSnapshot, OperationFailed, Refused
from snaporch.model.record import FileRecord
from snaporch.model.rfc import DeviceDisk

EMPTY_IMAGE = 192 * 2**10  # what qemu-img makes of an empty qcow2: header, refcounts, first table
CLUSTER = 64 * 2**10  # the smallest piece by which a qcow2 grows
PLENTY = 2**50  # capacity of a file system that nobody limits: ten thousand memory files fit


def os_error(code: int, path: str) -> OSError:
    """Return the OSError, of its proper subclass, that the kernel would give for `path`."""
    return OSError(code, os.strerror(code), path)


@attrs.define(eq=False)
class FileSystem:
    """A file system, mounted at `prefix`.

    Attributes:
        prefix: every path below it is on this file system, unless a longer prefix fits.
        capacity: bytes in all.
        readonly: nothing can be made on it.
        used: bytes that files have taken.
    """

    prefix: str
    capacity: int = PLENTY
    readonly: bool = False
    used: int = 0

    @property
    def free(self) -> int:
        """Bytes that can still be taken."""
        return max(0, self.capacity - self.used)


@attrs.define(eq=False)
class SimulatedFile:
    """A file, of which only the size is known; images and memory files are more.

    Attributes:
        path: where it is.
        system: the file system that it takes space of.
        inode: unique in the host, never used again.
        size: in bytes; all of them are taken of the file system.
        version: counts the writes, as mtime does.
        flips: counts what `damage` did to its content.
        linked: it has not been removed.
    """

    path: str
    system: FileSystem
    inode: int
    size: int = 0
    version: int = 0
    flips: int = 0
    linked: bool = True

    def content(self) -> str:
        """Return what the checksum is computed from."""
        return f"{type(self).__name__} {self.size} {self.flips}"

    def grow(self, size: int) -> None:
        """Make the file `size` bytes longer, or as long as the space lasts.

        Raises:
            OSError: ENOSPC; what fitted is taken.
        """
        if size <= 0:
            return
        taken = min(size, self.system.free) if self.linked else size
        self.size += taken
        self.version += 1
        if self.linked:
            self.system.used += taken
        if taken < size:
            raise os_error(errno.ENOSPC, self.path)

    def empty(self) -> None:
        """Make the file empty."""
        if self.linked:
            self.system.used -= self.size
        self.size = 0
        self.version += 1

    @property
    def identity(self) -> tuple[int, ...]:
        """What changes with every write that the kernel sees: inode, size and version."""
        return (self.inode, self.size, self.version)

    def record(self) -> FileRecord:
        """Return the file as it is now, its checksum computed from its content."""
        digest = xxhash.xxh3_128_hexdigest(self.content().encode())
        return FileRecord(self.path, self.size, f"xxh3-128:{digest}", self.identity)


@attrs.define(eq=False)
class MemoryFile(SimulatedFile):
    """A memory file: empty when made, sealed when a stream has completed.

    Attributes:
        number: what RAM held at the point.
        torn: the disks that did not agree with RAM even then, see `Guest.torn`.
        ram: bytes of RAM that were saved.
        versions: what it is bound to, as `Capabilities.versions`.
        complete: all of the memory is in it.
        frozen: the guest's file systems were frozen at the point.
    """

    number: int = 0
    torn: frozenset[str] = frozenset()
    ram: int = 0
    versions: Mapping[str, str] = attrs.field(factory=dict)
    complete: bool = False
    frozen: bool = False

    def content(self) -> str:
        """See SimulatedFile."""
        return f"{super().content()} {self.number} {sorted(self.torn)} {self.complete}"


@attrs.frozen
class Inside:
    """A snapshot inside an image.

    Attributes:
        number: `Image.number` at the point.
        content: what a disk had read, also from below the image.
        memory: what RAM held, as a memory file that is nowhere; None without memory.
        size: bytes that it takes of the image.
    """

    number: int | None
    content: int
    memory: MemoryFile | None = None
    size: int = CLUSTER


@attrs.define(eq=False)
class Image(SimulatedFile):
    """A disk image.

    Attributes:
        format: ``qcow2`` or ``raw``.
        virtual_size: what a guest sees, in bytes.
        backing: the path that its header names, or an empty string.
        backing_format: the format named there.
        number: the last number written while the image was active; None: nothing, reads go to the backing image.
        overlays: paths of the overlays that froze it.
        stale: it was merged, or what it was over was merged into: it must not be used again.
        inside: the snapshots inside it, by name.
    """

    format: str = "qcow2"
    virtual_size: int = 2**30
    backing: str = ""
    backing_format: str = ""
    number: int | None = None
    overlays: set[str] = attrs.field(factory=set)
    stale: bool = False
    inside: dict[str, Inside] = attrs.field(factory=dict)

    def content(self) -> str:
        """See SimulatedFile."""
        inside = [(tag, point.number) for tag, point in self.inside.items()]
        return f"{super().content()} {self.format} {self.virtual_size} {self.backing} {self.number} {inside}"

    @property
    def allocated(self) -> int:
        """Bytes of the disk that the image holds itself."""
        return self.size - (EMPTY_IMAGE if self.format == "qcow2" else 0)

    def keep(self, tag: str, point: Inside) -> None:
        """Put a snapshot inside.

        Raises:
            OSError: ENOSPC.
        """
        self.grow(point.size)
        self.inside[tag] = point

    def forget(self, tag: str) -> None:
        """Remove a snapshot inside, if it is there."""
        if (point := self.inside.pop(tag, None)) is not None:
            self.size -= point.size
            self.system.used -= point.size
            self.version += 1

    def point(self, tag: str) -> Inside:
        """Return a snapshot inside.

        Raises:
            DamagedSnapshot: it is not there.
        """
        if tag not in self.inside:
            raise DamagedSnapshot(f"{self.path} has no snapshot {tag!r} inside any more", self.path)
        return self.inside[tag]

    def go_back(self, tag: str) -> None:
        """Hold again what a snapshot inside holds."""
        self.number = self.point(tag).number
        self.version += 1

    def write(self, number: int) -> None:
        """Overwrite the number in place, which takes a cluster the first time.

        Raises:
            AssertionError: the image is frozen.
        """
        if self.overlays:
            raise AssertionError(f"bug: {self.path} is written to, which is frozen below {sorted(self.overlays)}")
        if self.number is None and self.format == "qcow2":
            self.system.used += CLUSTER  # not refused on a full disk: what is simulated there is `spread`
            self.size += CLUSTER
        self.number = number
        self.version += 1

    def spread(self, size: int) -> None:
        """Let a guest write `size` bytes that the image has not held, as far as the disk and the space go."""
        size = min(size, self.virtual_size - self.size, self.system.free)
        if size > 0:
            self.grow(size)


def _give_room(image: Image, merged: Iterable[Image]) -> None:
    """Make an image as much larger as it can become by taking up others, or raise ENOSPC."""
    more = min(sum(each.allocated for each in merged), max(0, image.virtual_size - image.allocated))
    if more > image.system.free:
        raise os_error(errno.ENOSPC, image.path)
    image.grow(more)


@attrs.define(eq=False)
class Files:
    """Every file of a host.

    Attributes:
        systems: file systems by prefix.
        directories: those that exist.
        by_path: the files.
    """

    systems: dict[str, FileSystem] = attrs.field(factory=lambda: {"/": FileSystem("/")})
    directories: set[str] = attrs.field(factory=lambda: {"/"})
    by_path: dict[str, SimulatedFile] = attrs.field(factory=dict)
    _inodes: int = 0

    def mount(self, system: FileSystem) -> None:
        """Put a file system in place; its prefix is a directory from now on."""
        self.systems[system.prefix] = system
        self.make_directory(system.prefix, force=True)

    def system_of(self, path: str) -> FileSystem:
        """Return the file system that `path` is or would be on."""
        while path not in self.systems:
            path = posixpath.dirname(path)
        return self.systems[path]

    def make_directory(self, directory: str, *, force: bool = False) -> None:
        """Make a directory and its parents; `force` makes it on a read-only file system too.

        Raises:
            OSError: EROFS, or ENOTDIR where a file is in the way.
        """
        missing = []
        while directory not in self.directories:
            missing.append(directory)
            directory = posixpath.dirname(directory)
        for path in missing:
            if path in self.by_path:
                raise os_error(errno.ENOTDIR, path)
            if self.system_of(path).readonly and not force:
                raise os_error(errno.EROFS, path)
        self.directories.update(missing)

    def _place(self, path: str) -> tuple[FileSystem, int]:
        """Return the file system and the inode of a file that is to be made."""
        if path in self.by_path or path in self.directories:
            raise os_error(errno.EEXIST, path)
        if posixpath.dirname(path) not in self.directories:
            raise os_error(errno.ENOENT, path)
        system = self.system_of(path)
        if system.readonly:
            raise os_error(errno.EROFS, path)
        self._inodes += 1
        return system, self._inodes

    def make_plain(self, path: str, size: int = 0) -> SimulatedFile:
        """Make a file that nobody looks into; errors as `make_memory`."""
        return self._keep(SimulatedFile(path, *self._place(path)), size)

    def make_memory(self, path: str) -> SimulatedFile:
        """Make an empty file for memory.

        Raises:
            FileExistsError: there is something; it is untouched.
            OSError: ENOENT (no directory), EROFS, ENOSPC.
        """
        return self._keep(MemoryFile(path, *self._place(path)), 0)

    def make_image(self, path: str, virtual_size: int, *, format_: str = "qcow2", base: DeviceDisk | None) -> Image:
        """Make an empty image, over `base` where there is one; errors as `make_memory`."""
        image = Image(path, *self._place(path), format=format_, virtual_size=virtual_size)
        if base is not None:
            image.backing, image.backing_format = base.path, base.format
        self._keep(image, EMPTY_IMAGE)
        return image

    def _keep(self, file: SimulatedFile, size: int) -> SimulatedFile:
        if size > file.system.free:
            raise os_error(errno.ENOSPC, file.path)
        file.grow(size)
        self.by_path[file.path] = file
        return file

    def find(self, path: str) -> SimulatedFile:
        """Return the file at `path`.

        Raises:
            FileNotFoundError: there is none.
        """
        try:
            return self.by_path[path]
        except KeyError:
            raise os_error(errno.ENOENT, path) from None

    def image(self, path: str, format_: str = "") -> Image:
        """Return the image at `path`, opened as `format_` (empty: as what it is).

        Raises:
            Refused: nothing is there, or no image of that format.
        """
        file = self.by_path.get(path)
        if file is None:
            raise Refused(f"cannot read image {path}: no such file")
        if not isinstance(file, Image) or (format_ and file.format != format_ != "raw"):
            raise Refused(f"cannot read image {path}: it is not in {format_ or 'any image'} format")
        return file

    def chain(self, path: str, format_: str = "") -> Iterator[Image]:
        """Yield the image at `path` and what is below it; errors as `image`."""
        if path:
            image = self.image(path, format_)
            yield from self.below(image) if format_ != "raw" else (image,)

    def below(self, image: Image) -> Iterator[Image]:
        """Yield an image, which may be open and removed, and what is below it; errors as `image`."""
        yield image
        yield from self.chain(image.backing, image.backing_format)

    def number(self, path: str) -> int:
        """Return the number that is read from an image: its own or that of the first image below that has one."""
        return next((image.number for image in self.chain(path) if image.number is not None), 0)

    def freeze_below(self, overlay: Image) -> None:
        """Note that a machine writes to `overlay` and relies on what is below."""
        if stale := [image.path for image in self.chain(overlay.path) if image.stale]:
            raise AssertionError(f"bug: {stale} are used again, whose content went with a merge")
        if overlay.backing:
            self.image(overlay.backing).overlays.add(overlay.path)

    def merge(self, overlay: Image) -> Image:
        """Write what `overlay` holds to its backing image, which thaws, and return that.

        Raises:
            AssertionError: another overlay relies on the backing image.
            OSError: ENOSPC; nothing is lost, the overlay still holds everything.
        """
        base = self.image(overlay.backing)
        if overlay.number is not None:
            if others := base.overlays - {overlay.path}:
                raise AssertionError(f"bug: {base.path} is merged into, on which {sorted(others)} rely")
            grown = max(0, min(overlay.size - EMPTY_IMAGE - CLUSTER, base.virtual_size - base.size))
            if grown > base.system.free:
                raise os_error(errno.ENOSPC, base.path)
            base.overlays.clear()
            base.write(overlay.number)
            base.spread(grown)
        base.overlays.discard(overlay.path)
        return base

    def run(self, top: str, base: str | None) -> list[Image]:
        """Return the images from `top` down to `base`, that included; None: all of them.

        Raises:
            OperationFailed: `base` is not below `top`.
        """
        found: list[Image] = []
        for image in self.chain(top):
            found.append(image)
            if image.path == base:
                return found
        if base is not None:
            raise OperationFailed(f"{base} is not below {top}")
        return found

    def commit(self, top: str, base: str) -> None:
        """Write to `base` what is over it up to `top`, with which it then reads the same.

        Any other overlay that relied on an image that changes must not be used again.

        Raises:
            OSError: ENOSPC; nothing has changed.
        """
        *over, into = self.run(top, base)
        _give_room(into, over)
        for image, below in pairwise([*over, into]):
            for other in below.overlays - {image.path}:
                self.image(other).stale = True
        into.number = next((image.number for image in (*over, into) if image.number is not None), None)
        into.version += 1

    def replace(self, run: Sequence[Image]) -> None:
        """Have the last image take the place of the first: what froze that freezes it now; the others are stale."""
        *over, into = run
        into.overlays = set(over[0].overlays)
        for image in over:
            image.stale = True

    def pull(self, top: str, base: str | None) -> None:
        """Copy up into `top` what is between it and `base`, which backs it then.

        Raises:
            OSError: ENOSPC; nothing has changed.
        """
        run = self.run(top, base)
        into, *between = run if base is None else run[:-1]
        _give_room(into, between)
        read = next((image.number for image in (into, *between) if image.number is not None), None)
        into.number = 0 if read is None and base is None else read
        self.rebase(into, None if base is None else run[-1])

    def rebase(self, image: Image, base: Image | None) -> None:
        """Have an image name another backing image, which is frozen if the old one was."""
        old = self.by_path.get(image.backing)
        if isinstance(old, Image) and image.path in old.overlays:
            old.overlays.discard(image.path)
            if base is not None:
                base.overlays.add(image.path)
        image.backing, image.backing_format = ("", "") if base is None else (base.path, base.format)
        image.version += 1

    def empty(self, overlay: Image) -> None:
        """Drop what an overlay holds, as `qemu-img commit` does after it has merged it."""
        overlay.system.used -= overlay.size - EMPTY_IMAGE
        overlay.size, overlay.number = EMPTY_IMAGE, None
        overlay.version += 1

    def remove(self, path: str) -> None:
        """Unlink a file, if it is there; what it froze thaws."""
        file = self.by_path.pop(path, None)
        if file is None:
            return
        file.linked = False
        file.system.used -= file.size
        if isinstance(file, Image) and isinstance(base := self.by_path.get(file.backing), Image):
            base.overlays.discard(path)
