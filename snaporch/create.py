"""Create: the story of a live checkpoint, from the request to the record. Read downwards.

    plan_create     decides everything, or refuses; no I/O
    check_create    looks whether it can be done here: files, directories, space
    Participant     performs the steps of `snaporch.steps.CREATE` on one domain, and their compensations
    create          puts them together

In a background checkpoint the memory lane opens its stream while each disk's lane makes its overlay. They meet
at the point: the guest is paused, all disks switch in one transaction, the hypervisor write-protects RAM, and the
guest runs on, after milliseconds. Memory then streams while the disks' frozen images are sealed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence

import attrs
import trio

from snaporch.catalog.store import Change
from snaporch.context import Context
from snaporch.convert import dumps
from snaporch.drivers.base import Capabilities, Machine, Overlay, Storage, Stream, StreamPlan
from snaporch.engine import Operation
from snaporch.errors import (
    ConnectionGone,
    DeadlineExceeded,
    InvalidInput,
    NotEnoughSpace,
    TargetExists,
    Unsupported,
)
from snaporch.models import (
    CreateFlag,
    CreateOptions,
    DeviceDisk,
    DiskSnapshot,
    DiskStatus,
    DomainRecord,
    DomainSnapshot,
    DomainState,
    FileRecord,
    OnTimeout,
    SnapshotRecord,
    Strategy,
    Timings,
    check_name,
)
from snaporch.states import State
from snaporch.steps import CREATE, ROLLBACK_CREATE, Lane

# What an overlay may need while the stream runs; it grows with what the guest writes, for as long as it is used.
OVERLAY_BYTES = 16 * 2**20
# Stream headers and device state beside RAM itself.
STREAM_BYTES = 16 * 2**20


@attrs.frozen
class CreatePlan:
    """Everything that a create will do, decided before it is begun: what the journal holds.

    Attributes:
        domain: the domain's record as it was.
        snapshot: with every field filled in.
        state: what the domain did.
        strategy: chosen for the memory.
        reason: why.
        overlays: one for each disk that is taken.
        stream: how memory is streamed, when it is.
        options: the caller's.
    """

    domain: DomainRecord
    snapshot: DomainSnapshot
    state: DomainState
    strategy: Strategy
    reason: str
    overlays: tuple[Overlay, ...]
    stream: StreamPlan | None
    options: CreateOptions


@attrs.frozen
class Scene:
    """What a plan is made from.

    Attributes:
        domain: the domain's record.
        state: what it does.
        disks: its disks as they are.
        capabilities: the machine's; None when inactive.
        directory: where files go that have no path in the request.
        operation: the operation's id.
        now: seconds since the epoch.
    """

    domain: DomainRecord
    state: DomainState
    disks: tuple[DiskStatus, ...]
    capabilities: Capabilities | None
    directory: str
    operation: str
    now: float


# --- deciding -----------------------------------------------------------------------------------------------


def plan_create(scene: Scene, snapshot: DomainSnapshot, flags: CreateFlag, options: CreateOptions) -> CreatePlan:
    """Decide how a create is done; the table of the specification's section 3.

    Raises:
        InvalidInput: the request makes no sense.
        Unsupported: this domain, as it is, cannot do it.
    """
    if options.strategy in {Strategy.BACKGROUND, Strategy.PRECOPY}:
        flags |= CreateFlag.LIVE  # to say how the guest's memory is taken while it runs is to say that it runs
    memory = snapshot.memory and CreateFlag.DISK_ONLY not in flags
    _check_kind(scene, snapshot, flags, memory=memory)
    name = check_name(snapshot.name or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(scene.now)))
    taken = _taken_disks(scene, snapshot, options.exclude, name)
    strategy, reason = _choose_strategy(scene, flags, options) if memory else (Strategy.NONE, "disks only")
    memory_file = os.path.abspath(snapshot.memory_file or f"{scene.directory}/{name}.mem") if memory else ""
    complete = attrs.evolve(
        snapshot,
        name=name,
        creation_time=int(scene.now),
        memory=memory,
        memory_file=memory_file,
        disks=tuple(disk for disk, _ in taken),
    )
    return CreatePlan(
        domain=scene.domain,
        snapshot=complete,
        state=scene.state,
        strategy=strategy,
        reason=reason,
        overlays=tuple(overlay for _, overlay in taken),
        stream=StreamPlan(memory_file, _stream_strategy(scene, strategy), options.bandwidth) if memory else None,
        options=options,
    )


def _check_kind(scene: Scene, snapshot: DomainSnapshot, flags: CreateFlag, *, memory: bool) -> None:
    internal = [disk.disk.target for disk in snapshot.disks if not disk.external]
    if CreateFlag.LIVE in flags and (internal or not memory):
        raise InvalidInput("LIVE is for external checkpoints: not with internal disks, and not without memory")
    if scene.state is DomainState.INACTIVE:
        if memory:
            raise InvalidInput(
                f"{scene.domain.name} is inactive: there is no memory to save; start it, or ask for disks only"
            )
    elif not memory:
        raise Unsupported(
            f"{scene.domain.name} is {scene.state}: disks alone would not be one point with its memory; "
            "take a checkpoint, or shut it down first"
        )
    if internal and len(internal) < len(snapshot.disks):
        raise InvalidInput("all disks internal, or all external: mixed, one point cannot be kept")
    if internal:
        raise Unsupported(f"internal snapshots ({', '.join(internal)}) are not supported yet; leave out --internal")
    if CreateFlag.QUIESCE in flags:
        raise Unsupported("QUIESCE is not supported yet; a checkpoint with memory needs none")


def _taken_disks(
    scene: Scene, snapshot: DomainSnapshot, exclude: Collection[str], name: str
) -> tuple[tuple[DiskSnapshot, Overlay], ...]:
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
    paths = [overlay.path for _, overlay in result]
    if len(set(paths)) < len(paths):
        raise InvalidInput("two disks cannot have the same overlay")
    return result


def _one_disk(
    scene: Scene, status: DiskStatus, asked: DiskSnapshot | None, name: str
) -> tuple[DiskSnapshot, Overlay]:
    path = asked.external_sn.path if asked is not None and asked.external_sn is not None else ""
    path = os.path.abspath(path or f"{scene.directory}/{status.target}.{scene.operation}.qcow2")
    overlay = Overlay(base=status, path=path, node=f"sp-{scene.operation}-{status.target}")
    frozen = DeviceDisk(status.target, status.active, status.format)
    return DiskSnapshot(frozen, name, external=True, external_sn=DeviceDisk(status.target, path)), overlay


def _choose_strategy(scene: Scene, flags: CreateFlag, options: CreateOptions) -> tuple[Strategy, str]:
    capabilities = scene.capabilities
    if capabilities is None:
        raise AssertionError("an active domain has a machine")
    if scene.state is DomainState.PAUSED:
        return Strategy.PAUSED, "the guest is paused already"
    if CreateFlag.LIVE not in flags:
        return Strategy.PAUSED, "asked for without LIVE"
    if options.strategy is Strategy.PRECOPY:
        return Strategy.PRECOPY, "asked for"
    if capabilities.background:
        return Strategy.BACKGROUND, "asked for" if options.strategy is Strategy.BACKGROUND else "possible here"
    why = f"background is not possible: {capabilities.background_blocker}"
    if options.strategy is Strategy.BACKGROUND:
        raise Unsupported(f"{scene.domain.name}: {why}; ask for auto or precopy")
    return Strategy.PRECOPY, why


def _stream_strategy(scene: Scene, strategy: Strategy) -> Strategy:
    """Return how the hypervisor streams: a paused guest by write-protection where that leaves it truly paused."""
    capabilities = scene.capabilities
    if scene.state is DomainState.PAUSED and capabilities and capabilities.background and capabilities.keeps_paused:
        return Strategy.BACKGROUND
    return strategy


# --- looking ------------------------------------------------------------------------------------------------


async def check_create(storage: Storage, plan: CreatePlan, capabilities: Capabilities | None) -> None:
    """Refuse what can be seen to fail, before anything is touched.

    Raises:
        TargetExists: a file is there already.
        Refused: a directory cannot be written to.
        NotEnoughSpace: what may be needed is more than what is free.
    """
    needs = {overlay.path: OVERLAY_BYTES for overlay in plan.overlays}
    if plan.stream is not None and capabilities is not None:
        needs[plan.stream.path] = capabilities.ram + STREAM_BYTES
    by_place: dict[str, tuple[int, int, str]] = {}
    for path, needed in needs.items():
        if await storage.exists(path):
            raise TargetExists(f"{path} exists already: nothing is overwritten; choose another file", path)
        directory = os.path.dirname(path)
        await storage.check_writable(directory)
        place, free = await storage.free(directory)
        before = by_place.get(place, (0, free, directory))[0]
        by_place[place] = before + needed, free, directory
    for needed, free, directory in by_place.values():
        if needed > free:
            raise NotEnoughSpace(needed, free, directory)


# --- doing --------------------------------------------------------------------------------------------------


@attrs.define
class Participant:
    """One domain in a create: performs the steps that the tables name.

    Attributes:
        plan: what is done.
        operation: of which this is a part.
        context: the orchestrator's.
        storage: the driver's.
        machine: the domain's; None when inactive.
        known: sealed images by path, which need not be read again.
    """

    plan: CreatePlan
    operation: Operation
    context: Context
    storage: Storage
    machine: Machine | None
    known: dict[str, FileRecord]
    point: float = 0.0
    result: SnapshotRecord | None = None
    _stream: Stream | None = None
    _made: set[str] = attrs.field(factory=set)
    _memory: FileRecord | None = None
    _images: dict[str, tuple[FileRecord, ...]] = attrs.field(factory=dict)
    _commands: float = 0.0
    _pause_began: float | None = None
    _between: float | None = None

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.plan.domain.name

    def keys(self, lane: Lane) -> Sequence[str]:
        """See `snaporch.engine.Actor`."""
        if lane is Lane.DISK:
            return [overlay.target for overlay in self.plan.overlays]
        return [""] if lane is Lane.DOMAIN or self.plan.stream else []

    @property
    def _hypervisor(self) -> Machine:
        if self.machine is None:
            raise ConnectionGone(f"{self.name} is inactive")
        return self.machine

    @property
    def stream(self) -> Stream:
        """The memory stream; made on first use."""
        if self._stream is None:
            if self.plan.stream is None:
                raise AssertionError("a plan without memory has no memory lane")
            self._stream = self._hypervisor.stream(self.plan.stream)
        return self._stream

    def _overlay(self, target: str) -> Overlay:
        return next(overlay for overlay in self.plan.overlays if overlay.target == target)

    # The disk lanes, beside the running guest.

    async def make_overlay(self, target: str) -> None:
        """Make the disk's overlay, empty."""
        overlay = self._overlay(target)
        base = DeviceDisk(target, overlay.base.active, overlay.base.format)
        await self.storage.make_directory(os.path.dirname(overlay.path))
        await self.storage.make_overlay(overlay.path, base, overlay.base.virtual_size)
        self._made.add(overlay.path)

    async def add_node(self, target: str) -> None:
        """Let the hypervisor open it."""
        await self._hypervisor.add_node(self._overlay(target))

    # The memory lane, beside the running guest.

    async def make_memory_file(self) -> None:
        """Make the memory file, empty."""
        if self.plan.stream is not None:
            await self.storage.make_directory(os.path.dirname(self.plan.stream.path))
            await self.storage.make_file(self.plan.stream.path)
            self._made.add(self.plan.stream.path)

    async def open_stream(self) -> None:
        """Have everything ready for the memory."""
        await self.stream.open()

    # The point: they meet.

    async def pause(self) -> None:
        """Stop the guest, if it runs."""
        if self.plan.state is DomainState.RUNNING:
            await self._hypervisor.pause()
            self._pause_began = trio.current_time()
        self.point = time.time()

    async def switch(self) -> None:
        """Put all disks on their overlays, in one transaction."""
        began = trio.current_time()
        if self.plan.strategy is Strategy.PRECOPY:  # the hypervisor has stopped the guest by itself
            self.point, self._pause_began = time.time(), began
        if self.plan.overlays:
            await self._hypervisor.switch(self.plan.overlays)
        self._commands += trio.current_time() - began

    async def start_stream(self) -> None:
        """Let the hypervisor begin."""
        began = trio.current_time()
        await self.stream.start()
        self._commands += trio.current_time() - began

    async def await_armed(self) -> None:
        """Wait until the point is held."""
        began = trio.current_time()
        await self.stream.armed()
        self._commands += trio.current_time() - began

    async def resume(self) -> None:
        """Let the guest run, if it ran before; also undoes `pause`."""
        if self.plan.state is not DomainState.RUNNING or self.machine is None:
            return
        now = trio.current_time()
        try:
            await self._hypervisor.resume()
        except ConnectionGone:
            if self.operation.machine.state is not State.ROLLING_BACK:
                raise
        if self._pause_began is not None:
            self._between = now - self._pause_began - self._commands

    # Afterwards: memory streams, the frozen images are sealed.

    async def finish_stream(self) -> None:
        """Wait until all memory has left the hypervisor; a limit on time is kept here."""
        limit = self.plan.options.max_seconds
        with trio.move_on_after(limit if limit is not None else float("inf")) as scope:
            await self.stream.finished(self._progress)
        if not scope.cancelled_caught:
            return
        if self.plan.options.on_timeout is OnTimeout.FAIL:
            raise DeadlineExceeded(
                f"create {self.plan.snapshot.name} of {self.name}: memory was not saved within {limit:g} s; "
                "rolled back; allow more, let it pause the guest, or use the background strategy"
            )
        await self._hypervisor.pause()
        await self.stream.finished(self._progress)

    def _progress(self, done: int, total: int) -> None:
        self.context.events.publish(self.operation.event("progress", done=done, total=total))

    async def seal_memory(self) -> None:
        """Wait until the memory file is durable; the stream's checksum was computed on the way."""
        self._memory = await self.stream.seal()

    async def seal_image(self, target: str) -> None:
        """Make the disk's frozen chain durable and take its checksums."""
        chain = self._overlay(target).base.chain
        self._images[target] = tuple([await self.storage.seal(path, self.known.get(path)) for path in chain])

    # Compensations: each looks at what is there.

    async def abort_stream(self) -> None:
        """End the stream, whatever it is doing."""
        if self._stream is not None:
            await self._stream.abort()

    async def switch_back(self) -> None:
        """Put the disks back on the images that they were on, with everything that the guest has written since."""
        try:
            await self._hypervisor.switch_back(self.plan.overlays)
        except ConnectionGone:  # the guest is gone, its last words are in the overlays: merge them offline
            for overlay in self.plan.overlays:
                if overlay.path in self._made:
                    await self.storage.commit_overlay(overlay.path)

    async def remove_node(self, target: str) -> None:
        """Let the hypervisor close the overlay."""
        try:
            await self._hypervisor.remove_node(self._overlay(target))
        except ConnectionGone:
            return

    async def remove_overlay(self, target: str) -> None:
        """Remove the overlay, if we made it."""
        await self._remove(self._overlay(target).path)

    async def remove_memory_file(self) -> None:
        """Remove the memory file, if we made it."""
        if self.plan.stream is not None:
            await self._remove(self.plan.stream.path)

    async def _remove(self, path: str) -> None:
        if path in self._made:
            await self.storage.remove(path)

    # The record.

    async def commit(self) -> Change:
        """Return what the catalog is to know: the snapshot, and the domain on its overlays."""
        record, domain = self._record(), self.plan.domain
        self.result = record
        overlays = {disk.disk.target: disk.external_sn for disk in record.snapshot.disks if disk.external_sn}
        return Change(
            snapshot=record,
            domain=attrs.evolve(domain, active=domain.active | overlays, current=record.name),
            files=tuple(sorted(self._made)),
        )

    def _record(self) -> SnapshotRecord:
        plan, pause = self.plan, self.machine.pause_times() if self.machine else None
        capabilities = self.machine.capabilities if self.machine else None
        return SnapshotRecord(
            domain=self.name,
            snapshot=plan.snapshot,
            parent=plan.domain.current,
            domain_state=plan.state,
            strategy=plan.strategy,
            reason=plan.reason,
            point=pause[0] if pause else self.point or time.time(),
            memory=self._memory,
            images=self._images,
            definition=plan.domain.definition,
            template=plan.domain.template,
            hypervisor={"name": capabilities.hypervisor, **capabilities.versions} if capabilities else {},
            timings=Timings(
                pause=pause[1] - pause[0] if pause else None,
                total=time.time() - self.operation.begun,
                between=self._between,
                phases=dict(self.operation.phases),
            ),
        )


