"""Decides how a create is done, or refuses; no I/O.

A plan says everything before anything is begun: which files, which block nodes, which strategy and why. The journal
has the plan, so that recovery knows which files may have been made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs

from snaporch.drivers.base import (
    Capabilities,
    GuestAgent,
    ImagePoints,
    Inside,
    MemoryStreams,
    Overlay,
    OverlayPlace,
    Overlays,
    PointsInside,
    StreamPlan,
    Trait,
    require,
)
from snaporch.errors import InvalidInput, Unsupported
from snaporch.images.kinds import TABLE, Kind, Verb
from snaporch.model.domain import DiskStatus, DomainRecord, DomainState, MachineShape
from snaporch.model.formats import versioned
from snaporch.model.names import check_name, check_text, short
from snaporch.model.record import Estimate, PastCheckpoint, index_of
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot
from snaporch.model.way import Way, WayBack
from snaporch.operations.estimate import estimate

WORTH_SECONDS = 0.008  # of set-up: with less a late stop gains nothing


@versioned("create-plan")
@attrs.frozen
class CreatePlan:
    """Everything that a create will do, decided before it is begun: what the journal holds.

    Attributes:
        domain: the domain's record as it was.
        snapshot: with every field filled in.
        state: what the domain did.
        strategy: chosen for the memory.
        reason: why.
        overlays: one for each disk that is taken in files of its own.
        inside: one for each disk that is taken inside its image; the first one's holds the memory as well.
        quiesce: the guest agent freezes the file systems around the point.
        expected: what it is expected to take; None without memory.
        stops_itself: the memory stream stops the guest, see `Capabilities.stops_itself`.
        stream: how memory is streamed, when it is.
        options: the caller's.
        hypervisor: what the machine says of itself, by which its memory may later be refused; empty when inactive.
        shape: what the machine is made of; None when inactive.
        way_back: how the domain could go back to it; None when inactive.
        saves: a revert takes it, of what it is about to replace.
        late: the seconds for which the hypervisor is expected to get ready for the point, most of which the guest
            is to run through; None: it is paused first.
        tpm: the file that the state of the machine's TPM is copied to; empty: it has none, or memory has it.
    """

    domain: DomainRecord
    snapshot: DomainSnapshot
    state: DomainState
    strategy: Strategy
    reason: str
    overlays: tuple[Overlay, ...]
    stream: StreamPlan | None
    options: CreateOptions
    hypervisor: dict[str, str] = attrs.field(factory=dict)
    inside: tuple[Inside, ...] = ()
    quiesce: bool = False
    expected: Estimate | None = None
    stops_itself: bool = False
    shape: MachineShape | None = None
    way_back: WayBack | None = None
    saves: bool = False
    late: float | None = None
    tpm: str = ""

    @property
    def order(self) -> Strategy:
        """The strategy by whose steps it is done."""
        return order_of(self.strategy, stops_itself=self.stops_itself)

    @property
    def bases(self) -> tuple[DiskStatus, ...]:
        """The disks that are taken, as they were."""
        return tuple([overlay.base for overlay in self.overlays] + [point.base for point in self.inside])

    @property
    def files(self) -> tuple[str, ...]:
        """The files that will be made."""
        others = (self.stream.path if self.stream else "", self.tpm)
        return (*(o.path for o in self.overlays), *filter(None, others), *self.extra)

    @property
    def extra(self) -> tuple[str, ...]:
        """Those of them without which the snapshot is whole."""
        return (self.stream.index,) if self.stream and self.stream.index else ()

    @property
    def memory_place(self) -> str:
        """The file that memory goes to: one of its own, or the first image that is saved inside of; else empty."""
        if self.stream is not None:
            return self.stream.path
        return self.inside[0].base.active if self.snapshot.memory and self.inside else ""


@attrs.frozen
class Scene:
    """What a plan is made from.

    Attributes:
        domain: the domain's record.
        state: what it does.
        disks: its disks as they are.
        capabilities: the machine's; None when inactive.
        settings: the machine's settings that a stream changes.
        directory: where files go that have no path in the request.
        operation: the operation's id.
        now: seconds since the epoch.
        earlier: how the domain's last checkpoints went.
        shape: what its machine is made of; None when inactive.
        traits: of its driver.
        places: where overlays go that have no path in the request, by target, if not in `directory`.
        way_back: how it could go back to this point; None when inactive.
        renamed: a file of memory is named as this snapshot's would be: that snapshot has another name now.
    """

    domain: DomainRecord
    state: DomainState
    disks: tuple[DiskStatus, ...]
    capabilities: Capabilities | None
    settings: dict[str, Any]
    directory: str
    operation: str
    now: float
    earlier: tuple[PastCheckpoint, ...] = ()
    shape: MachineShape | None = None
    traits: frozenset[Trait] = frozenset()
    places: Mapping[str, OverlayPlace] = attrs.field(factory=dict)
    way_back: WayBack | None = None
    renamed: bool = False


def plan_create(scene: Scene, snapshot: DomainSnapshot, flags: CreateFlag, options: CreateOptions) -> CreatePlan:
    """Decide how a create is done: the strategy, or the reason why it is refused.

    Raises:
        InvalidInput: the request makes no sense.
        Unsupported: this domain, as it is, cannot do it.
    """
    if options.strategy in {Strategy.BACKGROUND, Strategy.PRECOPY}:
        flags |= CreateFlag.LIVE  # to say how the guest's memory is taken while it runs is to say that it runs
    memory = snapshot.memory and CreateFlag.DISK_ONLY not in flags
    _check_kind(scene, snapshot, flags, memory=memory)
    _check_text(snapshot)
    name = check_name(snapshot.name or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(scene.now)))
    taken = _taken_disks(scene, snapshot, options.exclude, name)
    inside = tuple(how for _, how in taken if isinstance(how, Inside))
    overlays = tuple(how for _, how in taken if isinstance(how, Overlay))
    strategy, reason = Strategy.NONE, "disks only"
    if memory:
        strategy, reason = _choose_strategy(scene, flags, options) if not inside else _internal(scene, overlays)
    streamed = memory and not inside
    _check_able(scene, flags, options, streamed=streamed, overlays=overlays, inside=inside)
    can = scene.capabilities
    stops_itself = streamed and can is not None and can.stops_itself
    late, not_late = _late_stop(scene, strategy, flags) if options.late_stop else (None, "")
    if order_of(strategy, stops_itself=stops_itself) is Strategy.PRECOPY and CreateFlag.QUIESCE in flags:
        raise Unsupported(
            f"--quiesce would keep the file systems of {scene.domain.name} frozen while its memory streams "
            f"({strategy}: {reason}); leave out --live, or --quiesce"
        )
    if snapshot.memory_file and not streamed:
        raise InvalidInput("leave out the memory file: the memory is saved inside an image, or not at all")
    memory_file = os.path.abspath(snapshot.memory_file or _memory_file(scene, name)) if streamed else ""
    if memory_file in {overlay.path for overlay in overlays}:
        raise InvalidInput("memory and a disk cannot have the same file")
    complete = attrs.evolve(
        snapshot,
        name=name,
        creation_time=int(scene.now),
        memory=memory,
        memory_file=memory_file,
        disks=tuple(disk for disk, _ in taken),
    )
    stream = _stream_plan(scene, memory_file, strategy, options) if streamed else None
    return CreatePlan(
        domain=scene.domain,
        snapshot=complete,
        state=scene.state,
        strategy=strategy,
        reason=f"{reason}; no late stop: {not_late}" if not_late else reason,
        overlays=overlays,
        stream=stream,
        options=options,
        hypervisor=_hypervisor(scene.capabilities),
        inside=inside,
        quiesce=CreateFlag.QUIESCE in flags,
        stops_itself=stops_itself,
        expected=_expected(scene, strategy) if memory else None,
        shape=scene.shape,
        way_back=scene.way_back,
        late=late,
        tpm=f"{scene.directory}/tpm.{short(scene.operation)}.state" if scene.domain.tpm and not memory else "",
    )


def _late_stop(scene: Scene, strategy: Strategy, flags: CreateFlag) -> tuple[float | None, str]:
    """Return what is foreseen of the hypervisor's set-up if the guest is to run through it, or why it is not."""
    can = scene.capabilities
    if strategy is not Strategy.BACKGROUND or can is None:
        return None, "the strategy is not background"
    if Trait.LATE_STOPS not in can.traits:
        return None, f"{can.hypervisor} cannot be relied upon for it, or gains nothing"
    if CreateFlag.QUIESCE in flags:
        return None, "its file systems are frozen meanwhile"
    known = [past.setup for past in scene.earlier if past.setup is not None]
    if not known:
        return None, "no earlier checkpoint says how long the guest could run on"
    if (least := min(known)) <= WORTH_SECONDS:
        return None, f"it could gain no more than {least * 1000:.0f} ms"
    return least, ""


