"""Verify: is a snapshot still what was saved, and does it run?

Without `boot` it reads every file of the snapshot in full. With it, a throw-away copy of the guest runs for a few
seconds: see `snaporch.operations.trial`. Neither the domain nor the snapshot is touched.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from snaporch.drivers.base import Driver, ImagePoints, Launch, Storage, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.ways import WAYS
from snaporch.errors import DamagedSnapshot, LoadFailed, Refused, SnaporchError
from snaporch.images.kinds import Verb
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainRecord
from snaporch.model.record import Boot, OperationKind, SnapshotRecord, VerifyReport
from snaporch.model.rfc import DeviceDisk
from snaporch.model.way import Way
from snaporch.operations.checks import chain_problem, check_space
from snaporch.operations.disks import check_fresh, claim_snapshot
from snaporch.operations.group import check_ids
from snaporch.operations.records import check_ours
from snaporch.operations.restoring import in_their_places
from snaporch.operations.trial import Trial, plan_trial


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
        check_ours(record)
        directory = context.directory(domain.name)
        await check_fresh(driver.storage, record, Verb.VERIFY)
        plan = plan_trial(domain, record, directory=directory, operation=operation.id)
        plan = await in_their_places(driver, plan)
        needed = sum(file.size for file in record.inside.values())
        await check_space([(driver.storage, directory, needed)])
        trial = Trial(plan, operation, context, driver, None)
        launch = Launch(record.definition, plan.disks, plan.run_directory, template=record.template, tpm=plan.tpm)
        stand_ins = driver.stand_ins(launch)
        await context.engine.run(
            operation,
            WAYS[Way.VERIFY].phases,
            WAYS[Way.VERIFY].rollback,
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
