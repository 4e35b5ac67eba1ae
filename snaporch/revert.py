"""Revert: a domain goes back to a point, and nothing is lost unless it gets there. Read downwards.

    plan_revert     (snaporch.planning) decides everything, or refuses; no I/O
    check_revert    looks at every file of the snapshot, at the definition, at the host
    Reverter        performs the steps of `snaporch.steps.REVERT`, and their compensations
    revert          puts them together

A new hypervisor process is launched beside the old one, its disks on fresh overlays over the frozen images, and
loads the memory. Only when it is complete does the old guest stand still and the new one run; only when that is in
the catalog does the old process go. Until then the old guest is there, and runs on if anything fails.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import attrs

from snaporch.catalog.store import Change
from snaporch.context import Context
from snaporch.convert import dumps
from snaporch.create import create
from snaporch.drivers.base import Driver, Guard, Launch, Machine
from snaporch.engine import Operation
from snaporch.errors import (
    CommandRefused,
    DamagedSnapshot,
    HypervisorError,
    NotEnoughSpace,
    OperationFailed,
    Refused,
    TargetExists,
    Unsupported,
)
from snaporch.models import (
    CreateFlag,
    CreateOptions,
    DeviceDisk,
    DomainRecord,
    DomainSnapshot,
    DomainState,
    Process,
    RevertFlag,
    SnapshotRecord,
    check_name,
)
from snaporch.planning import RevertPlan, plan_revert, wanted_state
from snaporch.steps import REVERT, ROLLBACK_REVERT, Lane

OVERLAY_BYTES = 2**20  # an empty overlay is less; what the guest writes later is not this operation's


# --- looking ------------------------------------------------------------------------------------------------


async def check_revert(driver: Driver, plan: RevertPlan) -> None:
    """Check everything that can be checked before the present state is touched.

    Raises:
        DamagedSnapshot: a file is missing, or its size, checksum or chain is not what was saved.
        Refused: somebody else has an image of the snapshot open for writing.
        NotEnoughSpace: there is no room for the fresh overlays.
    """
    storage, record = driver.storage, plan.snapshot
    if record.memory is not None:
        await storage.check(record.memory)
    for target, chain in record.images.items():
        for file in chain:
            await storage.check(file)
        base = plan.frozen[target]
        found = await storage.chain(base.path, base.format, still=True)
        if [os.path.realpath(link.path) for link in found] != [os.path.realpath(file.path) for file in chain]:
            raise DamagedSnapshot(f"the backing chain of {base.path} is not what was saved", base.path)
    directory = os.path.dirname(plan.directory)
    await storage.check_writable(directory)
    _, free = await storage.free(directory)
    if free < (needed := OVERLAY_BYTES * len(plan.frozen)):
        raise NotEnoughSpace(needed, free, directory)


# --- doing --------------------------------------------------------------------------------------------------


@attrs.define
class Reverter:
    """One domain in a revert: performs the steps that the tables name.

    Attributes:
        plan: what is done.
        context: the orchestrator's.
        driver: the domain's.
        old: its machine; None when it is inactive or does not answer.
        new: the process that takes its place.
        made: the files that this operation has made.
    """

    plan: RevertPlan
    context: Context
    driver: Driver
    old: Machine | None
    new: Process | None = None
    made: set[str] = attrs.field(factory=set)
    _guard: Guard | None = None

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.plan.domain.name

    def keys(self, lane: Lane) -> Sequence[str]:
        """See `snaporch.engine.Actor`."""
        return {Lane.DISK: list(self.plan.frozen), Lane.DOMAIN: [""], Lane.MEMORY: []}[lane]

    def _path(self, target: str) -> str:
        return next(disk.path for disk in self.plan.disks if disk.target == target)

    async def make_overlay(self, target: str) -> None:
        """Make a fresh overlay over the frozen image: the snapshot itself is never written to."""
        storage, base, path = self.driver.storage, self.plan.frozen[target], self._path(target)
        await storage.make_directory(os.path.dirname(path))
        await storage.make_overlay(path, base, await storage.virtual_size(base.path, base.format))
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
        """Start the new process, its CPUs stopped."""
        self.new = await self.driver.launch(self._launch())

    def _process(self) -> Process:
        if self.new is None:
            raise AssertionError("launched before it is used")
        return self.new

    async def load(self) -> None:
        """Load the memory into it, where the snapshot has some."""
        record = self.plan.snapshot
        if record.memory is None:
            return
        async with self.driver.connect(self._process(), self.name) as machine:
            found = machine.capabilities.versions
            for key, value in found.items():
                if record.hypervisor.get(key) != value:
                    raise Unsupported(
                        f"{record.name} needs {key} {record.hypervisor.get(key)}, and this is {value}: "
                        "its memory would not load"
                    )
            await machine.load(record.memory.path)

    async def post_guard(self) -> None:
        """Have somebody end the new guest and let the old one run, if we die before the new one has taken over."""
        if self.old is not None and self.plan.was is DomainState.RUNNING:
            self._guard = self.old.guard(keep_stream=False, rival=self.new)
            await self._guard.post()

    async def dismiss_guard(self) -> None:
        """The new guest has taken over, or the old one runs on."""
        if self._guard is not None:
            await self._guard.dismiss()

    async def stand_still(self) -> None:
        """Stop the old guest, if it runs; it can still run on."""
        if self.old is not None and self.plan.was is DomainState.RUNNING:
            await self.old.pause()

    async def end_old(self) -> None:
        """FORCE: end the old process first, whether it answers or not."""
        if self.plan.domain.process is not None:
            await self.driver.kill(self.plan.domain.process)

    async def take_over(self) -> None:
        """Let the new guest run, or see that it stands."""
        async with self.driver.connect(self._process(), self.name) as machine:
            if self.plan.state is DomainState.RUNNING:
                await self._run(machine)
            if await machine.state() is not self.plan.state:
                raise HypervisorError(f"{self.name}: the guest is not {self.plan.state} after loading")

    async def _run(self, machine: Machine) -> None:
        try:
            await machine.resume()
        except CommandRefused as error:
            if self.old is None or self.plan.way != "beside":
                raise
            raise Unsupported(  # the old one has an image locked
                f"{self.name}: the new guest cannot run beside the old one: {error.description}"
            ) from None

    # Compensations.

    async def end_new(self) -> None:
        """End the new process."""
        if self.new is not None:
            await self.driver.kill(self.new)
        await self.driver.clear(self.plan.run_directory)

    async def run_old(self) -> None:
        """Let the old guest run on."""
        if self.old is not None and self.plan.was is DomainState.RUNNING:
            await self.old.resume()

    async def mourn_old(self) -> None:
        """Say, once, what FORCE has cost: the process that was ended first cannot be brought back."""
        domain, old = await self.context.catalog.domain(self.name), self.plan.domain.process
        if domain.process is None or domain.process != old or self.driver.alive(old):
            return  # it is known, or not so
        await self.context.catalog.write(Change(domains=(attrs.evolve(domain, process=None),)))
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
            process=self.new,
            template=record.template,
        )

    async def commit(self) -> Change:
        """Return what the catalog is to know."""
        return Change(domains=(self.domain(),), files={self.name: tuple(sorted(self.made))})

    async def clean_up(self) -> None:
        """End the old process and remove what no snapshot holds; the revert is complete already."""
        plan, catalog = self.plan, self.context.catalog
        domain, old = await catalog.domain(self.name), plan.domain.process
        if old is not None and old != domain.process:
            await self.driver.kill(old)
            await self._take_socket(domain, old)
            await self.context.clear(self.plan.domain)
        held = {file.path for record in await catalog.snapshots(self.name) for file in _files(record)}
        held |= {disk.path for disk in domain.disks}
        own = await catalog.own_files(self.name)
        gone = tuple(disk.path for disk in plan.domain.disks if disk.path in own - held)
        for path in gone:
            await self.driver.storage.remove(path)
        await catalog.write(Change(gone=gone))

    async def _take_socket(self, domain: DomainRecord, old: Process) -> None:
        """Put the new process in the old one's place: others know an attached domain by its socket."""
        process = domain.process
        if domain.template is not None and process is not None and os.path.exists(process.socket):
            os.replace(process.socket, old.socket)
            moved = attrs.evolve(domain, process=attrs.evolve(process, socket=old.socket))
            await self.context.catalog.write(Change(domains=(moved,)))