def order_of(strategy: Strategy, *, stops_itself: bool) -> Strategy:
    """Return by whose steps memory is saved: a stream that stops the guest by itself begins while that runs."""
    return Strategy.PRECOPY if stops_itself and strategy is Strategy.PAUSED else strategy


def _check_able(
    scene: Scene,
    flags: CreateFlag,
    options: CreateOptions,
    *,
    streamed: bool,
    overlays: Sequence[Overlay],
    inside: Sequence[Inside],
) -> None:
    """Refuse what the driver's record, or the machine's, does not name."""
    name, can = scene.domain.name, scene.capabilities
    if inside:
        require(scene.traits, ImagePoints, name)
    if can is None:
        return
    if overlays:
        require(can.traits, Overlays, name)
    if inside:
        require(can.traits, PointsInside, name)
        if can.inside_memory_in_file:
            raise Unsupported(f"{name}: its hypervisor keeps no memory inside images; leave out internal disks")
    if streamed:
        require(can.traits, MemoryStreams, name)
        if options.bandwidth and not can.limits_streams:
            raise Unsupported(
                f"{name}: its hypervisor streams memory as quickly as it can; leave out the bandwidth"
            )
    if CreateFlag.QUIESCE in flags:
        require(can.traits, GuestAgent, name)


def _expected(scene: Scene, strategy: Strategy) -> Estimate:
    ram = scene.capabilities.ram if scene.capabilities is not None else scene.domain.definition.memory
    found = estimate(strategy, ram, scene.earlier)
    return attrs.evolve(found, pause=None) if scene.state is DomainState.PAUSED else found


