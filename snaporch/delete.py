"""Delete: points are given up, and no other point, nor the guest, ever sees a difference. Read downwards.

    look            the images as they are, and the plan (snaporch.images.merge), or a refusal; touches nothing
    delete          marks the snapshots, then merges, then removes files, then records
    finish_delete   the same from wherever a delete was cut short

A delete goes forward only. Once its snapshots are marked they can no longer be reverted to, and whatever then stops
it (an error, a cancellation, a crash) leaves images in which every remaining point is whole: `recover` plans
anew from what is there and goes on. Each merge is in the catalog before the next one begins. Two things cannot be
seen from the images afterwards, so the journal has them before the first merge: which files were written to (their
checksums are no longer right), and which go in the end (what was merged away is in no chain any more).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import trio

from snaporch.catalog.store import Change, files_of
from snaporch.context import Context
from snaporch.convert import dumps
from snaporch.drivers.base import Driver, Machine
from snaporch.engine import Operation
from snaporch.errors import SnaporchError, Stranded, Unsupported
from snaporch.images.chain import Graph, Image, doomed_by, graph_of, heir
from snaporch.images.merge import MergePlan, MergeStep, plan_delete
from snaporch.inside import check_forgettable, forget, points_inside
from snaporch.models import (
    DeleteFlag,
    DeviceDisk,
    DiskSnapshot,
    DomainRecord,
    FileRecord,
    SnapshotRecord,
)
from snaporch.states import OperationState, Signal, State


@attrs.frozen
class DeletePlan:
    """What the journal holds of a delete: merges are planned anew from the images as they are.

    Attributes:
        doomed: names of the snapshots.
        written: images that merges may have written to.
        unlink: files that were to go.
    """

    doomed: tuple[str, ...]
    written: tuple[str, ...] = ()
    unlink: tuple[str, ...] = ()

    def going_on(self, plan: MergePlan) -> DeletePlan:
        """Return the journal for a plan that is about to be carried out."""
        written = {path for step in plan.steps for path in (step.survivor, *step.repoint)}
        return DeletePlan(
            self.doomed,
            tuple(sorted({*self.written, *written})),
            tuple(dict.fromkeys([*plan.unlink, *self.unlink])),
        )


# --- looking ------------------------------------------------------------------------------------------------


async def _images(
    driver: Driver, tips: Iterable[DeviceDisk], own: frozenset[str], given_up: frozenset[str] = frozenset()
) -> dict[str, Image]:
    """Return all images in the chains of `tips`, by path; of `given_up` ones only those that are still there."""
    found: dict[str, Image] = {}
    for tip in tips:
        if tip.path in found or (tip.path in given_up and not await driver.storage.exists(tip.path)):
            continue
        chain = await driver.storage.inspect(tip.path, tip.format)
        for link, backing in zip(chain, [*chain[1:], None], strict=True):
            found[link.path] = Image(
                link.path,
                link.format,
                backing.path if backing else None,
                allocated=link.allocated,
                virtual_size=link.virtual_size,
                own=link.path in own,
                inside=await driver.storage.inside(link.path) if link.path in own else (),
            )
    return found


def _points(snapshots: Iterable[SnapshotRecord]) -> list[DeviceDisk]:
    return [disk.disk for snapshot in snapshots for disk in snapshot.snapshot.disks]


async def look(
    context: Context, record: DomainRecord, machine: Machine | None, doomed: frozenset[str]
) -> tuple[Graph, MergePlan]:
    """Return a domain's images as they are and what is to become of them; touches nothing.

    Raises:
        DamagedSnapshot: a chain is broken.
    """
    snapshots = await context.catalog.snapshots(record.name)
    own = await context.catalog.own_files(record.name)
    given_up = frozenset(disk.path for disk in _points(s for s in snapshots if s.deleting)) - {
        disk.path for disk in [*record.disks, *_points(s for s in snapshots if not s.deleting)]
    }
    images = await _images(context.driver(record), [*record.disks, *_points(snapshots)], own, given_up)
    others = await context.read_elsewhere(record.name)
    there = [s for s in snapshots if all(disk.path in images for disk in _points([s]))]
    graph = graph_of(record, there, images.values(), running=machine is not None, others=others)
    plan = plan_delete(graph, doomed)
    memory = (s.memory.path for s in snapshots if s.name in doomed and s.memory is not None)
    return graph, attrs.evolve(plan, unlink=(*plan.unlink, *(path for path in memory if path in own)))


async def _as_it_is(record: DomainRecord, machine: Machine | None) -> DomainRecord:
    """Return a domain's record with the images that its disks are on, as the machine has them."""
    if machine is None:
        return record
    now = {disk.target: disk for disk in await machine.disks()}
    active = dict(record.active)
    for disk in record.disks:
        found = now.get(disk.target)
        if found is not None and found.active != disk.path and not disk.readonly:
            active[disk.target] = attrs.evolve(disk, path=found.active, format=found.format)
    return attrs.evolve(record, active=active)


