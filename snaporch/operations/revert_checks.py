"""What a revert looks at before it touches anything."""

from __future__ import annotations

import os

import structlog

from snaporch.drivers.base import Driver, ImagePoints, Machine, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.ways import WAYS
from snaporch.errors import DamagedSnapshot, HypervisorError, Refused, Unsupported
from snaporch.images.kinds import Verb
from snaporch.model.domain import DomainState
from snaporch.model.record import EventKind, SnapshotRecord
from snaporch.model.way import Way
from snaporch.operations.checks import EMPTY_OVERLAY_BYTES, STREAM_BYTES, chain_problem, check_space
from snaporch.operations.disks import check_fresh, check_no_jobs
from snaporch.operations.readers import read_by_others
from snaporch.operations.revert_plan import RevertPlan, inside_blocker

_log = structlog.get_logger("snaporch")


async def check_revert(driver: Driver, plan: RevertPlan) -> None:
    """Check everything that can be checked before the present state is touched.

    Raises:
        DamagedSnapshot: a file is missing, or its size, checksum or chain is not what was saved.
        Unsupported: overlays over its images are refused.
        Refused: somebody else has an image of the snapshot open for writing.
        NotEnoughSpace: there is no room for the fresh overlays, or to keep what the guest holds.
    """
    storage, record = driver.storage, plan.snapshot
    if record.memory is not None:
        await storage.check(record.memory)
    for file in record.frozen:
        await storage.check(file)
    await check_fresh(storage, record, Verb.REVERT)
    for target, tag in plan.inside.items():
        await need(storage, ImagePoints, plan.domain.name).check_inside(record.inside[target], tag)
    for disk in record.snapshot.disks:
        # A guest of ours that runs may keep a frozen image open for writing without ever using it (QEMU could not
        # open it anew by a relative name, say). Nothing is lost if somebody else has it: the new one does not load.
        still = plan.was is DomainState.INACTIVE and (disk.external or WAYS[plan.way].at_rest)
        if problem := await chain_problem(storage, record, disk, still=still):
            raise DamagedSnapshot(problem, disk.disk.path)
    directories = [os.path.dirname(disk.path) for disk in plan.disks if disk.target in plan.frozen]
    needs = [(storage, directory, EMPTY_OVERLAY_BYTES) for directory in directories]
    for directory in {*directories} or {os.path.dirname(plan.directory)}:
        await storage.check_writable(directory)
    if plan.way is Way.INSIDE:
        image = next(iter(record.inside.values())).path
        needs.append((storage, os.path.dirname(image), record.definition.memory + STREAM_BYTES))
    await check_space(needs)


async def state_before(machine: Machine | None, *, force: bool) -> DomainState:
    """Return what a domain does; FORCE takes a machine that does not answer for one that is in the way."""
    if machine is None:
        return DomainState.INACTIVE
    try:
        return await machine.state()
    except HypervisorError:
        if force:
            return DomainState.RUNNING
        raise


async def check_free(context: Context, snapshot: SnapshotRecord) -> None:
    """Refuse to take images back in place that something else needs as they are."""
    if not snapshot.inside:
        return
    others = await context.catalog.snapshots(snapshot.domain)
    needed = await read_by_others(context, snapshot.domain, {file.path for file in snapshot.inside.values()})
    if why := inside_blocker(snapshot, others, needed):
        raise Unsupported(f"{snapshot.domain} cannot go back to {snapshot.name}, which is inside an image: {why}")


async def check_jobs_of_others(
    context: Context, operation: Operation, name: str, old: Machine, *, force: bool
) -> None:
    """Refuse to end what another program has the old machine do; FORCE ends it, and says so."""
    try:
        await check_no_jobs(name, old, ending=True)
    except Refused as error:
        if not force:
            raise
        text = f"{error}; --force ends that, and what it was to copy is not whole"
        context.events.publish(operation.event(EventKind.NOTE, text=text))
        _log.warning("another program's work ends with the old guest", domain=name, why=str(error))
    except HypervisorError:
        if not force:
            raise
