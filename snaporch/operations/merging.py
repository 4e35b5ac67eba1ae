"""Merges of a domain's images, for delete and flatten.

A plan (`snaporch.images.merge`) is carried out step by step. After each step the catalog records what moved, before
the next step begins; anything that stops it (an error, a cancellation, a crash) leaves images in which every point
is whole. Two things cannot be seen from the images afterwards, so the journal has them before the first merge:
which files were written to (their checksums are no longer right), and which go in the end (what was merged away is
in no chain).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager

import attrs
import trio

from snaporch.catalog import Change
from snaporch.catalog.writing import files_of
from snaporch.drivers.base import (
    Driver,
    GuestVerb,
    ImagePoints,
    LiveCopies,
    LiveMerges,
    Machine,
    OfflineMerges,
    Overlays,
    PivotNote,
    Progress,
    Storage,
    has,
    need,
)
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.verdict import STAY
from snaporch.errors import NotConverging, Refused, Unsupported
from snaporch.images import moves
from snaporch.images.chain import Copies, Graph, Image, graph_of
from snaporch.images.kinds import Traced, Verb
from snaporch.images.merge import plan_delete
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainRecord
from snaporch.model.formats import versioned
from snaporch.model.merge import MergeKind, MergePlan, MergeStep, Where
from snaporch.model.record import EventKind, FileRecord, SnapshotRecord
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import DeviceDisk, DiskSnapshot
from snaporch.operations.checks import check_verb
from snaporch.operations.claims import claim
from snaporch.operations.disks import check_no_jobs
from snaporch.operations.readers import Readers, check_unopened, kept_for, marked_elsewhere, processes_of, readers
from snaporch.operations.unchanged import check_below, check_frozen, looked_up


@versioned("merge-journal")
@attrs.frozen
class MergeJournal:
    """What the journal holds: merges are planned anew from the images as they are.

    Attributes:
        domain: whose images these are.
        doomed: names of the snapshots that go.
        options: how to merge; recovery uses them, too.
        written: images that merges may have written to.
        unlink: files that were to go.
        then: of a group, what comes after this in the same operation: one for each of the other domains.
    """

    domain: str
    doomed: tuple[str, ...] = ()
    options: MergeOptions = attrs.field(factory=MergeOptions)
    written: tuple[str, ...] = ()
    unlink: tuple[str, ...] = ()
    then: tuple[MergeJournal, ...] = ()

    def going_on(self, plan: MergePlan) -> MergeJournal:
        """Return the journal for a plan that is about to be carried out."""
        written = set[str]().union(*(moves.written(step) for step in plan.steps))
        return attrs.evolve(
            self,
            written=tuple(sorted({*self.written, *written})),
            unlink=tuple(dict.fromkeys([*plan.unlink, *self.unlink])),
        )


# --- looking ------------------------------------------------------------------------------------------------------


async def _images(
    driver: Driver, tips: Iterable[DeviceDisk], own: frozenset[str], given_up: frozenset[str] = frozenset()
) -> dict[str, Image]:
    """Return all images in the chains of `tips`, by path; of `given_up` ones only those that are still there."""
    found: dict[str, Image] = {}
    storage = driver.storage
    points = need(storage, ImagePoints, "images") if has(storage, ImagePoints) else None
    for tip in tips:
        if tip.path in found or (tip.path in given_up and not await driver.storage.exists(tip.path)):
            continue
        chain = await driver.storage.inspect(tip.path, tip.format)
        traced = {link.path: link for link in await driver.storage.trace(tip.path, tip.format)}
        if away := [link.path for link in chain if link.path not in traced]:
            raise Refused(f"{away[0]} is not below {tip.path} any more: somebody exchanges images just now")
        for link, backing in zip(chain, [*chain[1:], None], strict=True):
            found[link.path] = Image(
                link.path,
                link.format,
                backing.path if backing else None,
                allocated=link.allocated,
                virtual_size=link.virtual_size,
                own=link.path in own,
                inside=await points.inside(link.path) if points is not None and link.format == "qcow2" else (),
                identity=traced[link.path].identity,
                odd=await _odd(storage, traced[link.path]),
            )
    return found


async def _odd(storage: Storage, link: Traced) -> str:
    """Return why an image must stay as it is, or an empty string."""
    why = link.refused(Verb.MERGE).partition(": ")[2]
    return why or ("its file system is read-only" if await storage.is_read_only(link.path) else "")


def _other_names(images: Iterable[Image]) -> dict[str, str]:
    """Return the images that are in the chains under two names, each with the other one in words."""
    names: dict[str, list[str]] = {}
    for image in images:
        names.setdefault(image.identity, []).append(image.path)
    pairs = ((found[number], found[number - 1]) for found in names.values() for number in range(len(found)))
    return {path: f"who knows it as {other}" for path, other in pairs if path != other}


def _points(snapshots: Iterable[SnapshotRecord]) -> list[DeviceDisk]:
    return [disk.disk for snapshot in snapshots for disk in snapshot.snapshot.disks]


def _copies(machine: Machine | None) -> Copies:
    if machine is None or (has(machine, LiveCopies) and machine.capabilities.copies_into_middle):
        return Copies.INTO_ANY
    return Copies.INTO_ACTIVE if has(machine, LiveCopies) else Copies.INTO_NONE


async def as_it_is(record: DomainRecord, machine: Machine | None) -> DomainRecord:
    """Return a domain's record with the images that its disks are on, as the machine has them."""
    if machine is None:
        return record
    now = {disk.target: disk for disk in await machine.disks()}
    active = dict(record.active)
    for disk in record.disks:
        found = now.get(disk.target)
        if found is not None and found.active != disk.path and not disk.readonly:
            active[disk.target] = attrs.evolve(disk, path=found.active, format=found.format)
    moved = {disk.path for disk in active.values()} - {disk.path for disk in record.active.values()}
    below = {path: chain for path, chain in record.below.items() if path not in moved}
    return attrs.evolve(record, active=active, below=below)


