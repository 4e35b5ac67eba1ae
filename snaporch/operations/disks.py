"""Checks of a domain's disks: does the definition fit them, may a guest run on them, may they be snapshotted?

Rule 1: a domain's disks are what its hypervisor has. A drive that its definition does not know would be missing
        from snapshots.
Rule 2: a domain that is on overlays is on them until these are merged. No definition takes it off its newest image,
        and none brings a frozen image under a guest.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import attrs

from snaporch.drivers.base import Machine, Storage
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import Refused, Unsupported
from snaporch.images.kinds import Kind, Traced, Verb, refusal
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainRecord
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.claims import claim
from snaporch.operations.readers import check_writable, marked_elsewhere, processes_of
from snaporch.operations.unchanged import check_as_left, check_below

# --- definitions ----------------------------------------------------------------------------------------------


async def redefined(context: Context, known: DomainRecord, definition: DomainDefinition) -> DomainRecord:
    """Return a domain's record with another definition, which must fit the images that its disks are on.

    A disk that is on an overlay keeps its target, path, format and readonly, or names that overlay, which is the
    user's own from then on.

    Raises:
        Refused: it does not fit; the error says which disk is on what. Or the domain's files are another user's.
    """
    storage = context.driver(known).storage
    new, old = ({disk.target: disk for disk in each.disks} for each in (definition, known.definition))
    active = dict(known.active)
    for target, on in known.active.items():
        was, wanted = old.get(target, on), new.get(target)
        if was.path == on.path or (wanted is not None and await _same(storage, wanted, on, was.readonly)):
            del active[target]
        elif wanted is None or not await _same(storage, wanted, was, was.readonly) or target not in old:
            raise Refused(_does_not_fit(known.name, was, on))
    yours = {disk.path for disk in definition.disks}
    below = {path: chain for path, chain in known.below.items() if path not in yours}
    generation = known.generation if definition.genid == known.definition.genid else ""
    record = attrs.evolve(
        known, definition=definition, template=None, active=active, below=below, generation=generation
    )
    await check_same_rights(context, known, record, yours)
    return record


async def check_same_rights(
    context: Context, known: DomainRecord, record: DomainRecord, yours: Collection[str] = ()
) -> None:
    """Refuse to go on with other rights with what was made with one user's.

    Where those files are, that user may exchange them at any time: what is done there has that user's rights alone.

    Args:
        context: the orchestrator's.
        known: the domain's record.
        record: the one that it is to have.
        yours: files that are the caller's own from then on.

    Raises:
        Refused: the domain has snapshots, or other files that snaporch has made, or an operation on it was cut
            short.
    """
    name, was, now = known.name, context.driver(known).whose, context.driver(record).whose
    if was == now:
        return
    await _check_nothing_left(context, name)
    if not await context.catalog.snapshots(name) and await context.catalog.own_files(name) <= {*yours}:
        return
    of = [f"the user {user}" if user else "snaporch's own user" for user in (was, now)]
    raise Refused(
        f"{name}: what is known of it was made with the rights of {of[0]}, and would be worked on with those of "
        f"{of[1]}: delete its snapshots first (`snaporch domain undefine {name} --snapshots`), or take another name"
    )


async def _check_nothing_left(context: Context, name: str) -> None:
    """Refuse where a recovery would work with the rights that the domain has then."""
    for record, _ in await context.catalog.unfinished(name):
        raise Refused(
            f"{name}: {record.kind} {record.subject} was cut short, and is yet to be undone with the rights that "
            f"it was begun with: `snaporch recover`, or `snaporch operations give-up {record.id}`, does that first"
        )


async def _same(storage: Storage, wanted: DeviceDisk, image: DeviceDisk, readonly: bool) -> bool:
    names = await storage.identities({wanted.path, image.path})
    same = wanted.path == image.path or (len(names) > 1 and len(set(names.values())) == 1)
    return same and wanted.format == image.format and wanted.readonly == readonly


def _does_not_fit(domain: str, was: DeviceDisk, on: DeviceDisk) -> str:
    return (
        f"{was.target} of {domain} is on {on.path}, which holds what the guest has written since its last "
        "snapshot: "
        f"leave target, path ({was.path}), format and readonly of that disk as they are, or delete the domain's "
        f'snapshots first, or take that image for the disk (path = "{on.path}", format = "{on.format}"); a copy of '
        "the definition under another name makes another domain"
    )


async def adopted(context: Context, record: DomainRecord) -> tuple[str, ...]:
    """Return the files that snaporch has made and that the definition names: the user's own from now on."""
    own = await context.catalog.own_files(record.name)
    return tuple(disk.path for disk in record.definition.disks if disk.path in own)


