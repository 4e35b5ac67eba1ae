"""The list of snapshots that a domain's manager has, and ours: kept the same, both ways.

    check_records   before anything is begun: others have not taken, deleted or gone back to snapshots meanwhile,
                    nor put the domain to sleep
    sync            follows what others have done, takes over snapshots that they have made, repairs their list

What an operation here changes is told to the manager at its end, by `snaporch.engine.context`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import Driver, Foreign, KeepsRecords, Theirs, has, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import InvalidInput, Refused
from snaporch.images.chain import heir
from snaporch.model.domain import DomainRecord
from snaporch.model.names import check_name, new_id
from snaporch.model.record import FileRecord, OperationKind, SnapshotRecord, SyncReport
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeviceDisk, DomainSnapshot


async def check_records(context: Context, record: DomainRecord) -> None:
    """Refuse to begin where others have taken, deleted or gone back to snapshots of the domain, or put it to sleep.

    Raises:
        Refused: with the names, or the reason.
    """
    driver = context.driver(record)
    if not has(driver, KeepsRecords):
        return
    keeper = need(driver, KeepsRecords, record.name)
    snapshots = await context.catalog.snapshots(record.name)
    theirs = await keeper.theirs(record, known={each.id for each in snapshots})
    if theirs is None:
        return
    if theirs.blocker:
        raise Refused(f"{record.name}: {theirs.blocker}")
    mend = f"`snaporch domain sync {record.name}` takes that over"
    if moved := [disk.target for disk in _moved(record, theirs)]:
        raise Refused(f"others have put disks of {record.name} on other images: {', '.join(moved)}; {mend}")
    there = {each.id for each in theirs.snapshots}
    if unknown := [each.name for each in theirs.snapshots if each.id not in {s.id for s in snapshots}]:
        raise Refused(f"{record.name} has snapshots that were taken by others: {', '.join(unknown)}; {mend}")
    if gone := [each.name for each in snapshots if _is_listed(record, each) and each.id not in there]:
        raise Refused(f"others have deleted snapshots of {record.name}: {', '.join(gone)}; {mend}")


def _moved(record: DomainRecord, theirs: Theirs) -> list[DeviceDisk]:
    """Return the disks that are not on the images that they were left on, as they were left."""
    now = {disk.target: disk.path for disk in theirs.disks}
    disks = (disk for disk in record.disks if not disk.readonly and disk.target in now)
    return [disk for disk in disks if not _same(now[disk.target], disk.path)]


def _is_listed(record: DomainRecord, snapshot: SnapshotRecord) -> bool:
    """Return whether the manager's list is to have a snapshot."""
    return bool(snapshot.foreign) or (record.records and not snapshot.blocker)


def check_ours(snapshot: SnapshotRecord) -> None:
    """Refuse to go back to a snapshot that only its maker can go back to.

    Raises:
        Refused: with the reason.
    """
    if snapshot.blocker:
        raise Refused(f"{snapshot.name} of {snapshot.domain} cannot be gone back to: {snapshot.blocker}")


def check_deletable(snapshots: Iterable[SnapshotRecord]) -> None:
    """Refuse to delete what only its maker can delete.

    Raises:
        Refused: with the reason.
    """
    for each in snapshots:
        if each.foreign and each.blocker:
            raise Refused(
                f"{each.name} of {each.domain} was taken by {each.foreign} and can only be deleted there "
                f"({each.blocker}); `snaporch domain sync {each.domain}` then follows"
            )


