"""libvirt's own list of a domain's snapshots: ours are put into it, and others are read from it.

All of it is idempotent: what libvirt has is compared with what it is to have. What each part of a record does is in
`snapshot_xml`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import trio

from snaporch.drivers.base import Foreign, Theirs
from snaporch.drivers.libvirt import domain_xml, snapshot_xml
from snaporch.drivers.libvirt.connection import Connection
from snaporch.drivers.libvirt.process import DRIVER
from snaporch.drivers.libvirt.save_image import OFFSET, SaveImage, read_header
from snaporch.drivers.libvirt.snapshot_xml import EXTERNAL, INTERNAL, LEFT_OUT, Record, XmlSnapshot
from snaporch.errors import Refused
from snaporch.model.domain import DomainRecord, DomainState
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DeviceDisk, DiskSnapshot

_STATES = {
    "running": DomainState.RUNNING,
    "paused": DomainState.PAUSED,
    "shutoff": DomainState.INACTIVE,
    "disk-snapshot": DomainState.RUNNING,
}


@attrs.frozen
class Listed:
    """A snapshot in libvirt's list.

    Attributes:
        raw: libvirt's object.
        xml: what it says.
        current: libvirt takes the domain's present state for a descendant of it.
    """

    raw: Any
    xml: XmlSnapshot
    current: bool


def read_save_image(path: str) -> SaveImage:
    """Return what the header of a memory file says; see `read_header` for the errors."""
    with open(path, "rb") as file:
        return read_header(file.read(OFFSET), path)


async def listed(connection: Connection, domain: Any) -> dict[str, Listed]:
    """Return libvirt's list of a domain's snapshots, by name."""
    found = {}
    for raw in await connection.call("virDomainListAllSnapshots", domain.listAllSnapshots, 0):
        flags = connection.libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        xml = snapshot_xml.read(await connection.call("virDomainSnapshotGetXMLDesc", raw.getXMLDesc, flags))
        current = await connection.call("virDomainSnapshotIsCurrent", raw.isCurrent, 0)
        found[xml.name] = Listed(raw, xml, bool(current))
    return found


async def write(
    connection: Connection, domain: Any, record: DomainRecord, snapshots: Sequence[SnapshotRecord]
) -> None:
    """Have libvirt's list say what the catalog says.

    Raises:
        Refused: libvirt has another snapshot of a name of ours; all others are right then.
    """
    there = await listed(connection, domain)
    kept = {each.id: each.name for each in snapshots}
    wanted = {each.name: each for each in snapshots if record.records or each.foreign}
    current = next((name for name, each in there.items() if each.current), None)
    ours = {name: each.xml.mark for name, each in there.items() if each.xml.owner == record.uuid}
    for name in [name for name, mark_ in ours.items() if kept.get(mark_) != name]:
        await _remove(connection, there[name])
        current = there[name].xml.parent if current == name else current
        del there[name]
    current = record.current if record.current in wanted else current
    inactive = ""
    for each in snapshot_xml.in_order(_record(wanted[name], snapshots, record, current) for name in wanted):
        known, snapshot = there.get(each.name), wanted[each.name]
        if known is not None and known.xml.mark != each.id:
            continue
        if known is None:
            inactive = inactive or await _inactive(connection, domain)
            xml = each.made(await _at_the_point(snapshot) or inactive, inactive)
        elif each.agrees(known.xml) and (known.current or each.name != current):
            continue
        else:
            xml = each.changed(known.xml.root)
        await _redefine(connection, domain, xml, current=each.name == current)
    if foreign := sorted(n for n in wanted if n in there and there[n].xml.mark != wanted[n].id):
        raise Refused(
            f"libvirt has snapshots {', '.join(foreign)} of {record.name}, which are others than those of these "
            "names here: `snaporch edit --name` renames those here, `virsh snapshot-delete --metadata` forgets "
            "libvirt's"
        )


async def mark(connection: Connection, domain: Any, record: DomainRecord, ids: Mapping[str, str]) -> None:
    """Mark snapshots in libvirt's list as those of a domain of ours; by name, their ids here."""
    there = await listed(connection, domain)
    for name, id_ in ids.items():
        if name in there and there[name].xml.mark != id_:
            xml = snapshot_xml.marked(there[name].xml.root, id_, record.uuid)
            await _redefine(connection, domain, xml, current=there[name].current)


async def remove(
    connection: Connection, domain: Any, record: DomainRecord, snapshots: Sequence[SnapshotRecord]
) -> None:
    """Remove from libvirt's list what snaporch has put into it; what others have made stays."""
    foreign = {each.id for each in snapshots if each.foreign}
    for each in (await listed(connection, domain)).values():
        if each.xml.owner == record.uuid and each.xml.mark not in foreign:
            await _remove(connection, each)


async def _remove(connection: Connection, one: Listed) -> None:
    only = connection.libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
    await connection.call("virDomainSnapshotDelete", one.raw.delete, only)


async def _redefine(connection: Connection, domain: Any, xml: str, *, current: bool) -> None:
    flags = connection.libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    flags |= connection.libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if current else 0
    await connection.call("virDomainSnapshotCreateXML", domain.snapshotCreateXML, xml, flags)


async def _inactive(connection: Connection, domain: Any) -> str:
    flags = connection.libvirt.VIR_DOMAIN_XML_INACTIVE | connection.libvirt.VIR_DOMAIN_XML_SECURE
    return str(await connection.call("virDomainGetXMLDesc", domain.XMLDesc, flags))


