"""Give up: end an operation that cannot be finished or undone, so that it blocks nothing. Removes nothing.

What a create, a revert or a verify has made becomes the domain's own: an overlay with data that the guest has
written becomes the disk's image. Everything else is surplus: the next delete merges it, or `fsck --repair` removes
it where it has no reader. The snapshots of a delete are gone; images that it had not merged yet are surplus, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import attrs

from snaporch.catalog import Change, merged
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import HypervisorError, NotFound, Refused, SnaporchError
from snaporch.images.chain import heir
from snaporch.model.convert import loads
from snaporch.model.domain import DomainRecord
from snaporch.model.record import GivenUp, OperationKind, OperationRecord
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.clone import ClonePlan
from snaporch.operations.create_plan import CreatePlan
from snaporch.operations.made import MadePlan
from snaporch.operations.merging import MergeJournal, Merging, as_it_is
from snaporch.operations.recover import recalled, sweep
from snaporch.operations.revert_plan import RevertPlan
from snaporch.operations.unchanged import left_on


@attrs.define
class _Answer:
    """What is found out about an operation: what to tell, and what to write."""

    kept: list[str] = attrs.field(factory=list)
    lost: list[str] = attrs.field(factory=list)
    changes: list[Change] = attrs.field(factory=list)
    dropped: list[tuple[str, str]] = attrs.field(factory=list)
    journals: list[MergeJournal] = attrs.field(factory=list)


async def _unfinished(context: Context, identifier: str) -> tuple[OperationRecord, str]:
    for record, plan in await context.catalog.unfinished():
        if record.id == identifier:
            return record, plan
    if await context.catalog.operation(identifier) is not None:
        raise Refused(f"operation {identifier} has ended: there is nothing to give up")
    raise NotFound(f"there is no operation {identifier!r}; `snaporch operations` lists all")


async def give_up(context: Context, identifier: str, *, dry_run: bool = False) -> GivenUp:
    """End an operation that cannot be mended; see `snaporch.Orchestrator.give_up`."""
    record, plan = await _unfinished(context, identifier)
    operation = recalled(record)
    async with context.locked(operation):
        answer = _Answer()
        await _LOOK[record.kind](context, operation, plan, answer)
        if not dry_run:
            change = merged(answer.changes)
            words = f"given up: {'; '.join(answer.lost) or 'nothing is lost'}"
            ended = operation.record(ended=True, error=words)
            dropped = tuple(answer.dropped)
            await context.catalog.write(attrs.evolve(change, dropped=dropped, operation=ended))
            await _seal_anew(context, operation, answer.journals)
            await _end_leftovers(context, operation)
        return GivenUp(identifier, tuple(answer.kept), tuple(answer.lost), done=not dry_run)


async def _seal_anew(context: Context, operation: Operation, journals: Iterable[MergeJournal]) -> None:
    """Take anew the checksums of images that were being merged: a merge that is cut short leaves them whole."""
    for journal in journals:
        with suppress(SnaporchError, OSError):  # `verify` says so
            record = await context.catalog.domain(journal.domain)
            await Merging(context, operation, record, None, journal).seal_anew(journal.written)


async def _end_leftovers(context: Context, operation: Operation) -> None:
    """End processes that were launched for the operation and are nobody's; what cannot be ended is for `fsck`."""
    for name in operation.domains:
        with suppress(NotFound, HypervisorError, OSError):
            await sweep(context, await context.catalog.domain(name), end=True)


async def _present(context: Context, name: str) -> DomainRecord | None:
    """Return a domain's record with the images that its disks are on; None: it is not defined any more.

    Raises:
        Refused: it runs and does not answer, so that nobody knows what it is on.
    """
    try:
        async with context.machine_of(name, hung_is_none=True) as (record, machine):
            if machine is None and record.handle is not None:
                raise Refused(f"{name} does not answer: end it first (`snaporch domain destroy {name}`)")
            return await as_it_is(record, machine)
    except NotFound:
        return None


async def _create(context: Context, _: Operation, text: str, answer: _Answer) -> None:
    for plan in loads(text, tuple[CreatePlan, ...]):
        record = await _present(context, plan.domain.name)
        answer.lost.append(f"snapshot {plan.snapshot.name} of {plan.domain.name}, which was never complete")
        if record is None:
            continue
        storage = context.driver(record).storage
        made = [path for path in plan.files if await storage.exists(path)]
        # An overlay that is there holds the newest data; where it is gone what is below it is complete.
        on = [each for each in plan.overlays if record.handle is None and each.path in made]
        active = record.active | {each.target: DeviceDisk(each.target, each.path) for each in on}
        record = left_on(attrs.evolve(record, active=active), {each.path: each.base.chain for each in on})
        answer.changes.append(Change(domains=(record,), files={record.name: tuple(made)}))
        answer.kept += [f"{disk.target} of {record.name}: on {disk.path}" for disk in record.disks]
        answer.kept += _surplus(record, made)


