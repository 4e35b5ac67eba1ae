"""Create: the story of a live checkpoint, from the request to the record. Read downwards.

    plan_create     (create_plan) decides everything, or refuses; no I/O
    at_one_point    (create_plan) the same for several domains that are to be taken together
    check_create    looks whether it can be done here: files, directories, space
    Participant     performs the steps of `snaporch.engine.steps.CREATE` on one domain, and their compensations
    create          puts them together

In a background checkpoint the memory lane opens its stream while each disk's lane makes its overlay. They meet
at the point: the guest is paused, all disks switch in one transaction, the hypervisor write-protects RAM, and the
guest runs on, after milliseconds. Memory then streams while the disks' frozen images are sealed.

Several domains are several participants: they finish each phase together, so that there is an instant at which all
guests are paused, and either all snapshots are taken or none is.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, ClassVar, TypeVar

import attrs
import trio

from snaporch.catalog.store import Change, merged
from snaporch.drivers.base import (
    Driver,
    Guard,
    GuestAgent,
    ImagePoints,
    Inside,
    Machine,
    MemoryStreams,
    Overlay,
    Overlays,
    PauseNote,
    PivotNote,
    PointsInside,
    Storage,
    Stream,
    has,
    need,
)
from snaporch.engine.actor import Actor
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.states import State
from snaporch.engine.steps import CREATE, QUIESCED, ROLLBACK_CREATE, Lane, all_steps, create_phases
from snaporch.engine.verdict import STAY, Verdict, guard_acted
from snaporch.errors import (
    ConnectionGone,
    DeadlineExceeded,
    HypervisorError,
    NotEnoughSpace,
    OperationFailed,
    OutcomeUnknown,
    TargetExists,
)
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainState
from snaporch.model.formats import versioned
from snaporch.model.names import in_order, new_id
from snaporch.model.record import FileRecord, Group, OperationKind, SnapshotRecord, Timings
from snaporch.model.request import CreateOptions, OnTimeout, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DomainSnapshot
from snaporch.operations.bandwidth import SharedBandwidth
from snaporch.operations.create_plan import CreatePlan, Scene, at_one_point, plan_create
from snaporch.operations.disks import check_taken, release_marks
from snaporch.operations.estimate import LOOK_BACK
from snaporch.operations.internal import forget
from snaporch.operations.places import check_directory

T = TypeVar("T")

# What an overlay may need while the stream runs; it grows with what the guest writes, for as long as it is used.
OVERLAY_BYTES = 16 * 2**20
# Stream headers and device state beside RAM itself.
STREAM_BYTES = 16 * 2**20
# While guests are paused, streams that have begun already would take the CPUs by which the others are armed.
HOLD_SECONDS = 0.25
DYING_SECONDS = 5.0  # from a lost connection to the end of a process with much memory


# --- looking ------------------------------------------------------------------------------------------------


async def check_create(participants: Sequence[Participant]) -> None:
    """Refuse what can be seen to fail, before anything is touched.

    Raises:
        TargetExists: a file is there already, or a snapshot of that name, in the catalog or inside an image.
        Refused: a directory cannot be written to, or somebody else writes to an image of an inactive domain.
        NotEnoughSpace: what may be needed by all together is more than what is free.
    """
    needed: Counter[str] = Counter()
    places: dict[str, tuple[int, str]] = {}
    for each in participants:
        await _check_name(each)
        for base in each.plan.bases if each.machine is None else ():  # else its images are its hypervisor's
            await each.storage.chain(base.active, base.format, still=True)
        for path in each.plan.files:
            await each.storage.check_place(str(each.context.root), each.name, path, "a file of the snapshot")
            await check_directory(each.context, each.storage, each.name, path, "a file of the snapshot")
            if await each.storage.exists(path):
                raise TargetExists(f"{path} exists already: nothing is overwritten; choose another file", path)
        for path, size in each.needs().items():
            directory = os.path.dirname(path)
            await each.storage.check_writable(directory)
            place, free = await each.storage.free(directory)
            needed[place] += size
            places.setdefault(place, (free, directory))
    for place, (free, directory) in places.items():
        if needed[place] > free:
            raise NotEnoughSpace(needed[place], free, directory)


async def _check_name(participant: Participant) -> None:
    name = participant.plan.snapshot.name
    if await participant.context.catalog.has_snapshot(participant.name, name):
        raise TargetExists(f"{participant.name} has a snapshot {name!r} already; choose another name")
    for point in participant.plan.inside:
        if point.tag in await need(participant.storage, ImagePoints, participant.name).inside(point.base.active):
            raise TargetExists(f"{point.base.active} has a snapshot {point.tag!r} inside; choose another name")


# --- doing --------------------------------------------------------------------------------------------------


@versioned("create-note")
@attrs.frozen
class Held:
    """What an operation has found out about its point: noted in the journal, for recovery after a crash.

    Attributes:
        point: when the guest was paused, by the host's clock.
        pause: the hypervisor's own time stamps of the beginning and the end of the pause.
        between: snaporch's own time between the commands of the pause, in seconds.
        memory: the memory file, once it is sealed.
        images: by target, the frozen chain, once it is sealed.
        inside: by target, the point inside the image, once it is sealed.
    """

    point: float = 0.0
    pause: tuple[float, float] | None = None
    between: float | None = None
    memory: FileRecord | None = None
    images: dict[str, tuple[FileRecord, ...]] = attrs.field(factory=dict)
    inside: dict[str, FileRecord] = attrs.field(factory=dict)


@attrs.define
class Participant(Actor):
    """One domain in a create: performs the steps that the tables name.

    Attributes:
        plan: what is done.
        operation: of which this is a part.
        context: the orchestrator's.
        driver: the domain's.
        machine: the domain's; None when inactive.
        known: sealed images by path, which need not be read again.
        bandwidth: of which the memory stream has a part, or None.
        held: what it knows of the point.
        made: the files that this operation has made.
        result: the record, once it is complete.
    """

    performs: ClassVar = all_steps([*CREATE.values(), *QUIESCED.values()], ROLLBACK_CREATE)

    plan: CreatePlan
    operation: Operation
    context: Context
    driver: Driver
    machine: Machine | None
    known: Mapping[str, FileRecord] = attrs.field(factory=dict)
    bandwidth: SharedBandwidth | None = None
    held: Held = attrs.field(factory=Held)
    made: set[str] = attrs.field(factory=set)
    result: SnapshotRecord | None = None
    _stream: Stream | None = None
    _guard: Guard | None = None
    _commands: float = 0.0
    _pause_began: float | None = None
    _unmerged: bool = False

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.plan.domain.name

    def keys(self, lane: Lane) -> Sequence[str]:
        """See Actor."""
        if lane is Lane.DISK:
            return [overlay.target for overlay in self.plan.overlays]
        if lane is Lane.INSIDE:
            return [point.target for point in self.plan.inside]
        return [""] if lane is Lane.DOMAIN or self.plan.stream else []

    @property
    def storage(self) -> Storage:
        """Where the domain's files are."""
        return self.driver.storage

    def needs(self) -> dict[str, int]:
        """Return the bytes that each file which is to be made, or to be kept inside of, may need."""
        needs = {overlay.path: OVERLAY_BYTES for overlay in self.plan.overlays}
        if self.machine is not None and self.plan.memory_place:
            needs[self.plan.memory_place] = self.machine.capabilities.ram + STREAM_BYTES
        return needs

    async def get_ready(self) -> None:
        """Know what need not be read again, and begin a new account of pauses.

        What the guest has written to since is read in any case: a file's times are no proof that nobody has, when
        the host has lost its power meanwhile.
        """
        chains = (path for base in self.plan.bases for path in base.chain[1:])
        self.known = await self.context.catalog.sealed(chains)
        if self.machine is not None:
            self.machine.forget_pauses()

    @property
    def _hypervisor(self) -> Machine:
        if self.machine is None:
            raise ConnectionGone(f"{self.name} is inactive")
        return self.machine

    def _able(self, trait: type[T]) -> T:
        return need(self._hypervisor, trait, self.name)

    @property
    def _points(self) -> ImagePoints:
        return need(self.storage, ImagePoints, self.name)

    @property
    def stream(self) -> Stream:
        """The memory stream; made on first use."""
        if self._stream is None:
            if self.plan.stream is None:
                raise AssertionError("a plan without memory has no memory lane")
            self._stream = self._able(MemoryStreams).stream(self.plan.stream)
        return self._stream

    def _note(self, **found: Any) -> None:
        """Note what was found out; the journal's next row has it."""
        self.held = attrs.evolve(self.held, **found)
        self.operation.notes[self.name] = dumps(self.held)

    def _overlay(self, target: str) -> Overlay:
        return next(overlay for overlay in self.plan.overlays if overlay.target == target)

    def _inside(self, target: str) -> Inside:
        return next(point for point in self.plan.inside if point.target == target)

    # The guard: posted beside the running guest, dismissed when it runs again.

    async def post_guard(self) -> None:
        """Start a guard, which lets the guest run again if snaporch dies while the guest is paused."""
        if self.plan.state is DomainState.RUNNING:
            background = self.plan.strategy is Strategy.BACKGROUND
            self._guard = self._hypervisor.guard(PauseNote(background, thaw=self.plan.quiesce))
            await self._guard.post()

    async def dismiss_guard(self) -> None:
        """Let the guest run, or leave it paused as it was; also a compensation."""
        if self._guard is not None:
            await self._guard.dismiss()

    # QUIESCE.

    async def freeze(self) -> None:
        """Have the guest's file systems frozen."""
        self.held = attrs.evolve(self.held, point=time.time())
        await self._able(GuestAgent).freeze()

    async def thaw(self) -> None:
        """Have them thawed, if the guest is there; also undoes `freeze`."""
        if self.machine is None:
            return
        try:
            await self._able(GuestAgent).thaw()
        except (ConnectionGone, OutcomeUnknown):
            undoing = self.operation.machine.state is State.ROLLING_BACK
            if not undoing or not await self._is_gone():  # noqa: ASYNC120 - it re-raises where it matters
                raise

    # The disk lanes, beside the running guest.

    async def make_overlay(self, target: str) -> None:
        """Make the disk's overlay, empty."""
        overlay = self._overlay(target)
        base = DeviceDisk(target, overlay.base.active, overlay.base.format)
        await self.storage.make_directory(os.path.dirname(overlay.path))
        await self.storage.make_overlay(overlay.path, base, overlay.base.virtual_size, overlay.owner)
        self.made.add(overlay.path)

    async def open_overlay(self, target: str) -> None:
        """Let the hypervisor open it."""
        await self._able(Overlays).open_overlay(self._overlay(target))

    # The memory lane, beside the running guest.

    async def make_memory_file(self) -> None:
        """Make the memory file, empty."""
        if self.plan.stream is not None:
            await self.storage.make_directory(os.path.dirname(self.plan.stream.path))
            await self.storage.make_file(self.plan.stream.path)
            self.made.add(self.plan.stream.path)

    async def open_stream(self) -> None:
        """Have everything ready for the memory."""
        await self.stream.open()

    # The point: they meet.

    async def sync_images(self) -> None:
        """Have what the guest has written go to disk while it runs: in the pause all its images are flushed."""
        shape = self.plan.shape
        if self.plan.state is DomainState.RUNNING and shape is not None:
            await self.storage.write_back([disk.active for disk in shape.disks if not disk.readonly])

    async def pause(self) -> None:
        """Stop the guest, if it runs."""
        if self.plan.state is DomainState.RUNNING:
            await self._hypervisor.pause()
            self._pause_began = trio.current_time()
        self.held = attrs.evolve(self.held, point=time.time())

    async def switch(self) -> None:
        """Put all disks on their overlays, in one transaction."""
        began = trio.current_time()
        if self.plan.order is Strategy.PRECOPY:  # the hypervisor has stopped the guest by itself
            self._pause_began, self._commands = began, 0.0
            self.held = attrs.evolve(self.held, point=time.time())
        if self.plan.overlays:
            await self._able(Overlays).switch(self.plan.overlays)
        self._commands += trio.current_time() - began
        if self.plan.memory_place:  # the guest is paused for its memory
            self._check_stood(changes=1 if self.plan.state is DomainState.RUNNING else 0)

    async def start_stream(self) -> None:
        """Let the hypervisor begin."""
        began = trio.current_time()
        await self.stream.hold(HOLD_SECONDS)
        await self.stream.start()
        self._commands += trio.current_time() - began

    async def await_armed(self) -> None:
        """Wait until the point is held."""
        began = trio.current_time()
        await self.stream.armed()
        self._commands += trio.current_time() - began

    async def resume(self) -> None:
        """Let the guest run, if it ran before; also undoes `pause`.

        Raises:
            HypervisorError: somebody else let it run meanwhile: its disks and its memory are not of one point.
        """
        if self.machine is None:
            return
        undoing = self.operation.machine.state is State.ROLLING_BACK
        if self.plan.state is not DomainState.RUNNING:
            self._note()
            if not undoing:
                self._check_stood(changes=0)
            return
        now = trio.current_time()
        try:
            await self._hypervisor.resume()
        except (ConnectionGone, OutcomeUnknown):
            if not undoing or not await self._is_gone():  # noqa: ASYNC120 - it re-raises where it matters
                raise
            return
        between = None
        if self._pause_began is not None and self.plan.order is not Strategy.PAUSED:
            between = now - self._pause_began - self._commands
        self._note(pause=self.machine.pause_times(), between=between)
        if not undoing:
            self._check_stood(changes=2)

    def _check_stood(self, *, changes: int) -> None:
        """Raise where the guest has run meanwhile: its disks and its memory would be of different instants."""
        if self._guard is not None and self._guard.has_acted():
            raise HypervisorError(guard_acted(self.name))
        if self._hypervisor.run_changes() > changes:
            raise HypervisorError(
                f"{self.name}: another program let the guest run while it was paused for the snapshot"
            )

    # Afterwards: memory streams, the frozen images are sealed.

    async def finish_stream(self) -> None:
        """Wait until all memory has left the hypervisor; a limit on time is kept here."""
        if self.held.memory is not None:
            return  # known since before a crash of snaporch
        await self.stream.hold(0)
        limit = self.plan.options.max_seconds
        with trio.move_on_after(limit if limit is not None else float("inf")) as scope:
            await self._streamed()
        if not scope.cancelled_caught:
            return
        stops_itself = self.plan.stops_itself
        live = self.plan.strategy is not Strategy.PAUSED
        if self.plan.options.on_timeout is OnTimeout.FAIL or (stops_itself and live):
            raise DeadlineExceeded(
                f"create {self.plan.snapshot.name} of {self.name}: memory was not saved within {limit:g} s; "
                "rolled back; allow more, let it pause the guest, or use the background strategy"
            )
        if not stops_itself:
            await self._hypervisor.pause()
        await self._streamed()

    async def _streamed(self) -> None:
        stream = partial(self.stream.finished, self._progress)
        if self.bandwidth is None:
            await stream()
        else:
            await self.bandwidth.during(stream, self.stream.limit)

    def _progress(self, done: int, total: int) -> None:
        self.context.events.publish(self.operation.progress(self.name, done, total))

    async def seal_memory(self) -> None:
        """Wait until the memory file is durable; the stream's checksum was computed on the way.

        The checksum is in the journal before the stream forgets it: nobody could compute it again from a file that
        nobody knows to be complete.
        """
        if self.held.memory is None:
            self._note(memory=await self.stream.seal())
            await self.context.catalog.write(Change(operation=self.operation.record()))
        await self.stream.forget()

    async def seal_image(self, target: str) -> None:
        """Make the disk's frozen chain durable and take its checksums."""
        await self._seal(target, self._overlay(target).base.chain)

    async def _seal(self, target: str, chain: Sequence[str]) -> None:
        for path in chain:  # before sealing: a mark changes the file's ctime
            await self.storage.mark(path, str(self.context.root))
        sealed = tuple([await self.storage.seal(path, self.known.get(path)) for path in chain])
        self._note(images=self.held.images | {target: sealed})

    # Points inside images.

    async def save_inside(self) -> None:
        """Let the hypervisor save memory and disks inside their images; it pauses the guest itself."""
        self.held = attrs.evolve(self.held, point=time.time())
        points = self.plan.inside
        await self._able(PointsInside).save_inside(points[0].tag, [point.target for point in points])
        self._note(pause=self._hypervisor.pause_times())

    async def keep_inside(self, target: str) -> None:
        """Keep an inactive disk inside its image."""
        point = self._inside(target)
        await self._points.save_inside(point.base.active, point.tag)

    async def seal_inside(self, target: str) -> None:
        """Take the checksum of the point, and seal what is below the image."""
        point = self._inside(target)
        await self._seal(target, point.base.chain[1:])
        sealed = await self._points.seal_inside(point.base.active, point.tag)
        self._note(inside=self.held.inside | {target: sealed})

    async def forget_inside(self, target: str) -> None:
        """Delete the point, if it is there: no other snapshot inside the image had its name."""
        point = self._inside(target)
        image = DeviceDisk(target, point.base.active, point.base.format)
        await forget(self.driver, self.machine, self.plan.domain.handle, image, point.tag)

    # Compensations: each looks at what is there.

    async def is_whole(self) -> bool:
        """Return whether all files of this create still exist; if not, a rollback had begun before the crash."""
        there = [await self.storage.exists(path) for path in self.plan.files]
        there += [point.tag in await self._points.inside(point.base.active) for point in self.plan.inside]
        return all(there)

    async def abort_stream(self) -> None:
        """End the stream, whatever it is doing."""
        if self.machine is not None:
            await self.stream.abort()
        elif self.plan.stream is not None:
            await self.driver.abandon(self.plan.stream)

    async def switch_back(self) -> None:
        """Put the disks back on the images that they were on, with everything that the guest has written since.

        From here on the snapshot's images may be written to; the missing memory file says so (see `is_whole`). An
        overlay is removed when both images have the same contents and before the disk moves to its base. Invariant:
        an overlay that exists has the newest data; if it is gone, its base is complete. A crash cannot break this.
        """
        self._unmerged = True
        await self.remove_memory_file()
        await self._obey_guards()
        try:
            await self._merge_back()
        except (ConnectionGone, OutcomeUnknown):
            if not await self._is_gone():  # noqa: ASYNC120 - it re-raises where it matters
                raise
            # The guest is gone; what it wrote last is in the overlays: merge them offline.
            for overlay in self.plan.overlays:
                if overlay.path in self.made and await self.storage.exists(overlay.path):
                    await self.storage.commit_overlay(overlay.path)
        self._unmerged = False

    async def _merge_back(self) -> None:
        machine = self._able(Overlays)
        noted = {
            overlay.target: overlay.path if await self.storage.exists(overlay.path) else overlay.base.active
            for overlay in self.plan.overlays
        }
        await machine.settle_merges(noted)
        switched = {disk.active for disk in await self._hypervisor.disks()}
        for overlay in self.plan.overlays:
            if overlay.path in switched:
                verdict = self._verdict(overlay)
                await machine.merge_back(overlay, PivotNote(partial(self._removed, overlay), verdict.path))
                await verdict.forget()

    def _verdict(self, overlay: Overlay) -> Verdict:
        return self.context.verdict(f"{self.name}.{overlay.target}")

    async def _obey_guards(self) -> None:
        """Remove overlays whose removal a crash has interrupted: no disk is on them any more."""
        for overlay in self.plan.overlays:
            verdict = self._verdict(overlay)
            if verdict.read() not in {"", STAY}:
                await self._removed(overlay)
            await verdict.forget()

    async def _removed(self, overlay: Overlay) -> None:
        path = overlay.path
        await self._verdict(overlay).insist(f"{overlay.base.format}:{overlay.base.active}", self.name)
        try:
            await self.storage.remove(path)
        except OSError:  # one that is gone must not be gone on with, whatever else went wrong
            if await self.storage.exists(path):  # noqa: ASYNC120 - it re-raises where it matters
                await self._verdict(overlay).forget()  # noqa: ASYNC120 - as above
                raise

    async def close_overlay(self, target: str) -> None:
        """Let the hypervisor close the overlay."""
        try:
            await self._able(Overlays).close_overlay(self._overlay(target))
        except (ConnectionGone, OutcomeUnknown):
            if not await self._is_gone():  # noqa: ASYNC120 - it re-raises where it matters
                raise

    async def _is_gone(self) -> bool:
        """Return whether the hypervisor is gone, rather than silent; a dying process gets a moment for it."""
        handle = self.plan.domain.handle
        if handle is None or self.machine is None:
            return True
        with trio.move_on_after(DYING_SECONDS):
            await self.driver.wait_gone(handle)
        return not await self.driver.alive(handle)

    async def remove_overlay(self, target: str) -> None:
        """Remove the overlay, if we made it and what the guest has written to it is elsewhere."""
        path = self._overlay(target).path
        if self._unmerged:
            raise OperationFailed(f"{path} holds what the guest has written and is kept")
        await self._remove(path)
        await release_marks(self.context, self.storage, self._overlay(target).base.chain)

    async def remove_memory_file(self) -> None:
        """Remove the memory file, if we made it."""
        if self.plan.stream is not None:
            await self._remove(self.plan.stream.path)

    async def _remove(self, path: str) -> None:
        if path in self.made:
            await self.storage.remove(path)

    # The record.

    async def commit(self) -> Change:
        """Return what the catalog is to know: the snapshot, and the domain on its overlays."""
        record, domain = self._record(), self.plan.domain
        self.result = record
        overlays = {disk.disk.target: disk.external_sn for disk in record.snapshot.disks if disk.external_sn}
        return Change(
            snapshots=(record,),
            domains=(
                attrs.evolve(
                    domain,
                    active=domain.active | overlays,
                    current=record.name,
                    way_back=record.way_back or domain.way_back,
                ),
            ),
            files={self.name: tuple(sorted(self.made))},
        )

    def _record(self) -> SnapshotRecord:
        plan, held = self.plan, self.held
        return SnapshotRecord(
            domain=self.name,
            snapshot=plan.snapshot,
            parent=plan.domain.current,
            domain_state=plan.state,
            strategy=plan.strategy,
            reason=plan.reason,
            point=held.pause[0] if held.pause else held.point or plan.snapshot.creation_time,
            memory=held.memory,
            images={disk.disk.target: held.images[disk.disk.target] for disk in plan.snapshot.disks},
            inside={point.target: held.inside[point.target] for point in plan.inside},
            definition=plan.domain.definition,
            template=plan.domain.template,
            hypervisor=plan.hypervisor,
            shape=plan.shape,
            way_back=plan.way_back,
            quiesced=plan.quiesce or plan.domain.frozen,
            expected=plan.expected,
            timings=Timings(
                pause=held.pause[1] - held.pause[0] if held.pause else None,
                total=trio.current_time() - self.operation.clock,
                between=held.between,
                phases=dict(self.operation.phases),
            ),
            group=Group(self.operation.id, members) if len(members := self.operation.domains) > 1 else None,
            id=new_id(),
        )