async def sync(context: Context, name: str, *, records: bool | None = None) -> SyncReport:
    """See `snaporch.Orchestrator.sync`."""
    async with context.locked(Operation(OperationKind.SYNC, name, "")):
        record = await context.catalog.domain(name)
        keeper = need(context.driver(record), KeepsRecords, name)
        record = attrs.evolve(record, records=record.records if records is None else records)
        snapshots = await context.catalog.snapshots(name)
        if records is False:
            await keeper.remove_records(record, snapshots)
        theirs = await keeper.theirs(record, known={each.id for each in snapshots})
        if theirs is None:
            await context.catalog.write(Change(domains=(record,)))
            return SyncReport(name, records=record.records)
        done = _Sync(context, context.driver(record), record, list(snapshots), theirs)
        await done.run()
        await keeper.mark_records(done.record, {each.name: each.id for each in done.snapshots if each.foreign})
    return SyncReport(
        name,
        imported=tuple(each.name for each in done.imported),
        gone=tuple(done.gone),
        followed=done.record.current if done.moved else None,
        problems=tuple(done.problems),
        records=record.records,
    )


@attrs.define
class _Sync:
    """One sync: what it has found, and what the catalog is to know."""

    context: Context
    driver: Driver
    record: DomainRecord
    snapshots: list[SnapshotRecord]
    theirs: Theirs
    imported: list[SnapshotRecord] = attrs.field(factory=list)
    gone: list[str] = attrs.field(factory=list)
    problems: list[str] = attrs.field(factory=list)
    files: set[str] = attrs.field(factory=set)
    moved: bool = False

    async def run(self) -> None:
        updated = await self._missing()
        for foreign in self.theirs.snapshots:
            if foreign.id not in {each.id for each in self.snapshots}:
                await self._import(foreign)
        await self._follow()
        lost = [p for p in await self.context.catalog.own_files(self.record.name) if not await self._exists(p)]
        held = await self.context.catalog.paths_of_snapshots(self.record.name)
        await self.context.catalog.write(
            Change(
                domains=(self.record,),
                snapshots=tuple(self.imported),
                updated=tuple(updated),
                dropped=tuple((self.record.name, name) for name in self.gone),
                files={self.record.name: tuple(sorted(self.files))},
                gone=tuple(path for path in lost if path not in held),
            )
        )

    async def _exists(self, path: str) -> bool:
        return await self.driver.storage.exists(path)

    async def _missing(self) -> list[SnapshotRecord]:
        """Drop what others have made and deleted; look at what they have deleted of ours. Return what changes."""
        there, parents = {each.id for each in self.theirs.snapshots}, {s.name: s.parent for s in self.snapshots}
        self.gone += [s.name for s in self.snapshots if s.foreign and s.id not in there]
        doomed, updated = frozenset(self.gone), []
        self.record = attrs.evolve(self.record, current=heir(parents, doomed, self.record.current))
        self.snapshots = [each for each in self.snapshots if each.name not in doomed]
        for index, each in enumerate(self.snapshots):
            changed = attrs.evolve(each, parent=heir(parents, doomed, each.parent))
            if each.id not in there and _is_listed(self.record, each) and (why := await self._damage(each)):
                why = f"others have deleted it, and its files are not what was saved: {why}"
                changed = attrs.evolve(changed, blocker=why)
                self.problems.append(f"{each.name}: {why}")
            if changed != each:
                self.snapshots[index] = changed
                updated.append(changed)
        return updated

    async def _damage(self, snapshot: SnapshotRecord) -> str:
        try:
            for file in snapshot.files:
                await self.driver.storage.check(file)
        except Refused as error:
            return str(error)
        return ""

    async def _import(self, foreign: Foreign) -> None:
        """Take a snapshot over that another program has made."""
        try:
            check_name(foreign.name)
        except InvalidInput as error:
            self.problems.append(f"{foreign.name!r:.80} is left out: {error}; give it another name there")
            return
        if foreign.id:
            self.problems.append(
                f"{foreign.name} is left out: a snaporch with another root has taken it, and its files are that "
                f"one's; where that root is no more, {foreign.by} can forget it (virsh snapshot-delete --metadata)"
            )
            return
        if foreign.name in {each.name for each in self.snapshots}:
            self.problems.append(
                f"{foreign.name} of {foreign.by} is left out: another snapshot has that name here; "
                f"`snaporch edit {self.record.name} {foreign.name} --name NEW` renames it"
            )
            return
        record = self._as_record(foreign)
        try:
            record = await self._sealed(record, foreign)
        except (Refused, OSError) as error:
            record = attrs.evolve(record, blocker=foreign.blocker or str(error))
        if record.blocker:
            record = attrs.evolve(record, memory=None, snapshot=attrs.evolve(record.snapshot, disks=()))
            self.problems.append(f"{record.name} can only be looked at here: {record.blocker}")
        self.imported.append(record)
        self.snapshots.append(record)

    def _as_record(self, foreign: Foreign) -> SnapshotRecord:
        here = {each.name for each in self.snapshots}
        known = self.record.definition
        if foreign.memory and (foreign.memory, foreign.vcpus) != (known.memory, known.vcpus):
            known = attrs.evolve(known, memory=foreign.memory, vcpus=foreign.vcpus)
        return SnapshotRecord(
            domain=self.record.name,
            snapshot=DomainSnapshot(
                foreign.name,
                foreign.description,
                foreign.creation_time,
                foreign.has_memory,
                foreign.memory_file,
                foreign.disks,
            ),
            parent=foreign.parent if foreign.parent in here else None,
            domain_state=foreign.state,
            strategy=Strategy.NONE,
            reason=f"{foreign.by} has taken it",
            point=float(foreign.creation_time),
            memory=None,
            images={},
            definition=known,
            template=self.record.template,
            hypervisor=dict(foreign.versions),
            foreign=foreign.by,
            blocker=foreign.blocker,
            id=new_id(),
        )

    async def _sealed(self, record: SnapshotRecord, foreign: Foreign) -> SnapshotRecord:
        """Return it with the checksums of its files, which are snaporch's to merge and to remove from now on."""
        if record.blocker:
            return record
        storage, images = self.driver.storage, dict[str, tuple[FileRecord, ...]]()
        for disk in foreign.disks:
            chain = [link.path for link in await storage.chain(disk.disk.path, disk.disk.format)]
            known = await self.context.catalog.sealed(chain)
            for path in chain:
                await storage.mark(path, str(self.context.root))
            images[disk.disk.target] = tuple([await storage.seal(path, known.get(path)) for path in chain])
        memory = await storage.seal(foreign.memory_file) if foreign.memory_file else None
        self.files |= {foreign.memory_file} if foreign.memory_file else set()
        self.files |= {d.external_sn.path for d in foreign.disks if d.external_sn and d.external_sn.path}
        return attrs.evolve(record, images=images, memory=memory)

    async def _follow(self) -> None:
        """Follow a domain that others have put on other images than it was left on.

        Raises:
            Refused: these are over no snapshot that is known.
        """
        current = next((each for each in self.snapshots if each.name == self.theirs.current), None)
        now = {disk.target: disk for disk in self.theirs.disks}
        moved = _moved(self.record, self.theirs)
        for disk in moved:
            if current is None or not await self._is_over(now[disk.target], current):
                raise Refused(
                    f"{self.record.name}: {disk.target} is on {now[disk.target].path}, which is neither where it "
                    f"was left ({disk.path}) nor over a snapshot that is known; shut it down and put its "
                    "definition back on that image, or `snaporch domain undefine` it and attach it anew"
                )
        if moved or current in self.imported:
            active = self.record.active | {disk.target: now[disk.target] for disk in moved}
            self.record = attrs.evolve(
                self.record, active=active, current=current.name if current else self.record.current, below={}
            )
        self.moved = bool(moved)

    async def _is_over(self, disk: DeviceDisk, snapshot: SnapshotRecord) -> bool:
        """Return whether an image is an overlay over what a snapshot holds."""
        links = await self.driver.storage.chain(disk.path, disk.format)
        frozen = _paths(snapshot.images.get(disk.target, ()))
        return bool(frozen) and [os.path.realpath(link.path) for link in links[1:]] == frozen


def _paths(files: Sequence[FileRecord]) -> list[str]:
    return [os.path.realpath(file.path) for file in files]


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
