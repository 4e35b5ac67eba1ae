"""Delete: snapshots are removed; no other snapshot and no guest changes. Read downwards.

    delete          plans, or refuses; marks the snapshots, then merges, then removes files, then records
    finish_delete   the same from where a delete was interrupted

A delete goes forward only. Once its snapshots are marked they can no longer be reverted to. Anything that then
stops the delete (an error, a cancellation, a crash) leaves images in which every remaining snapshot is whole:
`recover` makes a new plan from the images that exist and goes on. How images merge is in
`snaporch.operations.merging`.

A group's snapshots are marked all at once, in one transaction; then its domains are worked on one after the other,
and what is still to be done is in the journal.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain

import attrs
import trio

from snaporch.catalog import Change
from snaporch.drivers.base import Storage
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.states import OperationState, Signal, State
from snaporch.errors import NotEnoughSpace, Refused, SnaporchError, Stranded
from snaporch.images.chain import Graph, doomed_by, heir
from snaporch.images.merge import plan_delete
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainRecord
from snaporch.model.merge import MergePlan
from snaporch.model.names import in_order
from snaporch.model.record import OperationKind, SnapshotRecord
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import DeleteFlag
from snaporch.operations.checks import spaces
from snaporch.operations.disks import release_marks
from snaporch.operations.group import check_alone, check_ids
from snaporch.operations.internal import check_forgettable, forget, points_inside
from snaporch.operations.merging import MergeJournal, Merging, merging
from snaporch.operations.pins import check_unpinned
from snaporch.operations.records import check_deletable, check_records


async def _doomed(
    context: Context, domain: str, names: Sequence[str], flags: DeleteFlag, ids: Collection[str]
) -> tuple[SnapshotRecord, ...]:
    for name in names:
        check_ids([await context.catalog.snapshot(domain, name)], ids)
    snapshots = await context.catalog.snapshots(domain)
    parents = {snapshot.name: snapshot.parent for snapshot in snapshots}
    doomed = frozenset[str]().union(*(doomed_by(parents, name, flags) for name in names))
    return tuple(snapshot for snapshot in snapshots if snapshot.name in doomed)


async def _memory(merges: Merging) -> tuple[str, ...]:
    """Return the files of memory and their indexes, and of TPMs' states, of the doomed, as far as they are ours."""
    catalog, domain = merges.context.catalog, merges.record.name
    own, snapshots = await catalog.own_files(domain), await catalog.snapshots(domain)
    going = [s for s in snapshots if s.name in merges.doomed]
    paths = [path for s in going if s.memory is not None for path in (s.memory.path, s.index)]
    paths += [s.tpm.path for s in going if s.tpm is not None]
    return tuple(path for path in paths if path in own)


async def _go_on(context: Context, operation: Operation, journal: MergeJournal) -> MergePlan:
    """Merge, remove files, remove records, of the journal's domain: from wherever it was interrupted."""
    async with merging(context, operation, journal) as merges:
        name = merges.record.name
        snapshots = await context.catalog.snapshots(name)
        for image, tag in points_inside(s for s in snapshots if s.name in merges.doomed):
            await forget(merges.driver, merges.machine, merges.record.handle, image, tag)
        # The snapshots are marked: nobody goes back to them any more, and what their memory takes may be needed.
        await merges.remove(await merges.gone(await _memory(merges)))
        plan = await merges.merge_surplus()
        if journal.written:
            await merges.seal_anew(journal.written)
        gone = await merges.gone([*merges.journal.unlink, *await _memory(merges)])
        snapshots = await context.catalog.snapshots(name)
        if last := not journal.then:
            operation.machine.send(Signal.COMMIT)
        with trio.CancelScope(shield=True):
            await merges.remove(gone)
            if last:
                operation.machine.send(Signal.DONE)
            farewell = _farewell(merges.record, snapshots, merges.doomed, gone)
            left = None if last else dumps(_linked(journal.then))
            await context.catalog.write(attrs.evolve(farewell, operation=operation.record(ended=last), plan=left))
            frozen = (file.path for s in snapshots if s.name in merges.doomed for file in s.frozen)
            await release_marks(context, merges.driver.storage, frozen)
    context.events.publish(operation.event())
    return attrs.evolve(plan, unlink=gone)


def _linked(journals: Sequence[MergeJournal]) -> MergeJournal:
    """Return the first of several journals, with the others to come after it."""
    return attrs.evolve(journals[0], then=tuple(journals[1:]))