async def check_forgettable(context: Context, record: DomainRecord) -> None:
    """Refuse to forget a domain whose newest data is in an image that only snaporch knows of.

    Raises:
        Refused: a disk is on an overlay; or its files are another user's, and an operation on it was cut short.
    """
    if context.driver(record).whose:
        await _check_nothing_left(context, record.name)
    own = await context.catalog.own_files(record.name)
    for disk in record.disks:
        if disk.path in own:
            raise Refused(
                f"{disk.target} of {record.name} is on {disk.path}, which holds what the guest has written: its "
                f'own image is older. Define it with path = "{disk.path}", format = "{disk.format}" for that disk '
                "first: the image is yours then, and the domain can be undefined"
            )


async def check_new(context: Context, operation: Operation, record: DomainRecord) -> frozenset[str]:
    """Claim what a domain that is to be known reads, return that, and refuse images that belong to others.

    Raises:
        Refused: its guest would write to what others read, or somebody else writes to what it would read.
        Busy: an operation is just writing to one of its images.
    """
    chains = await _claim(context, operation, record, record.disks)
    await check_writable(context, record)
    await _check_written(context, record)
    return frozenset(os.path.realpath(link.path) for chain in chains.values() for link in chain)


async def check_attached(context: Context, operation: Operation, record: DomainRecord) -> frozenset[str]:
    """Return what a guest reads; refuse one that is another domain's, or that writes to what others need as it is.

    Raises:
        Refused: in words, which domain it is, or who reads what it writes to.
    """
    processes = processes_of(context.driver(record), record)
    for other in await context.catalog.domains():
        there = other.handle is not None and await context.driver(other).alive(other.handle)
        if there and other.name != record.name and processes & processes_of(context.driver(other), other):
            raise Refused(f"that process is domain {other.name} already: `snaporch domain show {other.name}`")
    storage = context.driver(record).storage
    found: set[str] = set()
    for disk in record.disks:
        try:
            await storage.trace(disk.path, disk.format)
        except Refused:  # it is no file of this host: a create says so, and nobody else can read it here
            continue
        found |= await check_new(
            context, operation, attrs.evolve(record, definition=_only(record.definition, disk))
        )
    return frozenset(found)


async def reattached(context: Context, known: DomainRecord, record: DomainRecord) -> DomainRecord:
    """Return the record of a domain that is attached to once more, with what is known of it from before.

    Raises:
        Refused: its owner has started it again without the image that has a disk's newest data, or on a chain that
            was changed meanwhile; or as another user, while there are files that were made for the first one.
        DamagedSnapshot: somebody has written to an image that a snapshot of it holds.
    """
    await check_same_rights(context, known, record)
    storage = context.driver(record).storage
    has: set[str] = set()
    for disk in record.disks:
        with suppress(Refused):  # it is no file of this host: a create says so
            has |= {link.identity for link in await storage.trace(disk.path, disk.format)}
    left = await storage.identities([disk.path for disk in known.active.values()])
    for target, disk in known.active.items():
        if disk.path in left and left[disk.path] not in has:
            raise Refused(
                f"{record.name} was left on {disk.path} ({target}), which holds the newest data of that disk, and "
                "this guest is not on it: end it, and start it on that image. A guest that is another one is "
                "attached to under another name"
            )
    record = attrs.evolve(record, below=known.below, tags=known.tags, max_depth=known.max_depth)
    await check_as_left(context, record)
    return attrs.evolve(record, current=known.current or record.current)


