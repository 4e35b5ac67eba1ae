"""Export: a snapshot in one file that another root, or another host, can take over. Read downwards.

Each disk is copied whole first, beside the domain's files, as its size and checksum come before it in the archive;
memory goes in as it is. `snaporch.model.archive` says what an archive is.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import Archives, Binary, Driver, ImagePoints, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import InvalidInput, TargetExists, Unsupported
from snaporch.model.archive import INITRD, KERNEL, MEMORY, TPM, ArchivedDisk, Exported, Manifest, Member
from snaporch.model.convert import dumps
from snaporch.model.record import FileRecord, OperationKind, SnapshotRecord
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.checks import STREAM_BYTES, check_space
from snaporch.operations.disks import claim_snapshot
from snaporch.operations.group import check_ids
from snaporch.operations.made import MadePlan, made, making
from snaporch.operations.places import check_directory

STREAM = "-"  # in an answer: not a file, what the caller gave


@attrs.frozen
class _Copy:
    """A disk that is copied: from where, and to where."""

    target: str
    image: DeviceDisk
    path: str
    readonly: bool = False
    tag: str = ""


@attrs.frozen
class _Export:
    """What an export works with."""

    context: Context
    operation: Operation
    driver: Driver
    record: SnapshotRecord
    output: str | Binary
    uuid: str = ""

    @property
    def archives(self) -> Archives:
        return need(self.driver.storage, Archives, self.record.domain)

    @property
    def file(self) -> str:
        return self.output if isinstance(self.output, str) else ""

    @property
    def part(self) -> str:
        """Where the file is written to before it is complete; nothing else has this name."""
        return f"{self.file}.{self.operation.short}.part" if self.file else ""

    @property
    def memory_copy(self) -> str:
        """Where memory that is inside an image is copied to."""
        inside = self.record.snapshot.memory and self.record.memory is None
        return self._beside("mem") if inside else ""

    def _beside(self, what: str) -> str:
        return f"{self.context.directory(self.record.domain)}/export-{self.operation.short}.{what}"

    def copies(self, targets: Collection[str] | None = None) -> tuple[_Copy, ...]:
        """Return the disks that are copied, in the guest's order.

        Raises:
            Unsupported: the guest writes to a disk that the snapshot does not hold.
            InvalidInput: there is no such disk.
        """
        found = tuple(self._copies(whole=targets is None))
        if unknown := sorted(set(targets or ()) - {copy.target for copy in found}):
            there = ", ".join(copy.target for copy in found) or "none"
            who = f"{self.record.name} of {self.record.domain}"
            raise InvalidInput(f"{who} has no disk {unknown[0]!r}; it has {there}")
        return tuple(copy for copy in found if targets is None or copy.target in targets)

    def _copies(self, *, whole: bool) -> Iterator[_Copy]:
        held = {disk.disk.target: disk for disk in self.record.snapshot.disks}
        for disk in self.record.definition.disks:
            path = self._beside(f"{disk.target}.qcow2")
            if (taken := held.get(disk.target)) is not None:
                yield _Copy(disk.target, taken.disk, path, tag="" if taken.external else taken.name)
            elif disk.readonly:
                yield _Copy(disk.target, disk, path, readonly=True)
            elif whole:
                raise Unsupported(
                    f"{self.record.name} does not hold {disk.target} of {self.record.domain}, which the guest "
                    "writes to: an archive would be no whole machine; `snaporch export-disk` exports single disks"
                )

    async def copy(self, copy: _Copy, path: str, format_: str = "qcow2") -> None:
        """Copy a disk whole; the file is made by that."""
        storage = self.driver.storage
        await storage.make_directory(os.path.dirname(path))
        if copy.tag:
            await need(storage, ImagePoints, self.record.domain).extract_disk(copy.image.path, copy.tag, path)
        else:
            await self.archives.copy_image(copy.image, path, format_, self.moved)

    def moved(self, done: int, total: int) -> None:
        """Tell how far it is."""
        self.context.events.publish(self.operation.progress(self.record.domain, done, total))

    async def check(self, copies: Sequence[_Copy], *, packed: bool = True) -> None:
        """Refuse what could not be written, or has no room; `packed`: what is copied then goes into the file.

        Raises:
            InvalidInput: there is no such directory.
            TargetExists: there is a file.
            NotEnoughSpace: it may not fit.
        """
        storage, domain = self.driver.storage, self.record.domain
        size = 0
        for copy in copies:
            images = await storage.inspect(copy.image.path, copy.image.format)
            size += min(images[0].virtual_size, sum(image.allocated for image in images)) + 2**20
        needs = [(storage, self.context.directory(domain), size)] if packed or not self.file else []
        if self.file:
            await storage.check_place(str(self.context.root), domain, self.file, "archive")
            await check_directory(self.context, storage, domain, self.file, "archive")
            if await storage.exists(self.file):
                raise TargetExists(f"{self.file} exists, and no file is ever overwritten: choose another name")
            await storage.check_writable(os.path.dirname(self.file))
            memory = self.record.memory_size + STREAM_BYTES if packed else 0
            needs.append((storage, os.path.dirname(self.file), size + memory))
        await check_space(needs)

    async def complete(self) -> None:
        """Give the file its name, and end the operation."""
        if self.part:
            await self.archives.name_file(self.part, self.file)
        await made(self.context, self.operation, Change())


async def _begin(context: Context, operation: Operation, output: str | Binary, ids: Collection[str]) -> _Export:
    domain = await context.catalog.domain(operation.who)
    record = await context.catalog.snapshot(domain.name, operation.subject)
    check_ids([record], ids)
    if record.deleting:
        raise Unsupported(f"{record.name} of {domain.name} is being deleted")
    driver = context.driver(domain)
    need(driver.storage, Archives, domain.name)
    if why := driver.storage.no_copies:
        raise Unsupported(f"{domain.name}: {why}")
    await claim_snapshot(context, operation, record)
    output = os.path.abspath(output) if isinstance(output, str) else output
    return _Export(context, operation, driver, record, output, domain.uuid)


async def export(
    context: Context, domain: str, name: str, output: str | Binary, *, version: str, ids: Collection[str] = ()
) -> Exported:
    """Write a snapshot to an archive; see `snaporch.Orchestrator.export`."""
    operation = Operation(OperationKind.EXPORT, domain, name)
    async with context.locked(operation):
        work = await _begin(context, operation, output, ids)
        record, storage = work.record, work.driver.storage
        if record.template is not None:
            raise Unsupported(
                f"{domain} was attached to: what its machine is made of is known from its process only, and an "
                "archive could not say it; `snaporch export-disk` exports its disks"
            )
        copies = work.copies()
        await work.check(copies)
        temporary = [copy.path for copy in copies] + ([work.memory_copy] if work.memory_copy else [])
        plan = MadePlan(record.definition.driver, (*temporary, *([work.part] if work.part else [])))
        async with making(context, operation, plan):
            memory = await _memory(work)
            files: list[tuple[str, FileRecord]] = [(MEMORY, memory)] if memory is not None else []
            modules = {KERNEL: record.definition.kernel, INITRD: record.definition.initrd}
            files += [(what, await storage.seal(path)) for what, path in modules.items() if path]
            files += [(TPM, record.tpm)] if record.tpm is not None else []
            disks = []
            for copy in copies:
                await work.copy(copy, copy.path)
                sealed = await storage.seal(copy.path)
                size = await storage.virtual_size(copy.path, "qcow2")
                disk = ArchivedDisk(copy.target, size, sealed.size, sealed.checksum, copy.readonly)
                disks.append(disk)
                files.append((disk.member.name, sealed))
            manifest = _manifest(record, disks, dict(files), work.uuid, version)
            if work.part:
                await storage.make_file(work.part)
            text = dumps(manifest).encode()
            size = await work.archives.pack(work.part or work.output, text, files, work.moved)
            for path in temporary:
                await storage.remove(path)
            await work.complete()
    return Exported(
        domain, name, work.file or STREAM, size, memory is not None, tuple(copy.target for copy in copies)
    )


async def _memory(work: _Export) -> FileRecord | None:
    record = work.record
    if not work.memory_copy:
        return record.memory
    first = next(disk for disk in record.snapshot.disks if not disk.external)
    points = need(work.driver.storage, ImagePoints, record.domain)
    await work.driver.storage.make_directory(os.path.dirname(work.memory_copy))
    await points.extract_memory(first.disk.path, first.name, work.memory_copy)
    return await work.driver.storage.seal(work.memory_copy)


def _manifest(
    record: SnapshotRecord, disks: Sequence[ArchivedDisk], files: dict[str, FileRecord], uuid: str, version: str
) -> Manifest:
    members = {name: Member(name, file.size, file.checksum) for name, file in files.items()}
    return Manifest(
        written_by=version,
        name=record.name,
        definition=attrs.evolve(record.definition, kernel="", initrd="", serial="", disks=()),
        point=record.point,
        disks=tuple(disks),
        description=record.snapshot.description,
        creation_time=record.snapshot.creation_time,
        domain_state=record.domain_state,
        strategy=record.strategy,
        quiesced=record.quiesced,
        serial=bool(record.definition.serial),
        uuid=uuid,
        hypervisor={key: str(value) for key, value in record.hypervisor.items()},
        devices=record.shape.devices if record.shape else (),
        memory=members.get(MEMORY),
        kernel=members.get(KERNEL),
        initrd=members.get(INITRD),
        tpm=members.get(TPM),
    )


async def export_disk(
    context: Context,
    domain: str,
    name: str,
    target: str,
    output: str | Binary,
    *,
    format_: str = "qcow2",
    ids: Collection[str] = (),
) -> Exported:
    """Copy one disk of a snapshot, whole, to an image of its own; see `snaporch.Orchestrator.export_disk`."""
    if format_ not in {"qcow2", "raw"}:
        raise InvalidInput(f"format {format_!r:.60} is neither qcow2 nor raw")
    operation = Operation(OperationKind.EXPORT, domain, name)
    async with context.locked(operation):
        work = await _begin(context, operation, output, ids)
        (copy,) = work.copies({target})
        if copy.tag and format_ != "qcow2":
            raise Unsupported(f"{name} of {domain} is inside {copy.image.path}: it is exported as qcow2 only")
        await work.check([copy], packed=False)
        path = work.part or copy.path
        async with making(context, operation, MadePlan(work.record.definition.driver, (path,))):
            await work.copy(copy, path, format_)
            sealed = await work.driver.storage.seal(path)
            if not isinstance(output, str):
                await work.archives.send(sealed, output, work.moved)
                await work.driver.storage.remove(path)
            await work.complete()
    return Exported(domain, name, work.file or STREAM, sealed.size, memory=False, disks=(target,))