def _files(record: SnapshotRecord) -> list[DeviceDisk]:
    return [DeviceDisk(target, file.path) for target, chain in record.images.items() for file in chain]


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


async def _way(driver: Driver, plan: RevertPlan, old: Machine | None, *, force: bool) -> RevertPlan:
    """Return the plan with the way that can be gone: beside the old guest, or, with FORCE, in its place."""
    if plan.way != "beside" or plan.domain.process is None:
        return plan
    launch = Launch(plan.snapshot.definition, plan.disks, plan.run_directory, template=plan.snapshot.template)
    blocker = await driver.beside_blocker(launch) if old is not None else "the old process does not answer"
    if blocker and not force:
        raise Unsupported(
            f"{plan.domain.name}: the new guest cannot be made ready beside the old one: {blocker}; "
            "FORCE ends the old one first"
        )
    return attrs.evolve(plan, way="displace") if blocker else plan


async def revert(
    context: Context, domain: str, name: str, flags: RevertFlag, *, save_current: str = ""
) -> SnapshotRecord:
    """Revert a domain; see `snaporch.Orchestrator.revert`."""
    force = RevertFlag.FORCE in flags
    snapshot = await context.catalog.snapshot(domain, name)
    wanted_state(snapshot, flags)
    if snapshot.deleting:
        raise Unsupported(f"{name} is being deleted; `snaporch recover` finishes that")
    if save_current:
        await _save(context, domain, save_current, snapshot)
    operation = Operation("revert", domain, name)
    async with context.locked(operation), context.machine_of(domain, hung_is_none=force) as (record, old):
        driver = context.driver(record)
        was = await _present(old, force=force)
        if old is None and record.process is not None:
            was = DomainState.RUNNING
        plan = plan_revert(
            record, was, snapshot, flags, directory=context.directory(domain), operation=operation.id
        )
        await check_revert(driver, plan)
        plan = await _way(driver, plan, old, force=force)
        reverter = Reverter(plan, context, driver, old)
        try:
            await _run(context, operation, reverter)
        except Refused as error:
            if plan.way != "beside" or was is DomainState.INACTIVE or isinstance(error, DamagedSnapshot):
                raise
            if not force:
                raise Unsupported(f"{error}; if the running guest holds that, FORCE ends it first") from error
            # The new process did not come up beside the old one (a port that both want, say): in its place, then.
            operation = Operation("revert", domain, name)
            plan = attrs.evolve(plan, way="displace", disks=_renamed(plan, operation.id))
            reverter = Reverter(plan, context, driver, old)
            await _run(context, operation, reverter)
    return snapshot


