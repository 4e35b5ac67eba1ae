"""Import: a new domain with one snapshot, from an archive that may be anybody's. Read downwards.

Nothing in an archive is trusted: files get names of this root's, images are read in the one format that an archive
has, each file is compared with the manifest and each image looked at before the catalog knows anything, and what
would run on this host as it says (`emulator`, `extra_args`) is dropped unless the caller trusts it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import Archives, Driver, Launch, check_versions, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import InvalidInput, OtherMachine, SnaporchError, TargetExists, Unsupported
from snaporch.model.archive import TPM, Imported, Manifest
from snaporch.model.convert import structured
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainRecord, DomainState, MachineShape
from snaporch.model.names import check_name, new_uuid
from snaporch.model.record import FileRecord, OperationKind, SnapshotRecord
from snaporch.model.request import Strategy
from snaporch.model.reserved import check_command_line, check_domain_name
from snaporch.model.rfc import DeviceDisk, DiskSnapshot, DomainSnapshot
from snaporch.operations.checks import EMPTY_OVERLAY_BYTES, check_space
from snaporch.operations.made import MadePlan, made, making
from snaporch.operations.places import check_definition
from snaporch.operations.revert_plan import tpm_place
from snaporch.operations.shape import check_shape, wanted_disks

_LOCAL = "qemu"  # the driver whose storage reads an archive before it is known which one it is for


@attrs.frozen
class _Import:
    """What an import works with."""

    context: Context
    operation: Operation
    driver: Driver
    manifest: Manifest
    name: str
    memory: bool
    trust: bool

    @property
    def archives(self) -> Archives:
        return need(self.driver.storage, Archives, self.name)

    def _path(self, what: str) -> str:
        return f"{self.context.directory(self.name)}/{what.replace('/', '-')}.{self.operation.short}"

    @property
    def paths(self) -> dict[str, str]:
        """Where each member of the archive goes; memory that is left out goes nowhere."""
        return {
            member.name: "" if member == self.manifest.memory and not self.memory else self._path(member.name)
            for member in self.manifest.members
        }

    @property
    def frozen(self) -> dict[str, DeviceDisk]:
        """The disks as they are in the archive."""
        paths = self.paths
        return {
            disk.target: DeviceDisk(disk.target, paths[disk.member.name], "qcow2", disk.readonly)
            for disk in self.manifest.disks
        }

    @property
    def active(self) -> dict[str, DeviceDisk]:
        """The overlays of the disks that are written to."""
        return {
            disk.target: DeviceDisk(disk.target, self._path(f"{disk.target}.qcow2"), "qcow2")
            for disk in self.manifest.disks
            if not disk.readonly
        }

    @property
    def dropped(self) -> tuple[str, ...]:
        """What the definition says and is not taken over."""
        said = self.manifest.definition
        values = {"emulator": said.emulator, "extra_args": list(said.extra_args)}
        return tuple(f"{key} = {json.dumps(value)}" for key, value in values.items() if value and not self.trust)

    @property
    def definition(self) -> DomainDefinition:
        """The new domain's, with paths of this root."""
        said, paths = self.manifest.definition, self.paths
        definition = attrs.evolve(
            said,
            name=self.name,
            kernel=paths.get("kernel", ""),
            initrd=paths.get("initrd", ""),
            serial=f"{self.context.directory(self.name)}/serial.log" if self.manifest.serial else "",
            disks=tuple(self.frozen.values()),
        )
        return definition if self.trust else attrs.evolve(definition, emulator="", extra_args=())

    @property
    def disks(self) -> tuple[DeviceDisk, ...]:
        """The disks as the domain has them."""
        return tuple(self.active.get(target, disk) for target, disk in self.frozen.items())

    @property
    def tpm(self) -> str:
        """The directory with the state of the domain's TPM; empty: it has none."""
        return tpm_place(self.definition, self.context.directory(self.name), self.operation.id)

    @property
    def shape(self) -> MachineShape | None:
        """What its machine is made of; None: it has no memory that would be bound to it."""
        if not self.memory:
            return None
        sizes = {disk.target: disk.virtual_size for disk in self.manifest.disks}
        disks = (
            DiskStatus(d.target, d.path, d.format, d.readonly, sizes[d.target], (d.path,))
            for d in self.frozen.values()
        )
        definition = self.definition
        return MachineShape(definition.memory, definition.vcpus, tuple(disks), self.manifest.devices)

    def moved(self, done: int, total: int) -> None:
        """Tell how far it is."""
        self.context.events.publish(self.operation.progress(self.name, done, total))