def _hypervisor(capabilities: Capabilities | None) -> dict[str, str]:
    return {"name": capabilities.hypervisor, **capabilities.versions} if capabilities is not None else {}


def _check_text(snapshot: DomainSnapshot) -> None:
    overlays = [disk.external_sn.path for disk in snapshot.disks if disk.external_sn is not None]
    for what, text in (("description", snapshot.description), ("memory file", snapshot.memory_file or "")):
        check_text(text, what)
    for path in overlays:
        check_text(path, "overlay")


def check_way_back(plan: CreatePlan) -> None:
    """Refuse a checkpoint that its domain could never go back to; asked last: what its images say is clearer.

    Raises:
        Unsupported: so it is, and it was not asked for all the same.
    """
    back = plan.way_back
    if plan.snapshot.memory and back is not None and back.way is Way.NONE and not plan.options.even_if_no_way_back:
        raise Unsupported(
            f"{plan.domain.name} could never go back to this checkpoint: {back.reason}; "
            "with --even-if-no-way-back it is taken all the same"
        )


def _check_kind(scene: Scene, snapshot: DomainSnapshot, flags: CreateFlag, *, memory: bool) -> None:
    internal = [disk.disk.target for disk in snapshot.disks if not disk.external]
    if CreateFlag.LIVE in flags and (internal or not memory):
        raise InvalidInput("--live is for external checkpoints: not with internal disks, and not without memory")
    if scene.state is DomainState.INACTIVE:
        if memory:
            name = scene.domain.name
            raise InvalidInput(
                f"{name} is inactive: there is no memory to save; start it (`snaporch domain start {name}`), or "
                "take its disks alone (--disk-only)"
            )
    elif not memory and CreateFlag.QUIESCE not in flags:
        raise Unsupported(
            f"{scene.domain.name} is {scene.state}: disks alone would not be one point with its memory; "
            "take a checkpoint, shut it down first, or let its guest agent freeze its file systems (--quiesce)"
        )
    if CreateFlag.QUIESCE in flags and scene.state is not DomainState.RUNNING:
        raise InvalidInput(
            f"{scene.domain.name} is {scene.state}: it has no running guest to quiesce; leave out --quiesce"
        )
    if internal and not memory and scene.state is not DomainState.INACTIVE:
        raise Unsupported(
            "of a guest that runs, disks alone are taken in files of their own, not inside the images"
        )


