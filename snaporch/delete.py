"""Delete: points are given up, and no other point, nor the guest, ever sees a difference. Read downwards.

    look            the images as they are, and the plan (snaporch.images.merge), or a refusal; touches nothing
    delete          marks the snapshots, then merges, then removes files, then records
    finish_delete   the same from wherever a delete was cut short

A delete goes forward only. Once its snapshots are marked they can no longer be reverted to, and whatever then stops
it (an error, a cancellation, a crash) leaves images in which every remaining point is whole: `recover` plans
anew from what is there and goes on. Each merge is in the catalog before the next one begins.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import trio

from snaporch.catalog.store import Change
from snaporch.context import Context
from snaporch.convert import dumps
from snaporch.drivers.base import Driver, Machine
from snaporch.engine import Operation
from snaporch.errors import NotFound, SnaporchError, Stranded, Unsupported
from snaporch.images.chain import Graph, Image, doomed_by, graph_of, heir
from snaporch.images.merge import MergePlan, MergeStep, plan_delete
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
    """

    doomed: tuple[str, ...]


# --- looking ------------------------------------------------------------------------------------------------


async def _images(driver: Driver, tips: Iterable[DeviceDisk], own: frozenset[str]) -> dict[str, Image]:
    """Return all images in the chains of `tips`, by path."""
    found: dict[str, Image] = {}
    for tip in tips:
        if tip.path in found:
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
            )
    return found


async def _others(context: Context, domain: str) -> dict[str, list[str]]:
    """Return, by name of every other domain, the images that it reads, as far as the catalog knows them."""
    paths: dict[str, list[str]] = {}
    for record in await context.catalog.domains():
        if record.name != domain:
            snapshots = await context.catalog.snapshots(record.name)
            chains = [file.path for s in snapshots for chain in s.images.values() for file in chain]
            paths[record.name] = [*chains, *(disk.path for disk in record.disks)]
    return paths


async def look(
    context: Context, record: DomainRecord, machine: Machine | None, doomed: frozenset[str]
) -> tuple[Graph, MergePlan]:
    """Return a domain's images as they are and what is to become of them; touches nothing.

    Raises:
        DamagedSnapshot: a chain is broken.
    """
    snapshots = await context.catalog.snapshots(record.name)
    points = [disk.disk for snapshot in snapshots for disk in snapshot.snapshot.disks]
    own = await context.catalog.own_files(record.name)
    images = await _images(context.driver(record), [*record.disks, *points], own)
    others = await _others(context, record.name)
    graph = graph_of(record, snapshots, images.values(), running=machine is not None, others=others)
    return graph, plan_delete(graph, doomed)


async def _doomed(context: Context, domain: str, name: str, flags: DeleteFlag) -> frozenset[str]:
    snapshots = await context.catalog.snapshots(domain)
    try:
        return doomed_by({snapshot.name: snapshot.parent for snapshot in snapshots}, name, flags)
    except NotFound:
        await context.catalog.snapshot(domain, name)  # says it with the names
        raise


# --- merging ------------------------------------------------------------------------------------------------


async def _merge(driver: Driver, machine: Machine | None, graph: Graph, step: MergeStep) -> None:
    """Do one merge, in the hypervisor or with no hypervisor near."""
    formats = {path: image.format for path, image in graph.images.items()}
    if step.where == "live":
        if machine is None:
            raise Unsupported(f"{step.top} is open in a hypervisor that is gone: plan anew")
        if step.kind == "commit":
            await machine.commit_image(step.top, step.base)
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


def _moved_disk(disk: DiskSnapshot, step: MergeStep, graph: Graph) -> DiskSnapshot:
    if step.kind != "commit" or disk.disk.path != step.top:
        return disk
    image = graph.images[step.base]
    return attrs.evolve(disk, disk=attrs.evolve(disk.disk, path=image.path, format=image.format))


async def _chain(driver: Driver, disk: DeviceDisk, known: dict[str, FileRecord]) -> tuple[FileRecord, ...]:
    links = await driver.storage.chain(disk.path, disk.format)
    return tuple([await driver.storage.seal(link.path, known.get(link.path)) for link in links])


