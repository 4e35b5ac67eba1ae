"""Clone: new domains are made from a snapshot of another one, all or none. Read downwards.

    clone_names     what they are called
    plan_clones     decides everything, or refuses
    Cloner          performs the steps of `snaporch.engine.ways`: as a throw-away copy, but that it stays
    clone           puts them together
    undo_clones     the recovery: clones that were cut short before the catalog had them are removed

A clone's disks are overlays, in its own directory, over the images that the snapshot holds frozen. Its definition
names these overlays: it is a domain like any other, and whoever may write to an image finds it among the readers
(`snaporch.operations.readers`). Its snapshot stays as long as its images are read: `snaporch.operations.pins`.

What one process alone can have of the host is the driver's to know (`snaporch.drivers.base.Clones`). All clones are
complete before the first of them runs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import ClassVar

import attrs
import trio

from snaporch.catalog.writing import Change, merged
from snaporch.drivers.base import Clones, Copied, Driver, ImagePoints, Launch, Original, Place, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.ways import WAYS, performed
from snaporch.errors import (
    DamagedSnapshot,
    InvalidInput,
    NotFound,
    TargetExists,
    Unsupported,
)
from snaporch.model.convert import dumps, loads
from snaporch.model.domain import DomainRecord, DomainState, Origin
from snaporch.model.formats import versioned
from snaporch.model.names import in_order, new_uuid
from snaporch.model.record import CloneRecord, OperationKind, SnapshotRecord
from snaporch.model.request import CloneOptions
from snaporch.model.reserved import check_domain_name
from snaporch.model.way import Way
from snaporch.operations.checks import EMPTY_OVERLAY_BYTES, chain_problem, check_ram, check_space
from snaporch.operations.disks import claim_snapshot
from snaporch.operations.group import check_ids
from snaporch.operations.places import leave_nothing
from snaporch.operations.restoring import in_their_places
from snaporch.operations.revert_plan import RevertPlan
from snaporch.operations.trial import Trial, plan_trial

AT_ONCE = 4  # clones that are started at one time; more only take longer each

# --- deciding -----------------------------------------------------------------------------------------------------


@versioned("clone-plan")
@attrs.frozen
class ClonePlan:
    """Everything that makes one clone, decided before it is begun: what the journal holds.

    Attributes:
        restore: how it is brought to the point.
        origin: where it comes from.
    """

    restore: RevertPlan
    origin: Origin

    @property
    def name(self) -> str:
        """The clone's name."""
        return self.restore.domain.name


def clone_names(new: str, count: int | None) -> tuple[str, ...]:
    """Return what clones are called: `new` or, of a count, ``new-1`` and so on.

    Raises:
        InvalidInput: a domain cannot be called so.
    """
    names = (new,) if count is None else tuple(f"{new}-{number}" for number in range(1, count + 1))
    for name in names:
        check_domain_name(name)
    return names


def wanted_state(record: SnapshotRecord, state: DomainState | None) -> DomainState:
    """Return what clones are to do: by default what the domain did at the point."""
    return record.domain_state if state is None else state


async def plan_clones(
    context: Context,
    driver: Driver,
    record: SnapshotRecord,
    names: Sequence[str],
    asked: CloneOptions,
    *,
    operation: str,
) -> tuple[ClonePlan, ...]:
    """Decide how clones are made.

    Raises:
        Unsupported: it is not known how something of the original can be there a second time.
    """
    maker = need(driver, Clones, record.domain)
    plans = []
    for name in names:
        new = DomainRecord(attrs.evolve(record.definition, name=name), template=record.template, uuid=new_uuid())
        plan = plan_trial(new, record, directory=context.directory(name), operation=operation)
        plan = attrs.evolve(plan, way=Way.CLONE, state=wanted_state(record, asked.state))
        plans.append(await in_their_places(driver, plan))
    places = [Place(plan.domain.name, context.directory(plan.domain.name), plan.disks) for plan in plans]
    memory = record.snapshot.memory
    original = Original(record.definition, record.template, memory, keep_network=asked.keep_network)
    copies = await maker.copies(original, places)
    return tuple(_with_copy(plan, copied) for plan, copied in zip(plans, copies, strict=True))


def _with_copy(plan: RevertPlan, copied: Copied) -> ClonePlan:
    record = plan.snapshot
    files = (*(disk.path for disk in plan.disks if disk.target in plan.frozen), *copied.files)
    origin = Origin(record.domain, record.name, record.id, files, copied.ports)
    domain = attrs.evolve(
        plan.domain,
        definition=copied.definition,
        template=copied.template,
        shape=record.shape,
        origin=origin,
        reads=tuple(sorted({os.path.realpath(path) for path in (*files, *(file.path for file in record.frozen))})),
        generation=plan.generation,
        tpm=plan.tpm,
    )
    return ClonePlan(attrs.evolve(plan, domain=domain), origin)


# --- looking ------------------------------------------------------------------------------------------------------


async def _check_free(context: Context, driver: Driver, name: str) -> None:
    """Refuse a name that is taken: by a domain, or by files in the root."""
    directory = context.directory(name)
    with suppress(NotFound):
        await context.catalog.domain(name)
        raise TargetExists(f"there is a domain {name!r} already; choose another name for the clone")
    if await driver.storage.exists(directory):
        raise TargetExists(f"there is {directory} already, where the clone's files would go; choose another name")