async def _chain(driver: Driver, disk: DiskSnapshot, known: dict[str, FileRecord]) -> tuple[FileRecord, ...]:
    """Return a point's frozen images; what is not known of them is then."""
    links = await driver.storage.chain(disk.disk.path, disk.disk.format)
    frozen = [link.path for link in (links if disk.external else links[1:])]  # one with the point inside may change
    for path in frozen:
        known[path] = await driver.storage.seal(path, known.get(path))
    return tuple(known[path] for path in frozen)


# --- merging ------------------------------------------------------------------------------------------------------


@attrs.define
class Merging:
    """One domain's images while an operation that has its lock merges them; `merging` gives one.

    Attributes:
        context: the orchestrator's.
        operation: whose merges these are.
        record: the domain's, kept up to date.
        machine: the domain's, or None.
        journal: what it says now.
        done: the merges so far.
        outrun: images that the guest would not let merge with what it writes to.
        others: who else reads what, as the last look has found it.
        sealed: images that were merged, and that the catalog knows as they are now.
    """

    context: Context
    operation: Operation
    record: DomainRecord
    machine: Machine | None
    journal: MergeJournal
    done: list[MergeStep] = attrs.field(factory=list)
    outrun: set[str] = attrs.field(factory=set)
    others: Readers = attrs.field(factory=Readers)
    sealed: set[str] = attrs.field(factory=set)

    @property
    def doomed(self) -> frozenset[str]:
        """Names of the snapshots that are given up."""
        return frozenset(self.journal.doomed)

    @property
    def driver(self) -> Driver:
        """The domain's driver."""
        return self.context.driver(self.record)

    async def look(self) -> Graph:
        """Return the images as they are; touches nothing.

        Raises:
            DamagedSnapshot: a chain is broken.
        """
        snapshots = await self.context.catalog.snapshots(self.record.name)
        own = await self.context.catalog.own_files(self.record.name)
        given_up = frozenset(disk.path for disk in _points(s for s in snapshots if s.deleting)) - {
            disk.path for disk in [*self.record.disks, *_points(s for s in snapshots if not s.deleting)]
        }
        images = await _images(self.driver, [*self.record.disks, *_points(snapshots)], own, given_up)
        there = [s for s in snapshots if all(disk.path in images for disk in _points([s]))]
        needed = _other_names(images.values()) | await self._needed(images.values())
        running, copies = self.machine is not None, _copies(self.machine)
        return graph_of(self.record, there, images.values(), running=running, needed=needed, copies=copies)

    async def _needed(self, images: Iterable[Image]) -> dict[str, str]:
        """Return the images that others read, each with one of these in words."""
        self.others = await readers(self.context, {self.record.name})
        found = {image.path: self.others.of(image.identity) for image in images}
        for path in [path for path, who in found.items() if not who]:
            found[path] = await marked_elsewhere(self.context, self.driver.storage, path)
        return {path: who for path, who in found.items() if who}

    async def check_alone(self, graph: Graph, plan: MergePlan) -> None:
        """Refuse what can be seen to fail, before anything is touched.

        Raises:
            Unsupported: the hypervisor, or qemu-img where no process has the image open, cannot merge that.
            Refused: anyone else may read what is to be written to or removed, or has it open.
        """
        what = f"{self.operation.kind} {self.operation.subject} of {self.record.name}".replace("  ", " ")
        touched = moves.touched(plan)
        if touched:
            self.others.check_seen(what)
            await self._check_unchanged(graph, touched.union(*(moves.read(step, graph) for step in plan.steps)))
        for step in plan.steps:
            self._check_able(step)
            if step.where is Where.OFFLINE:
                await self.driver.storage.chain(step.top, graph.images[step.top].format, still=True)
        if self.machine is not None and plan.steps:
            await check_no_jobs(self.record.name, self.machine)
        images = {graph.images[path].identity: path for path in touched}
        await check_unopened(self.driver.storage, images, self._processes, what)

    async def _check_unchanged(self, graph: Graph, touched: Collection[str]) -> None:
        """Refuse to merge what was changed behind snaporch's back, but for what an earlier try has written."""
        storage, record = self.driver.storage, self.record
        if self.journal.written:
            return
        chains = [
            [image.path for image in graph.chain(disk.path)] for disk in record.disks if disk.path in graph.images
        ]
        await check_below(storage, record, chains)
        stay = [s for s in await self.context.catalog.snapshots(record.name) if s.name not in self.doomed]
        await check_frozen(storage, record.name, stay, touched)

    @property
    def _processes(self) -> set[int]:
        return processes_of(self.driver, self.record)

    async def look_and_claim(self, plans: Callable[[Graph], MergePlan] | None = None) -> tuple[Graph, MergePlan]:
        """Return the images and what is to be done with them, by `plans`, when all of it is claimed.

        Whoever has begun to read one of them meanwhile has either claimed it before, which is Busy, or is seen by
        the look after the claim.

        Raises:
            Busy: another operation reads or writes one of these images.
            Refused: somebody else reads one, or may read it.
        """
        make = plans or (lambda graph: plan_delete(graph, self.doomed, frozenset(self.outrun)))
        while True:
            graph = await self.look()
            plan = make(graph)
            images = {graph.images[path].identity: path for path in moves.touched(plan)}
            if images.keys() <= self.operation.claimed:
                await self.check_alone(graph, plan)
                return graph, plan
            await claim(self.context, self.operation, images, write=True)
            self.operation.claimed.update(images)

    def _check_able(self, step: MergeStep) -> None:
        name, machine = self.record.name, self.machine
        if step.where is Where.OFFLINE or machine is None:
            need(self.driver.storage, OfflineMerges, name)
            return
        need(machine, LiveMerges if step.kind is MergeKind.COMMIT else LiveCopies, name)
        if step.kind is MergeKind.STREAM and not (step.active or machine.capabilities.copies_into_middle):
            raise Unsupported(
                f"{name}: its hypervisor copies into active images only, and {step.top} is not active; shut "
                "it down first"
            )

    async def merge_surplus(self) -> MergePlan:
        """Merge and give up whatever nobody needs, but what the guest outruns; return the plan as carried out."""
        while True:
            graph, plan = await self.look_and_claim()
            try:
                await self.carry_out(graph, plan)
            except NotConverging as error:
                self.context.events.publish(self.operation.event(EventKind.NOTE, text=str(error)))
                continue
            done = tuple(self.done)
            return attrs.evolve(plan, steps=done, bytes=sum(step.bytes for step in done))

    async def carry_out(self, graph: Graph, plan: MergePlan) -> None:
        """Do all merges of a plan that was made of `graph`.

        Raises:
            NotConverging: a merge was given up, as `outrun` has it; those before it are done.
        """
        self.journal = self.journal.going_on(plan)
        change = Change(domains=(self.record,), operation=self.operation.record(), plan=dumps(self.journal))
        await self.context.catalog.write(change)
        for step in plan.steps:
            before = sum(each.bytes for each in self.done)
            self.sealed -= moves.written(step)
            await self._merge(graph, step, self._progress(step, before, before + plan.bytes))
            with trio.CancelScope(shield=True):  # what a merge has moved must be known before anything else happens
                await self._note(graph, step)
            self.done.append(step)

    def _progress(self, step: MergeStep, before: int, total: int) -> Progress:
        """Return what tells of a step's progress; it tells at once that the step begins.

        A guest that writes may well make more of what is left: then the guest is paused.
        """
        moved = before

        def tell(done: int, of: int) -> None:
            nonlocal moved
            moved = max(moved, before + (step.bytes * min(done, of) // of if of else 0))
            self.context.events.publish(self.operation.progress(self.record.name, moved, total))

        tell(0, 0)
        return tell

    async def _merge(self, graph: Graph, step: MergeStep, progress: Progress) -> None:
        """Do one merge, in the hypervisor or with no hypervisor near."""
        if step.where is Where.LIVE:
            if self.machine is None:
                raise Unsupported(f"{step.top} is open in a hypervisor that is gone: plan anew")
            await self._merge_live(self.machine, graph, step, progress)
            above = [path for path in step.repoint if path not in graph.opened]
        else:
            await self._merge_offline(graph, step, progress)
            above = list(step.repoint)
        for path in above:
            base = DeviceDisk("", step.base, graph.images[step.base].format)
            await need(self.driver.storage, OfflineMerges, self.record.name).rebase(path, base, content=False)

    async def _merge_live(self, machine: Machine, graph: Graph, step: MergeStep, progress: Progress) -> None:
        if step.kind is MergeKind.STREAM:
            copier = need(machine, LiveCopies, self.record.name)
            await copier.stream_image(step.top, step.new_backing, options=self.journal.options, progress=progress)
            return

        target = next((disk.target for disk in self.record.disks if disk.path == step.top), "")
        verdict, base = self.context.verdict(f"{self.record.name}.{target}"), graph.images[step.base]

        async def gone_over() -> None:
            await verdict.insist(f"{base.format}:{base.path}", self.record.name)
            try:
                await self.context.catalog.write(Change(domains=(moves.moved_domain(self.record, step, graph),)))
            except BaseException:
                await verdict.forget()  # noqa: ASYNC102 - it shields itself
                raise

        note = PivotNote(gone_over, verdict.path)
        try:
            await need(machine, LiveMerges, self.record.name).commit_image(
                step.top, step.base, note=note, options=self.journal.options, progress=progress
            )
        except NotConverging:
            self.outrun.add(graph.images[step.top].backing or step.base)
            raise
        await verdict.forget()

    async def _merge_offline(self, graph: Graph, step: MergeStep, progress: Progress) -> None:
        storage, options = need(self.driver.storage, OfflineMerges, self.record.name), self.journal.options
        if step.kind is MergeKind.COMMIT:
            await storage.commit_image(step.top, step.base, options=options, progress=progress)
        else:
            below = step.new_backing
            backing = DeviceDisk("", below, graph.images[below].format) if below else None
            await storage.rebase(step.top, backing, content=True, options=options, progress=progress)

    async def _note(self, graph: Graph, step: MergeStep) -> None:
        """Put into the catalog what a merge has moved and changed."""
        record = await looked_up(self.driver.storage, moves.moved_domain(self.record, step, graph))
        updated = await self._sealed(moves.written(step), step, graph)
        await self.context.catalog.write(Change(domains=(record,), updated=updated))
        self.record, self.sealed = record, self.sealed | moves.written(step)

    async def seal_anew(self, written: Iterable[str]) -> None:
        """Put into the catalog what merges changed that were cut short before it knew."""
        self.record = await looked_up(self.driver.storage, self.record)
        updated = await self._sealed(set(written) - self.sealed)
        await self.context.catalog.write(Change(domains=(self.record,), updated=updated))

    async def _sealed(
        self, written: set[str], step: MergeStep | None = None, graph: Graph | None = None
    ) -> tuple[SnapshotRecord, ...]:
        """Return the records of snapshots that stay with images of a merge in their chains, as these are now.

        Those that were written to are read, whatever their times: after a loss of power an image may hold what was
        merged into it and have the times of before, which are synced later than data.
        """
        updated, snapshots = [], await self.context.catalog.snapshots(self.record.name)
        known = await self.context.catalog.sealed({file.path for file in files_of(snapshots)} - written)
        touched = written if step is None else written | {step.top, step.base}
        for snapshot in snapshots:
            if snapshot.name in self.doomed or not touched & {file.path for file in snapshot.frozen}:
                continue
            disks = snapshot.snapshot.disks
            if step is not None and graph is not None:
                disks = tuple(moves.moved_disk(disk, step, graph) for disk in disks)
            images = {disk.disk.target: await _chain(self.driver, disk, known) for disk in disks}
            inner = attrs.evolve(snapshot.snapshot, disks=disks)
            updated.append(attrs.evolve(snapshot, snapshot=inner, images=images))
        return tuple(updated)

    async def gone(self, unlink: Iterable[str]) -> tuple[str, ...]:
        """Return those of `unlink` that are ours and that nothing but the doomed snapshots reads."""
        snapshots = await self.context.catalog.snapshots(self.record.name)
        points = _points(s for s in snapshots if s.name not in self.doomed)
        images = await _images(self.driver, [*self.record.disks, *points], frozenset())
        own = await self.context.catalog.own_files(self.record.name)
        going = tuple(path for path in unlink if path in own and path not in images)
        kept = await kept_for(self.context, self.record.name, going, self._processes)
        return tuple(path for path in going if path not in kept)

    async def remove(self, paths: Iterable[str]) -> None:
        """Remove files."""
        for path in paths:
            await self.driver.storage.remove(path)


@asynccontextmanager
async def merging(
    context: Context,
    operation: Operation,
    journal: MergeJournal,
    *,
    look_only: bool = False,
    unlocked: bool = False,
) -> AsyncIterator[Merging]:
    """Give what an operation merges a domain's images with; ends what earlier merges have left.

    Args:
        context: the orchestrator's.
        operation: it has the domain's lock.
        journal: of the domain, as it is.
        look_only: touch nothing, end nothing.
        unlocked: the same, and the operation has no lock.
    """
    look = context.seen if unlocked else context.machine_of
    async with look(journal.domain) as (found, machine):
        if look_only and not unlocked:
            await check_verb(journal.domain, machine, GuestVerb.MERGE)
        record = found if look_only or unlocked else await _obeying(context, found)
        if machine is not None and not (look_only or unlocked) and has(machine, Overlays):
            await need(machine, Overlays, record.name).settle_merges(
                {disk.target: disk.path for disk in record.disks}
            )
        yield Merging(context, operation, await as_it_is(record, machine), machine, journal)


async def _obeying(context: Context, record: DomainRecord) -> DomainRecord:
    """Return a domain's record with the disks as guards left them after snaporch's death; also in the catalog."""
    verdicts = {disk.target: context.verdict(f"{record.name}.{disk.target}") for disk in record.disks}
    gone = {target: word for target, verdict in verdicts.items() if (word := verdict.read()) not in {"", STAY}}
    moved = {target: word.partition(":") for target, word in gone.items()}
    active = {disk.target: disk for disk in record.disks if disk.target in moved}
    active = {t: attrs.evolve(disk, format=moved[t][0], path=moved[t][2]) for t, disk in active.items()}
    if active:
        now = {disk.path for disk in active.values()}
        below = {path: chain for path, chain in record.below.items() if path not in now}
        record = attrs.evolve(record, active=record.active | active, below=below)
        await context.catalog.write(Change(domains=(record,)))
    for verdict in verdicts.values():
        await verdict.forget()
    return record