async def _at_the_point(snapshot: SnapshotRecord) -> str:
    """Return libvirt's XML of the domain at the point, which is in the memory file; empty where there is none."""
    if snapshot.memory is None:
        return ""
    return (await trio.to_thread.run_sync(read_save_image, snapshot.memory.path)).xml


def _record(
    snapshot: SnapshotRecord, snapshots: Sequence[SnapshotRecord], domain: DomainRecord, current: str | None
) -> Record:
    inner = snapshot.snapshot
    external = [disk for disk in inner.disks if disk.external]
    present = {disk.target: disk.path for disk in domain.disks}
    overlays = {}
    for disk in external:
        target, made = disk.disk.target, disk.external_sn.path if disk.external_sn else ""
        above = present[target] if snapshot.name == current else _above(disk.disk, snapshots)
        overlays[target] = above or made
    taken = {disk.disk.target for disk in inner.disks}
    state = "disk-snapshot" if snapshot.domain_state is DomainState.RUNNING else "shutoff"
    return Record(
        id=snapshot.id,
        owner=domain.uuid,
        name=snapshot.name,
        parent=snapshot.parent,
        description=inner.description,
        creation_time=inner.creation_time,
        state=str(snapshot.domain_state) if inner.memory else state,
        memory_file=snapshot.memory.path if snapshot.memory else "",
        frozen=tuple(disk.disk for disk in inner.disks),
        overlays=overlays,
        others=tuple(target for target in present if target not in taken),
    )


def _above(frozen: DeviceDisk, snapshots: Sequence[SnapshotRecord]) -> str:
    """Return the image that another snapshot has over a frozen one, or an empty string."""
    for each in snapshots:
        chain = [file.path for file in each.images.get(frozen.target, ())]
        if frozen.path in chain[1:]:
            return chain[chain.index(frozen.path) - 1]
    return ""


# --- what others have made ------------------------------------------------------------------------------------


async def look(connection: Connection, domain: Any, known: Collection[str]) -> Theirs:
    """Return what libvirt has of a domain: its disks, and its snapshots."""
    there = await listed(connection, domain)
    active = bool(await connection.call("virDomainIsActive", domain.isActive))
    text = await connection.call("virDomainGetXMLDesc", domain.XMLDesc, 0)
    return Theirs(
        disks=tuple(disk.device for disk in domain_xml.disks(domain_xml.parse(text))),
        current=next((name for name, each in there.items() if each.current), None),
        snapshots=tuple([await _foreign(each.xml, known) for each in _by_age(there)]),
        running=active,
        blocker=await asleep(connection, domain),
    )


async def asleep(connection: Connection, domain: Any) -> str:
    """Return why nothing may be done to a domain that libvirt has put to sleep, or an empty string."""
    if await connection.call("virDomainHasManagedSaveImage", domain.hasManagedSaveImage, 0):
        return (
            "libvirt has saved its memory (managed save), and its disks belong to that; `virsh start` goes on from "
            "it, `virsh managedsave-remove` gives that memory up"
        )
    return ""


def _by_age(found: Mapping[str, Listed]) -> list[Listed]:
    """Return snapshots, oldest first; of one second a parent before its children."""

    def depth(name: str | None) -> int:
        return 1 + depth(found[name].xml.parent) if name is not None and name in found else 0

    return sorted(found.values(), key=lambda each: (each.xml.creation_time, depth(each.xml.name)))


async def _foreign(xml: XmlSnapshot, known: Collection[str]) -> Foreign:
    machine, why = "", _unknown(xml)
    if not why and xml.memory_file and xml.mark not in known:
        try:
            saved = await trio.to_thread.run_sync(read_save_image, xml.memory_file)
            machine = domain_xml.machine_type(domain_xml.parse(saved.xml))
        except (Refused, OSError) as error:
            why = str(error)
    frozen = {disk.target: disk for disk in xml.frozen}
    external = [target for target, kind in xml.kinds.items() if kind == EXTERNAL and target in frozen]
    disks = tuple(
        DiskSnapshot(
            attrs.evolve(frozen[target], readonly=False),
            xml.name,
            external_sn=DeviceDisk(target, xml.overlays.get(target, "")),
        )
        for target in external
    )
    root = xml.domain
    return Foreign(
        name=xml.name,
        id=xml.mark,
        parent=xml.parent,
        description=xml.description,
        creation_time=xml.creation_time,
        state=_STATES.get(xml.state, DomainState.INACTIVE),
        has_memory=xml.memory in {EXTERNAL, INTERNAL},
        memory_file=xml.memory_file,
        disks=disks,
        memory=domain_xml.memory(root) if root is not None else 0,
        vcpus=domain_xml.vcpus(root) if root is not None else 0,
        versions={"machine": machine} if machine else {},
        by=DRIVER,
        blocker=why,
    )


def _unknown(xml: XmlSnapshot) -> str:
    """Return why nobody but libvirt can go back to a snapshot of its own, or an empty string."""
    if xml.memory == INTERNAL or INTERNAL in xml.kinds.values():
        return f"it is inside its images; `virsh snapshot-revert DOMAIN {xml.name}` goes back to it"
    if xml.state not in _STATES:
        return f"its domain was {xml.state or 'in no known state'}"
    if xml.domain is None:
        return "libvirt does not say what its domain was"
    frozen = {disk.target for disk in xml.frozen}
    if lost := [target for target, kind in xml.kinds.items() if kind != LEFT_OUT and target not in frozen]:
        return f"libvirt does not say which image holds {', '.join(lost)}"
    return ""