def _only(definition: DomainDefinition, disk: DeviceDisk) -> DomainDefinition:
    return attrs.evolve(definition, disks=(disk,))


async def _check_written(context: Context, record: DomainRecord) -> None:
    """Refuse to be backed by an image that the guest of another domain writes to."""
    own, storage = context.driver(record).name, context.driver(record).storage
    written: dict[str, tuple[str, str]] = {}
    for other in await context.catalog.domains():
        driver = context.driver(other)
        if other.name == record.name or other.handle is None or not await driver.alive(other.handle):
            continue
        paths = [disk.path for disk in other.disks if not disk.readonly]
        there = await driver.storage.identities(paths) if driver.name == own else {}
        written |= {identity: (path, other.name) for path, identity in there.items()}
    for disk in record.disks:
        for link in await storage.trace(disk.path, disk.format):
            if link.identity in written:
                path, name = written[link.identity]
                raise Refused(
                    f"{disk.target} of {record.name} would read {path}, which the guest of {name} writes to just "
                    f"now: take a snapshot of {name} first, and let it be backed by what that froze"
                )


async def _claim(
    context: Context, operation: Operation, record: DomainRecord, disks: Iterable[DeviceDisk]
) -> dict[str, tuple[Traced, ...]]:
    """Claim whole chains for reading; return them, by target."""
    storage = context.driver(record).storage
    chains = {disk.target: await storage.trace(disk.path, disk.format) for disk in disks}
    images = {link.identity: link.path for chain in chains.values() for link in chain}
    await claim(context, operation, images, write=False)
    return chains


# --- running --------------------------------------------------------------------------------------------------


async def check_start(context: Context, operation: Operation, record: DomainRecord) -> None:
    """Claim what a domain is about to run on, and refuse to run on what others need as it is.

    Raises:
        DamagedSnapshot: a frozen image under one of its disks is not what it was.
        Refused: somebody reads what the guest would write to, or writes to what it would read.
        Busy: an operation is just writing to one of the images.
    """
    if record.origin is not None and record.origin.discarded:
        raise Refused(f"{record.name} was being discarded: `snaporch domain undefine {record.name} --discard`")
    chains = await _claim(context, operation, record, record.disks)
    for chain in chains.values():
        if why := refusal(Verb.START, chain):
            raise Unsupported(f"{record.name} cannot be started: {why}")
    await check_writable(context, record)
    storage = context.driver(record).storage
    for disk in record.disks:
        if not disk.readonly:
            await storage.unmark(disk.path, str(context.root))


async def check_drives(record: DomainRecord, machine: Machine, storage: Storage) -> None:
    """Refuse a machine that writes to an image which the domain's definition does not name.

    Raises:
        Unsupported: it has such a drive, or lacks one that is defined.
    """
    disks = await machine.disks()
    known = await storage.identities({disk.path for disk in record.disks})
    found = await storage.identities({path for disk in disks for path in disk.chain})
    ours = set(known.values())
    for disk in disks:
        if not disk.readonly and not ours & {found[path] for path in disk.chain if path in found}:
            raise Unsupported(_unknown(record, disk))
    there = set(found.values())
    for wanted in record.disks:
        if not wanted.readonly and known.get(wanted.path) not in there:
            raise Unsupported(
                f"{record.name}: its hypervisor is not on {wanted.path} ({wanted.target}), which holds the disk's "
                "newest data: it was unplugged, or somebody has started the guest on another image. End that guest "
                f"before it writes more; `snaporch domain start {record.name}` starts it on the right image"
            )