def _taken_disks(
    scene: Scene, snapshot: DomainSnapshot, exclude: Collection[str], name: str
) -> tuple[tuple[DiskSnapshot, Overlay | Inside], ...]:
    """Return what is done with each disk that is taken."""
    asked = {disk.disk.target: disk for disk in snapshot.disks}
    if len(asked) < len(snapshot.disks):
        raise InvalidInput("a disk is named twice")
    present = {disk.target: disk for disk in scene.disks}
    for target in {*asked, *exclude} - present.keys():
        raise InvalidInput(f"{scene.domain.name} has no disk {target!r}; it has {', '.join(present) or 'none'}")
    for target in asked.keys() & set(exclude):
        raise InvalidInput(f"{target} is both asked for and left out")
    for target in (target for target in asked if present[target].readonly):
        raise InvalidInput(f"{target} is read-only: there is nothing to switch")
    taken = [disk for disk in scene.disks if not disk.readonly and disk.target not in exclude]
    result = tuple(_one_disk(scene, disk, asked.get(disk.target), name) for disk in taken)
    paths = [how.path for _, how in result if isinstance(how, Overlay)]
    if len(set(paths)) < len(paths):
        raise InvalidInput("two disks cannot have the same overlay")
    return result


def _one_disk(
    scene: Scene, status: DiskStatus, asked: DiskSnapshot | None, name: str
) -> tuple[DiskSnapshot, Overlay | Inside]:
    frozen = DeviceDisk(status.target, status.active, status.format)
    if asked is not None and not asked.external:
        if status.format != "qcow2":
            raise InvalidInput(f"{status.target} is {status.format}: {TABLE[Kind.RAW][Verb.INTERNAL]}")
        tag = tag_of(asked.name or name)
        return DiskSnapshot(frozen, tag, external=False), Inside(status, tag)
    path = asked.external_sn.path if asked is not None and asked.external_sn is not None else ""
    place = scene.places.get(status.target, OverlayPlace(scene.directory))
    path = os.path.abspath(path or f"{place.directory}/{status.target}.{short(scene.operation)}.qcow2")
    overlay = Overlay(base=status, path=path, owner=place.owner)
    return DiskSnapshot(frozen, name, external=True, external_sn=DeviceDisk(status.target, path)), overlay


def _memory_file(scene: Scene, name: str) -> str:
    return (
        f"{scene.directory}/{name}.{short(scene.operation)}.mem"
        if scene.renamed
        else f"{scene.directory}/{name}.mem"
    )


def tag_of(name: str) -> str:
    """Return a snapshot's name inside images: QEMU takes one of digits only for another snapshot's number."""
    return f"snapshot-{name}" if name.isdecimal() else name


def _internal(scene: Scene, overlays: tuple[Overlay, ...]) -> tuple[Strategy, str]:
    if overlays:
        outside = ", ".join(overlay.target for overlay in overlays)
        raise InvalidInput(
            f"all disks internal, or all external: with {outside} in files of their own, one point cannot be kept; "
            "ask for all of them inside, or leave some out"
        )
    if scene.capabilities is not None and scene.capabilities.memory_blocker:
        raise Unsupported(f"{scene.domain.name}: {scene.capabilities.memory_blocker}")
    if scene.shape is not None and scene.shape.has_generation:
        raise Unsupported(
            f"{scene.domain.name} has a generation id, which could not change in the process that would go back to "
            "this point itself: leave out what asks for internal disks"
        )
    return Strategy.INTERNAL, "asked for inside the images"


