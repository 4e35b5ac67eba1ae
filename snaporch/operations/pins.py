"""Pins: a snapshot stays for as long as a clone that was made from it reads its images.

A clone needs its snapshot until its chains, and those of its own snapshots, are short (`flatten`), or it is gone.
That is looked up anew each time, by the identity of files, as all readers are (`snaporch.operations.readers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import InvalidInput, Refused
from snaporch.model.domain import DomainRecord
from snaporch.model.record import SnapshotRecord
from snaporch.operations.claims import claim
from snaporch.operations.readers import kept_for, tips


async def pins(context: Context, snapshots: Iterable[SnapshotRecord]) -> Mapping[str, tuple[str, ...]]:
    """Return, by name, those of a domain's snapshots that clones need, each with the names of these clones."""
    found: dict[str, list[str]] = {}
    known = {snapshot.id: snapshot for snapshot in snapshots}
    for domain in {snapshot.domain for snapshot in known.values()}:
        for record in await context.catalog.clones(domain):
            snapshot = known.get(record.origin.id) if record.origin is not None else None
            if snapshot is not None and await _reads(context, record, snapshot):
                found.setdefault(snapshot.name, []).append(record.name)
    return {name: tuple(clones) for name, clones in found.items()}


async def _reads(context: Context, record: DomainRecord, snapshot: SnapshotRecord) -> bool:
    """Return whether a clone, or a snapshot of it, reads what was frozen; one that cannot be looked at may."""
    storage = context.driver(record).storage
    frozen = {chain[0].path for chain in snapshot.images.values() if chain}
    held = set((await storage.identities(frozen)).values())
    try:
        read = {link.identity for disk in tips(record) for link in await storage.trace(disk.path, disk.format)}
    except Refused:
        return True
    own = await context.catalog.paths_of_snapshots(record.name)
    return bool(held & (read | set((await storage.identities(own)).values())))


async def check_unpinned(context: Context, snapshots: Iterable[SnapshotRecord]) -> None:
    """Refuse to delete a snapshot that a clone needs.

    Raises:
        Refused: in words, which clone, and what to do.
    """
    for snapshot in snapshots:
        for name, clones in (await pins(context, [snapshot])).items():
            clone = clones[0]
            raise Refused(
                f"{name} of {snapshot.domain} is pinned: its images are read by {', '.join(clones)}, made from it: "
                f"`snaporch domain undefine {clone} --discard` gives that up, `snaporch flatten {clone}` has it "
                "read nothing but its own"
            )


async def discarded(
    context: Context, operation: Operation, record: DomainRecord, *, discard: bool
) -> tuple[str, ...]:
    """Return the files that go with a domain that is to be forgotten, and claim them: those that a clone was given.

    Raises:
        InvalidInput: `discard` is said of a domain that is no clone: its images are the user's.
        Refused: it was not said that they may go, or somebody else reads them.
        Busy: an operation has begun to read one.
    """
    if record.origin is None:
        if discard:
            raise InvalidInput(f"{record.name} is no clone: its images are yours, and stay; leave out --discard")
        return ()
    files = tuple({*record.origin.files, *await context.catalog.own_files(record.name)})
    there = await context.driver(record).storage.identities(files)
    if there and not discard:
        raise Refused(
            f"{record.name} is a clone: what its guest has written is in {min(there)}, which snaporch has made "
            f"for it; `snaporch domain undefine {record.name} --discard` removes that, too"
        )
    await claim(context, operation, {identity: path for path, identity in there.items()}, write=True)
    for path, who in (await kept_for(context, record.name, there)).items():
        raise Refused(f"{record.name} cannot be discarded: {who} reads {path}")
    return files


def without_disks(record: DomainRecord) -> DomainRecord:
    """Return a clone's record as it is while its files are removed: nobody need look for its images any more."""
    origin = attrs.evolve(record.origin, discarded=True) if record.origin is not None else None
    return attrs.evolve(record, definition=attrs.evolve(record.definition, disks=()), active={}, origin=origin)
