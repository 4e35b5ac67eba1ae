"""Verify: is a snapshot still what was saved, and does it run?

Without `boot` it reads every file of the snapshot in full. With it, a throw-away copy of the guest is launched on
overlays of its own (of points inside images: on copies), without network and without the outside's serial ports,
loads the memory and runs for a few seconds; then all of it is removed. Neither the domain nor the snapshot is
touched.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import partial
from typing import ClassVar

import attrs
import trio

from snaporch.catalog.store import Change
from snaporch.drivers.base import Driver, ImagePoints, Launch, LoadsMemory, Machine, Storage, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.steps import ROLLBACK_VERIFY, VERIFY, all_steps
from snaporch.errors import DamagedSnapshot, HypervisorError, LoadFailed, Refused, SnaporchError, Unsupported
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainRecord, DomainState
from snaporch.model.record import Boot, OperationKind, SnapshotRecord, VerifyReport
from snaporch.model.rfc import DeviceDisk
from snaporch.model.way import Way
from snaporch.operations.disks import claim_snapshot
from snaporch.operations.group import check_ids
from snaporch.operations.planning import RevertPlan, fresh_disks
from snaporch.operations.revert import Reverter, chain_problem, check_space, in_their_places

RUN_SECONDS = 3.0  # a guest whose memory does not fit its devices or disks panics within its first timer ticks


@attrs.define
class Trial(Reverter):
    """A throw-away copy of a snapshot's guest: a revert that takes nobody's place."""

    performs: ClassVar = all_steps([VERIFY], ROLLBACK_VERIFY)

    def _launch(self) -> Launch:
        return attrs.evolve(super()._launch(), isolated=True, incoming=self.plan.snapshot.snapshot.memory)

    async def make_overlay(self, target: str) -> None:
        """Make an overlay or, of a point inside an image, which others may be on, a copy."""
        if target not in self.plan.inside:
            await super().make_overlay(target)
            return
        path = self._path(target)
        await self.driver.storage.make_directory(os.path.dirname(path))
        await self._points.extract_disk(self.plan.frozen[target].path, self.plan.inside[target], path)
        self.made.add(path)

    @property
    def _memory(self) -> str:
        return str(self.plan.run_directory / "memory")

    def _chains(self) -> dict[str, tuple[str, ...]]:
        """Return what backs the copy's images: the copy of a point inside an image has no backing."""
        return super()._chains() | dict.fromkeys(self.plan.inside, ())

    async def _load_memory(self, machine: Machine) -> None:
        """Load the memory; one that is inside an image is copied first."""
        if not self.plan.memory_inside:
            await super()._load_memory(machine)
            return
        target, tag = next(iter(self.plan.inside.items()))
        await self.driver.storage.make_directory(self.plan.directory)
        await self._points.extract_memory(self.plan.frozen[target].path, tag, self._memory)
        await need(machine, LoadsMemory, self.name).load(self._memory)

    async def end_new(self) -> None:
        """End the copy's process, and remove its memory."""
        if self.plan.memory_inside:
            await self.driver.storage.remove(self._memory)
        await super().end_new()

    async def run_awhile(self) -> None:
        """Let the copy run, and look whether it still does."""
        async with self.driver.connect(self._launched(), self.name) as machine:
            await machine.resume()
            await trio.sleep(RUN_SECONDS)
            if await machine.state() is not DomainState.RUNNING:
                raise HypervisorError(f"{self.name}: the guest stopped by itself within {RUN_SECONDS:g} s")

    async def commit(self) -> Change:
        """Return that there is nothing for the catalog to know."""
        return Change()

    async def clean_up(self) -> None:
        """Remove the copy."""
        await self.end_new()
        for target in self.plan.frozen:
            await self.remove_overlay(target)


async def check_files(driver: Driver, record: SnapshotRecord) -> tuple[str, ...]:
    """Read every file of a snapshot in full and return what is wrong."""
    problems: list[str] = []
    checks = [partial(driver.storage.check, file, thorough=True) for file in record.files]
    checks += [
        partial(
            need(driver.storage, ImagePoints, record.domain).check_inside,
            record.inside[disk.disk.target],
            disk.name,
        )
        for disk in record.snapshot.disks
        if not disk.external
    ]
    for check in checks:
        try:
            await check()
        except Refused as error:  # damage, mostly
            problems.append(str(error))
    return tuple(problems) or await check_chains(driver, record)


async def check_chains(driver: Driver, record: SnapshotRecord) -> tuple[str, ...]:
    """Return what is wrong with the order and the structure of a snapshot's images, whose files are all there."""
    problems = []
    for disk in record.snapshot.disks:
        try:
            if problem := await chain_problem(driver.storage, record, disk):
                problems.append(problem)
            links = await driver.storage.chain(disk.disk.path, disk.disk.format)
            for link in links if disk.external or await _at_rest(driver.storage, disk.disk) else links[1:]:
                await driver.storage.check_image(link.path, link.format)
        except Refused as error:
            problems.append(str(error))
    return tuple(problems)