async def _revert(context: Context, operation: Operation, text: str, answer: _Answer) -> None:
    for plan in loads(text, tuple[RevertPlan, ...]):
        record = await _present(context, plan.domain.name)
        if record is None:
            continue
        storage = context.driver(record).storage
        fresh = {disk.path for disk in plan.disks if disk.target in plan.frozen}
        made = [path for path in sorted(fresh) if await storage.exists(path)]
        if operation.kind is OperationKind.REVERT and record.handle is None and plan.domain.handle is not None:
            answer.lost.append(f"the memory of {record.name}, whose guest is gone: it boots from its disks")
        answer.changes.append(Change(domains=(record,), files={record.name: tuple(made)}))
        answer.kept += [f"{disk.target} of {record.name}: on {disk.path}" for disk in record.disks]
        answer.kept += _surplus(record, made)
        if plan.kept:
            images = ", ".join(disk.path for disk in plan.disks if disk.target in plan.inside)
            answer.kept.append(f"the earlier state of {record.name}: as {plan.kept} inside {images}, if it exists")


def _surplus(record: DomainRecord, made: Iterable[str]) -> list[str]:
    on = {disk.path for disk in record.disks}
    return [f"{path}: `snaporch fsck {record.name} --repair` removes it" for path in made if path not in on]


async def _merges(context: Context, _: Operation, text: str, answer: _Answer) -> None:
    journal = loads(text, MergeJournal)
    for each in (journal, *journal.then):
        record = await _present(context, each.domain)
        if record is None:
            continue
        snapshots = await context.catalog.snapshots(each.domain)
        doomed = frozenset(each.doomed) & {snapshot.name for snapshot in snapshots}
        parents = {snapshot.name: snapshot.parent for snapshot in snapshots}
        orphans = (s for s in snapshots if s.parent in doomed and s.name not in doomed)
        answer.changes.append(
            Change(
                domains=(attrs.evolve(record, current=heir(parents, doomed, record.current)),),
                updated=tuple(attrs.evolve(s, parent=heir(parents, doomed, s.parent)) for s in orphans),
            )
        )
        answer.journals.append(each)
        answer.dropped += [(each.domain, name) for name in sorted(doomed)]
        answer.lost += [f"snapshot {name} of {each.domain}, as was asked for" for name in sorted(doomed)]
        answer.kept += [f"{disk.target} of {record.name}: on {disk.path}" for disk in record.disks]
        written = set(each.written)
        for snapshot in snapshots:
            if snapshot.name not in doomed and written & {file.path for file in snapshot.frozen}:
                answer.kept.append(
                    f"snapshot {snapshot.name} of {each.domain}: an image of it was being merged; "
                    f"`snaporch verify {each.domain} {snapshot.name}` says whether it is whole"
                )


async def _made(context: Context, operation: Operation, text: str, answer: _Answer) -> None:
    plan = loads(text, MadePlan)
    storage = context.driver_of(operation.who, plan.driver).storage
    answer.kept += [f"{path}, which nothing needs: remove it" for path in plan.files if await storage.exists(path)]


async def _clone(context: Context, _: Operation, text: str, answer: _Answer) -> None:
    for plan in loads(text, tuple[ClonePlan, ...]):
        name, driver = plan.name, context.driver(plan.restore.domain)
        answer.lost.append(f"clone {name}, which was never complete")
        there = sorted(await driver.storage.identities(plan.origin.files))
        answer.kept += [f"{path}: nothing needs it, and you may remove it" for path in there]
        if (handle := await driver.find(plan.restore.run_directory)) is not None:
            answer.kept.append(f"process {driver.pid(handle) or handle.id} of {name}: nothing needs it")


_LOOK = {
    OperationKind.EXPORT: _made,
    OperationKind.IMPORT: _made,
    OperationKind.CREATE: _create,
    OperationKind.REVERT: _revert,
    OperationKind.VERIFY: _revert,
    OperationKind.CLONE: _clone,
    OperationKind.DELETE: _merges,
    OperationKind.FLATTEN: _merges,
}
