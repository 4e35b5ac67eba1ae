"""Revert: a domain goes back to a point, and nothing is lost unless it gets there. Read downwards.

    plan_revert     (revert_plan) decides everything, or refuses; no I/O
    check_revert    (revert_checks) looks at every file of the snapshot, at the definition, at the host
    Reverter        performs the steps of `snaporch.engine.ways`
    with_way        (choosing) looks whether both guests can be there at one time
    revert          puts them together

Beside the old guest, which is the rule: a new hypervisor process is launched beside the old one, its disks on
fresh overlays over the frozen images, and loads the memory. Only when the new guest is complete is the
old one paused, and the new one runs; only when that is in the catalog does the old process end. Until then the old
guest is there, and runs on if anything fails.

Where the two cannot be there at one time: a throw-away copy shows that the point loads, the old guest is kept in a
file, its process ends, and the new one loads the point. If that fails, what was kept is put back. That is *proven*.

Several domains are several reverters: old and new guests of a group never run at one time, and all go back or
none. What undoes the steps is in `revert_undo`, the proof in `proving`, what they share with a throw-away copy in
`restoring`, how the old guest is kept in a file in `keeping`, and how a lazy one loads in `loading`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import ClassVar

import attrs
import structlog
import trio

from snaporch.catalog import Change, merged
from snaporch.drivers.base import GuestAgent, GuestVerb, Machine, PointsInside, check_versions, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.verdict import COMPLETE, END, LOAD
from snaporch.engine.ways import REVERTS, WAYS, performed
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    DamagedSnapshot,
    HypervisorError,
    OtherMachine,
    Refused,
    SnaporchError,
    Stranded,
    TargetExists,
    Unsupported,
)
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainRecord, DomainState, Handle
from snaporch.model.names import check_name, in_order
from snaporch.model.record import EventKind, OperationKind, RevertRecord, SnapshotRecord
from snaporch.model.request import CreateOptions
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.model.way import Way
from snaporch.operations.checks import check_verb, unlike
from snaporch.operations.choosing import check_room_for_proofs, one_after_the_other, with_lazy, with_way
from snaporch.operations.create import create
from snaporch.operations.disks import check_same_rights, claim_snapshot
from snaporch.operations.group import check_ids
from snaporch.operations.loading import Loading
from snaporch.operations.readers import kept_for
from snaporch.operations.records import check_ours, check_records
from snaporch.operations.restoring import Restoring, in_their_places
from snaporch.operations.revert_checks import check_free, check_jobs_of_others, check_revert, state_before
from snaporch.operations.revert_plan import plan_revert, renamed, wanted_state
from snaporch.operations.unchanged import left_on

_log = structlog.get_logger("snaporch")


@attrs.define
class Reverter(Loading):
    """One domain in a revert: performs the steps that the tables name.

    Attributes:
        behind: how far its clock is behind, see `RevertRecord.clock_behind_seconds`.
        before: what the old guest did at the beginning, in its hypervisor's word.
    """

    performs: ClassVar = performed(REVERTS.values())

    behind: float | None = None
    before: str = ""

    async def differs(self) -> str:
        """See Actor; a guest that was put back has been looked at as it was let run."""
        handle = (await self.context.catalog.domain(self.name)).handle
        if handle != self.plan.domain.handle:
            return ""
        return await unlike(self.name, self.driver, handle, self.old, self.plan.was, self.before)

    async def one_after_the_other(self, why: str, operation: Operation | None = None, *, force: bool) -> Reverter:
        """Return one that ends the old guest first; as another operation, with files of that one's name."""
        plan = self.plan if operation is None else renamed(self.plan, operation.id)
        plan = await one_after_the_other(self.context, self.driver, plan, self.old, why, force=force)
        operation = operation or self.operation
        return Reverter(plan, operation, self.context, self.driver, self.old, before=self.before)

    def eagerly(self, why: str) -> Reverter:
        """Return one that loads all memory before its guest runs, since another one of its group does."""
        plan = self.plan
        if plan.way is Way.LAZY:
            plan = attrs.evolve(plan, way=Way.BESIDE, eager=f"another one of its group cannot: {why}")
        return Reverter(plan, self.operation, self.context, self.driver, self.old, before=self.before)

    def announce(self) -> None:
        """Say beforehand what it takes to keep the old guest."""
        if (expected := self.plan.expected) is not None and expected.seconds is not None:
            text = (
                f"{self.name}: {self.plan.reason}, so the guest is kept in a file and is paused meanwhile: about "
                f"{expected.bytes:,} bytes, {expected.seconds:.1f} s"
            )
            self.context.events.publish(self.operation.event(EventKind.NOTE, text=text))
            _log.info("the guest is kept", domain=self.name, bytes=expected.bytes, seconds=expected.seconds)

    # The old guest is paused, and ends. How it is kept is in `keeping`.

    async def sync_images(self) -> None:
        """Have what the old guest has written go to disk while it runs: as it is stopped its images are flushed."""
        if self.old is not None and self.plan.was is DomainState.RUNNING:
            await self.driver.storage.write_back(
                [disk.path for disk in self.plan.domain.disks if not disk.readonly]
            )

    async def stand_still(self) -> None:
        """Stop the old guest, if it runs; it can still run on."""
        if self.old is None or self.plan.was is not DomainState.RUNNING:
            return
        self.old.forget_pauses()
        if self.plan.keep is None or not self.old.capabilities.stops_itself:
            await self.old.pause()
            self.note_stop(self.old)

    async def end_old(self) -> None:
        """End the old process before there is a new one, whether it answers or not."""
        if self.plan.domain.handle is None:
            return
        await self.check_stood()
        if self.plan.was is DomainState.RUNNING and self.kept.stopped is None:
            self.note(stopped=time.time())
        if self.guard is not None:
            await self.verdict.insist(END, self.name)
        await self.driver.kill(self.plan.domain.handle)
        await self.send_guard_away()  # only now: until here the guest could be left paused

    # The new one is there.

    async def take_over(self) -> None:
        """Let the new guest run, or see that it is paused."""
        if WAYS[self.plan.way].same_process:
            await self.arrive(self._old)
        else:
            async with self.driver.connect(self.launched, self.name) as machine:
                await self.arrive(machine)

    @property
    def _beside(self) -> bool:
        return self.plan.way in {Way.BESIDE, Way.LAZY}

    async def let_run(self, machine: Machine) -> None:
        """Let the guest run, and note when it did."""
        try:
            await machine.resume()
            self.started = machine.run_times()[1] or time.time()
        except CommandRefused as error:
            if self.old is None or not self._beside:
                raise
            raise Unsupported(  # the old one has an image locked
                f"{self.name}: the new guest cannot run beside the old one: {error.description}"
            ) from None

    # To a point inside images.

    @property
    def _old(self) -> Machine:
        if self.old is None:
            raise ConnectionGone(f"{self.name}: its hypervisor is gone")
        return self.old

    async def keep_present(self) -> None:
        """Keep the memory and disks of the paused guest inside the images, too."""
        check_versions(self._old, self.plan.snapshot.hypervisor, self.plan.snapshot.name)
        await need(self._old, PointsInside, self.name).save_inside(self.plan.kept, list(self.plan.inside))

    async def load_inside(self) -> None:
        """Load the point in the process that runs the guest, unless a guard has done that after a crash."""
        if not self.loaded:
            await self.post_guard()  # there is none where snaporch has died once already
            await self.verdict.insist(LOAD, self.name)
            await self.load_again(self._old, self.plan.tag, list(self.plan.inside))

    async def keep_image(self, target: str) -> None:
        """Keep what an image holds now, inside it."""
        await self.points.save_inside(self.image(target).path, self.plan.kept)

    async def go_back(self, target: str) -> None:
        """Put an image back to the point."""
        await self.points.restore_inside(self.image(target).path, self.plan.inside[target])

    async def bring_up(self) -> None:
        """Launch, load and let run, unless the domain is to be inactive."""
        if self.plan.state is not DomainState.INACTIVE:
            await self.launch()
            await self.load()
            await self.take_over()

    # The record.

    def domain(self) -> DomainRecord:
        """Return the domain's record as it is after the revert."""
        record = self.plan.snapshot
        frozen = {target: [file.path for file in files] for target, files in record.images.items()}
        reads = {*self.plan.domain.reads, *(os.path.realpath(file.path) for file in record.frozen)}
        domain = DomainRecord(
            definition=attrs.evolve(record.definition, clock=self.plan.domain.definition.clock),
            active={disk.target: disk for disk in self.plan.disks},
            current=record.name,
            handle=self.plan.domain.handle if WAYS[self.plan.way].same_process else self.new,
            template=record.template,
            tags=self.plan.domain.tags,
            max_depth=self.plan.domain.max_depth,
            frozen=self.frozen_inside and self.plan.state is DomainState.PAUSED,
            shape=record.shape,
            records=self.plan.domain.records,
            clock_behind_seconds=self.behind,
            origin=self.plan.domain.origin,
            reads=tuple(sorted(reads)),
            generation=self.plan.generation,
            tpm=self.plan.domain.tpm if WAYS[self.plan.way].same_process else self.plan.tpm,
        )
        return left_on(domain, {d.path: frozen[d.target] for d in self.plan.disks if d.target in self.plan.frozen})

    async def commit(self) -> Change:
        """Return what the catalog is to know; from here on the new guest is the domain's."""
        if self._beside:
            await self.verdict.insist(COMPLETE, self.name)
        self.behind = self._age()
        return Change(domains=(self.domain(),), files={self.name: tuple(sorted(self.made))})

    async def clean_up(self) -> None:
        """End the old process and remove what no snapshot holds; the revert is complete already."""
        plan, catalog = self.plan, self.context.catalog
        domain, old = await catalog.domain(self.name), plan.domain.handle
        if old is not None and old != domain.handle:
            await self.driver.kill(old)
            await self._take_place(domain, old)
            await self.driver.forget(old)
        elif old is None and domain.handle is not None and domain.template is not None:
            await self._moved(domain, await self.driver.come_back(domain.template, domain.handle))
        await self.remove_kept()
        if plan.domain.tpm and plan.domain.tpm != domain.tpm:
            await self.driver.remove_tpm(plan.domain.tpm)
        await self._forget_all((await catalog.domain(self.name)).handle)
        held = await catalog.paths_of_snapshots(self.name) | {disk.path for disk in domain.disks}
        own = await catalog.own_files(self.name)
        going = [disk.path for disk in plan.domain.disks if disk.path in own - held]
        kept = await kept_for(self.context, self.name, going)
        gone = tuple(path for path in going if path not in kept)
        for path in gone:
            await self.driver.storage.remove(path)
        await catalog.write(Change(gone=gone))

    async def _forget_all(self, handle: Handle | None) -> None:
        """Give up all that was kept, in the machine that now has the images open, or without one."""
        async with AsyncExitStack() as stack:
            machine = self.old if WAYS[self.plan.way].same_process else None
            if self.plan.inside and machine is None and handle is not None:
                machine = await stack.enter_async_context(self.driver.connect(handle, self.name))
            for target in self.plan.inside:
                await self.forget(machine, handle, target)

    def _age(self) -> float | None:
        """Return how far the clock of a guest is behind that has the point's memory, as it goes on."""
        record = self.plan.snapshot
        if not record.snapshot.memory or self.plan.state is DomainState.INACTIVE:
            return None
        return max(0.0, (self.started or time.time()) - record.point) + (record.clock_behind_seconds or 0.0)

    async def set_clock(self) -> None:
        """Have the guest's agent set its clock, where it is to; what cannot be set is told."""
        domain = await self.context.catalog.domain(self.name)
        # After a crash nobody knows any more when it was that the guest went on.
        self.behind = domain.clock_behind_seconds if self.started is None else self._age()
        if self.behind is None or domain.handle is None:
            return
        if self.plan.state is DomainState.RUNNING and not self.plan.keep_clock:
            try:
                self.behind = await self._clock_set(domain.handle)
            except (HypervisorError, Refused) as error:
                text = f"{self.name}: its clock is {self.behind:.1f} s behind, and was not set: {error}"
                self.context.events.publish(self.operation.event(EventKind.NOTE, text=text))
                if not isinstance(error, Unsupported):  # there is no agent: the answer says how far it is behind
                    _log.info("the guest's clock is not set", domain=self.name, behind=self.behind, why=str(error))
        domain = attrs.evolve(domain, clock_behind_seconds=self.behind)
        try:
            await self.context.catalog.write(Change(domains=(domain,)))
        except SnaporchError as error:  # the revert is complete: `domain show` says what it said before
            _log.warning("it is not kept how far the guest's clock is behind", domain=self.name, error=str(error))

    async def _clock_set(self, handle: Handle) -> float:
        """Return how far the guest's clock is behind once its agent has set it."""
        async with AsyncExitStack() as stack:
            # Recovery has found the new machine as the domain's, and is connected to it.
            connected = WAYS[self.plan.way].same_process or (self.started is None and self.old is not None)
            machine = (
                self._old if connected else await stack.enter_async_context(self.driver.connect(handle, self.name))
            )
            return max(0.0, await need(machine, GuestAgent, self.name).set_clock())

    def answer(self) -> RevertRecord:
        """Return what is told of it."""
        outage = None
        if self.started is not None and self.kept.stopped is not None:
            outage = max(0.0, self.started - self.kept.stopped)
        return RevertRecord(
            domain=self.name,
            name=self.plan.snapshot.name,
            point=self.plan.snapshot.point,
            way=self.plan.way.word,
            outage_seconds=outage,
            total_seconds=trio.current_time() - self.operation.clock,
            lazy=self.plan.way is Way.LAZY and not self.eager,
            lazy_reason=self.eager or self.plan.eager,
            clock_behind_seconds=self.behind,
        )

    async def _take_place(self, domain: DomainRecord, old: Handle) -> None:
        """Put the new machine where others look for the old one."""
        if domain.handle is not None:
            await self._moved(domain, await self.driver.take_place(old, domain.handle))

    async def _moved(self, domain: DomainRecord, handle: Handle) -> None:
        if handle is not domain.handle:
            await self.context.catalog.write(Change(domains=(attrs.evolve(domain, handle=handle),)))


