"""Who reads an image: looked up anew each time, by the identity of files, among all that the root knows.

Rule 1: an image is known by its identity (`snaporch.images.kinds.Traced`), never by a name or by what the catalog
has. Rule 2: a reader that cannot be examined still counts: no image that it may read is written to.
Rule 3: a read-only disk is a reader like any other.

Readers are the disks of domains (as defined, and as they are now) with their whole chains, snapshots with all of
their frozen images, processes of this host that have a file open, and other root directories, by their marks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import attrs
import trio

from snaporch.drivers.base import Driver, Storage
from snaporch.engine.context import Context
from snaporch.errors import NotFound, OperationFailed, Refused, UnreadableRecord
from snaporch.images.kinds import Traced
from snaporch.model.domain import DomainRecord
from snaporch.model.finding import Unreadable
from snaporch.model.rfc import DeviceDisk

ANOTHER_ROOT = "the root directory"
TRANSIENT_SECONDS = 1.0  # a process that only looks at an image has it open for milliseconds
_LOOK_AGAIN_SECONDS = 0.05


@attrs.frozen
class Readers:
    """Who reads which images.

    Attributes:
        by_identity: for each image, in words, one that reads it.
        unseen: what may read anything, as it cannot be looked at: a sentence each.
        lost: by inode, snapshots whose image is not there: it may be there again under another name.
    """

    by_identity: Mapping[str, str] = attrs.field(factory=dict)
    unseen: tuple[str, ...] = ()
    lost: Mapping[int, str] = attrs.field(factory=dict)

    def of(self, identity: str) -> str:
        """Return, in words, who reads an image; an empty string: nobody."""
        found = self.by_identity.get(identity, "")
        if not found and self.lost and (inode := identity.rpartition(" ")[2]).isdecimal():
            return self.lost.get(int(inode), "")
        return found

    def check_seen(self, what: str) -> None:
        """Raise Refused where somebody who may read anything cannot be looked at."""
        if self.unseen:
            raise Refused(
                f"{what}: it cannot be seen what others read: {'; '.join(self.unseen)}; bring that back, or "
                "undefine "
                "the domain or delete the snapshot that needs it"
            )


def tips(record: DomainRecord) -> tuple[DeviceDisk, ...]:
    """Return all images that a domain's chains begin with: as it is defined, and as it is now."""
    disks = (*record.disks, *record.active.values(), *record.definition.disks)
    return tuple({disk.path: disk for disk in disks}.values())


async def readers(context: Context, but: Collection[str]) -> Readers:
    """Return who reads what, of all domains but these and of all their snapshots."""
    found: dict[str, str] = {}
    unseen: list[str] = []
    for record in await context.catalog.domains():
        if record.name not in but:
            unseen += await _domain(context, record, found)
    for each in await context.catalog.unreadable(kind="domain"):
        if each.domain not in but:
            await _unreadable(context, each, found)
    lost = await _snapshots(context, but, found)
    return Readers(found, tuple(unseen), lost)


async def _domain(context: Context, record: DomainRecord, found: dict[str, str]) -> list[str]:
    """Note what a domain reads; return what cannot be looked at, and is still the domain's."""
    unseen = await _looked_at(context.driver(record), record, found)
    if unseen:
        try:
            now = await context.catalog.domain(record.name)
        except NotFound:  # a clone that was discarded meanwhile
            return []
        if now != record:
            return await _looked_at(context.driver(now), now, found)
    return unseen


async def _looked_at(driver: Driver, record: DomainRecord, found: dict[str, str]) -> list[str]:
    storage, unseen = driver.storage, []
    for disk in tips(record):
        try:
            for link in await storage.trace(disk.path, disk.format):
                found.setdefault(link.identity, f"domain {record.name}")
        except (Refused, OperationFailed) as error:
            unseen.append(f"disk {disk.target} of domain {record.name}: {error}")
    await _also(storage, driver.named_files(record.definition), f"domain {record.name}", found)
    return unseen


async def _also(storage: Storage, paths: Collection[str], who: str, found: dict[str, str]) -> None:
    """Note files that are named and may be images, and what is below them."""
    for path, identity in (await storage.identities(paths)).items():
        found.setdefault(identity, who)
        with suppress(Refused):  # it is no image
            for link in await storage.trace(path, "qcow2"):
                found.setdefault(link.identity, who)


async def _unreadable(context: Context, each: Unreadable, found: dict[str, str]) -> None:
    """Note what a domain may read whose record cannot be read: all that it names, and what is below that."""
    who = f"domain {each.domain}, whose record cannot be read"
    for driver in context.drivers.values():
        await _also(driver.storage, each.paths, who, found)


async def _storages(context: Context, domain: str) -> list[Storage]:
    """Return where a domain's images may be: of one whose record cannot be read, with every driver."""
    with suppress(UnreadableRecord):
        return [context.driver(await context.catalog.domain(domain)).storage]
    return [driver.storage for driver in context.drivers.values()]


async def _snapshots(context: Context, but: Collection[str], found: dict[str, str]) -> dict[int, str]:
    lost: dict[int, str] = {}
    for domain, rows in (await context.catalog.frozen_but(but)).items():
        there: dict[str, str] = {}
        for storage in await _storages(context, domain):
            there |= await storage.identities({path for _, path, _ in rows})
        for name, path, inode in rows:
            who = f"snapshot {name} of domain {domain}"
            if path in there:
                found.setdefault(there[path], who)
            elif inode:
                lost.setdefault(inode, who)
    return lost