def _choose_strategy(scene: Scene, flags: CreateFlag, options: CreateOptions) -> tuple[Strategy, str]:
    capabilities = scene.capabilities
    if capabilities is None:
        raise AssertionError("an active domain has a machine")
    if capabilities.memory_blocker:
        raise Unsupported(f"{scene.domain.name}: {capabilities.memory_blocker}")
    if scene.state is DomainState.PAUSED:
        return Strategy.PAUSED, "the guest is paused already"
    if CreateFlag.LIVE not in flags:
        return Strategy.PAUSED, "asked for without --live"
    if capabilities.live_blocker:
        raise Unsupported(f"{scene.domain.name}: {capabilities.live_blocker}")
    caveat = capabilities.precopy_caveat
    if options.strategy is Strategy.PRECOPY:
        return Strategy.PRECOPY, f"asked for, although {caveat}" if caveat else "asked for"
    if capabilities.background:
        return Strategy.BACKGROUND, "asked for" if options.strategy is Strategy.BACKGROUND else "possible here"
    why = f"background is not possible: {capabilities.background_blocker}"
    if options.strategy is Strategy.BACKGROUND:
        raise Unsupported(f"{scene.domain.name}: {why}; ask for auto or precopy")
    if caveat:
        return Strategy.PAUSED, f"{why}; precopy is not safe: {caveat}"
    return Strategy.PRECOPY, why


def _stream_plan(scene: Scene, path: str, strategy: Strategy, options: CreateOptions) -> StreamPlan:
    """Return how the hypervisor streams: a paused guest by write-protection where that leaves it truly paused.

    Raises:
        Unsupported: by nothing that would come to its end.
    """
    can = scene.capabilities
    if can is not None and (
        scene.state is DomainState.PAUSED or (can.ends_blocker and strategy is Strategy.PAUSED)
    ):
        strategy = _of_one_that_stands(can, strategy)
    if can is not None and can.ends_blocker and strategy is not Strategy.BACKGROUND:
        raise Unsupported(f"{scene.domain.name}: {can.ends_blocker}")
    index = index_of(path) if Trait.LOADS_LAZILY in scene.traits else ""
    return StreamPlan(path, strategy, options.bandwidth, scene.settings, index)


def _of_one_that_stands(can: Capabilities, otherwise: Strategy) -> Strategy:
    return Strategy.BACKGROUND if can.background and can.keeps_paused else otherwise


def paused_stream(path: str, was: DomainState, can: Capabilities, settings: dict[str, Any]) -> StreamPlan:
    """Return how the memory of a paused guest is streamed; the guest is then as it was: running, or paused."""
    stands = was is DomainState.PAUSED or bool(can.ends_blocker)
    return StreamPlan(path, _of_one_that_stands(can, Strategy.PAUSED) if stands else Strategy.PAUSED, 0, settings)


def at_one_point(plans: Sequence[CreatePlan]) -> tuple[CreatePlan, ...]:
    """Return the plans of several domains so that all can be taken at one point: by the steps of one strategy.

    A guest that is paused already goes through the steps of a background stream with those that run.

    Raises:
        Unsupported: one of them cannot go with the others. Precopies never can: each ends when its own guest writes
            slowly enough, and that guest would then be paused until the last of the others has come so far. Nor can
            those inside images: each hypervisor stops its guest when it comes to it.
    """
    if len(plans) == 1:
        return tuple(plans)
    paths = [path for plan in plans for path in plan.files]
    if len(set(paths)) < len(paths):
        raise InvalidInput("two domains cannot have the same file: a group's files are named by snaporch")
    live = any(plan.strategy is Strategy.BACKGROUND for plan in plans)
    plans = [_stopped_first(_as_background(plan) if live else plan) for plan in plans]
    chosen = {plan.order for plan in plans}
    if len(chosen) > 1 or chosen & {Strategy.PRECOPY, Strategy.INTERNAL}:
        each = "; ".join(f"{plan.domain.name}: {plan.strategy}, {plan.reason}" for plan in plans)
        raise Unsupported(
            f"these cannot be taken at one point as they are ({each}): all by background, or leave out --live and "
            "all are paused until their memory is saved"
        )
    return tuple(plans)


def _stopped_first(plan: CreatePlan) -> CreatePlan:
    if plan.late is None:
        return plan
    return attrs.evolve(plan, late=None, reason=f"{plan.reason}; no late stop: several are taken at one point")


def _as_background(plan: CreatePlan) -> CreatePlan:
    """Return the plan of a guest that is paused already with the steps of those that run, if its stream fits."""
    if plan.state is DomainState.PAUSED and plan.stream and plan.stream.strategy is Strategy.BACKGROUND:
        return attrs.evolve(plan, strategy=Strategy.BACKGROUND, reason="the guest is paused already")
    return plan