async def _at_rest(storage: Storage, image: DeviceDisk) -> bool:
    """Return whether nobody writes to an image: the structure of one that is written to cannot be checked."""
    try:
        await storage.chain(image.path, image.format, still=True)
    except Refused:
        return False
    return True


def _plan_trial(context: Context, domain: DomainRecord, record: SnapshotRecord, operation: Operation) -> RevertPlan:
    """Return the plan of a throw-away copy: all of its disks are files of its own.

    Raises:
        Unsupported: there is a disk that the snapshot does not hold, and that the copy would write to.
    """
    directory = context.directory(domain.name)
    disks, frozen = fresh_disks(domain, record, directory, operation.id)
    inside = {disk.disk.target: disk for disk in record.snapshot.disks if not disk.external}
    held = {*frozen, *inside}
    if shared := [disk.target for disk in disks if disk.target not in held and not disk.readonly]:
        raise Unsupported(
            f"{record.name} does not hold {', '.join(shared)}: a copy of its guest would write to that"
        )
    return RevertPlan(
        domain=domain,
        snapshot=record,
        state=DomainState.RUNNING,
        was=DomainState.INACTIVE,
        disks=tuple(
            attrs.evolve(disk, path=f"{directory}/{disk.target}.{operation.short}.qcow2")
            if disk.target in inside
            else disk
            for disk in disks
        ),
        frozen=frozen | {target: disk.disk for target, disk in inside.items()},
        way=Way.VERIFY,
        directory=str(context.run_directory(domain.name, operation.id)),
        operation=operation.id,
        inside={target: disk.name for target, disk in inside.items()},
    )


async def verify(
    context: Context, domain: str, name: str, *, boot: bool = False, ids: Collection[str] = ()
) -> VerifyReport:
    """Verify a snapshot; see `snaporch.Orchestrator.verify`."""
    operation = Operation(OperationKind.VERIFY, domain, name)
    async with context.locked(operation):
        domain_record = await context.catalog.domain(domain)
        record = await context.catalog.snapshot(domain, name)
        check_ids([record], ids)
        driver = context.driver(domain_record)
        await claim_snapshot(context, operation, record)
        problems = await check_files(driver, record)
        tried, reason = None, ""
        if boot and not problems:
            tried, reason = await _try(context, operation, domain_record, record)
    failed = (f"it does not run: {reason}",) if tried is Boot.FAILED else ()
    return VerifyReport(
        domain,
        name,
        ok=not problems and not failed,
        problems=problems or failed,
        booted={Boot.RAN: True, Boot.FAILED: False}.get(tried) if tried else None,
        files="damaged" if problems else "good",
        boot=tried,
        reason=reason,
    )


async def _try(
    context: Context, operation: Operation, domain: DomainRecord, record: SnapshotRecord
) -> tuple[Boot, str]:
    """Load a snapshot in a throw-away copy and let that run; return what became of it, and why."""
    driver, stand_ins = context.driver(domain), tuple[str, ...]()
    try:
        plan = await in_their_places(driver, _plan_trial(context, domain, record, operation))
        needed = sum(file.size for file in record.inside.values())
        await check_space(driver.storage, context.directory(domain.name), needed)
        trial = Trial(plan, context, driver, None)
        launch = Launch(record.definition, plan.disks, plan.run_directory, template=record.template)
        stand_ins = driver.stand_ins(launch)
        await context.engine.run(
            operation,
            VERIFY,
            ROLLBACK_VERIFY,
            [trial],
            plan=dumps([plan]),
            commit=trial.commit,
            finish=trial.clean_up,
        )
    except (SnaporchError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, DamagedSnapshot):
            return Boot.FAILED, str(error)
        if isinstance(cause, Refused | OSError):
            return Boot.NOT_POSSIBLE, str(error)
        if isinstance(cause, LoadFailed) and stand_ins:
            return Boot.NOT_POSSIBLE, f"{error}; the copy had {', '.join(stand_ins)}"
        return Boot.FAILED, str(error)
    return Boot.RAN, ""


async def intact(context: Context, record: SnapshotRecord) -> bool:
    """See `snaporch.Orchestrator.intact`."""
    storage = context.driver(await context.catalog.domain(record.domain)).storage
    try:
        for file in record.files:
            await storage.check(file)
        for disk in record.snapshot.disks:
            points = None if disk.external else need(storage, ImagePoints, record.domain)
            if points is not None and disk.name not in await points.inside(disk.disk.path):
                return False
    except DamagedSnapshot:
        return False
    return True