async def _doomed(context: Context, domain: str, names: Sequence[str], flags: DeleteFlag) -> frozenset[str]:
    for name in names:
        await context.catalog.snapshot(domain, name)
    parents = {snapshot.name: snapshot.parent for snapshot in await context.catalog.snapshots(domain)}
    return frozenset[str]().union(*(doomed_by(parents, name, flags) for name in names))


# --- merging ------------------------------------------------------------------------------------------------


async def _merge(
    context: Context, record: DomainRecord, machine: Machine | None, graph: Graph, step: MergeStep
) -> None:
    """Do one merge, in the hypervisor or with no hypervisor near."""
    driver = context.driver(record)

    async def settled() -> None:
        await context.catalog.write(Change(domains=(_moved_domain(record, step, graph),)))

    formats = {path: image.format for path, image in graph.images.items()}
    if step.where == "live":
        if machine is None:
            raise Unsupported(f"{step.top} is open in a hypervisor that is gone: plan anew")
        if step.kind == "commit":
            await machine.commit_image(step.top, step.base, settled=settled)
        else:
            await machine.stream_image(step.top, step.new_backing)
        above = [path for path in step.repoint if path not in graph.opened]
    else:
        backing = DeviceDisk("", step.new_backing, formats[step.new_backing]) if step.new_backing else None
        if step.kind == "commit":
            await driver.storage.commit_image(step.top, step.base)
        else:
            await driver.storage.rebase(step.top, backing, content=True)
        above = list(step.repoint)
    for path in above:
        await driver.storage.rebase(path, DeviceDisk("", step.base, formats[step.base]), content=False)


def _moved_domain(record: DomainRecord, step: MergeStep, graph: Graph) -> DomainRecord:
    """Return a domain's record after a merge: a disk on what was committed is on what it went into."""
    active = dict(record.active)
    for disk in record.disks:
        if step.kind == "commit" and disk.path == step.top:
            base = graph.images[step.base]
            active[disk.target] = attrs.evolve(disk, path=base.path, format=base.format)
    return attrs.evolve(record, active=active)


def _moved_disk(disk: DiskSnapshot, step: MergeStep, graph: Graph) -> DiskSnapshot:
    if step.kind != "commit" or disk.disk.path != step.top:
        return disk
    image = graph.images[step.base]
    return attrs.evolve(disk, disk=attrs.evolve(disk.disk, path=image.path, format=image.format))


async def _chain(driver: Driver, disk: DiskSnapshot, known: dict[str, FileRecord]) -> tuple[FileRecord, ...]:
    links = await driver.storage.chain(disk.disk.path, disk.disk.format)
    sealed = links if disk.external else links[1:]  # an image with the point inside may change
    return tuple([await driver.storage.seal(link.path, known.get(link.path)) for link in sealed])


async def _note_merge(
    context: Context, record: DomainRecord, doomed: frozenset[str], graph: Graph, step: MergeStep
) -> DomainRecord:
    """Put into the catalog what a merge has moved and changed; return the domain's record."""
    touched = {step.top, step.base, *step.repoint}
    updated, driver, snapshots = [], context.driver(record), await context.catalog.snapshots(record.name)
    known = await context.catalog.sealed(file.path for file in files_of(snapshots))
    for snapshot in snapshots:
        chains = {file.path for chain in snapshot.images.values() for file in chain}
        if snapshot.name in doomed or not touched & chains:
            continue
        disks = tuple(_moved_disk(disk, step, graph) for disk in snapshot.snapshot.disks)
        images = {disk.disk.target: await _chain(driver, disk, known) for disk in disks}
        updated.append(attrs.evolve(snapshot, snapshot=attrs.evolve(snapshot.snapshot, disks=disks), images=images))
    record = _moved_domain(record, step, graph)
    await context.catalog.write(Change(domains=(record,), updated=tuple(updated)))
    return record


async def _seal_anew(
    context: Context, record: DomainRecord, doomed: frozenset[str], written: frozenset[str]
) -> None:
    """Put into the catalog what merges changed that were cut short before it knew."""
    updated, snapshots = [], await context.catalog.snapshots(record.name)
    known = await context.catalog.sealed(file.path for file in files_of(snapshots))
    for snapshot in snapshots:
        if snapshot.name not in doomed and written & {file.path for file in snapshot.frozen}:
            driver, disks = context.driver(record), snapshot.snapshot.disks
            images = {disk.disk.target: await _chain(driver, disk, known) for disk in disks}
            updated.append(attrs.evolve(snapshot, images=images))
    await context.catalog.write(Change(updated=tuple(updated)))