async def revert(
    context: Context,
    snapshots: Sequence[SnapshotRecord],
    flags: RevertFlag,
    *,
    save_current: str = "",
    mend: Callable[[Stranded], Awaitable[object]],
) -> tuple[RevertRecord, ...]:
    """Revert domains, each to one of these, all or none; see `snaporch.Orchestrator.revert_group`.

    Args:
        context: the orchestrator's.
        snapshots: one of each domain.
        flags: as there.
        save_current: as there.
        mend: called where it is stranded, and nothing is held any more; returns where it is complete after all.
    """
    for snapshot in snapshots:
        wanted_state(snapshot, flags)
        if snapshot.deleting:
            raise Unsupported(f"{snapshot.name} is being deleted; `snaporch recover` finishes that")
    domains, name = in_order(snapshot.domain for snapshot in snapshots), snapshots[0].name
    # Before the one that saves: who asked knows the first one's id.
    operation = Operation(OperationKind.REVERT, domains, name)
    if save_current:
        await _save(context, domains, save_current, snapshots[0])
    reverters: list[Reverter] = []
    try:
        async with context.locked(operation), AsyncExitStack() as stack:
            for each in snapshots:  # the name may be another's since it was looked at
                check_ids([await context.catalog.snapshot(each.domain, each.name)], {each.id})
            reverters += [await _reverter(context, each, flags, operation, stack) for each in snapshots]
            await _go_back(context, operation, reverters, force=RevertFlag.FORCE in flags)
    except Stranded as error:
        await mend(error)
    return tuple(each.answer() for each in reverters)