async def _check_snapshot(driver: Driver, record: SnapshotRecord, plans: Sequence[ClonePlan]) -> None:
    """Check every file of the snapshot, and that there is room for clones.

    Raises:
        DamagedSnapshot: a file is missing, or is not what was saved.
        NotEnoughSpace: there is too little room for overlays, or too little RAM.
    """
    storage = driver.storage
    for file in record.files:
        await storage.check(file)
    for disk in record.snapshot.disks:
        if not disk.external:
            points = need(storage, ImagePoints, record.domain)
            await points.check_inside(record.inside[disk.disk.target], disk.name)
        if problem := await chain_problem(storage, record, disk):
            raise DamagedSnapshot(problem, disk.disk.path)
    copied = sum(file.size for file in record.inside.values())  # out of images, in full
    needs = [
        (storage, os.path.dirname(disk.path), EMPTY_OVERLAY_BYTES)
        for plan in plans
        for disk in plan.restore.disks
        if disk.target in plan.restore.frozen
    ]
    needs += [(storage, os.path.dirname(plan.restore.directory), copied) for plan in plans]
    await check_space(needs)
    running = [plan for plan in plans if plan.restore.state is not DomainState.INACTIVE]
    if running:
        await check_ram(driver, len(running) * record.definition.memory)


# --- doing --------------------------------------------------------------------------------------------------------


@attrs.define
class Cloner(Trial):
    """One clone: performs the steps that the tables name.

    Attributes:
        slots: how many may start at one time.
    """

    performs: ClassVar = performed([WAYS[Way.CLONE]])

    slots: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(AT_ONCE))

    @property
    def _inactive(self) -> bool:
        return self.plan.state is DomainState.INACTIVE

    def what_to_launch(self) -> Launch:
        """Return what `launch` starts: the domain as it is defined."""
        domain = self.plan.domain
        return attrs.evolve(
            super().what_to_launch(), definition=domain.definition, template=domain.template, isolated=False
        )

    async def launch(self) -> None:
        """Start its machine, unless it is to be inactive."""
        if not self._inactive:
            async with self.slots:
                await super().launch()

    async def load(self) -> None:
        """Load the memory of the point, if it is to run or to be paused."""
        if self._inactive:
            return
        async with self.slots:
            await super().load()
        if self.plan.memory_inside:
            await self.driver.storage.remove(self._memory)

    async def take_over(self) -> None:
        """Let it run, or see that it is paused."""
        if self._inactive:
            return
        async with self.driver.connect(self.launched, self.name) as machine:
            back = await self.driver.way_back(attrs.evolve(self.plan.domain, handle=self.new), machine)
            self.plan = attrs.evolve(self.plan, domain=attrs.evolve(self.plan.domain, way_back=back))
            await self.arrive(machine)

    async def commit(self) -> Change:
        """Return the domain that it is from here on."""
        frozen = self.frozen_inside and self.plan.state is DomainState.PAUSED
        return Change(domains=(attrs.evolve(self.plan.domain, handle=self.new, frozen=frozen),))

    async def leave_nothing(self) -> None:
        """Remove what its machine has written, and its directory."""
        domain = self.plan.domain
        await leave_nothing(self.context, self.name, self.driver, domain.origin.files if domain.origin else ())


async def clone(
    context: Context,
    domain: str,
    name: str,
    names: Sequence[str],
    asked: CloneOptions,
    *,
    ids: Collection[str] = (),
) -> tuple[CloneRecord, ...]:
    """Make clones; see `snaporch.Orchestrator.clone`."""
    if asked.state is DomainState.INACTIVE:
        raise InvalidInput("clone: a clone can be started or be paused; by default it does what the original did")
    if domain in names:
        raise TargetExists(f"a clone cannot be called {domain!r}, as its original; choose another name")
    operation = Operation(OperationKind.CLONE, in_order([domain, *names]), name)
    async with context.locked(operation, wait=asked.wait):
        record = await context.catalog.snapshot(domain, name)
        check_ids([record], ids)
        if record.deleting:
            raise Unsupported(f"{name} is being deleted; `snaporch recover` finishes that")
        driver = context.driver(await context.catalog.domain(domain))
        for new in names:
            await _check_free(context, driver, new)
        await claim_snapshot(context, operation, record)
        plans = await plan_clones(context, driver, record, names, asked, operation=operation.id)
        await _check_snapshot(driver, record, plans)
        row, cloners = WAYS[Way.CLONE], _cloners(context, operation, driver, plans)
        await context.engine.run(
            operation, row.phases, row.rollback, cloners, plan=dumps(plans), commit=partial(_commit, cloners)
        )
    return tuple(CloneRecord(each.name, each.restore.state, domain, name, each.origin.ports) for each in plans)


def _cloners(context: Context, operation: Operation, driver: Driver, plans: Iterable[ClonePlan]) -> list[Cloner]:
    slots = trio.CapacityLimiter(AT_ONCE)
    return [Cloner(plan.restore, operation, context, driver, None, slots=slots) for plan in plans]


async def _commit(cloners: Iterable[Cloner]) -> Change:
    return merged([await each.commit() for each in cloners])


async def undo_clones(context: Context, operation: Operation, text: str) -> None:
    """Remove the clones of an operation that was cut short.

    Raises:
        Stranded: it still cannot be done.
    """
    plans = loads(text, tuple[ClonePlan, ...])
    first = plans[0].restore.domain
    driver, row = context.driver(first), WAYS[Way.CLONE]
    cloners = _cloners(context, operation, driver, plans)
    for each in cloners:
        await driver.storage.release({disk.path for disk in each.plan.disks})
        await each.find()
    await context.engine.undo(operation, row.phases, row.rollback, cloners)