async def _still_read(context: Context, record: DomainRecord, doomed: frozenset[str]) -> frozenset[str]:
    """Return all files that anything but the doomed snapshots reads."""
    points = _points(s for s in await context.catalog.snapshots(record.name) if s.name not in doomed)
    images = await _images(context.driver(record), [*record.disks, *points], frozenset())
    others = await context.read_elsewhere(record.name)
    return frozenset({*images, *(path for paths in others.values() for path in paths)})


# --- the whole ----------------------------------------------------------------------------------------------


async def _go_on(context: Context, operation: Operation, journal: DeletePlan) -> MergePlan:
    """Merge, remove files, remove records: from wherever it stands."""
    doomed = frozenset(journal.doomed)
    async with context.machine_of(operation.domain) as (record, machine):
        if machine is not None:
            await machine.settle_merges({disk.target: disk.path for disk in record.disks})
        now = await _as_it_is(record, machine)
        snapshots = await context.catalog.snapshots(record.name)
        for image, tag in points_inside(s for s in snapshots if s.name in doomed):
            await forget(context.driver(now), machine, now.process, image, tag)
        driver = context.driver(now)
        graph, plan = await look(context, now, machine, doomed)
        goes_on, before = journal.going_on(plan), frozenset(journal.written)
        change = Change(domains=(now,), operation=operation.record(), plan=dumps(goes_on))
        await context.catalog.write(change)
        done = 0
        for step in plan.steps:
            context.events.publish(operation.event("progress", done=done, total=plan.bytes))
            await _merge(context, now, machine, graph, step)
            with trio.CancelScope(shield=True):  # what a merge has moved must be known before anything else happens
                now = await _note_merge(context, now, doomed, graph, step)
            done += step.bytes
        if before:
            await _seal_anew(context, now, doomed, before)
        kept = await _still_read(context, now, doomed)
        own = await context.catalog.own_files(operation.domain)
        gone = tuple(path for path in goes_on.unlink if path in own and path not in kept)
        snapshots = await context.catalog.snapshots(operation.domain)
        operation.machine.send(Signal.COMMIT)
        with trio.CancelScope(shield=True):
            for path in gone:
                await driver.storage.remove(path)
            await context.catalog.write(_farewell(operation, now, snapshots, doomed, gone))
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


async def _forward(context: Context, operation: Operation, journal: DeletePlan) -> MergePlan:
    try:
        return await _go_on(context, operation, journal)
    except (SnaporchError, OSError, trio.TooSlowError) as error:
        raise await _cut_short(context, operation, str(error)) from error
    except trio.Cancelled as cut:  # noqa: ASYNC103 - what cannot be undone is told, also to whoever cancelled
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
    context: Context, domain: str, names: Sequence[str], flags: DeleteFlag, *, dry_run: bool = False
) -> MergePlan:
    """Delete snapshots; see `snaporch.Orchestrator.delete`."""
    operation = Operation("delete", domain, ", ".join(names))
    async with context.locked(operation):
        doomed = await _doomed(context, domain, names, flags)
        if not doomed:
            return MergePlan()
        async with context.machine_of(domain) as (record, machine):
            marked = [s for s in await context.catalog.snapshots(domain) if s.name in doomed]
            inside = points_inside(marked)
            await check_forgettable(context, domain, machine, inside)
            graph, plan = await look(context, await _as_it_is(record, machine), machine, doomed)
        if dry_run:
            return plan
        for step in plan.steps:
            if step.where == "offline":  # refused before anything is touched, where somebody else has them open
                await context.driver(record).storage.chain(step.top, graph.images[step.top].format, still=True)
        operation.machine.send(Signal.PREPARE)
        operation.machine.send(Signal.MERGE)
        journal = DeletePlan(tuple(sorted(doomed)), written=tuple(sorted({image.path for image, _ in inside})))
        going = tuple(attrs.evolve(snapshot, deleting=True) for snapshot in marked)
        await context.catalog.write(Change(updated=going, operation=operation.record(), plan=dumps(journal)))
        context.events.publish(operation.event())
        return await _forward(context, operation, journal)


async def finish_delete(context: Context, operation: Operation, plan: DeletePlan) -> None:
    """Finish a delete that was cut short.

    Raises:
        Stranded: it still cannot be finished.
    """
    operation.machine = OperationState(State.MERGING)
    await _forward(context, operation, plan)
