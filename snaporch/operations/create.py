"""Create: the story of a live checkpoint, from the request to the record. Read downwards.

    look            (create_scene) finds out all that is decided by
    plan_create     (create_plan) decides everything, or refuses; no I/O
    at_one_point    (create_plan) the same for several domains that are to be taken together
    check_create    (create_checks) looks whether it can be done here: files, directories, space
    Participant     performs the steps of `snaporch.engine.steps.CREATE` on one domain
    CreateUndo      (create_undo) undoes them
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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import ClassVar

import attrs
import trio

from snaporch.catalog import Change, merged
from snaporch.drivers.base import (
    Guard,
    GuestAgent,
    GuestVerb,
    Overlays,
    PauseNote,
    PointsInside,
    need,
)
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.states import State
from snaporch.engine.steps import CREATE, QUIESCED, ROLLBACK_CREATE, all_steps, create_phases
from snaporch.engine.verdict import guard_acted
from snaporch.errors import DamagedSnapshot, DeadlineExceeded, HypervisorError, OperationFailed
from snaporch.images.kinds import Verb
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainState
from snaporch.model.names import in_order, new_id
from snaporch.model.record import FileRecord, Group, OperationKind, SnapshotRecord, Timings
from snaporch.model.request import CreateOptions, OnTimeout, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DomainSnapshot
from snaporch.operations.bandwidth import SharedBandwidth
from snaporch.operations.checks import check_verb, unlike
from snaporch.operations.create_checks import check_create
from snaporch.operations.create_plan import at_one_point, check_way_back, plan_create
from snaporch.operations.create_scene import look
from snaporch.operations.create_undo import CreateUndo
from snaporch.operations.disks import check_taken
from snaporch.operations.unchanged import check_current, left_on

# While guests are paused, streams that have begun already would take the CPUs by which the others are armed.
HOLD_SECONDS = 0.25
LEAD_SECONDS = 0.005  # that a late stop comes before the foreseen end of the set-up


@attrs.define
class Participant(CreateUndo):
    """One domain in a create: performs the steps that the tables name.

    Attributes:
        known: sealed images by path, which need not be read again.
        bandwidth: of which the memory stream has a part, or None.
        result: the record, once it is complete.
        before: what the guest did at the beginning, in its hypervisor's word.
    """

    performs: ClassVar = all_steps([*CREATE.values(), *QUIESCED.values()], ROLLBACK_CREATE)

    known: Mapping[str, FileRecord] = attrs.field(factory=dict)
    bandwidth: SharedBandwidth | None = None
    result: SnapshotRecord | None = None
    before: str = ""
    _guard: Guard | None = None
    _commands: float = 0.0
    _pause_began: float | None = None
    _started: bool = False  # the stream, before the pause
    _missed: bool = False
    _tpm: tuple[int, ...] = ()

    async def get_ready(self) -> None:
        """Know what need not be read again, and begin a new account of pauses.

        What the guest has written to since is read in any case: a file's times are no proof that nobody has, when
        the host has lost its power meanwhile.
        """
        chains = (path for base in self.plan.bases for path in base.chain[1:])
        self.known = await self.context.catalog.sealed(chains)
        if self.machine is not None:
            self.machine.forget_pauses()
            self.before = await self.machine.condition()

    async def differs(self) -> str:
        """See Actor."""
        handle = self.plan.domain.handle
        return await unlike(self.name, self.driver, handle, self.machine, self.plan.state, self.before)

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
        if self.plan.tpm:
            self._tpm = await self.driver.tpm_identity(self.plan.domain.tpm)

    async def thaw(self) -> None:
        """Have them thawed, if the guest is there; also undoes `freeze`."""
        if self.machine is None:
            return
        await self._ask(self._able(GuestAgent).thaw)

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

    # The TPM of a machine whose memory, in which its state would be, is not saved.

    async def copy_tpm(self) -> None:
        """Copy the state of the TPM.

        Raises:
            OperationFailed: the guest has changed it since its file systems were frozen.
        """
        if not self.plan.tpm:
            return
        self.made.add(self.plan.tpm)
        runs = self.machine is not None
        found = await self.driver.copy_tpm(self.plan.domain.tpm, self.plan.tpm, runs=runs)
        if runs and (found != self._tpm or found != await self.driver.tpm_identity(self.plan.domain.tpm)):
            raise OperationFailed(
                f"{self.name}: the guest wrote to its TPM while its disks were taken: take it again"
            )

    async def seal_tpm(self) -> None:
        """Make the copy durable and take its checksum."""
        if self.plan.tpm:
            self._note(tpm=await self.storage.seal(self.plan.tpm))

    # The memory lane, beside the running guest.

    async def make_memory_file(self) -> None:
        """Make the memory file, empty."""
        if self.plan.stream is not None:
            await self.storage.make_directory(os.path.dirname(self.plan.stream.path))
            await self.storage.make_file(self.plan.stream.path)
            self.made.update({self.plan.stream.path, *self.plan.extra})

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
            if self.plan.late is None or not await self._stop_late(self.plan.late):
                await self._hypervisor.pause()
            self._pause_began = trio.current_time()
        self.held = attrs.evolve(self.held, point=time.time())

    async def _stop_late(self, foreseen: float) -> bool:
        """Have the hypervisor begin, and stop the guest before the point; return whether that came in time."""
        await self.stream.hold(foreseen + HOLD_SECONDS)
        self._started = await self.stream.start_early(max(0.0, foreseen - LEAD_SECONDS))
        if not self._started:
            self._missed = True
            self._hypervisor.forget_pauses()
        return self._started

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
        if self._started:
            return
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
        if self.plan.state is not DomainState.RUNNING:
            self._note()
            if not self._undoing:
                self._check_stood(changes=0)
            return
        now = trio.current_time()
        if not await self._ask(self._hypervisor.resume):
            return
        between = None
        if self._pause_began is not None and self.plan.order is not Strategy.PAUSED:
            between = now - self._pause_began - self._commands
        setup = self._stream.setup_seconds() if self._stream is not None else None
        self._note(pause=self.machine.pause_times(), between=between, setup=setup, missed=self._missed)
        if not self._undoing:
            self._check_stood(changes=2)

    @property
    def _undoing(self) -> bool:
        return self.operation.machine.state is State.ROLLING_BACK

    async def _ask(self, call: Callable[[], Awaitable[object]]) -> bool:
        """Ask something of the machine; return False where it is gone, which matters not to what is undone."""
        if self._undoing:
            return await self.unless_gone(call)
        await call()
        return True

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

    # The record.

    async def commit(self) -> Change:
        """Return what the catalog is to know: the snapshot, and the domain on its overlays.

        Raises:
            HypervisorError: somebody has written to a frozen image while memory streamed.
        """
        await self._check_still()
        record, domain = self._record(), self.plan.domain
        self.result = record
        overlays = {disk.disk.target: disk.external_sn for disk in record.snapshot.disks if disk.external_sn}
        domain = attrs.evolve(
            domain,
            active=domain.active | overlays,
            current=record.name,
            way_back=record.way_back or domain.way_back,
        )
        return Change(
            snapshots=(record,),
            domains=(left_on(domain, {each.path: each.base.chain for each in self.plan.overlays}),),
            files={self.name: tuple(sorted(self.made))},
        )

    async def _check_still(self) -> None:
        """Look at the frozen images once more: another program may have merged an overlay into one meanwhile."""
        for file in {file.path: file for chain in self.held.images.values() for file in chain}.values():
            if file.identity:  # block devices would have to be read in full
                try:
                    await self.storage.check(file)
                except DamagedSnapshot as error:
                    raise HypervisorError(f"another program has changed what {self.name} was on: {error}") from None

    def _record(self) -> SnapshotRecord:
        plan, held = self.plan, self.held
        point, life = (
            held.pause[0] if held.pause else held.point or plan.snapshot.creation_time,
            plan.options.expires,
        )
        return SnapshotRecord(
            domain=self.name,
            snapshot=plan.snapshot,
            parent=plan.domain.current,
            domain_state=plan.state,
            strategy=plan.strategy,
            reason=plan.reason,
            point=point,
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
                setup=held.setup,
                foreseen=plan.late,
                missed=held.missed,
            ),
            group=Group(self.operation.id, members) if len(members := self.operation.domains) > 1 else None,
            id=new_id(),
            clock_behind_seconds=plan.domain.clock_behind_seconds if plan.snapshot.memory else None,
            saved_by_revert=plan.saves,
            tpm=held.tpm,
            expires=None if life is None else point + life,
        )


async def create(
    context: Context,
    domains: Sequence[str],
    snapshot: DomainSnapshot,
    flags: CreateFlag,
    options: CreateOptions,
    *,
    bandwidth: SharedBandwidth | None = None,
    saves: bool = False,
) -> tuple[SnapshotRecord, ...]:
    """Create a snapshot of each of these domains, all at one point; see `snaporch.Orchestrator.create_group`.

    With `saves` it is a revert that takes it, of what it is about to replace.
    """
    if bandwidth is None and options.bandwidth and len(domains) > 1:
        bandwidth = SharedBandwidth(options.bandwidth)
    if bandwidth is not None:
        options = attrs.evolve(options, bandwidth=bandwidth.next_share)
    operation = Operation(OperationKind.CREATE, in_order(domains), snapshot.name or "snapshot")
    async with context.locked(operation, wait=options.wait), AsyncExitStack() as stack:
        scenes = [await look(context, name, operation, stack) for name in operation.domains]
        for scene, machine in scenes:
            verb = GuestVerb.QUIESCE if CreateFlag.QUIESCE in flags else GuestVerb.CREATE
            await check_verb(scene.domain.name, machine, verb)
        plans = at_one_point([plan_create(scene, snapshot, flags, options) for scene, _ in scenes])
        plans = tuple(attrs.evolve(plan, saves=saves) for plan in plans)
        operation.subject = plans[0].snapshot.name
        participants = [
            Participant(plan, operation, context, context.driver(plan.domain), machine, bandwidth=bandwidth)
            for plan, (_, machine) in zip(plans, scenes, strict=True)
        ]
        for each in participants:
            await check_current(context, each.plan.domain)
            taken = dict.fromkeys((overlay.base for overlay in each.plan.overlays), Verb.CREATE)
            taken |= dict.fromkeys((point.base for point in each.plan.inside), Verb.INTERNAL)
            await check_taken(context, operation, each.plan.domain, each.machine, taken)
            check_way_back(each.plan)
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


async def commit(participants: Sequence[Participant]) -> Change:
    """Return what the catalog is to know of all of them, in one transaction."""
    return merged([await each.commit() for each in participants])
