"""Decides how a domain goes back to a snapshot, or refuses; no I/O. The journal has the plan."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs

from snaporch.drivers.base import StreamPlan
from snaporch.errors import InvalidInput, Unsupported
from snaporch.model.domain import DomainDefinition, DomainRecord, DomainState
from snaporch.model.formats import versioned
from snaporch.model.names import short
from snaporch.model.record import Estimate, SnapshotRecord
from snaporch.model.rfc import DeviceDisk, RevertFlag
from snaporch.model.way import Way


@versioned("revert-plan")
@attrs.frozen
class RevertPlan:
    """Everything that a revert will do, decided before it is begun: what the journal holds.

    Attributes:
        domain: the domain's record as it was.
        snapshot: where it goes back to.
        state: what it is to do afterwards.
        was: what it did before.
        disks: the images it will run on.
        frozen: of each disk that the snapshot holds, the image that its fresh overlay is made over.
        way: how; `snaporch.engine.ways` has its row.
        directory: of the new process.
        operation: whose plan it is.
        inside: of each disk whose point is inside an image, that snapshot's name; the first one's has the memory.
        kept: the name of the snapshot that holds, inside these images, what they held before.
        owners: by target, the owner of the fresh overlay, where this is not the user who runs snaporch.
        reason: why the old guest has to be ended first, where it has.
        keep: how what it holds is kept in a file meanwhile, where it is.
        expected: what that is expected to take.
        keep_clock: the guest's clock is left as it is.
        generation: the generation id of the new machine, which no other has had; empty: it has none.
        eager: why all memory is loaded before the guest runs, though it was to come lazily; else empty.
        tpm: the directory for the state of the new machine's TPM; empty: it has none.
    """

    domain: DomainRecord
    snapshot: SnapshotRecord
    state: DomainState
    was: DomainState
    disks: tuple[DeviceDisk, ...]
    frozen: dict[str, DeviceDisk]
    way: Way
    directory: str
    operation: str
    inside: dict[str, str] = attrs.field(factory=dict)
    kept: str = ""
    owners: dict[str, tuple[int, int]] = attrs.field(factory=dict)
    reason: str = ""
    keep: StreamPlan | None = None
    expected: Estimate | None = None
    keep_clock: bool = False
    generation: str = ""
    eager: str = ""
    tpm: str = ""

    @property
    def memory_inside(self) -> bool:
        """Whether the snapshot's memory is inside an image."""
        return self.snapshot.snapshot.memory and bool(self.inside)

    @property
    def tag(self) -> str:
        """The name of the snapshot that holds the point inside the images, by which hypervisors load all of it."""
        return next(iter(self.inside.values()))

    @property
    def run_directory(self) -> Path:
        """The directory for sockets and logs of the new process."""
        return Path(self.directory)


def wanted_state(record: SnapshotRecord, flags: RevertFlag) -> DomainState:
    """Return what the domain is to do after a revert.

    Raises:
        InvalidInput: RUNNING and PAUSED were both asked for.
    """
    if flags & RevertFlag.RUNNING and flags & RevertFlag.PAUSED:
        raise InvalidInput("--running and --paused exclude each other")
    if flags & RevertFlag.RUNNING:
        return DomainState.RUNNING
    return DomainState.PAUSED if flags & RevertFlag.PAUSED else record.domain_state


def fresh_disks(
    domain: DomainRecord, record: SnapshotRecord, directory: str, operation: str
) -> tuple[tuple[DeviceDisk, ...], dict[str, DeviceDisk]]:
    """Return the disks that a snapshot's guest is to run on, and the frozen images that their overlays are over."""
    frozen = {disk.disk.target: disk.disk for disk in record.snapshot.disks if disk.external}
    inside = {disk.disk.target: disk.disk for disk in record.snapshot.disks if not disk.external}
    disks = (
        attrs.evolve(disk, path=f"{directory}/{disk.target}.{short(operation)}.qcow2", format="qcow2")
        if disk.target in frozen
        else inside.get(disk.target, disk)
        for disk in _media(attrs.evolve(domain, definition=record.definition), record)
    )
    return tuple(disks), frozen


def _media(domain: DomainRecord, record: SnapshotRecord) -> Iterable[DeviceDisk]:
    """Yield a domain's disks; one that is only read has the medium of the point, where that is known."""
    known = {disk.target: disk for disk in record.shape.disks} if record.shape and record.template else None
    for disk in domain.disks:
        if known is None or not disk.readonly:
            yield disk
        elif (then := known.get(disk.target)) is not None:
            yield attrs.evolve(disk, path=then.active, format=then.format)