async def mine(context: Context, record: DomainRecord) -> Mapping[str, str]:
    """Return, by identity, what the domain's own snapshots hold frozen, each with one of them in words."""
    storage, found = context.driver(record).storage, dict[str, str]()
    snapshots = await context.catalog.snapshots(record.name)
    there = await storage.identities({file.path for snapshot in snapshots for file in snapshot.frozen})
    for snapshot in snapshots:
        for file in snapshot.frozen:
            if file.path in there:
                found.setdefault(there[file.path], f"snapshot {snapshot.name} of domain {record.name}")
    return found


def processes_of(driver: Driver, record: DomainRecord) -> set[int]:
    """Return the ids of the processes that run a domain."""
    pid = driver.pid(record.handle) if record.handle is not None else None
    return set() if pid is None else {pid}


# --- who has it open ----------------------------------------------------------------------------------------------


async def check_unopened(storage: Storage, images: Mapping[str, str], but: Collection[int], what: str) -> None:
    """Refuse to write to images that another process has open.

    Args:
        storage: where they are.
        images: identity to path.
        but: processes that may: the domain's own.
        what: is to be done, for the error.

    Raises:
        Refused: a process has one open, and not for a moment only.
    """
    end = trio.current_time() + TRANSIENT_SECONDS
    while opened := _others(await storage.openers(frozenset(images)), but):
        if trio.current_time() >= end:
            identity, pid = opened[0]
            raise Refused(
                f"{what}: process {pid} has {images[identity]} open, which would be written to; end it first, "
                "or wait "
                "for it"
            )
        await trio.sleep(_LOOK_AGAIN_SECONDS)


def _others(found: Mapping[str, tuple[int, ...]], but: Collection[int]) -> list[tuple[str, int]]:
    return [(identity, pid) for identity, pids in found.items() for pid in pids if pid not in but]


async def marked_elsewhere(context: Context, storage: Storage, path: str) -> str:
    """Return, in words, another root for which an image is frozen, or an empty string."""
    others = [root for root in await storage.marks(path) if root != str(context.root)]
    return f"{ANOTHER_ROOT} {others[0]}" if others else ""


# --- who may write to it ------------------------------------------------------------------------------------------


async def check_writable(context: Context, record: DomainRecord) -> None:
    """Refuse to let a domain's guest write to an image that anyone else reads, or that a snapshot holds.

    Raises:
        Refused: in words, who reads which image, and what to do.
    """
    storage = context.driver(record).storage
    others, own = await readers(context, {record.name}), await mine(context, record)
    written: dict[str, str] = {}
    for disk in record.disks:
        chain = await storage.trace(disk.path, disk.format)
        for link in () if disk.readonly else _written(chain):
            who = others.of(link.identity) or own.get(link.identity, "")
            who = who or written.get(link.identity, "") or await marked_elsewhere(context, storage, link.path)
            if who:
                raise Refused(_taken(record.name, disk, who))
            written[link.identity] = f"its own disk {disk.target}"
    for disk in record.disks:
        chain = await storage.trace(disk.path, disk.format)
        for link in chain[0 if disk.readonly else len(_written(chain)) :]:
            if link.identity in written:
                raise Refused(_taken(record.name, disk, written[link.identity]))


def _written(chain: Sequence[Traced]) -> Sequence[Traced]:
    """Return what a writer of an image writes to: it, and the file of a loop device."""
    number = 1
    while number < len(chain) and chain[number].same:
        number += 1
    return chain[:number]


def _taken(domain: str, disk: DeviceDisk, who: str) -> str:
    mark = (
        "; where that root is gone for good, take its mark off the image "
        f"(`getfattr -m user.snaporch. {disk.path}` says its name, `setfattr -x NAME {disk.path}` removes it)"
    )
    return (
        f"{domain} would write to {disk.path} ({disk.target}), which {who} reads: give the domain an image of "
        f"its own, for example an overlay (`qemu-img create -f qcow2 -b {disk.path} -F {disk.format} NEW.qcow2`)"
        f"{mark if who.startswith(ANOTHER_ROOT) else ''}"
    )


async def read_by_others(context: Context, domain: str, paths: Collection[str]) -> dict[str, str]:
    """Return those of these images that others than the domain read, each with one of these in words.

    Raises:
        Refused: somebody who may read them cannot be looked at.
    """
    others = await readers(context, {domain})
    others.check_seen(f"{', '.join(sorted(paths))} would be written to")
    there = await context.driver(await context.catalog.domain(domain)).storage.identities(paths)
    return {path: who for path, identity in there.items() if (who := others.of(identity))}


async def kept_for(
    context: Context, domain: str, paths: Iterable[str], processes: Collection[int] = ()
) -> dict[str, str]:
    """Return those of a domain's own files that others read, each with who; with one unseen reader all of them are.

    Call it before files are removed that the domain itself does not need any more; `processes` are its own.
    """
    storage = context.driver(await context.catalog.domain(domain)).storage
    there = await storage.identities(list(paths))
    others = await readers(context, {domain}) if there else Readers()
    opened = await storage.openers(frozenset(there.values()))
    kept = {}
    for path, identity in there.items():
        who = others.of(identity) or next(iter(others.unseen), "") or await marked_elsewhere(context, storage, path)
        if not who and (strangers := [pid for pid in opened.get(identity, ()) if pid not in processes]):
            who = f"process {strangers[0]}"
        if who:
            kept[path] = who
    return kept