def _farewell(
    record: DomainRecord, snapshots: Sequence[SnapshotRecord], doomed: frozenset[str], gone: tuple[str, ...]
) -> Change:
    """Return what goes from the catalog: the records; their children get the nearest ancestor that remains."""
    parents = {snapshot.name: snapshot.parent for snapshot in snapshots}
    orphans = (s for s in snapshots if s.parent in doomed and s.name not in doomed)
    return Change(
        domains=(attrs.evolve(record, current=heir(parents, doomed, record.current)),),
        updated=tuple(attrs.evolve(s, parent=heir(parents, doomed, s.parent)) for s in orphans),
        dropped=tuple((record.name, name) for name in sorted(doomed)),
        gone=gone,
    )


async def _forward(context: Context, operation: Operation, journal: MergeJournal) -> dict[str, MergePlan]:
    """Do all that is in the journal, domain after domain; return the plans as they were carried out."""
    plans: dict[str, MergePlan] = {}
    left: tuple[MergeJournal, ...] = (journal, *journal.then)
    try:
        while left:
            plans[left[0].domain] = await _go_on(context, operation, _linked(left))
            left = left[1:]
    except (SnaporchError, OSError, trio.TooSlowError) as error:
        raise await _cut_short(context, operation, str(error)) from error
    except trio.Cancelled as cut:  # noqa: ASYNC103 - what cannot be undone is told, also to whoever cancelled
        if operation.machine.state is State.COMPLETE:  # it came just too late
            raise
        # It shields itself.
        raise await _cut_short(context, operation, "cancelled") from cut  # noqa: ASYNC102, ASYNC104
    return plans


async def _cut_short(context: Context, operation: Operation, why: str) -> Stranded:
    """Note that a delete is interrupted here, and return the error that says so."""
    operation.machine = OperationState(State.STRANDED)
    with trio.CancelScope(shield=True):
        await context.catalog.write(Change(operation=operation.record(error=why)))
    context.events.publish(operation.event(text=why))
    return Stranded(
        f"delete {operation.subject} of {operation.who} was interrupted: {why}",
        operation.id,
        ("every remaining snapshot is whole, merging is not finished",),
    )


async def delete(
    context: Context,
    chosen: Mapping[str, Sequence[str]],
    flags: DeleteFlag,
    options: MergeOptions,
    *,
    ids: Collection[str] = (),
    decided: Collection[SnapshotRecord] = (),
    dry_run: bool = False,
) -> dict[str, MergePlan]:
    """Delete snapshots, chosen by domain; see `snaporch.Orchestrator.delete_group`.

    With `decided`, only those go that still are what somebody has looked at before: see `_check_as_decided`.
    """
    subject = ", ".join(dict.fromkeys(chain.from_iterable(chosen.values())))
    operation = Operation(OperationKind.DELETE, in_order(chosen), subject)
    async with context.locked(operation, only_looks=dry_run):
        doomed = {name: await _doomed(context, name, chosen[name], flags, ids) for name in operation.domains}
        marked = tuple(chain.from_iterable(doomed.values()))
        if DeleteFlag.ALONE not in flags:
            await check_alone(context.catalog, marked, "delete")
        await check_unpinned(context, marked)
        _check_as_decided(marked, decided)
        journals = [_journal(name, going, options) for name, going in doomed.items() if going]
        plans = dict.fromkeys(doomed, MergePlan())
        for journal in journals:
            plans[journal.domain] = await _plan(context, operation, journal, dry_run=dry_run)
        if dry_run or not journals:
            return plans
        operation.machine.send(Signal.PREPARE)
        operation.machine.send(Signal.MERGE)
        going = tuple(attrs.evolve(snapshot, deleting=True) for snapshot in marked)
        journal = _linked(journals)
        begun = Change(updated=going, operation=operation.record(), begins=True, plan=dumps(journal))
        await context.catalog.write(begun)
        context.events.publish(operation.event())
        return plans | await _forward(context, operation, journal)


def _check_as_decided(snapshots: Iterable[SnapshotRecord], decided: Collection[SnapshotRecord]) -> None:
    """Refuse what was pinned, or was given another end, between the decision to delete it and the lock.

    Raises:
        Refused: one was.
    """
    before = {each.id: each for each in decided}
    for each in snapshots if decided else ():
        known = before.get(each.id, each)
        if (each.pinned, each.expires) != (known.pinned, known.expires):
            what = "pinned" if each.pinned else "given another end"
            raise Refused(f"{each.name} of {each.domain} was {what} just now: it stays")