async def create(
    context: Context,
    domains: Sequence[str],
    snapshot: DomainSnapshot,
    flags: CreateFlag,
    options: CreateOptions,
    *,
    bandwidth: SharedBandwidth | None = None,
) -> tuple[SnapshotRecord, ...]:
    """Create a snapshot of each of these domains, all at one point; see `snaporch.Orchestrator.create_group`."""
    if bandwidth is None and options.bandwidth and len(domains) > 1:
        bandwidth = SharedBandwidth(options.bandwidth)
    if bandwidth is not None:
        options = attrs.evolve(options, bandwidth=bandwidth.next_share)
    operation = Operation(OperationKind.CREATE, in_order(domains), snapshot.name or "snapshot")
    async with context.locked(operation, wait=options.wait), AsyncExitStack() as stack:
        scenes = [await _scene(context, name, operation, stack) for name in operation.domains]
        plans = at_one_point([plan_create(scene, snapshot, flags, options) for scene, _ in scenes])
        operation.subject = plans[0].snapshot.name
        participants = [
            Participant(plan, operation, context, context.driver(plan.domain), machine, bandwidth=bandwidth)
            for plan, (_, machine) in zip(plans, scenes, strict=True)
        ]
        for each in participants:
            await check_taken(context, operation, each.plan.domain, each.machine, each.plan.bases)
        await check_create(participants)
        for each in participants:
            if each.plan.quiesce and each.machine is not None:
                await need(each.machine, GuestAgent, each.name).check_agent()
        for each in participants:
            await each.get_ready()
        await context.engine.run(
            operation,
            create_phases(plans[0].order, quiesce=plans[0].quiesce),
            ROLLBACK_CREATE,
            participants,
            plan=dumps(plans),
            commit=partial(commit, participants),
        )
    made = {each.name: each.result for each in participants}
    return tuple(record for name in domains if (record := made[name]) is not None)


