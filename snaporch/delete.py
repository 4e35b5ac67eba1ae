"""Delete: points are given up, and no other point, nor the guest, ever sees a difference. Read downwards.

    delete          plans, or refuses; marks the snapshots, then merges, then removes files, then records
    finish_delete   the same from wherever a delete was cut short

A delete goes forward only. Once its snapshots are marked they can no longer be reverted to, and whatever then stops
it (an error, a cancellation, a crash) leaves images in which every remaining point is whole: `recover` plans anew
from what is there and goes on. How images merge is in `snaporch.merging`.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import trio

from snaporch.catalog.store import Change
from snaporch.context import Context
from snaporch.convert import dumps
from snaporch.engine import Operation
from snaporch.errors import SnaporchError, Stranded
from snaporch.images.chain import doomed_by, heir
from snaporch.images.merge import MergePlan, plan_delete
from snaporch.inside import check_forgettable, forget, points_inside
from snaporch.merging import MergeJournal, Merging, merging
from snaporch.models import DeleteFlag, DomainRecord, MergeOptions, SnapshotRecord
from snaporch.states import OperationState, Signal, State


async def _doomed(context: Context, domain: str, names: Sequence[str], flags: DeleteFlag) -> frozenset[str]:
    for name in names:
        await context.catalog.snapshot(domain, name)
    parents = {snapshot.name: snapshot.parent for snapshot in await context.catalog.snapshots(domain)}
    return frozenset[str]().union(*(doomed_by(parents, name, flags) for name in names))


async def _memory(merges: Merging) -> tuple[str, ...]:
    """Return the memory files of the doomed snapshots, as far as they are ours."""
    catalog, domain = merges.context.catalog, merges.record.name
    own, snapshots = await catalog.own_files(domain), await catalog.snapshots(domain)
    files = (s.memory.path for s in snapshots if s.name in merges.doomed and s.memory is not None)
    return tuple(path for path in files if path in own)


async def _go_on(context: Context, operation: Operation, journal: MergeJournal) -> MergePlan:
    """Merge, remove files, remove records: from wherever it stands."""
    async with merging(context, operation, journal) as merges:
        snapshots = await context.catalog.snapshots(operation.domain)
        for image, tag in points_inside(s for s in snapshots if s.name in merges.doomed):
            await forget(merges.driver, merges.machine, merges.record.process, image, tag)
        plan = await merges.merge_surplus()
        if journal.written:
            await merges.seal_anew(journal.written)
        gone = await merges.gone([*merges.journal.unlink, *await _memory(merges)])
        snapshots = await context.catalog.snapshots(operation.domain)
        operation.machine.send(Signal.COMMIT)
        with trio.CancelScope(shield=True):
            await merges.remove(gone)
            await context.catalog.write(_farewell(operation, merges.record, snapshots, merges.doomed, gone))
    context.events.publish(operation.event())
    return attrs.evolve(plan, unlink=gone)


def _farewell(
    operation: Operation,
    record: DomainRecord,
    snapshots: tuple[SnapshotRecord, ...],
    doomed: frozenset[str],
    gone: tuple[str, ...],
) -> Change:
    """Return the last change of a delete: the records go, their children get the nearest ancestor that remains."""
    operation.machine.send(Signal.DONE)
    parents = {snapshot.name: snapshot.parent for snapshot in snapshots}
    orphans = (s for s in snapshots if s.parent in doomed and s.name not in doomed)
    return Change(
        domains=(attrs.evolve(record, current=heir(parents, doomed, record.current)),),
        updated=tuple(attrs.evolve(s, parent=heir(parents, doomed, s.parent)) for s in orphans),
        dropped=tuple((record.name, name) for name in sorted(doomed)),
        operation=operation.record(ended=True),
        gone=gone,
    )


async def _forward(context: Context, operation: Operation, journal: MergeJournal) -> MergePlan:
    try:
        return await _go_on(context, operation, journal)
    except (SnaporchError, OSError, trio.TooSlowError) as error:
        raise await _cut_short(context, operation, str(error)) from error
    except trio.Cancelled as cut:  # noqa: ASYNC103 - what cannot be undone is told, also to whoever cancelled
        if operation.machine.state is State.COMPLETE:  # it came just too late
            raise
        # It shields itself.
        raise await _cut_short(context, operation, "cancelled") from cut  # noqa: ASYNC102, ASYNC104


async def _cut_short(context: Context, operation: Operation, why: str) -> Stranded:
    """Note that a delete stands where it is, and return the error that says so."""
    operation.machine = OperationState(State.STRANDED)
    with trio.CancelScope(shield=True):
        await context.catalog.write(Change(operation=operation.record(error=why)))
    context.events.publish(operation.event(text=why))
    return Stranded(
        f"delete {operation.subject} of {operation.domain} was cut short: {why}",
        operation.id,
        ("every remaining snapshot is whole, merging is not finished",),
    )


async def delete(
    context: Context,
    domain: str,
    names: Sequence[str],
    flags: DeleteFlag,
    options: MergeOptions,
    *,
    dry_run: bool = False,
) -> MergePlan:
    """Delete snapshots; see `snaporch.Orchestrator.delete`."""
    operation = Operation("delete", domain, ", ".join(names))
    async with context.locked(operation):
        doomed = await _doomed(context, domain, names, flags)
        if not doomed:
            return MergePlan()
        marked = [s for s in await context.catalog.snapshots(domain) if s.name in doomed]
        inside = points_inside(marked)
        written = tuple(sorted({image.path for image, _ in inside}))
        journal = MergeJournal(tuple(sorted(doomed)), options, written)
        async with merging(context, operation, journal, look_only=True) as merges:
            await check_forgettable(context, domain, merges.machine, inside)
            graph = await merges.look()
            plan = plan_delete(graph, doomed)
            if dry_run:
                return attrs.evolve(plan, unlink=(*plan.unlink, *await _memory(merges)))
            await merges.check_still(graph, plan)
        operation.machine.send(Signal.PREPARE)
        operation.machine.send(Signal.MERGE)
        going = tuple(attrs.evolve(snapshot, deleting=True) for snapshot in marked)
        await context.catalog.write(Change(updated=going, operation=operation.record(), plan=dumps(journal)))
        context.events.publish(operation.event())
        return await _forward(context, operation, journal)


async def finish_delete(context: Context, operation: Operation, journal: MergeJournal) -> None:
    """Finish a delete that was cut short.

    Raises:
        Stranded: it still cannot be finished.
    """
    operation.machine = OperationState(State.MERGING)
    await _forward(context, operation, journal)