def _journal(domain: str, going: Sequence[SnapshotRecord], options: MergeOptions) -> MergeJournal:
    written = {image.path for image, _ in points_inside(going)}
    return MergeJournal(domain, tuple(sorted(each.name for each in going)), options, tuple(sorted(written)))


async def _plan(context: Context, operation: Operation, journal: MergeJournal, *, dry_run: bool) -> MergePlan:
    """Return what is to be done with a domain, or refuse; touches nothing."""
    async with merging(context, operation, journal, look_only=True, unlocked=dry_run) as merges:
        going = [s for s in await context.catalog.snapshots(journal.domain) if s.name in merges.doomed]
        await check_records(context, merges.record)
        check_deletable(going)
        await check_forgettable(context, journal.domain, merges.machine, points_inside(going))
        if dry_run:
            plan = plan_delete(await merges.look(), merges.doomed)
        else:
            graph, plan = await merges.look_and_claim()
            await check_room(merges, graph, plan, going)
        return attrs.evolve(plan, unlink=(*plan.unlink, *await _memory(merges)))


async def check_room(merges: Merging, graph: Graph, plan: MergePlan, going: Sequence[SnapshotRecord]) -> None:
    """Refuse merges that may not fit: what they write is counted as all new, and what goes first is taken off.

    Raises:
        NotEnoughSpace: with both figures, and the names of snapshots whose deletion makes room without needing any.
    """
    storage, own = merges.driver.storage, await merges.context.catalog.own_files(merges.record.name)
    needs = []
    for step in plan.steps:
        image = graph.images[step.survivor]  # it cannot become larger than what a guest sees of it
        more = min(step.bytes, max(0, image.virtual_size - image.allocated))
        needs.append((storage, os.path.dirname(step.survivor), more))
    for device, space in (await spaces(needs)).items():
        free = space.free + await _freed_by_memory(storage, device, going, own)
        if space.needed > free:
            names = await _makes_room(merges, graph, device, space.needed - free)
            raise NotEnoughSpace(space.needed, free, space.directory, names)


async def _freed_by_memory(
    storage: Storage, device: str, snapshots: Iterable[SnapshotRecord], own: frozenset[str]
) -> int:
    files = [s.memory for s in snapshots if s.memory is not None and s.memory.path in own]
    return sum([file.size for file in files if (await storage.free(os.path.dirname(file.path)))[0] == device])


async def _makes_room(merges: Merging, graph: Graph, device: str, short: int) -> tuple[tuple[str, ...], ...]:
    """Return which snapshots can be deleted without a merge and free enough on a device.

    Returns:
        Names, each of which does by itself; where none does, a few that do so one after the other; or nothing.
    """
    freed = partial(_freed, merges, graph, device)
    known = await merges.context.catalog.readable_snapshots(merges.record.name)
    others = [each for each in known if each.name not in merges.doomed]
    alone = {each.name: await freed([each]) for each in others}
    if enough := tuple((name,) for name, size in alone.items() if size >= short):
        return enough
    chosen, most = list[SnapshotRecord](), 0
    for each in reversed(others):  # a leaf makes a leaf of its parent
        if (size := await freed([*chosen, each])) > most:
            chosen, most = [*chosen, each], size
        if most >= short:
            return (tuple(each.name for each in chosen),)
    return ()


async def _freed(merges: Merging, graph: Graph, device: str, going: Sequence[SnapshotRecord]) -> int:
    """Return what deleting snapshots frees on a device; 0 where that would have to merge something."""
    storage, plan = merges.driver.storage, plan_delete(graph, {each.name for each in going})
    if plan.steps:
        return 0
    own = await merges.context.catalog.own_files(merges.record.name)
    freed = await _freed_by_memory(storage, device, going, own)
    for path in plan.unlink:
        if path in graph.images and (await storage.free(os.path.dirname(path)))[0] == device:
            freed += graph.images[path].allocated
    return freed


async def finish_delete(context: Context, operation: Operation, journal: MergeJournal) -> None:
    """Finish a delete that was cut short.

    Raises:
        Stranded: it still cannot be finished.
    """
    operation.machine = OperationState(State.MERGING)
    await _forward(context, operation, journal)