async def import_archive(
    context: Context,
    path: str,
    *,
    name: str = "",
    trust: bool = False,
    same_identity: bool = False,
    disks_only: bool = False,
) -> Imported:
    """Make a domain of an archive; see `snaporch.Orchestrator.import_archive`."""
    path = os.path.abspath(path)
    manifest = await _read(context, path)
    name = check_domain_name(name or manifest.definition.name)
    check_name(manifest.name)
    operation = Operation(OperationKind.IMPORT, name, manifest.name)
    driver = context.driver_of(name, manifest.definition.driver)
    memory = manifest.memory is not None and not disks_only
    work = _Import(context, operation, driver, manifest, name, memory, trust)
    check_command_line(work.definition)
    if memory and work.dropped:
        raise InvalidInput(
            f"the memory in {path} belongs to a machine with {'; '.join(work.dropped)}, which would be taken from "
            "whoever wrote the archive: if you trust that, say --trust; --disks-only leaves the memory out"
        )
    if work.tpm:
        driver.need_tpm(name)
        if manifest.memory is not None and not memory:
            raise InvalidInput(f"the state of the TPM in {path} is in the memory: leave out --disks-only")
    async with context.locked(operation):
        if context.catalog.knows(name):
            raise TargetExists(f"there is a domain {name!r} already; give another name: --as NAME")
        uuid = await _uuid(context, manifest, same=same_identity)
        paths, overlays = work.paths, [disk.path for disk in work.active.values()]
        size = sum(member.size for member in manifest.members if paths[member.name])
        directory = context.directory(name)
        await check_space([(driver.storage, directory, size + len(overlays) * EMPTY_OVERLAY_BYTES)])
        files = tuple([target for target in paths.values() if target] + overlays)
        run_directory = context.run_directory(name, operation.id)
        async with making(context, operation, MadePlan(driver.info.name, files, str(run_directory), work.tpm)):
            await made(context, operation, await _taken_out(work, path, uuid, files))
    return Imported(name, manifest.name, memory, tuple(work.frozen), work.dropped)


async def _taken_out(work: _Import, path: str, uuid: str, files: tuple[str, ...]) -> Change:
    """Unpack an archive into files that are made for it, and check these; return what the catalog is to know."""
    storage, paths = work.driver.storage, work.paths
    await storage.make_directory(work.context.directory(work.name))
    for target in filter(None, paths.values()):
        await storage.make_file(target)
    for disk in work.frozen.values():
        if disk.target in work.active:
            await storage.mark(disk.path, str(work.context.root))
    members = [(member, paths[member.name]) for member in work.manifest.members]
    unpacked = await work.archives.unpack(path, members, work.moved)
    await _check_images(work)
    await check_definition(work.context, work.definition)
    if work.memory:
        await _check_machine(work)
    elif work.tpm:
        await work.driver.make_tpm(work.tpm, paths.get(TPM, ""))
    record = await _snapshot(work, {file.path: file for file in unpacked})
    domain = DomainRecord(
        work.definition,
        work.active,
        current=record.name,
        shape=work.shape,
        uuid=uuid,
        generation=work.definition.new_generation(),
        tpm=work.tpm,  # of a point with memory that is not there yet: what it has is in the memory
    )
    return Change(domains=(domain,), snapshots=(record,), files={work.name: files})