async def _scene(
    context: Context, name: str, operation: Operation, stack: AsyncExitStack
) -> tuple[Scene, Machine | None]:
    """Look at a domain; its machine stays connected for as long as `stack` is open."""
    record, machine = await stack.enter_async_context(context.machine_of(name))
    shape = await machine.shape() if machine else None
    disks = shape.disks if shape else await context.disks_of(record, None)
    driver, directory = context.driver(record), context.directory(name)
    images = [DeviceDisk(disk.target, disk.active, disk.format) for disk in disks]
    scene = Scene(
        domain=record,
        state=await machine.state() if machine else DomainState.INACTIVE,
        disks=disks,
        capabilities=machine.capabilities if machine else None,
        settings=await _settings(machine, name),
        directory=directory,
        operation=operation.id,
        now=operation.begun,
        earlier=await context.catalog.checkpoints(name, LOOK_BACK),
        shape=shape,
        traits=driver.traits,
        places={image.target: await driver.overlay_place(record, image, directory) for image in images},
        way_back=await driver.way_back(record, machine) if machine else None,
        renamed=await context.catalog.is_own(f"{directory}/{operation.subject}.mem"),
    )
    return scene, machine


async def _settings(machine: Machine | None, name: str) -> dict[str, Any]:
    if machine is None or not has(machine, MemoryStreams):
        return {}
    return await need(machine, MemoryStreams, name).settings()


async def commit(participants: Sequence[Participant]) -> Change:
    """Return what the catalog is to know of all of them, in one transaction."""
    return merged([await each.commit() for each in participants])