def tpm_place(definition: DomainDefinition, directory: str, operation: str) -> str:
    """Return the directory for the state of a TPM that an operation makes; empty: the machine has none."""
    return f"{directory}/tpm-{short(operation)}" if definition.tpm is not None else ""


def inside_blocker(record: SnapshotRecord, others: Iterable[SnapshotRecord], needed: Mapping[str, str]) -> str:
    """Return why images cannot go back in place to a snapshot that is inside them, or an empty string.

    Args:
        record: the snapshot.
        others: the domain's other snapshots.
        needed: images that others read, each with one of these in words.
    """
    for image in {file.path for file in record.inside.values()}:
        for other in others:
            if other.name != record.name and image in {file.path for file in other.frozen}:
                return f"snapshot {other.name} is in what {image} holds now; delete that one first"
        if image in needed:
            return f"{needed[image]} reads {image}"
    return ""


def plan_revert(
    domain: DomainRecord,
    was: DomainState,
    record: SnapshotRecord,
    flags: RevertFlag,
    *,
    directory: str,
    operation: str,
) -> RevertPlan:
    """Decide how a revert is done.

    Raises:
        InvalidInput: the flags exclude each other.
        Unsupported: without FORCE: the definition has changed, or a disk was left out of the snapshot.
    """
    state, force = wanted_state(record, flags), RevertFlag.FORCE in flags
    if record.definition.machine_only != domain.definition.machine_only and not force:
        raise Unsupported(
            f"{domain.name} was defined differently when {record.name} was taken; "
            "`--force` goes back to that definition"
        )
    disks, frozen = fresh_disks(domain, record, directory, operation)
    inside = {disk.disk.target: disk.name for disk in record.snapshot.disks if not disk.external}
    place = f"{directory}/run-{short(operation)}"
    keep_clock = RevertFlag.KEEP_CLOCK in flags or domain.definition.clock == "keep"
    generation = record.definition.new_generation()
    tpm = tpm_place(record.definition, directory, operation)
    if inside:
        way, kept = _way_inside(domain, was, record, force=force), f"snaporch-{short(operation)}"
        plan = RevertPlan(domain, record, state, was, disks, frozen, way, place, operation, inside, kept)
        return attrs.evolve(plan, keep_clock=keep_clock, generation=generation, tpm=tpm)
    shared = [disk.target for disk in disks if disk.target not in frozen and not disk.readonly]
    if shared and was is not DomainState.INACTIVE and not force:
        raise Unsupported(
            f"{record.name} does not hold {', '.join(shared)}: the old guest and the new one cannot both have it, "
            "so the old one could not be kept until the new one runs; `--force` ends it first"
        )
    way = Way.INACTIVE if state is DomainState.INACTIVE else Way.BESIDE
    if shared and was is not DomainState.INACTIVE and way is Way.BESIDE:
        way = Way.DISPLACE
    plan = RevertPlan(domain, record, state, was, disks, frozen, way, place, operation)
    return attrs.evolve(plan, keep_clock=keep_clock, generation=generation, tpm=tpm)


def _way_inside(domain: DomainRecord, was: DomainState, record: SnapshotRecord, *, force: bool) -> Way:
    """Return how a domain goes back to a point inside images, which can only go back in place.

    Raises:
        Unsupported: without FORCE: somebody has, or the guest has to be told a new generation id.
    """
    if was is DomainState.INACTIVE:
        return Way.INSIDE_INACTIVE
    present = {disk.target: disk.path for disk in domain.disks}
    here = all(present.get(target) == file.path for target, file in record.inside.items())
    here = here and not (record.shape is not None and record.shape.has_generation)
    if here and record.snapshot.memory and record.definition.machine_only == domain.definition.machine_only:
        return Way.INSIDE
    if not force:
        raise Unsupported(
            f"{domain.name} is {was}: {record.name} is inside images that go back in place, and the guest would "
            "have to be ended first; shut it down, or `--force` does it"
        )
    return Way.INSIDE_DISPLACE


def renamed(plan: RevertPlan, operation: str) -> RevertPlan:
    """Return the same plan, as another operation: its overlays and its directory have that one's name."""
    name = short(operation)
    disks = tuple(
        attrs.evolve(disk, path=f"{os.path.dirname(disk.path)}/{disk.target}.{name}.qcow2")
        if disk.target in plan.frozen
        else disk
        for disk in plan.disks
    )
    parent = os.path.dirname(plan.directory)
    tpm = tpm_place(plan.snapshot.definition, parent, operation)
    return attrs.evolve(plan, disks=disks, directory=f"{parent}/run-{name}", operation=operation, tpm=tpm)
