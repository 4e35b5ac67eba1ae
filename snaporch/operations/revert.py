"""Revert: a domain goes back to a point, and nothing is lost unless it gets there. Read downwards.

    plan_revert     (snaporch.operations.planning) decides everything, or refuses; no I/O
    check_revert    looks at every file of the snapshot, at the definition, at the host
    Reverter        performs the steps of `snaporch.engine.steps.REVERT`, and their compensations
    revert          puts them together

A new hypervisor process is launched beside the old one, its disks on fresh overlays over the frozen images, and
loads the memory. Only when it is complete does the old guest stand still and the new one run; only when that is in
the catalog does the old process go. Until then the old guest is there, and runs on if anything fails.

Several domains are several reverters: old and new guests of a group never run at one time, and all go back or none.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import ClassVar

import attrs

from snaporch.catalog.store import Change, merged
from snaporch.drivers.base import (
    Driver,
    Guard,
    GuestAgent,
    ImagePoints,
    Launch,
    LoadNote,
    LoadsMemory,
    Machine,
    Overlays,
    PauseNote,
    PointsInside,
    StartsBeside,
    Storage,
    check_versions,
    has,
    need,
)
from snaporch.engine.actor import Actor
from snaporch.engine.context import Context, dies
from snaporch.engine.run import Operation
from snaporch.engine.steps import REVERT, ROLLBACK_REVERT, Lane, all_steps
from snaporch.engine.verdict import COMPLETE, LOAD, PUT_BACK, UNDONE, Verdict
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    DamagedSnapshot,
    HypervisorError,
    NotEnoughSpace,
    OperationFailed,
    OtherMachine,
    OutcomeUnknown,
    Refused,
    TargetExists,
    Unsupported,
)
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainRecord, DomainState, Handle
from snaporch.model.names import check_name, in_order, short
from snaporch.model.record import OperationKind, SnapshotRecord
from snaporch.model.request import CreateOptions
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.model.way import Way
from snaporch.operations.create import STREAM_BYTES, create
from snaporch.operations.disks import claim_snapshot
from snaporch.operations.group import check_ids
from snaporch.operations.internal import forget
from snaporch.operations.planning import RevertPlan, inside_blocker, plan_revert, wanted_state
from snaporch.operations.readers import kept_for, read_by_others
from snaporch.operations.shape import check_shape, wanted_disks

OVERLAY_BYTES = 2**20  # an empty overlay is less; what the guest writes later is not this operation's


# --- looking ------------------------------------------------------------------------------------------------


async def check_revert(driver: Driver, plan: RevertPlan) -> None:
    """Check everything that can be checked before the present state is touched.

    Raises:
        DamagedSnapshot: a file is missing, or its size, checksum or chain is not what was saved.
        Refused: somebody else has an image of the snapshot open for writing.
        NotEnoughSpace: there is no room for the fresh overlays, or to keep what the guest holds.
    """
    storage, record = driver.storage, plan.snapshot
    if record.memory is not None:
        await storage.check(record.memory)
    for file in record.frozen:
        await storage.check(file)
    for target, tag in plan.inside.items():
        await need(storage, ImagePoints, plan.domain.name).check_inside(record.inside[target], tag)
    for disk in record.snapshot.disks:
        # A guest of ours that runs may keep a frozen image open for writing without ever using it (QEMU could not
        # open it anew by a relative name, say). Nothing is lost if somebody else has it: the new one does not load.
        still = plan.was is DomainState.INACTIVE and (disk.external or plan.way is Way.INSIDE_INACTIVE)
        if problem := await chain_problem(storage, record, disk, still=still):
            raise DamagedSnapshot(problem, disk.disk.path)
    overlays = Counter(os.path.dirname(disk.path) for disk in plan.disks if disk.target in plan.frozen)
    for directory, count in overlays.items() or [(os.path.dirname(plan.directory), 0)]:
        await storage.check_writable(directory)
        await check_space(storage, directory, OVERLAY_BYTES * count)
    if plan.way is Way.INSIDE:
        image = next(iter(record.inside.values())).path
        await check_space(storage, os.path.dirname(image), record.definition.memory + STREAM_BYTES)


async def check_space(storage: Storage, directory: str, needed: int) -> None:
    """Raise NotEnoughSpace where less is free than is needed, in bytes."""
    _, free = await storage.free(directory)
    if free < needed:
        raise NotEnoughSpace(needed, free, directory)


async def chain_problem(
    storage: Storage, record: SnapshotRecord, disk: DiskSnapshot, *, still: bool = False
) -> str:
    """Return what is wrong with the chain of one of a snapshot's disks, or an empty string.

    Raises:
        Refused: an image cannot be read or, with `still`, somebody writes to it.
    """
    found = await storage.chain(disk.disk.path, disk.disk.format, still=still)
    known = [file.path for file in record.images[disk.disk.target]]
    if not disk.external:
        known.insert(0, record.inside[disk.disk.target].path)
    if [os.path.realpath(link.path) for link in found] == [os.path.realpath(path) for path in known]:
        return ""
    return f"the backing chain of {disk.disk.path} is not what was saved"


# --- doing --------------------------------------------------------------------------------------------------


@attrs.define
class Reverter(Actor):
    """One domain in a revert: performs the steps that the tables name.

    Attributes:
        plan: what is done.
        context: the orchestrator's.
        driver: the domain's.
        old: its machine; None when it is inactive or does not answer.
        new: the machine that takes its place.
        made: the files that this operation has made.
        loaded: the point is in the old process already: when we had died a guard has loaded it.
    """

    performs: ClassVar = all_steps(REVERT.values(), ROLLBACK_REVERT)

    plan: RevertPlan
    context: Context
    driver: Driver
    old: Machine | None
    new: Handle | None = None
    made: set[str] = attrs.field(factory=set)
    loaded: bool = False
    _guard: Guard | None = None

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.plan.domain.name

    @property
    def verdict(self) -> Verdict:
        """What is decided of the operation."""
        return self.context.verdict(self.plan.operation)

    def keys(self, lane: Lane) -> Sequence[str]:
        """See Actor."""
        disks = {Lane.DISK: list(self.plan.frozen), Lane.INSIDE: list(self.plan.inside)}
        return disks.get(lane, [""] if lane is Lane.DOMAIN else [])

    def displacing(self, operation: str = "") -> Reverter:
        """Return one that ends the old process first; as another operation, with overlays of that one's name."""
        plan = attrs.evolve(self.plan, way=Way.DISPLACE)
        if operation:
            plan = attrs.evolve(plan, disks=_renamed(plan, operation), operation=operation)
        return Reverter(plan, self.context, self.driver, self.old)

    def _path(self, target: str) -> str:
        return next(disk.path for disk in self.plan.disks if disk.target == target)

    async def make_overlay(self, target: str) -> None:
        """Make a fresh overlay over the frozen image: the snapshot itself is never written to."""
        storage, base, path = self.driver.storage, self.plan.frozen[target], self._path(target)
        await storage.make_directory(os.path.dirname(path))
        size = await storage.virtual_size(base.path, base.format)
        await storage.make_overlay(path, base, size, self.plan.owners.get(target))
        self.made.add(path)

    def _launch(self) -> Launch:
        record = self.plan.snapshot
        return Launch(
            record.definition,
            self.plan.disks,
            self.plan.run_directory,
            incoming=record.memory is not None,
            template=record.template,
        )

    async def launch(self) -> None:
        """Start the new process, its CPUs stopped, or leave that to `load`."""
        if not self._in_one_call:
            self.new = await self.driver.launch(self._launch())

    def _launched(self) -> Handle:
        if self.new is None:
            raise AssertionError("launched before it is used")
        return self.new

    def _chains(self) -> dict[str, tuple[str, ...]]:
        """Return, by target, the images that back those that the new process is to be on."""
        images = self.plan.snapshot.images
        return {target: tuple(file.path for file in chain) for target, chain in images.items()}

    async def load(self) -> None:
        """See that it is the machine that was wanted, and load the memory into it, where the snapshot has some."""
        if self._in_one_call:
            memory = self._memory_file()
            self.new = await self.driver.restore(self._launch(), memory, versions=self._versions)
        async with self.driver.connect(self._launched(), self.name) as machine:
            shape = self.plan.snapshot.shape
            disks = wanted_disks(self.plan.disks, self._chains(), shape)
            check_shape(self.name, disks, shape, await machine.shape())
            if self.plan.snapshot.snapshot.memory and not self._in_one_call:
                check_versions(machine, self._versions, self.plan.snapshot.name)
                await self._load_memory(machine)

    @property
    def _in_one_call(self) -> bool:
        """Whether the new machine is launched with its memory."""
        return self.driver.info.one_call and self.plan.snapshot.memory is not None

    def _memory_file(self) -> str:
        if self.plan.snapshot.memory is None:
            raise AssertionError("a snapshot without a memory file has none to load")
        return self.plan.snapshot.memory.path

    async def _load_memory(self, machine: Machine) -> None:
        if self.plan.snapshot.memory is not None:
            await need(machine, LoadsMemory, self.name).load(self._memory_file())
        else:
            await need(machine, PointsInside, self.name).load_inside(self.plan.tag, list(self.plan.inside))

    @property
    def _versions(self) -> Mapping[str, str]:
        """What the snapshot's memory is bound to."""
        return self.plan.snapshot.hypervisor

    async def post_guard(self) -> None:
        """Have somebody end the new guest and let the old one run, if we die before the revert is complete."""
        if self.old is None or self.plan.was is not DomainState.RUNNING or self._guard is not None:
            return
        plan, verdict = self.plan, self.verdict.path
        if plan.way is Way.INSIDE:
            run = plan.state is DomainState.RUNNING
            self._guard = await need(self.old, PointsInside, self.name).load_guard(
                LoadNote(plan.tag, plan.kept, tuple(plan.inside), verdict, run=run)
            )
        else:
            self._guard = self.old.guard(PauseNote(keep_stream=False, rival=self.new, verdict=verdict))
        await self._guard.post()

    async def dismiss_guard(self) -> None:
        """The old guest runs on."""
        await self.send_guard_away()
        await self.verdict.forget()

    async def send_guard_away(self) -> None:
        """The revert is complete, or the old guest runs on."""
        if self._guard is not None:
            await self._guard.dismiss()
            self._guard = None

    async def stand_still(self) -> None:
        """Stop the old guest, if it runs; it can still run on."""
        if self.old is not None and self.plan.was is DomainState.RUNNING:
            await self.old.pause()

    async def end_old(self) -> None:
        """FORCE: end the old process first, whether it answers or not."""
        if self.plan.domain.handle is not None:
            await self.driver.kill(self.plan.domain.handle)

    async def take_over(self) -> None:
        """Let the new guest run, or see that it stands."""
        if self.plan.way is Way.INSIDE:
            await self._take_over(self._old)
        else:
            async with self.driver.connect(self._launched(), self.name) as machine:
                await self._take_over(machine)

    async def _take_over(self, machine: Machine) -> None:
        if self.plan.state is DomainState.RUNNING:
            await self._run(machine)
        if await machine.state() is not self.plan.state:
            raise HypervisorError(f"{self.name}: the guest is not {self.plan.state} after loading")
        if self._frozen and self.plan.state is DomainState.RUNNING:
            await need(machine, GuestAgent, self.name).thaw()

    @property
    def _frozen(self) -> bool:
        """Whether the guest's memory has its file systems frozen."""
        return self.plan.snapshot.quiesced and self.plan.snapshot.snapshot.memory

    async def _run(self, machine: Machine) -> None:
        try:
            await machine.resume()
        except CommandRefused as error:
            if self.old is None or self.plan.way is not Way.BESIDE:
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

    @property
    def _points(self) -> ImagePoints:
        return need(self.driver.storage, ImagePoints, self.name)

    def _image(self, target: str) -> DeviceDisk:
        return next(disk for disk in self.plan.disks if disk.target == target)

    async def keep_present(self) -> None:
        """Keep what the guest, which stands, holds now: inside the images too."""
        check_versions(self._old, self._versions, self.plan.snapshot.name)
        await need(self._old, PointsInside, self.name).save_inside(self.plan.kept, list(self.plan.inside))

    async def load_inside(self) -> None:
        """Load the point in the process that runs the guest, unless a guard has done that when we had died."""
        if not self.loaded:
            await self.post_guard()  # there is none where we have died once already
            await self.verdict.insist(LOAD, self.name)
            await self._load(self._old, self.plan.tag, list(self.plan.inside))

    async def keep_image(self, target: str) -> None:
        """Keep what an image holds now, inside it."""
        await self._points.save_inside(self._image(target).path, self.plan.kept)

    async def go_back(self, target: str) -> None:
        """Put an image back to the point."""
        await self._points.restore_inside(self._image(target).path, self.plan.inside[target])

    async def bring_up(self) -> None:
        """Launch, load and let run, unless the domain is to be inactive."""
        if self.plan.state is not DomainState.INACTIVE:
            await self.launch()
            await self.load()
            await self.take_over()

    # Compensations.

    async def keeps_present(self) -> bool:
        """Return whether what the guest held before is kept inside: if not, that is what it holds."""
        return all([self.plan.kept in await self._inside(target) for target in self.plan.inside])

    async def load_present(self) -> None:
        """Load what the guest held before, where its process is still there.

        Before it runs, that is no longer kept: so, should we die, it is known which of the two the guest is.
        """
        kept, targets = self.plan.kept, list(self.plan.inside)
        if self.verdict.read() == LOAD:
            await self.verdict.revise(PUT_BACK)
        if self.old is not None and self.verdict.read() == PUT_BACK and await self.keeps_present():
            await self._unless_gone(partial(self._load, self.old, kept, targets))
        if self.old is not None:
            await self._unless_gone(partial(need(self.old, PointsInside, self.name).delete_inside, kept, targets))

    async def _load(self, machine: Machine, tag: str, targets: Sequence[str]) -> None:
        if await machine.state() is DomainState.RUNNING:
            await machine.pause()
        await need(machine, PointsInside, self.name).load_inside(tag, targets)

    async def _unless_gone(self, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except (ConnectionGone, OutcomeUnknown):
            handle = self.plan.domain.handle
            if handle is None or not await dies(self.driver, handle):  # noqa: ASYNC120 - re-raised where it matters
                raise
            self.old = None

    async def _inside(self, target: str) -> tuple[str, ...]:
        return await self._points.inside(self._image(target).path)

    async def restore_image(self, target: str) -> None:
        """Put an image back to what it held before, where no process has it open any more."""
        if self.old is None and self.plan.kept in await self._inside(target):
            await self._points.restore_inside(self._image(target).path, self.plan.kept)

    async def forget_kept(self, target: str) -> None:
        """Give up what was kept inside an image."""
        await self._forget(self.old, self.plan.domain.handle, target)

    async def _forget(self, machine: Machine | None, handle: Handle | None, target: str) -> None:
        await forget(self.driver, machine, handle, self._image(target), self.plan.kept)

    async def end_new(self) -> None:
        """End the new process."""
        if self.verdict.read() == COMPLETE:
            await self.verdict.revise(UNDONE)
        if self.new is not None:
            await self.driver.kill(self.new)
        await self.driver.clear(self.plan.run_directory)

    async def run_old(self) -> None:
        """Let the old guest run on, if it is there."""
        if self.old is not None and self.plan.was is DomainState.RUNNING:
            await self._unless_gone(self.old.resume)

    async def mourn_old(self) -> None:
        """Say, once, what FORCE has cost: the process that was ended first cannot be brought back."""
        domain, old = await self.context.catalog.domain(self.name), self.plan.domain.handle
        if domain.handle is None or domain.handle != old or await self.driver.alive(old):
            return  # it is known, or not so
        await self.context.catalog.write(Change(domains=(attrs.evolve(domain, handle=None),)))
        raise OperationFailed(
            f"FORCE has ended the old guest and its memory is lost; its disks are whole: "
            f"`snaporch domain start {self.name}` boots it"
        )

    async def remove_overlay(self, target: str) -> None:
        """Remove the fresh overlay."""
        if (path := self._path(target)) in self.made:
            await self.driver.storage.remove(path)

    # The record.

    def domain(self) -> DomainRecord:
        """Return the domain's record as it is after the revert."""
        record = self.plan.snapshot
        return DomainRecord(
            definition=record.definition,
            active={disk.target: disk for disk in self.plan.disks},
            current=record.name,
            handle=self.plan.domain.handle if self.plan.way is Way.INSIDE else self.new,
            template=record.template,
            tags=self.plan.domain.tags,
            max_depth=self.plan.domain.max_depth,
            frozen=self._frozen and self.plan.state is DomainState.PAUSED,
            shape=record.shape,
        )

    async def commit(self) -> Change:
        """Return what the catalog is to know; from here on the new guest is the domain's."""
        if self.plan.way is Way.BESIDE:
            await self.verdict.insist(COMPLETE, self.name)
        return Change(domains=(self.domain(),), files={self.name: tuple(sorted(self.made))})

    async def clean_up(self) -> None:
        """End the old process and remove what no snapshot holds; the revert is complete already."""
        plan, catalog = self.plan, self.context.catalog
        domain, old = await catalog.domain(self.name), plan.domain.handle
        if old is not None and old != domain.handle:
            await self.driver.kill(old)
            await self._take_place(domain, old)
            await self.driver.forget(old)
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
            machine = self.old if self.plan.way is Way.INSIDE else None
            if self.plan.inside and machine is None and handle is not None:
                machine = await stack.enter_async_context(self.driver.connect(handle, self.name))
            for target in self.plan.inside:
                await self._forget(machine, handle, target)

    async def _take_place(self, domain: DomainRecord, old: Handle) -> None:
        """Put the new machine where others look for the old one."""
        new = domain.handle
        if new is not None and (moved := await self.driver.take_place(old, new)) is not new:
            await self.context.catalog.write(Change(domains=(attrs.evolve(domain, handle=moved),)))


async def _present(machine: Machine | None, *, force: bool) -> DomainState:
    """Return what a domain does; FORCE takes a machine that does not answer for one that is in the way."""
    if machine is None:
        return DomainState.INACTIVE
    try:
        return await machine.state()
    except HypervisorError:
        if force:
            return DomainState.RUNNING
        raise


async def in_their_places(driver: Driver, plan: RevertPlan) -> RevertPlan:
    """Return the plan with its overlays where the driver wants them."""
    directory, disks = os.path.dirname(plan.directory), []
    owners: dict[str, tuple[int, int]] = {}
    for disk in plan.disks:
        if (frozen := plan.frozen.get(disk.target)) is not None:
            place = await driver.overlay_place(plan.domain, frozen, directory)
            disk = attrs.evolve(disk, path=f"{place.directory}/{os.path.basename(disk.path)}")  # noqa: PLW2901
            owners |= {disk.target: place.owner} if place.owner is not None else {}
        disks.append(disk)
    return attrs.evolve(plan, disks=tuple(disks), owners=owners)


async def _way(driver: Driver, plan: RevertPlan, old: Machine | None, *, force: bool) -> RevertPlan:
    """Return the plan with the way that can be gone: beside the old guest, or, with FORCE, in its place."""
    if plan.way is Way.INSIDE and old is None:  # it does not answer, which only FORCE comes this far with
        return attrs.evolve(plan, way=Way.INSIDE_DISPLACE)
    if plan.way is not Way.BESIDE or plan.domain.handle is None:
        return plan
    launch = Launch(plan.snapshot.definition, plan.disks, plan.run_directory, template=plan.snapshot.template)
    if old is not None:  # a merge that failed may have left images open for writing, which would bar the new guest
        await need(old, Overlays, plan.domain.name).settle_merges(
            {disk.target: disk.path for disk in plan.domain.disks}
        )
    blocker = await _beside_blocker(driver, launch) if old is not None else "the old process does not answer"
    if blocker and not force:
        raise Unsupported(
            f"{plan.domain.name}: the new guest cannot be made ready beside the old one: {blocker}; "
            "FORCE ends the old one first"
        )
    return attrs.evolve(plan, way=Way.DISPLACE) if blocker else plan


async def _beside_blocker(driver: Driver, launch: Launch) -> str:
    if not has(driver, StartsBeside):
        return "its hypervisor runs one machine of a name"
    return await need(driver, StartsBeside, launch.definition.name).beside_blocker(launch)


async def _check_free(context: Context, snapshot: SnapshotRecord) -> None:
    """Refuse to take images back in place that something else needs as they are."""
    if not snapshot.inside:
        return
    others = await context.catalog.snapshots(snapshot.domain)
    needed = await read_by_others(context, snapshot.domain, {file.path for file in snapshot.inside.values()})
    if why := inside_blocker(snapshot, others, needed):
        raise Unsupported(f"{snapshot.domain} cannot go back to {snapshot.name}, which is inside an image: {why}")


async def revert(
    context: Context, snapshots: Sequence[SnapshotRecord], flags: RevertFlag, *, save_current: str = ""
) -> None:
    """Revert domains, each to one of these, all or none; see `snaporch.Orchestrator.revert_group`."""
    for snapshot in snapshots:
        wanted_state(snapshot, flags)
        if snapshot.deleting:
            raise Unsupported(f"{snapshot.name} is being deleted; `snaporch recover` finishes that")
    domains, name = in_order(snapshot.domain for snapshot in snapshots), snapshots[0].name
    operation = Operation(
        OperationKind.REVERT, domains, name
    )  # before the one that saves: who asked knows the first one's id
    if save_current:
        await _save(context, domains, save_current, snapshots[0])
    async with context.locked(operation), AsyncExitStack() as stack:
        for each in snapshots:  # the name may be another's since it was looked at
            check_ids([await context.catalog.snapshot(each.domain, each.name)], {each.id})
        reverters = [await _reverter(context, each, flags, operation, stack) for each in snapshots]
        reverters = _alike(reverters)
        try:
            await _run(context, operation, reverters)
        except Refused as error:
            beside = reverters[0].plan.way is Way.BESIDE
            stood = any(each.plan.was is not DomainState.INACTIVE for each in reverters)
            if not beside or not stood or isinstance(error, DamagedSnapshot | OtherMachine):
                raise
            if RevertFlag.FORCE not in flags:
                raise Unsupported(f"{error}; if the running guest holds that, FORCE ends it first") from error
            # The new process did not come up beside the old one (a port that both want, say): in its place, then.
            operation = Operation(OperationKind.REVERT, domains, name)
            await _run(context, operation, [each.displacing(operation.id) for each in reverters])


async def _reverter(
    context: Context, snapshot: SnapshotRecord, flags: RevertFlag, operation: Operation, stack: AsyncExitStack
) -> Reverter:
    """Look at a domain and decide how it goes back; its machine stays connected for as long as `stack` is open."""
    force, name = RevertFlag.FORCE in flags, snapshot.domain
    record, old = await stack.enter_async_context(context.machine_of(name, hung_is_none=force))
    driver = context.driver(record)
    was = await _present(old, force=force)
    if old is None and record.handle is not None:
        was = DomainState.RUNNING
    await claim_snapshot(context, operation, snapshot)
    await _check_free(context, snapshot)
    plan = plan_revert(record, was, snapshot, flags, directory=context.directory(name), operation=operation.id)
    plan = await in_their_places(driver, plan)
    await check_revert(driver, plan)
    return Reverter(await _way(driver, plan, old, force=force), context, driver, old)


def _alike(reverters: Sequence[Reverter]) -> list[Reverter]:
    """Return them with one way for all: where one has to displace its old guest, all do.

    Raises:
        Unsupported: there is no such way.
    """
    ways = {each.plan.way for each in reverters}
    if len(ways) == 1:
        return list(reverters)
    if not ways <= {Way.BESIDE, Way.DISPLACE}:
        each = "; ".join(f"{reverter.name}: {reverter.plan.way.word}" for reverter in reverters)
        raise Unsupported(f"these cannot go back together, their ways differ ({each}); each by itself can")
    return [each.displacing() for each in reverters]


async def _run(context: Context, operation: Operation, reverters: Sequence[Reverter]) -> None:
    await context.engine.run(
        operation,
        REVERT[reverters[0].plan.way],
        ROLLBACK_REVERT,
        reverters,
        plan=dumps([each.plan for each in reverters]),
        commit=partial(commit, reverters),
        finish=partial(clean_up, reverters),
    )


async def commit(reverters: Sequence[Reverter]) -> Change:
    """Return what the catalog is to know of all of them, in one transaction."""
    return merged([await each.commit() for each in reverters])


async def clean_up(reverters: Sequence[Reverter]) -> None:
    """Clean up after all of them; the revert is complete already."""
    for each in reverters:
        await each.send_guard_away()
    await reverters[0].verdict.forget()
    for each in reverters:
        await each.clean_up()


def _renamed(plan: RevertPlan, operation: str) -> tuple[DeviceDisk, ...]:
    """Return the disks with overlays of a new operation's name."""
    return tuple(
        attrs.evolve(disk, path=f"{os.path.dirname(disk.path)}/{disk.target}.{short(operation)}.qcow2")
        if disk.target in plan.frozen
        else disk
        for disk in plan.disks
    )


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
    await create(context, domains, snapshot, flags, CreateOptions())