async def _go_back(context: Context, operation: Operation, reverters: list[Reverter], *, force: bool) -> None:
    """Go the way of all of them; where it turns out that there is no room for two, one after the other."""
    reverters[:] = await _alike(reverters, force=force)
    try:
        await _run(context, operation, reverters)
    except Refused as error:
        beside = reverters[0].plan.way in {Way.BESIDE, Way.LAZY}
        stood = any(each.plan.was is not DomainState.INACTIVE for each in reverters)
        if not beside or not stood or isinstance(error, DamagedSnapshot | OtherMachine):
            raise
        # The new process did not come up beside the old one (a port that both want, say).
        operation = Operation(OperationKind.REVERT, operation.domains, operation.subject)
        for each in reverters:
            await claim_snapshot(context, operation, each.plan.snapshot)
        reverters[:] = [await each.one_after_the_other(str(error), operation, force=force) for each in reverters]
        await _run(context, operation, reverters)


async def _reverter(
    context: Context, snapshot: SnapshotRecord, flags: RevertFlag, operation: Operation, stack: AsyncExitStack
) -> Reverter:
    """Look at a domain and decide how it goes back; its machine stays connected for as long as `stack` is open."""
    force, name = RevertFlag.FORCE in flags, snapshot.domain
    record, old = await stack.enter_async_context(context.machine_of(name, hung_is_none=force))
    driver = context.driver(record)
    check_ours(snapshot)
    await check_same_rights(context, record, attrs.evolve(record, template=snapshot.template))
    await check_records(context, record)
    if not force:
        await check_verb(name, old, GuestVerb.REVERT)
    if old is not None:
        await check_jobs_of_others(context, operation, name, old, force=force)
    was = await state_before(old, force=force)
    if old is None and record.handle is not None:
        was = DomainState.RUNNING
    await claim_snapshot(context, operation, snapshot)
    await check_free(context, snapshot)
    plan = plan_revert(record, was, snapshot, flags, directory=context.directory(name), operation=operation.id)
    plan = await in_their_places(driver, plan)
    await check_revert(driver, plan)
    plan = await with_way(context, driver, plan, old, force=force)
    plan = with_lazy(driver, plan) if RevertFlag.LAZY in flags else plan
    if WAYS[plan.way].same_process:
        await check_verb(name, old, GuestVerb.REVERT_INSIDE)
    before = await old.condition() if old is not None and not force else ""
    return Reverter(plan, operation, context, driver, old, before=before)