async def check_no_jobs(name: str, machine: Machine, *, ending: bool = False) -> None:
    """Refuse to change the chains of a machine, or to end it, while another program has it work on its images.

    Raises:
        Refused: so it is.
    """
    if jobs := await machine.jobs_of_others(ending=ending):
        raise Refused(
            f"{name}: another program has its hypervisor work on its images ({', '.join(jobs)}): wait until that "
            "is over, or end it there"
        )


def _unknown(record: DomainRecord, disk: DiskStatus) -> str:
    return (
        f"{record.name} writes to {disk.active} ({disk.target}), which is not in its definition: it would be "
        "in no snapshot. Name it there under [[disks]] instead of in extra_args, or unplug it; a disk that was "
        "plugged into an attached guest is known after `snaporch domain attach` has been done again"
    )


# --- snapshots ------------------------------------------------------------------------------------------------


async def check_taken(
    context: Context,
    operation: Operation,
    record: DomainRecord,
    machine: Machine | None,
    disks: Mapping[DiskStatus, Verb],
) -> None:
    """Claim what a snapshot is to be taken of, and refuse what it could not hold, or could not be gone back to.

    Args:
        context: the orchestrator's.
        operation: the create.
        record: the domain's.
        machine: its machine, or None.
        disks: those that are taken, as they are, each with what is done with it.

    Raises:
        Unsupported: an image is of a kind that is not taken.
        Refused: an image cannot be looked at, or is frozen for another root.
    """
    storage = context.driver(record).storage
    if machine is not None:
        odd = await machine.oddities()
        for disk, verb in disks.items():
            if why := odd.get(disk.target):
                raise Unsupported(f"{record.name} ({disk.target}): {why.refused(verb)}")
        await check_drives(record, machine, storage)
        await check_no_jobs(record.name, machine)
    await check_below(storage, record, [disk.chain for disk in disks])
    images: dict[str, str] = {}
    for disk, verb in disks.items():
        chain = await _trace_taken(storage, record, disk, verb)
        images |= {link.identity: link.path for link in chain}
        if who := await marked_elsewhere(context, storage, disk.active):
            raise Refused(f"{record.name} writes to {disk.active} ({disk.target}), which is frozen for {who}")
    await claim(context, operation, images, write=False)


async def _trace_taken(storage: Storage, record: DomainRecord, disk: DiskStatus, verb: Verb) -> tuple[Traced, ...]:
    try:
        chain = await storage.trace(disk.active, disk.format)
    except Refused as error:
        remote = Traced(disk.active, "", {Kind.REMOTE: str(error)})
        raise Unsupported(f"{record.name} ({disk.target}): {remote.refused(verb)}") from error
    if why := refusal(verb, chain):
        raise Unsupported(f"{record.name} ({disk.target}): {why}")
    return chain


async def claim_snapshot(context: Context, operation: Operation, snapshot: SnapshotRecord) -> None:
    """Claim the images of a snapshot for reading.

    Raises:
        Busy: an operation is just writing to one of them.
    """
    storage = context.driver(await context.catalog.domain(snapshot.domain)).storage
    there = await storage.identities(snapshot.paths)
    await claim(context, operation, {identity: path for path, identity in there.items()}, write=False)


async def check_fresh(storage: Storage, snapshot: SnapshotRecord, verb: Verb) -> None:
    """Refuse to put fresh overlays over a snapshot's images where the table of kinds refuses the verb.

    Raises:
        Unsupported: an earlier snaporch has taken it, of an image of a kind that is refused now.
    """
    for disk in snapshot.snapshot.disks:
        if disk.external and (why := refusal(verb, await storage.trace(disk.disk.path, disk.disk.format))):
            raise Unsupported(f"{snapshot.domain} ({disk.disk.target}), snapshot {snapshot.name}: {why}")


async def release_marks(context: Context, storage: Storage, paths: Iterable[str]) -> None:
    """Take the marks of frozen images off those that no snapshot of the root holds any more."""
    held = {path for rows in (await context.catalog.frozen_but(())).values() for _, path, _ in rows}
    for path in set(paths) - held:
        await storage.unmark(path, str(context.root))
