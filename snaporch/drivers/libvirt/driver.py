"""Domains of a libvirt of this host: found, started, restored, copied.

A name of libvirt's is one running domain: a second one of it never starts beside the first. A throw-away copy has
a name and a UUID of its own. A file in the directory of a launch says which domain the launch was of, so that it is
found again where the call was cut short.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import (
    Address,
    Discovers,
    Driver,
    Info,
    KeepsRecords,
    Launch,
    OverlayPlace,
    StreamPlan,
    Theirs,
    Trait,
    Writer,
)
from snaporch.drivers.libvirt import binding, domain_xml, records
from snaporch.drivers.libvirt.connection import Connection, NoDomain, check_uri, open_connection
from snaporch.drivers.libvirt.machine import MACHINE_TRAITS, LibvirtMachine
from snaporch.drivers.libvirt.process import DRIVER, NONE, LibvirtDomain, running
from snaporch.drivers.libvirt.qmp import open_libvirt_qmp
from snaporch.drivers.libvirt.records import read_save_image
from snaporch.drivers.libvirt.save_image import SaveImage
from snaporch.drivers.local import process
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qmp.stream import end_sinks
from snaporch.errors import ConnectionGone, HypervisorError, InvalidInput, Refused, Unsupported
from snaporch.model.domain import Discovered, DomainDefinition, DomainRecord, Handle
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DeviceDisk

START_SECONDS = 120.0
RESTORE_SECONDS = 600.0
DESTROY_SECONDS = 30.0
NOTE = "libvirt.json"
COPIES = uuid.UUID("6d2c1c4e-3f0b-4d52-9d1b-2f5a7a0c8f11")  # the name space of the UUIDs of copies
INFO = Info(
    DRIVER,
    MACHINE_TRAITS | {Trait.GUEST_AGENT, Trait.DISCOVERS, Trait.KEEPS_RECORDS} | LocalStorage.traits,
    one_call=True,
)


def default_uri() -> str:
    """Return the libvirtd that a user's domains are at: for root the system's."""
    return "qemu:///system" if os.geteuid() == 0 else "qemu:///session"


@attrs.define
class LibvirtDriver(Driver, Discovers, KeepsRecords):
    """Domains of a libvirt of this host."""

    info: Info = attrs.field(default=INFO, init=False)
    storage: LocalStorage = attrs.field(factory=LocalStorage)

    async def attach(self, name: str, address: Address) -> tuple[DomainDefinition, Handle]:
        """See Driver; by the URI and the name that the domain has there."""
        if address.qmp:
            raise InvalidInput(f"{name}: a domain of libvirt's is attached to by --uri and --of, not by a socket")
        uri = check_uri(address.uri or default_uri())
        async with open_connection(uri, name) as connection:
            domain = await self._named(connection, address.of or name)
            await _check_managed_save(connection, domain, name)
            active = await connection.call("virDomainIsActive", domain.isActive)
            root = domain_xml.parse(await connection.call("virDomainGetXMLDesc", domain.XMLDesc, 0))
            found = await _known(connection, domain, running_now=bool(active))
        definition = DomainDefinition(
            name=name,
            memory=domain_xml.memory(root),
            vcpus=domain_xml.vcpus(root),
            disks=tuple(disk.device for disk in domain_xml.disks(root)),
            driver=DRIVER,
        )
        return definition, found.handle()

    async def _named(self, connection: Connection, name: str) -> Any:
        listed = await connection.call("virConnectListAllDomains", connection.raw.listAllDomains, 0)
        domains = {each.name(): each for each in listed}
        if name not in domains:
            names = ", ".join(sorted(domains)) or "none"
            raise Refused(f"{connection.uri} has no domain {name!r}; it has {names}")
        return domains[name]

    async def discover(self, known: Mapping[str, Handle]) -> Sequence[Discovered]:
        """See Discovers: the domains of the user's libvirtd."""
        uuids = {LibvirtDomain.of(handle).uuid: name for name, handle in known.items()}
        uri, found = default_uri(), list[Discovered]()
        async with open_connection(uri, DRIVER) as connection:
            for domain in await connection.call("virConnectListAllDomains", connection.raw.listAllDomains, 0):
                mine = uuids.get(domain.UUIDString(), "")
                why = "" if mine else await _in_the_way(connection, domain)
                found.append(Discovered(DRIVER, domain.name(), domain=mine, uri=uri, blocker=why))
        return sorted(found, key=lambda each: each.name)

    async def present(self, record: DomainRecord) -> Handle | None:
        """See Driver: libvirt's users start, end and rename their domains as they like."""
        if (last := record.handle or record.template) is None:
            return None
        known = LibvirtDomain.of(last)
        if record.handle is not None and process.alive(known.local):
            return record.handle
        async with open_connection(known.uri, record.name) as connection:
            try:
                domain = await connection.domain(known.uuid)
            except NoDomain:
                return None
            if not await connection.call("virDomainIsActive", domain.isActive):
                return None
            now = await _known(connection, domain, running_now=True)
            if now.local == NONE:  # it has just ended, and libvirt does not know
                return None
            text = await connection.call("virDomainGetXMLDesc", domain.XMLDesc, 0)
        _check_left(record, domain_xml.disks(domain_xml.parse(text)))
        return now.handle()

    @asynccontextmanager
    async def connect(self, handle: Handle, label: str) -> AsyncIterator[LibvirtMachine]:
        """See Driver."""
        async with self._connected(handle, label, looking=False) as machine:
            yield machine

    @asynccontextmanager
    async def query(self, handle: Handle, label: str) -> AsyncIterator[LibvirtMachine]:
        """See Driver: libvirtd serves many clients."""
        async with self._connected(handle, label, looking=True) as machine:
            yield machine

    @asynccontextmanager
    async def _connected(self, handle: Handle, label: str, *, looking: bool) -> AsyncIterator[LibvirtMachine]:
        known = LibvirtDomain.of(handle)
        if not process.alive(known.local):
            raise ConnectionGone(f"{label}: its QEMU (process {known.local.pid}) is gone")
        async with open_connection(known.uri, label) as connection:
            domain = await connection.domain(known.uuid)
            async with (
                open_libvirt_qmp(connection, domain, known.local) as qmp,
                LibvirtMachine(qmp, known).opened(looking=looking) as machine,
            ):
                yield machine

    async def alive(self, handle: Handle) -> bool:
        """See Driver."""
        return process.alive(LibvirtDomain.of(handle).local)

    def pid(self, handle: Handle) -> int:
        """See Driver."""
        return LibvirtDomain.of(handle).local.pid

    async def wait_gone(self, handle: Handle) -> None:
        """See Driver."""
        await process.wait_gone(LibvirtDomain.of(handle).local)

    async def kill(self, handle: Handle) -> None:
        """See Driver: by libvirt or, where that does not do it, by a signal."""
        known = LibvirtDomain.of(handle)
        if not process.alive(known.local):
            return
        with suppress(HypervisorError), trio.move_on_after(DESTROY_SECONDS):
            async with open_connection(known.uri, known.name) as connection:
                domain = await connection.domain(known.uuid)
                await connection.call("virDomainDestroy", domain.destroy, timeout=DESTROY_SECONDS)
        await process.kill(known.local)

    # Starting.

    async def launch(self, launch: Launch) -> Handle:
        """See Driver: libvirt's own definition is started, its disks on the images that were asked for."""
        known = _template(launch)
        await self.storage.make_directory(str(launch.directory))
        async with open_connection(known.uri, launch.definition.name) as connection:
            domain = await connection.domain(known.uuid)
            await _check_managed_save(connection, domain, launch.definition.name)
            flags = connection.libvirt.VIR_DOMAIN_XML_INACTIVE | connection.libvirt.VIR_DOMAIN_XML_SECURE
            text = await connection.call("virDomainGetXMLDesc", domain.XMLDesc, flags)
            if launch.isolated:
                return await self._copy(connection, launch, text, incoming=False)
            await _define(connection, domain_xml.with_disks(text, launch.disks))
            _note(launch.directory, known)
            start, paused = domain.createWithFlags, connection.libvirt.VIR_DOMAIN_START_PAUSED
            await connection.call("virDomainCreateWithFlags", start, paused, timeout=START_SECONDS)
            return await _started(connection, domain, launch)

    async def restore(
        self,
        launch: Launch,
        memory: str,
        *,
        offset: int = 0,  # noqa: ARG002 - the file's own header says it
        versions: Mapping[str, str] | None = None,
    ) -> Handle:
        """See Driver: ``virDomainRestoreFlags``; a copy is made empty, and loads by QEMU's own command."""
        known, saved = _template(launch), await trio.to_thread.run_sync(read_save_image, memory)
        _check_versions(saved, versions, launch.definition.name)
        await self.storage.make_directory(str(launch.directory))
        async with open_connection(known.uri, launch.definition.name) as connection:
            if launch.isolated:
                return await self._restored_copy(connection, launch, saved, memory)
            libvirt, xml = connection.libvirt, domain_xml.with_disks(saved.xml, launch.disks)
            _note(launch.directory, known)
            arguments = (memory, xml, libvirt.VIR_DOMAIN_SAVE_PAUSED)
            restore = connection.raw.restoreFlags
            await connection.call("virDomainRestoreFlags", restore, *arguments, timeout=RESTORE_SECONDS)
            domain = await connection.domain(known.uuid)
            handle = await _started(connection, domain, launch)
            # Else the next power cycle would start the images that were left.
            if await connection.call("virDomainIsPersistent", domain.isPersistent):
                flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
                text = await connection.call("virDomainGetXMLDesc", domain.XMLDesc, flags)
                await _define(connection, domain_xml.with_disks(text, launch.disks))
            return handle

    async def _restored_copy(self, connection: Connection, launch: Launch, saved: SaveImage, memory: str) -> Handle:
        handle = await self._copy(connection, launch, saved.xml, incoming=True)
        try:
            async with self.connect(handle, launch.definition.name) as machine:
                await machine.load(memory, saved.offset)
        except BaseException:
            with trio.move_on_after(DESTROY_SECONDS, shield=True):
                await self.kill(handle)
                await self.clear(launch.directory)
            raise
        return handle

    async def _copy(self, connection: Connection, launch: Launch, text: str, *, incoming: bool) -> Handle:
        """Start a throw-away copy, under a name and a UUID that follow from its directory."""
        own = str(uuid.uuid5(COPIES, str(launch.directory)))
        name = f"{launch.definition.name}-copy-{own[:8]}"
        xml = domain_xml.copied(text, name, own, launch.disks, str(launch.directory), incoming=incoming)
        _note(launch.directory, LibvirtDomain(connection.uri, own, name, copy=True))
        create, paused = connection.raw.createXML, connection.libvirt.VIR_DOMAIN_START_PAUSED
        domain = await connection.call("virDomainCreateXML", create, xml, paused, timeout=START_SECONDS)
        return await _started(connection, domain, launch, copy=True)

    async def find(self, directory: Path) -> Handle | None:
        """See Driver."""
        try:
            note = json.loads((directory / NOTE).read_text())
        except (OSError, ValueError):
            return None
        local = running(note["uuid"])
        if local == NONE:
            return None
        known = LibvirtDomain(note["uri"], note["uuid"], note["name"], local, str(directory), note["copy"])
        return known.handle()

    async def clear(self, directory: Path) -> None:
        """See Driver."""
        for name in (NOTE, "nvram"):
            (directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            directory.rmdir()

    async def forget(self, handle: Handle) -> None:
        """See Driver."""
        if directory := LibvirtDomain.of(handle).directory:
            await self.clear(Path(directory))

    async def abandon(self, plan: StreamPlan) -> None:
        """See Driver."""
        await end_sinks(plan.path)

    async def publish(self, record: DomainRecord, snapshots: Sequence[SnapshotRecord]) -> None:
        """See Driver: libvirt does not see what is done to the images of a domain that does not run."""
        async with self._theirs(record) as (connection, domain):
            if domain is None:
                return
            # What has ended since the catalog was written to runs no more, whatever libvirt knows by now.
            ended = await self.present(record) is None
            if ended and await connection.call("virDomainIsPersistent", domain.isPersistent):
                flags = connection.libvirt.VIR_DOMAIN_XML_INACTIVE | connection.libvirt.VIR_DOMAIN_XML_SECURE
                text = await connection.call("virDomainGetXMLDesc", domain.XMLDesc, flags)
                now = {disk.target: disk.chain[0] for disk in domain_xml.disks(domain_xml.parse(text))}
                if now != {disk.target: disk.path for disk in record.disks}:
                    await _define(connection, domain_xml.with_disks(text, record.disks))
            if not ended:
                text = await connection.call("virDomainGetXMLDesc", domain.XMLDesc, 0)
                _check_left(record, domain_xml.disks(domain_xml.parse(text)))
            await records.write(connection, domain, record, snapshots)

    # libvirt's list of snapshots.

    @asynccontextmanager
    async def _theirs(self, record: DomainRecord) -> AsyncIterator[tuple[Any, Any]]:
        """Yield a connection and libvirt's object of a domain; None of a transient one that has ended."""
        last = record.handle or record.template
        if last is None:
            yield None, None
            return
        known = LibvirtDomain.of(last)
        async with open_connection(known.uri, record.name) as connection:
            domain = None
            with suppress(NoDomain):
                domain = await connection.domain(known.uuid)
            yield connection, domain

    async def theirs(self, record: DomainRecord, *, known: Collection[str] = ()) -> Theirs | None:
        """See KeepsRecords."""
        async with self._theirs(record) as (connection, domain):
            return None if domain is None else await records.look(connection, domain, known)

    async def mark_records(self, record: DomainRecord, ids: Mapping[str, str]) -> None:
        """See KeepsRecords."""
        async with self._theirs(record) as (connection, domain):
            if domain is not None:
                await records.mark(connection, domain, record, ids)

    async def remove_records(self, record: DomainRecord, snapshots: Sequence[SnapshotRecord]) -> None:
        """See KeepsRecords."""
        async with self._theirs(record) as (connection, domain):
            if domain is not None:
                await records.remove(connection, domain, record, snapshots)

    # Files.

    async def overlay_place(
        self,
        record: DomainRecord,  # noqa: ARG002 - the same for all
        disk: DeviceDisk,
        directory: str,  # noqa: ARG002 - libvirt's QEMU may not get through to it
    ) -> OverlayPlace:
        """See Driver: beside the image that it covers, where libvirt's QEMU gets through to it."""
        status = os.stat(disk.path)
        owner = (status.st_uid, status.st_gid)
        return OverlayPlace(os.path.dirname(disk.path), None if owner == (os.geteuid(), os.getegid()) else owner)

    async def writers_of(self, paths: Collection[str], besides: Handle | None = None) -> tuple[Writer, ...]:
        """See Driver."""
        own = self.pid(besides) if besides is not None else None
        found = process.writers({os.path.realpath(path) for path in paths})
        return tuple(Writer(f"process {pid}", path) for pid, path in found if pid != own)

    async def doctor(self) -> dict[str, Any]:
        """See Driver."""
        try:
            libvirt, _ = binding.load()
        except Unsupported as error:
            return {"binding": str(error)}
        uri = default_uri()
        findings: dict[str, Any] = {"binding": f"libvirt-python {_version(libvirt.getVersion())}", "uri": uri}
        try:
            async with open_connection(uri, "doctor") as connection:
                number = await connection.call("virConnectGetLibVersion", connection.raw.getLibVersion)
                findings["libvirtd"] = _version(number)
                text = await connection.call("virConnectGetCapabilities", connection.raw.getCapabilities)
                models = domain_xml.security_models(domain_xml.parse(text))
                findings["security"] = ", ".join(models) or "none"
        except HypervisorError as error:
            findings["libvirtd"] = str(error)
        return findings


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _template(launch: Launch) -> LibvirtDomain:
    if launch.template is None:
        raise Unsupported(
            f"{launch.definition.name}: a domain of libvirt's is defined by libvirt; "
            f"`snaporch domain attach {launch.definition.name} --driver libvirt` takes it over"
        )
    return LibvirtDomain.of(launch.template)


async def _known(connection: Connection, domain: Any, *, running_now: bool) -> LibvirtDomain:
    own, name = domain.UUIDString(), domain.name()
    local = await trio.to_thread.run_sync(running, own) if running_now else NONE
    return LibvirtDomain(connection.uri, own, name, local)


async def _started(connection: Connection, domain: Any, launch: Launch, *, copy: bool = False) -> Handle:
    known = await _known(connection, domain, running_now=True)
    return attrs.evolve(known, directory=str(launch.directory), copy=copy).handle()


async def _define(connection: Connection, xml: str) -> None:
    await connection.call("virDomainDefineXML", connection.raw.defineXML, xml)


def _note(directory: Path, known: LibvirtDomain) -> None:
    document = {"uri": known.uri, "uuid": known.uuid, "name": known.name, "copy": known.copy}
    (directory / NOTE).write_text(json.dumps(document))


async def _in_the_way(connection: Connection, domain: Any) -> str:
    """Return why a domain cannot be attached to, or an empty string."""
    try:
        await _check_managed_save(connection, domain, domain.name())
        if not await connection.call("virDomainIsActive", domain.isActive):
            return "it does not run: `virsh start` starts it"
        domain_xml.disks(domain_xml.parse(await connection.call("virDomainGetXMLDesc", domain.XMLDesc, 0)))
    except (Refused, HypervisorError) as error:
        return str(error)
    return ""


async def _check_managed_save(connection: Connection, domain: Any, name: str) -> None:
    """Refuse a domain that libvirt has put to sleep: its images belong to the memory that was saved.

    Raises:
        Refused: it is.
    """
    if why := await records.asleep(connection, domain):
        raise Refused(f"{name}: {why}")


def _check_versions(saved: SaveImage, versions: Mapping[str, str] | None, name: str) -> None:
    """Refuse memory of another machine type than its own header has.

    Raises:
        Unsupported: they differ.
    """
    machine = domain_xml.machine_type(domain_xml.parse(saved.xml))
    if versions is not None and versions.get("machine", machine) != machine:
        raise Unsupported(f"{name}: the memory is of a machine {versions['machine']}, and its file says {machine}")


def _check_left(record: DomainRecord, found: tuple[domain_xml.XmlDisk, ...]) -> None:
    """Refuse a domain that somebody has started, reverted or merged on other images than it was left on.

    Raises:
        Refused: it is.
    """
    now = {disk.target: disk.chain[0] for disk in found}
    for disk in record.disks:
        path = now.get(disk.target)
        if disk.readonly:
            continue
        if path is None or os.path.realpath(path) != os.path.realpath(disk.path):
            raise Refused(
                f"{record.name}: {disk.target} is on {path or 'nothing'} in libvirt, and was left on {disk.path}: "
                f"another tool has reverted or merged it. `snaporch domain sync {record.name}` follows a revert; "
                "else shut it down and put libvirt's definition back on that image, or `snaporch domain undefine` "
                "it and attach it anew"
            )