async def _note_merge(
    context: Context, record: DomainRecord, doomed: frozenset[str], graph: Graph, step: MergeStep
) -> DomainRecord:
    """Put into the catalog what a merge has moved and changed; return the domain's record."""
    touched = {step.top, step.base, *step.repoint}
    known, updated, driver = await context.catalog.sealed(), [], context.driver(record)
    for snapshot in await context.catalog.snapshots(record.name):
        chains = {file.path for chain in snapshot.images.values() for file in chain}
        if snapshot.name in doomed or not touched & chains:
            continue
        disks = tuple(_moved_disk(disk, step, graph) for disk in snapshot.snapshot.disks)
        images = {disk.disk.target: await _chain(driver, disk.disk, known) for disk in disks}
        updated.append(attrs.evolve(snapshot, snapshot=attrs.evolve(snapshot.snapshot, disks=disks), images=images))
    active = dict(record.active)
    for disk in record.disks:
        if step.kind == "commit" and disk.path == step.top:
            base = graph.images[step.base]
            active[disk.target] = attrs.evolve(disk, path=base.path, format=base.format)
    record = attrs.evolve(record, active=active)
    await context.catalog.write(Change(domains=(record,), updated=tuple(updated)))
    return record


# --- the whole ----------------------------------------------------------------------------------------------


async def _go_on(context: Context, operation: Operation, doomed: frozenset[str]) -> MergePlan:
    """Merge, remove files, remove records: from wherever it stands."""
    async with context.machine_of(operation.domain) as (record, machine):
        driver = context.driver(record)
        graph, plan = await look(context, record, machine, doomed)
        now = record
        for number, step in enumerate(plan.steps, 1):
            context.events.publish(operation.event("progress", done=number - 1, total=len(plan.steps)))
            await _merge(driver, machine, graph, step)
            with trio.CancelScope(shield=True):  # what a merge has moved must be known before anything else happens
                now = await _note_merge(context, now, doomed, graph, step)
        snapshots = await context.catalog.snapshots(operation.domain)
        operation.machine.send(Signal.COMMIT)
        with trio.CancelScope(shield=True):
            own = await context.catalog.own_files(operation.domain)
            memory = [s.memory.path for s in snapshots if s.name in doomed and s.memory is not None]
            gone = (*plan.unlink, *(path for path in memory if path in own))
            for path in gone:
                await driver.storage.remove(path)
            await context.catalog.write(_farewell(operation, now, snapshots, doomed, gone))
    context.events.publish(operation.event())
    return plan


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


async def _forward(context: Context, operation: Operation, doomed: frozenset[str]) -> MergePlan:
    try:
        return await _go_on(context, operation, doomed)
    except (SnaporchError, OSError) as error:
        operation.machine = OperationState(State.STRANDED)
        await context.catalog.write(Change(operation=operation.record(error=str(error))))
        context.events.publish(operation.event(text=str(error)))
        raise Stranded(
            f"delete {operation.subject} of {operation.domain} was cut short: {error}",
            operation.id,
            ("every remaining snapshot is whole, merging is not finished",),
        ) from error


async def delete(
    context: Context, domain: str, name: str, flags: DeleteFlag, *, dry_run: bool = False
) -> MergePlan:
    """Delete snapshots; see `snaporch.Orchestrator.delete`."""
    operation = Operation("delete", domain, name)
    async with context.locked(operation):
        doomed = await _doomed(context, domain, name, flags)
        async with context.machine_of(domain) as (record, machine):
            _, plan = await look(context, record, machine, doomed)
        if dry_run or not doomed:
            return plan
        snapshots = await context.catalog.snapshots(domain)
        marked = tuple(attrs.evolve(s, deleting=True) for s in snapshots if s.name in doomed)
        operation.machine.send(Signal.PREPARE)
        operation.machine.send(Signal.MERGE)
        journal = dumps(DeletePlan(tuple(sorted(doomed))))
        await context.catalog.write(Change(updated=marked, operation=operation.record(), plan=journal))
        context.events.publish(operation.event())
        return await _forward(context, operation, doomed)


async def finish_delete(context: Context, operation: Operation, plan: DeletePlan) -> None:
    """Finish a delete that was cut short.

    Raises:
        Stranded: it still cannot be finished.
    """
    operation.machine = OperationState(State.MERGING)
    await _forward(context, operation, frozenset(plan.doomed))