async def create(
    context: Context, domain: str, snapshot: DomainSnapshot, flags: CreateFlag, options: CreateOptions
) -> SnapshotRecord:
    """Create a snapshot; see `snaporch.Orchestrator.create`."""
    operation = Operation("create", domain, snapshot.name or "snapshot")
    async with context.locked(operation, wait=options.wait), context.machine_of(domain) as (record, machine):
        driver = context.driver(record)
        scene = Scene(
            domain=record,
            state=await machine.state() if machine else DomainState.INACTIVE,
            disks=await context.disks_of(record, machine),
            capabilities=machine.capabilities if machine else None,
            directory=context.directory(domain),
            operation=operation.id,
            now=time.time(),
        )
        plan = plan_create(scene, snapshot, flags, options)
        operation.subject = plan.snapshot.name
        if plan.snapshot.name in {known.name for known in await context.catalog.snapshots(domain)}:
            raise TargetExists(f"{domain} has a snapshot {plan.snapshot.name!r} already; choose another name")
        await check_create(driver.storage, plan, scene.capabilities)
        if machine is not None:
            machine.forget_pauses()
        known = await context.catalog.sealed()
        participant = Participant(plan, operation, context, driver.storage, machine, known)
        await context.engine.run(
            operation,
            CREATE[plan.strategy],
            ROLLBACK_CREATE,
            [participant],
            plan=dumps(plan),
            commit=participant.commit,
        )
    if participant.result is None:
        raise AssertionError("the engine returns when it has committed")
    return participant.result
