"""Images and memory files on a simulated host."""

from __future__ import annotations

import errno
import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import trio
import xxhash

from snaporch.drivers.base import (
    ChainCost,
    ChainCosts,
    ImagePoints,
    ImageStatus,
    OfflineMerges,
    Progress,
    Storage,
    Trait,
    untold,
)
from snaporch.drivers.simulated.client import Client, SimulatedKill
from snaporch.drivers.simulated.files import Image, Inside, os_error
from snaporch.errors import DamagedSnapshot, OperationFailed, Refused
from snaporch.images.kinds import Kind, Traced
from snaporch.model.record import FileRecord
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import DeviceDisk

T = TypeVar("T")


class SimulatedStorage(Storage, OfflineMerges, ImagePoints, ChainCosts):
    """See Storage."""

    traits = frozenset([Trait.OFFLINE_MERGES, Trait.IMAGE_POINTS, Trait.CHAIN_COSTS])

    def __init__(self, client: Client) -> None:
        self._client = client
        self._host = client.host
        self._disk = client.host.disk

    async def _call(self, name: str, effect: Callable[[], T], seconds: float = 0.0) -> T:
        def settled() -> T:
            self._host.settle_files()
            return effect()

        return await self._client.call(f"storage.{name}", "", settled, seconds)

    async def exists(self, path: str) -> bool:
        """See Storage."""
        return await self._call("exists", lambda: path in self._disk.by_path or path in self._disk.directories)

    async def check_writable(self, directory: str) -> None:
        """See Storage."""

        def check() -> None:
            place = directory
            while place not in self._disk.directories:
                if place in self._disk.by_path:
                    raise Refused(f"{place} is not a directory")
                place = posixpath.dirname(place)
            if self._disk.system_of(directory).readonly:
                raise Refused(f"cannot write to {directory}: it is read-only")

        await self._call("check_writable", check)

    async def make_directory(self, directory: str) -> None:
        """See Storage."""
        await self._call("make_directory", lambda: self._disk.make_directory(directory))

    async def free(self, directory: str) -> tuple[str, int]:
        """See Storage; the id is the prefix."""

        def free() -> tuple[str, int]:
            system = self._disk.system_of(directory)
            return system.prefix, system.free

        return await self._call("free", free)

    async def chain(self, path: str, format_: str, *, still: bool = False) -> tuple[DeviceDisk, ...]:
        """See Storage; targets are empty."""

        def chain() -> tuple[DeviceDisk, ...]:
            links = tuple(DeviceDisk("", image.path, image.format) for image in self._disk.chain(path, format_))
            for link in links if still else ():
                if why := self._host.locks.writing(link.path):
                    raise Refused(f"cannot read image {path}: {why}")
            return links

        return await self._call("chain", chain)

    async def _look(self) -> None:
        """Look at what is there; a few system calls, in which nothing is ever cut short."""
        self._client.check_alive()
        await trio.lowlevel.checkpoint()
        self._host.settle_files()

    async def trace(self, path: str, format_: str) -> tuple[Traced, ...]:
        """See Storage."""
        await self._look()
        return tuple(
            Traced(image.path, str(image.inode), {Kind.RAW if image.format == "raw" else Kind.QCOW2: ""})
            for image in self._disk.chain(path, format_)
        )

    async def identities(self, paths: Collection[str]) -> Mapping[str, str]:
        """See Storage."""
        await self._look()
        by_path = self._disk.by_path
        return {path: str(by_path[path].inode) for path in paths if path in by_path}

    async def check_image(self, path: str, format_: str) -> None:
        """See Storage; damage is seen in a qcow2 image only, a raw one has no structure."""
        faults = await self._client.enter("storage.check_image", "")
        image = self._disk.by_path.get(path)
        if not isinstance(image, Image):
            raise DamagedSnapshot(f"{path} is missing, or no image", path)
        await self._client.leave("storage.check_image", "", self._reading(image.size), None, faults)
        if format_ == "qcow2" and image.flips:
            raise DamagedSnapshot(f"{path}: its structure has errors", path)

    async def virtual_size(self, path: str, format_: str) -> int:
        """See Storage; raises Refused as `chain` does."""
        return await self._call("virtual_size", lambda: self._disk.image(path, format_).virtual_size)

    async def _make(self, name: str, path: str, make: Callable[[], object], seconds: float) -> None:
        """Make a file, or leave none: only who made it may remove it, and a caller that hears an error did not."""
        at = f"storage.{name}"
        faults = await self._client.enter(at, "")
        self._host.settle_files()
        make()
        try:
            await self._client.leave(at, "", seconds, None, faults)
        except SimulatedKill:
            raise  # nobody is left to remove it
        except BaseException:
            self._disk.remove(path)
            raise

    async def make_file(self, path: str) -> None:
        """See Storage; when it raises, or is cancelled, it has left no file."""
        await self._make("make_file", path, lambda: self._disk.make_memory(path), self._host.speed.fsync)

    async def make_overlay(
        self,
        path: str,
        base: DeviceDisk,
        size: int,
        owner: tuple[int, int] | None = None,  # noqa: ARG002 - files here are nobody's
    ) -> None:
        """See Storage; as `make_file`. Like qemu-img told to do so, it does not look at the base."""
        seconds = self._host.speed.overlay
        await self._make("make_overlay", path, lambda: self._disk.make_image(path, size, base=base), seconds)

    async def commit_overlay(self, path: str) -> None:
        """See Storage; cancelled before its time is over, it has changed nothing.

        Raises:
            OperationFailed: it is no overlay, or a process has it or its backing image open.
            AssertionError: other overlays rely on the backing image.
        """
        at = "storage.commit_overlay"
        faults = await self._client.enter(at, "")
        if not isinstance(overlay := self._disk.by_path.get(path), Image):
            raise OperationFailed(f"qemu-img commit: could not open {path}")
        await self._client.wait(self._host.speed.merge + overlay.size / self._host.speed.disk_bandwidth)
        for open_path in (path, overlay.backing):
            if why := self._host.locks.writing(open_path) or self._host.locks.reading(open_path):
                raise OperationFailed(f"qemu-img commit: {why}")
        if not overlay.backing:
            raise OperationFailed(f"qemu-img commit: {path} has no backing file")
        self._disk.merge(overlay)
        self._disk.empty(overlay)
        await self._client.leave(at, "", 0.0, None, faults)

    async def inspect(self, path: str, format_: str) -> tuple[ImageStatus, ...]:
        """See Storage."""

        def status() -> tuple[ImageStatus, ...]:
            return tuple(
                ImageStatus(image.path, image.format, image.virtual_size, image.allocated)
                for image in self._disk.chain(path, format_)
            )

        return await self._call("inspect", status)

    async def read_cost(self, path: str, format_: str) -> ChainCost:
        """See Storage; it grows by the same with every image."""
        speed = self._host.speed

        def cost() -> ChainCost:
            depth = len(list(self._disk.chain(path, format_)))
            return ChainCost(depth * speed.node, depth * speed.query)

        return await self._call("read_cost", cost)

    async def commit_image(self, top: str, base: str, *, options: MergeOptions, progress: Progress) -> None:
        """See Storage; cut short before its time is over, it has changed nothing."""
        run = self._disk.run(top, base)

        def commit() -> None:
            self._disk.commit(top, base)
            self._disk.replace(run)

        await self._merge(commit, "commit_image", run[:-1], run[-1], options=options, progress=progress)

    async def rebase(
        self,
        path: str,
        backing: DeviceDisk | None,
        *,
        content: bool,
        options: MergeOptions = MergeOptions(),  # noqa: B008 - an immutable value
        progress: Progress = untold,
    ) -> None:
        """See Storage; cut short before its time is over, it has changed nothing."""
        image, base = self._disk.image(path), None if backing is None else self._disk.image(backing.path)
        moved = [each for each in self._disk.chain(path) if each not in {image, base}] if content else []

        def rebase() -> None:
            if content:
                self._disk.pull(path, None if base is None else base.path)
            else:
                self._disk.rebase(image, base)

        await self._merge(rebase, "rebase", moved, image, options=options, progress=progress)

    async def _merge(
        self,
        effect: Callable[[], None],
        name: str,
        moved: Sequence[Image],
        into: Image,
        *,
        options: MergeOptions,
        progress: Progress,
    ) -> None:
        """Merge images into one, for which nobody may have it open, after the time that this takes."""
        faults = await self._client.enter(f"storage.{name}", "")
        size = sum(image.allocated for image in moved)
        await self._client.wait(self._host.speed.merge_seconds(size, options.bandwidth))
        busy = [self._host.locks.writing(image.path) for image in (into, *moved)]
        if why := next(filter(None, [*busy, self._host.locks.reading(into.path)]), ""):
            raise OperationFailed(f"qemu-img: {why}")
        effect()
        progress(size, size)
        await self._client.leave(f"storage.{name}", "", 0.0, None, faults)

    def _qcow2(self, path: str) -> Image:
        image = self._disk.image(path)
        if image.format != "qcow2":
            raise DamagedSnapshot(f"{path} is no qcow2 image", path)
        return image

    def _at_rest(self, path: str) -> Image:
        if why := self._host.locks.writing(path) or self._host.locks.reading(path):
            raise OperationFailed(f"qemu-img snapshot: {why}")
        return self._qcow2(path)

    async def inside(self, path: str) -> tuple[str, ...]:
        """See Storage."""
        return await self._call("inside", lambda: tuple(self._qcow2(path).inside))

    async def save_inside(self, path: str, tag: str) -> None:
        """See Storage."""

        def save() -> None:
            image = self._at_rest(path)
            image.keep(tag, Inside(image.number, self._disk.number(path)))

        await self._call("save_inside", save, self._host.speed.fsync)

    async def restore_inside(self, path: str, tag: str) -> None:
        """See Storage."""
        await self._call("restore_inside", lambda: self._at_rest(path).go_back(tag), self._host.speed.fsync)

    async def delete_inside(self, path: str, tag: str) -> None:
        """See Storage."""

        def delete() -> None:
            if tag in self._qcow2(path).inside:
                self._at_rest(path).forget(tag)

        await self._call("delete_inside", delete, self._host.speed.fsync)

    async def seal_inside(self, path: str, tag: str) -> FileRecord:
        """See Storage."""

        def seal() -> FileRecord:
            image = self._qcow2(path)
            point = image.point(tag)
            words = f"{point.number} {point.memory and point.memory.content()} {image.flips}"
            return FileRecord(path, point.size, f"xxh3-128:{xxhash.xxh3_128_hexdigest(words.encode())}")

        return await self._call("seal_inside", seal, self._reading(self._disk.find(path).size))

    async def check_inside(self, record: FileRecord, tag: str) -> None:
        """See Storage."""

        def check() -> None:
            image = self._disk.by_path.get(record.path)
            if not isinstance(image, Image) or image.flips:
                raise DamagedSnapshot(f"{record.path} is missing, or its snapshot {tag!r} is damaged", record.path)
            image.point(tag)

        await self._call("check_inside", check, self._reading(record.size))

    async def extract_disk(self, path: str, tag: str, copy: str) -> None:
        """See Storage."""

        def make() -> None:
            image = self._qcow2(path)
            self._disk.make_image(copy, image.virtual_size, base=None).number = image.point(tag).content

        await self._make("extract_disk", copy, make, self._host.speed.overlay)

    async def extract_memory(self, path: str, tag: str, copy: str) -> None:
        """See Storage."""

        def make() -> None:
            if (memory := self._qcow2(path).point(tag).memory) is None:
                raise OperationFailed(f"{path}: there is no memory in its snapshot {tag!r}")
            file = self._disk.make_memory(copy)
            for name in ("number", "torn", "ram", "versions", "complete", "frozen"):
                setattr(file, name, getattr(memory, name))

        await self._make("extract_memory", copy, make, self._host.speed.overlay)

    async def remove(self, path: str) -> None:
        """See Storage.

        Raises:
            AssertionError: a running machine's disk depends on the file: the guest's data would be lost.
        """

        def remove() -> None:
            if self._host.locks.in_use(path):
                raise AssertionError(f"bug: {path} is removed, which a running machine's disk depends on")
            if path in self._disk.directories:
                raise os_error(errno.EISDIR, path)
            self._disk.remove(path)

        await self._call("remove", remove)

    async def write_back(self, paths: Collection[str]) -> None:  # noqa: ARG002 - nothing is cached
        """See Storage."""
        await self._call("write_back", lambda: None)

    async def seal(self, path: str, known: FileRecord | None = None) -> FileRecord:
        """See Storage."""
        faults = await self._client.enter("storage.seal", "")
        self._host.settle_files(path)
        file = self._disk.find(path)
        fresh = known is not None and (known.path, known.identity) == (path, file.identity)
        record = known if known is not None and fresh else file.record()
        seconds = 0.0 if fresh else self._reading(record.size) + self._host.speed.fsync
        await self._client.leave("storage.seal", "", seconds, None, faults)
        return record

    def _reading(self, size: int) -> float:
        return size / self._host.speed.checksum_bandwidth

    async def check(self, record: FileRecord, *, thorough: bool = False) -> None:
        """See Storage."""
        faults = await self._client.enter("storage.check", "")
        self._host.settle_files(record.path)
        file = self._disk.by_path.get(record.path)
        if file is None:
            raise DamagedSnapshot(f"{record.path} is missing", record.path)
        if file.size != record.size:
            raise DamagedSnapshot(f"{record.path} has {file.size:,} bytes instead of {record.size:,}", record.path)
        read = thorough or file.identity != record.identity
        await self._client.leave("storage.check", "", self._reading(file.size) if read else 0.0, None, faults)
        if read and file.record().checksum != record.checksum:
            raise DamagedSnapshot(f"{record.path} is damaged: its checksum is not what was saved", record.path)
