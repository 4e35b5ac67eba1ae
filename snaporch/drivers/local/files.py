"""Images and memory files in local directories: `Storage` by qemu-img and system calls.

Rule: nothing that exists is ever opened for writing here, but an image that `make_overlay` has just made with
O_EXCL, and the overlay and base of `commit_overlay`.
Rule: whatever reads or syncs a whole file does it in a worker thread; the event loop is never blocked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, ClassVar, TypeVar

import attrs
import trio

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
from snaporch.drivers.local import filework, trace
from snaporch.drivers.local.confine import Confinement, check_own
from snaporch.drivers.local.durable import identity, sync_path
from snaporch.drivers.local.lineage import Link, lineage
from snaporch.drivers.local.look import looked_at
from snaporch.drivers.local.names import file_named
from snaporch.drivers.local.packing import Packing
from snaporch.drivers.local.process import command_line, find_processes, kill, process_of
from snaporch.drivers.local.qemu_img import FILENAME, QemuImg, protocol, throttled
from snaporch.drivers.local.writeback import write_back
from snaporch.errors import DamagedSnapshot, OperationFailed, Refused
from snaporch.images.kinds import Kind, Traced
from snaporch.model.record import FileRecord
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import DeviceDisk

T = TypeVar("T")

_PROBE = 64 * 1024  # bytes: a cluster of qcow2
_PROBES = 256
_ROUNDS = 8  # through them, as qemu-img tells milliseconds
DISCARD_SECONDS = 10.0
WRITE_BACK_SECONDS = 60.0  # a file system that takes longer may not answer at all


@attrs.define
class LocalStorage(QemuImg, Storage, OfflineMerges, ImagePoints, ChainCosts, Packing):
    """Files of this host.

    Attributes:
        confinement: where images may lead, whatever they say; None: where their owner has them lead.
    """

    confinement: Confinement | None = None
    traits: ClassVar[frozenset[Trait]] = frozenset(
        [Trait.OFFLINE_MERGES, Trait.IMAGE_POINTS, Trait.CHAIN_COSTS, Trait.ARCHIVES]
    )

    def _by(self, path: str, work: Callable[..., T], *arguments: Any, **options: Any) -> Callable[[], T]:  # noqa: ARG002 - for others
        """Return what does some work on the file at `path`: by whoever may look at that.

        `work` is a function of a module, whose arguments and whose value JSON can say.
        """
        return partial(work, *arguments, **options)

    def _by_name(self, path: str, work: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        """Return what makes or removes the name `path` by some work: by whoever may, see `_by`."""
        return self._by(path, work, *arguments)

    async def _done(self, work: Callable[[], T], *, quick: bool = False) -> T:
        """Return what some work returns that `_by` or `_by_name` has given; it takes as long as it takes.

        Args:
            work: that work.
            quick: it needs no thread, where we do it ourselves.
        """
        return work() if quick else await trio.to_thread.run_sync(work)

    async def release(self, paths: Collection[str]) -> None:
        """See Storage."""
        for pid in find_processes(self.qemu_img):
            with suppress(OSError):  # it has ended by itself
                opened = {word.rpartition(FILENAME)[2].replace(",,", ",") for word in command_line(pid)}
                if not opened.isdisjoint(paths) and (found := process_of(pid)) is not None:
                    await kill(found)

    async def check_place(self, root: str, domain: str, path: str, what: str) -> None:
        """See Storage; whatever the spelling: by links, mounts and other names too."""
        await looked_at(path, partial(check_own, root, domain, path, what))

    async def exists(self, path: str) -> bool:
        """See Storage; a dangling symbolic link exists."""
        return await looked_at(path, self._by(path, filework.exists, path), patient=True)

    async def check_given(self, path: str, what: str, format_: str = "") -> None:
        """See Storage."""
        await looked_at(path, self._by(path, filework.check_given, path, what, format_), patient=True)

    async def check_writable(self, directory: str) -> None:
        """See Storage."""
        place = f"{directory}/*"
        await looked_at(place, self._by_name(place, filework.check_writable, directory), patient=True)

    async def make_directory(self, directory: str) -> None:
        """See Storage."""
        await self._done(self._by_name(directory, filework.make_directory, directory))

    async def free(self, directory: str) -> tuple[str, int]:
        """See Storage."""
        place = f"{directory}/*"
        return await looked_at(place, self._by_name(place, filework.free, directory), patient=True)

    async def _info(self, path: str, format_: str, *options: str, still: bool = False) -> tuple[ImageStatus, ...]:
        await self.lineage(path, format_)
        # -U: the image may be open in a running QEMU, and reading its header then is what we want.
        share = [] if still else ["-U"]
        try:
            out = await self._qemu_img("info", *share, "--output=json", *options, "-f", format_, path)
        except OperationFailed as error:
            who = "; `snaporch fsck` says which one" if "another process" in str(error) else ""
            raise Refused(f"cannot read image {path}: {error}{who}") from None
        try:
            said = json.loads(out)
            found = tuple(
                ImageStatus(
                    file_named(each["filename"], os.getcwd()),
                    str(each["format"]),
                    int(each["virtual-size"]),
                    int(each.get("actual-size", 0)),
                )
                for each in (said if isinstance(said, list) else [said])
            )
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            found = ()
        if not found:
            raise Refused(f"cannot read image {path}: what {self.qemu_img} says of it is no answer")
        return found

    async def lineage(self, path: str, format_: str) -> tuple[Link, ...] | None:
        """Return an image and what backs it, by their own headers; None where these do not say it all.

        Raises:
            Refused: one cannot be read, or not in time; Forbidden: one is not where a service may look.
        """
        if self.confinement is not None:
            return await looked_at(path, partial(self.confinement.lineage, path, format_))
        return await looked_at(path, self._by(path, filework.known_lineage, path, format_))

    async def chain(self, path: str, format_: str, *, still: bool = False) -> tuple[DeviceDisk, ...]:
        """See Storage; targets are empty."""
        if not still and (links := await self.lineage(path, format_)) is not None:
            return tuple(DeviceDisk("", link.path, link.format) for link in links)
        images = await self._info(path, format_, "--backing-chain", still=still)
        return tuple(DeviceDisk("", image.path, image.format) for image in images)

    async def trace(self, path: str, format_: str) -> tuple[Traced, ...]:
        """See Storage: some system calls, in the hundredth of the time that a qemu-img takes."""
        return await looked_at(path, self._by(path, trace.trace, path, format_), patient=True)

    async def identities(self, paths: Collection[str]) -> Mapping[str, str]:
        """See Storage."""
        found: dict[str, str] = {}
        for directory, some in groupby(sorted(paths, key=os.path.dirname), os.path.dirname):
            place, names = f"{directory}/*", tuple(some)
            found |= await looked_at(place, self._by(place, trace.identities, names), patient=True)
        return found

    async def is_read_only(self, path: str) -> bool:
        """See Storage."""
        flags = await looked_at(path, lambda: os.statvfs(path).f_flag, patient=True)
        return bool(flags & os.ST_RDONLY)

    async def openers(self, identities: Collection[str]) -> Mapping[str, tuple[int, ...]]:
        """See Storage."""
        return await trio.to_thread.run_sync(trace.openers, identities)

    async def mark(self, path: str, root: str) -> None:
        """See Storage."""
        await self._done(self._by(path, trace.mark, path, root), quick=True)

    async def unmark(self, path: str, root: str) -> None:
        """See Storage."""
        await self._done(self._by(path, trace.unmark, path, root), quick=True)

    async def marks(self, path: str) -> tuple[str, ...]:
        """See Storage."""
        return await looked_at(path, self._by(path, trace.marks, path), patient=True)

    async def check_image(self, path: str, format_: str) -> None:
        """See Storage."""
        if format_ != "qcow2" or await self._done(self._by(path, filework.is_encrypted, path)):
            return  # a raw image has no structure, and nobody here has a secret to look at that of an encrypted one
        try:
            await self._qemu_img("check", "-q", "-U", "-f", format_, path, good=(0, 3))  # 3: leaked clusters
        except OperationFailed as error:
            raise DamagedSnapshot(f"{path}: qemu-img check: {error}", path) from None

    async def virtual_size(self, path: str, format_: str) -> int:
        """See Storage."""
        if (links := await self.lineage(path, format_)) is not None:
            return links[0].virtual_size
        return (await self._info(path, format_))[0].virtual_size

    async def make_file(self, path: str) -> None:
        """See Storage."""
        await self._done(self._by_name(path, filework.make_file, path))

    async def make_overlay(
        self, path: str, base: DeviceDisk, size: int, owner: tuple[int, int] | None = None
    ) -> None:
        """See Storage."""
        make = self._by_name(path, filework.make_file, path, owner, self._mode(owner))
        await self._done(make)
        try:
            # -u: the base is open in a running QEMU; its size is known, so nothing need be read from it.
            await self._qemu_img(
                "create", "-q", "-u", "-f", "qcow2", "-b", base.path, "-F", base.format, path, str(size)
            )
            await self._sync(path)
        except BaseException:
            with trio.move_on_after(DISCARD_SECONDS, shield=True):
                await self._done(self._by_name(path, filework.discard, path), quick=True)
            raise

    def _mode(self, owner: tuple[int, int] | None) -> int:  # noqa: ARG002 - for others
        """Return the permissions of an overlay that is to be somebody's."""
        return 0o600

    async def _sync(self, path: str) -> None:
        await self._done(self._by(path, sync_path, path))

    async def commit_overlay(self, path: str) -> None:
        """See Storage."""
        await self._qemu_img("commit", "-q", "-f", "qcow2", path)

    async def inspect(self, path: str, format_: str) -> tuple[ImageStatus, ...]:
        """See Storage."""
        return await self._info(path, format_, "--backing-chain")

    async def read_cost(self, path: str, format_: str) -> ChainCost:
        """See Storage; the least of three, by `qemu-img bench`. What it reads may well be in the page cache."""
        size = await self.virtual_size(path, format_)
        step = max(size // _PROBES // _PROBE * _PROBE, _PROBE)
        count = max(1, min(_PROBES, size // step)) * _ROUNDS  # it begins anew at the image's end
        found = []
        for _ in range(3):
            began = trio.current_time()
            options = ["-U", "-f", format_, "-d", "1", "-c", str(count), "-s", str(_PROBE), "-S", str(step)]
            said = await self._qemu_img("bench", *options, path)
            try:
                reads = float(said.decode().partition("completed in ")[2].partition(" ")[0])
            except ValueError:
                raise Refused(f"cannot read image {path}: {self.qemu_img} does not say how long it took") from None
            found.append((trio.current_time() - began - reads, reads / count))
        return ChainCost(min(opens for opens, _ in found), min(reads for _, reads in found))

    async def commit_image(self, top: str, base: str, *, options: MergeOptions, progress: Progress) -> None:
        """See Storage."""
        rate = ["-r", str(options.bandwidth)] if options.bandwidth else []
        await self._watched(progress, "commit", "-d", *rate, "-f", "qcow2", "-b", base, top)
        await self._sync(base)

    async def rebase(
        self,
        path: str,
        backing: DeviceDisk | None,
        *,
        content: bool,
        options: MergeOptions = MergeOptions(),  # noqa: B008 - an immutable value
        progress: Progress = untold,
    ) -> None:
        """See Storage."""
        below = ["-F", backing.format, "-b", backing.path] if backing else ["-b", ""]
        if not content:
            await self._qemu_img("rebase", "-q", "-u", "-f", "qcow2", *below, path)
        elif not options.bandwidth:
            await self._watched(progress, "rebase", "-f", "qcow2", *below, path)
        else:  # it has no limit of its own
            limit = ["--object", f"throttle-group,id=limit,x-bps-write={options.bandwidth}", "--image-opts"]
            await self._watched(progress, "rebase", *limit, *below, throttled(path))
        await self._sync(path)

    async def inside(self, path: str) -> tuple[str, ...]:
        """See Storage."""
        return await self._done(self._by(path, filework.inside, path))

    async def _snapshot(self, option: str, path: str, tag: str) -> None:
        # `qemu-img snapshot` guesses the format unless it is told in this way.
        image = f"driver=qcow2,file.driver={protocol(path)},file.filename={path.replace(',', ',,')}"
        await self._qemu_img("snapshot", "-q", option, tag, "--image-opts", image)
        await self._sync(path)

    async def save_inside(self, path: str, tag: str) -> None:
        """See Storage."""
        await self._snapshot("-c", path, tag)

    async def restore_inside(self, path: str, tag: str) -> None:
        """See Storage."""
        await self._snapshot("-a", path, tag)

    async def delete_inside(self, path: str, tag: str) -> None:
        """See Storage."""
        if tag in await self.inside(path):
            await self._snapshot("-d", path, tag)

    async def seal_inside(self, path: str, tag: str) -> FileRecord:
        """See Storage; the process that wrote the file has synced it."""
        return await self._done(self._by(path, filework.seal_inside, path, tag))

    async def check_inside(self, record: FileRecord, tag: str) -> None:
        """See Storage."""
        try:
            found = await self.seal_inside(record.path, tag)
        except OSError as error:
            raise DamagedSnapshot(f"{record.path} cannot be read: {error.strerror}", record.path) from None
        if found.checksum != record.checksum:
            what = f"{record.path}: its snapshot {tag!r} is damaged: its checksum is not what was saved"
            raise DamagedSnapshot(what, record.path)

    async def extract_disk(self, path: str, tag: str, copy: str) -> None:
        """See Storage."""
        await self.make_file(copy)
        try:
            snapshot = ("-l", f"snapshot.name={tag}")
            await self._qemu_img("convert", "-q", "-U", "-f", "qcow2", "-O", "qcow2", *snapshot, path, copy)
        except BaseException:
            os.unlink(copy)
            raise

    async def extract_memory(self, path: str, tag: str, copy: str) -> None:
        """See Storage."""
        await self.make_file(copy)
        try:
            await trio.to_thread.run_sync(filework.extract_memory, path, tag, copy)
        except BaseException:
            os.unlink(copy)
            raise

    async def copy_image(self, image: DeviceDisk, copy: str, format_: str, progress: Progress) -> None:
        """See Archives."""
        await self.chain(image.path, image.format)  # which says no to what leads elsewhere
        await self.make_file(copy)
        try:
            await self._watched(progress, "convert", "-U", "-f", image.format, "-O", format_, image.path, copy)
        except BaseException:
            os.unlink(copy)
            raise

    async def check_alone(self, path: str) -> None:
        """See Archives."""
        try:
            links = await looked_at(path, partial(lineage, path, "qcow2"))
            (only,) = await self.trace(path, "qcow2") if len(links) == 1 else (None,)
        except Refused as error:
            raise DamagedSnapshot(str(error), path) from None
        if only is None or links[0].data_file or set(only.kinds) != {Kind.QCOW2}:
            what = ", ".join(only.kinds) if only is not None else f"backed by {links[0].backing}"
            raise DamagedSnapshot(f"{path} is not a plain qcow2 without a backing file ({what})", path)
        await self.check_image(path, "qcow2")

    async def remove(self, path: str) -> None:
        """See Storage."""
        await self._done(self._by_name(path, filework.remove, path))

    async def write_back(self, paths: Collection[str]) -> None:
        """See Storage; given up where the files do not get there in time."""
        with trio.move_on_after(WRITE_BACK_SECONDS):
            work = self._by(next(iter(paths), ""), write_back, tuple(paths))
            await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    async def seal(self, path: str, known: FileRecord | None = None) -> FileRecord:
        """See Storage."""
        there = known is not None and known.path == path and known.identity
        look = self._by(path, identity, path)
        if known is not None and there and there == await looked_at(path, look, patient=True):
            return known
        return await self._done(self._by(path, filework.checksum, path, sync=True))

    async def check(self, record: FileRecord, *, thorough: bool = False) -> None:
        """See Storage."""
        path = record.path
        try:
            now = await looked_at(path, self._by(path, identity, path), patient=True)
            size = await looked_at(path, self._by(path, filework.size, path), patient=True)
            if size != record.size:
                raise DamagedSnapshot(f"{path} has {size:,} bytes instead of {record.size:,}", path)
            if now and now == record.identity and not thorough:
                return
            found = await self._done(self._by(path, filework.checksum, path, sync=False))
        except FileNotFoundError:
            raise DamagedSnapshot(f"{path} is missing", path) from None
        except OSError as error:
            raise DamagedSnapshot(f"{path} cannot be read: {error.strerror}", path) from None
        if found.checksum != record.checksum:
            raise DamagedSnapshot(f"{path} is damaged: its checksum is not what was saved", path)