async def _run(context: Context, operation: Operation, reverter: Reverter) -> None:
    await context.engine.run(
        operation,
        REVERT[reverter.plan.way],
        ROLLBACK_REVERT,
        [reverter],
        plan=dumps(reverter.plan),
        commit=reverter.commit,
        finish=reverter.clean_up,
    )


def _renamed(plan: RevertPlan, operation: str) -> tuple[DeviceDisk, ...]:
    """Return the disks with overlays of a new operation's name."""
    directory = os.path.dirname(plan.directory)
    return tuple(
        attrs.evolve(disk, path=f"{directory}/{disk.target}.{operation}.qcow2")
        if disk.target in plan.frozen
        else disk
        for disk in plan.disks
    )


async def _save(context: Context, domain: str, name: str, target: SnapshotRecord) -> None:
    """Keep what the domain holds now, before it is replaced."""
    check_name(name)
    if name == target.name:
        raise TargetExists(f"the present state cannot be saved as {name!r}: that is where it goes back to")
    async with context.machine_of(domain) as (_, machine):
        memory = machine is not None
    flags = CreateFlag.LIVE if memory else CreateFlag.DISK_ONLY
    snapshot = DomainSnapshot(name, f"before reverting to {target.name}", memory=memory)
    await create(context, (domain,), snapshot, flags, CreateOptions())