async def _alike(reverters: Sequence[Reverter], *, force: bool) -> list[Reverter]:
    """Return them with one way for all: where one cannot have two guests at one time, none has.

    Raises:
        Refused: there is no such way.
    """
    ways = {each.plan.way for each in reverters}
    if len(ways) == 1:
        return list(reverters)
    if ways == {Way.BESIDE, Way.LAZY}:
        why = next(each.plan.eager for each in reverters if each.plan.way is Way.BESIDE)
        return [each.eagerly(why) for each in reverters]
    if not ways <= {Way.BESIDE, Way.LAZY, Way.PROVEN, Way.DISPLACE}:
        each = "; ".join(f"{reverter.name}: {reverter.plan.way.word}" for reverter in reverters)
        raise Unsupported(f"these cannot go back together, their ways differ ({each}); each by itself can")
    why = next(each.plan.reason for each in reverters if each.plan.way not in {Way.BESIDE, Way.LAZY})
    return [
        each if each.plan.way not in {Way.BESIDE, Way.LAZY} else await each.one_after_the_other(why, force=force)
        for each in reverters
    ]


async def _run(context: Context, operation: Operation, reverters: Sequence[Reverter]) -> None:
    row = WAYS[reverters[0].plan.way]
    await check_room_for_proofs((each.driver, each.plan) for each in reverters)
    for each in reverters:
        each.announce()
    await context.engine.run(
        operation,
        row.phases,
        row.rollback,
        reverters,
        plan=dumps([each.plan for each in reverters]),
        commit=partial(commit, reverters),
        finish=partial(clean_up, reverters),
    )