async def _read(context: Context, path: str) -> Manifest:
    text = await need(context.driver_of(path, _LOCAL).storage, Archives, path).read_manifest(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput(f"{path} is no archive of snaporch's: its manifest is not JSON") from None
    manifest = structured(document, Manifest, path)
    if wrong := list(manifest.faults()):
        raise InvalidInput(f"{path} is no archive of snaporch's: its manifest has {'; '.join(wrong)}")
    return manifest


async def _uuid(context: Context, manifest: Manifest, *, same: bool) -> str:
    if not same:
        return new_uuid()
    for other in await context.catalog.domains():
        if other.uuid == manifest.uuid:
            raise TargetExists(
                f"{other.name} is the domain that the archive is of: two of one identity would be taken for each "
                "other; leave out --same-identity"
            )
    return manifest.uuid or new_uuid()


async def _check_images(work: _Import) -> None:
    """Look at each image before anything is on it, and make the overlays."""
    storage = work.driver.storage
    for disk in work.manifest.disks:
        image = work.frozen[disk.target]
        await work.archives.check_alone(image.path)
        size = await storage.virtual_size(image.path, image.format)
        if size != disk.virtual_size:
            raise InvalidInput(f"{disk.target} has {size} bytes, and the manifest says {disk.virtual_size}")
        if disk.target in work.active:
            await storage.make_overlay(work.active[disk.target].path, image, size)


async def _check_machine(work: _Import) -> None:
    """Start the machine, without its memory, and see whether it is the one that the memory belongs to.

    Raises:
        Unsupported: it is not, or cannot be started here.
    """
    if work.driver.info.one_call:
        return  # nothing can be started that waits for memory: the first revert says it
    directory = work.context.run_directory(work.name, work.operation.id)
    launch = Launch(
        work.definition,
        work.disks,
        directory,
        incoming=True,
        isolated=True,
        generation=work.definition.new_generation(),
        tpm=work.tpm,
    )
    try:
        if work.tpm:
            await work.driver.make_tpm(work.tpm)
        handle = await work.driver.launch(launch)
        async with work.driver.connect(handle, work.name) as machine:
            check_versions(machine, work.manifest.hypervisor, work.manifest.name)
            chains = {target: (disk.path,) for target, disk in work.frozen.items() if target in work.active}
            check_shape(work.name, wanted_disks(work.disks, chains, work.shape), work.shape, await machine.shape())
    except (SnaporchError, OSError) as error:
        kind = OtherMachine if isinstance(error, OtherMachine) else Unsupported
        raise kind(
            f"the memory of {work.manifest.name} cannot be loaded here: {error}; --disks-only takes the disks alone"
        ) from error
    await work.driver.end(handle, directory)
    if work.tpm:
        await work.driver.remove_tpm(work.tpm)


async def _snapshot(work: _Import, unpacked: Mapping[str, FileRecord]) -> SnapshotRecord:
    """Seal the files, which are read again only if something has touched them; return the snapshot's record."""
    said, storage = work.manifest, work.driver.storage
    path = work.paths["memory"] if work.memory else ""
    memory = await storage.seal(path, unpacked[path]) if path else None
    state = work.paths.get(TPM, "")
    tpm = await storage.seal(state, unpacked[state]) if state else None
    images: dict[str, tuple[FileRecord, ...]] = {}
    for target, disk in work.frozen.items():
        if target in work.active:
            images[target] = (await storage.seal(disk.path, unpacked[disk.path]),)
    disks = tuple(
        DiskSnapshot(work.frozen[target], said.name, external_sn=overlay) for target, overlay in work.active.items()
    )
    snapshot = DomainSnapshot(
        said.name, said.description, said.creation_time, work.memory, memory.path if memory else "", disks
    )
    return SnapshotRecord(
        domain=work.name,
        snapshot=snapshot,
        parent=None,
        domain_state=said.domain_state if work.memory else DomainState.INACTIVE,
        strategy=said.strategy if work.memory else Strategy.NONE,
        reason="imported",
        point=said.point,
        memory=memory,
        images=images,
        definition=work.definition,
        hypervisor=dict(said.hypervisor) if work.memory else {},
        quiesced=said.quiesced,
        shape=work.shape,
        tpm=tpm,
    )
