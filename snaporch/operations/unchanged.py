"""Was a chain changed behind snaporch's back? A `qemu-img rebase -u`, `commit` or `resize`, by hand or by a backup.

What snapshots hold frozen is known by its checksum. The image that the guest writes to has none; of an image that
snaporch has put a disk on it is known what was below it then (`DomainRecord.below`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import attrs

from snaporch.drivers.base import Storage
from snaporch.engine.context import Context
from snaporch.errors import DamagedSnapshot, NotFound, Refused, UnreadableRecord
from snaporch.model.domain import DomainRecord
from snaporch.model.record import SnapshotRecord


def left_on(record: DomainRecord, chains: Mapping[str, Sequence[str]]) -> DomainRecord:
    """Return a domain's record that knows what is below its images now.

    Args:
        record: the domain's, with the disks as they are now.
        chains: paths of images that snaporch has put disks on, each with all that is below it.
    """
    on = {disk.path for disk in record.disks}
    known = record.below | {path: tuple(below) for path, below in chains.items()}
    return attrs.evolve(record, below={path: below for path, below in known.items() if path in on})


async def looked_up(storage: Storage, record: DomainRecord) -> DomainRecord:
    """Return a domain's record that knows what is below its images, read from these; for after a merge."""
    chains = {}
    for disk in record.active.values():
        with suppress(Refused):  # whoever needs that image says so
            chains[disk.path] = [link.path for link in (await storage.chain(disk.path, disk.format))[1:]]
    return left_on(attrs.evolve(record, below={}), chains)


async def check_below(storage: Storage, record: DomainRecord, chains: Iterable[Sequence[str]]) -> None:
    """Refuse images that are not backed by what they were left on.

    Args:
        storage: where they are.
        record: the domain's.
        chains: of its disks as they are now: paths, the active image first.

    Raises:
        Refused: in words, what was changed, and what to do.
    """
    for active, *found in chains:
        wanted = list(record.below.get(active, found))
        there = await storage.identities({*wanted, *found})
        if _names(wanted, there) != _names(found, there):
            raise Refused(_rebased(record.name, active, wanted, found))


def _names(paths: Iterable[str], there: Mapping[str, str]) -> list[str]:
    return [there.get(path) or os.path.realpath(path) for path in paths]


def _rebased(domain: str, active: str, wanted: Sequence[str], found: Sequence[str]) -> str:
    same = 0
    while same < min(len(wanted), len(found)) and wanted[same] == found[same]:
        same += 1
    image = [active, *wanted][same]
    was, now = (paths[same] if same < len(paths) else "nothing" for paths in (wanted, found))
    return (
        f"{domain} is on {active}, and {image} was backed by {was} and is now backed by {now}: another program has "
        "changed that, and the guest would read something else. Where no data was copied put it back "
        f"(`qemu-img rebase -u -F FORMAT -b {was} {image}`); where it is to stay so, define {domain} with "
        f'path = "{active}" for that disk: the image is yours then. `snaporch fsck {domain}` says what else differs'
    )


async def check_as_left(context: Context, record: DomainRecord, *, still: bool = False) -> None:
    """Refuse disks on an image that somebody has written to since it was frozen, or on a chain that was changed.

    Args:
        context: the orchestrator's.
        record: the domain's.
        still: nobody may have an image open for writing, either.

    Raises:
        DamagedSnapshot: the guest would find neither what it wrote nor what the snapshot holds.
        Refused: a chain is not what it was, or somebody else has one of the images open for writing.
    """
    storage = context.driver(record).storage
    snapshots = await context.catalog.readable_snapshots(record.name)
    frozen = {file.path: file for snapshot in snapshots for file in snapshot.frozen}
    for disk in record.disks if frozen or record.below else ():
        chain = [link.path for link in await storage.chain(disk.path, disk.format, still=still)]
        await check_below(storage, record, [chain])
        for path in chain:
            if path in frozen:
                await storage.check(frozen[path])


async def check_current(context: Context, record: DomainRecord) -> None:
    """Refuse to go on from a snapshot whose images somebody has written to: the guest's disks are on these.

    Block devices, which would have to be read in full, are not looked at here.

    Raises:
        DamagedSnapshot: one is not what was saved.
    """
    storage = context.driver(record).storage
    with suppress(NotFound, UnreadableRecord):
        current = await context.catalog.snapshot(record.name, record.current or "")
        for file in current.frozen:
            if file.identity:
                await storage.check(file)


async def check_frozen(
    storage: Storage, domain: str, snapshots: Iterable[SnapshotRecord], written: Iterable[str]
) -> None:
    """Refuse to merge images that are not what was saved: their new checksums would hide the damage.

    Args:
        storage: where they are.
        domain: the domain's name.
        snapshots: those that stay.
        written: images that the merges write to or read.

    Raises:
        DamagedSnapshot: a snapshot that stays has one of them, and it has changed.
    """
    wanted = frozenset(written)
    seen: set[str] = set()
    for snapshot in snapshots:
        for file in (file for file in snapshot.frozen if file.path in wanted - seen):
            seen.add(file.path)
            try:
                await storage.check(file)
            except DamagedSnapshot as error:
                raise DamagedSnapshot(
                    f"{error}; snapshot {snapshot.name} of {domain} has it: delete that with all that are on it "
                    f"(`snaporch delete {domain} {snapshot.name} --children`), or bring the file back",
                    file.path,
                ) from error