async def commit(reverters: Sequence[Restoring]) -> Change:
    """Return what the catalog is to know of all of them, in one transaction."""
    return merged([await each.commit() for each in reverters])


async def clean_up(reverters: Sequence[Restoring]) -> None:
    """Clean up after all of them; the revert is complete already."""
    for each in reverters:
        await each.send_guard_away()
        await each.verdict.forget()
    for each in reverters:
        await each.clean_up()
    async with trio.open_nursery() as nursery:
        for each in reverters:
            nursery.start_soon(each.set_clock)


async def _save(context: Context, domains: Sequence[str], name: str, target: SnapshotRecord) -> None:
    """Keep what the domains hold now, before it is replaced."""
    check_name(name)
    if name == target.name:
        raise TargetExists(f"the present state cannot be saved as {name!r}: that is where it goes back to")
    async with context.machine_of(domains[0]) as (_, machine):
        memory = machine is not None
    # An overlay over an image would keep it from going back in place.
    inside = tuple(DiskSnapshot(DeviceDisk(disk), external=False) for disk in target.inside)
    flags = CreateFlag.DISK_ONLY if not memory else CreateFlag(0) if inside else CreateFlag.LIVE
    snapshot = DomainSnapshot(name, f"before reverting to {target.name}", memory=memory, disks=inside)
    await create(context, domains, snapshot, flags, CreateOptions(), saves=True)
