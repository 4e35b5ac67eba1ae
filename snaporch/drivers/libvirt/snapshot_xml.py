"""libvirt's XML of a snapshot: read, and written anew; no I/O.

What libvirt does with a snapshot's record:

1. ``<domain>`` names the images that the snapshot has frozen. A revert by libvirt starts from those.
2. ``<disks>`` names the overlays that were made over them. A revert by libvirt takes those of its *current*
   snapshot for the state that is left, and unlinks them. So the record of the current snapshot names the images
   that the domain is on at present, always.
3. A mark of ours in ``<domain>``'s metadata says which snapshot of snaporch's it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from xml.etree.ElementTree import Element

import attrs

from snaporch.drivers.libvirt import domain_xml
from snaporch.model.rfc import DeviceDisk

MARK = "{urn:snaporch:snapshot}snapshot"
EXTERNAL, INTERNAL, LEFT_OUT = "external", "internal", "no"


@attrs.frozen
class XmlSnapshot:
    """A snapshot as libvirt has it.

    Attributes:
        name: its name.
        parent: the name of the one it descends from, or None.
        description: free text.
        creation_time: seconds since the epoch.
        state: libvirt's word for what the domain did at the point; ``disk-snapshot``: it ran, and only its disks
            were taken.
        memory: ``external``, ``internal`` or ``no``.
        memory_file: of one with external memory.
        kinds: of each disk ``external``, ``internal`` or ``no``.
        overlays: of each external disk the overlay that was made, where that is said.
        frozen: of each disk with an image what it was on at the point.
        mark: the id of the snapshot of snaporch's that it is, or empty.
        owner: by which domain of snaporch's, if any: that domain's uuid in its catalog.
        root: all of it.
    """

    name: str
    parent: str | None
    description: str
    creation_time: int
    state: str
    memory: str
    memory_file: str
    kinds: dict[str, str]
    overlays: dict[str, str]
    frozen: tuple[DeviceDisk, ...]
    mark: str
    owner: str
    root: Element

    @property
    def domain(self) -> Element | None:
        """The domain at the point."""
        return self.root.find("domain")


def read(text: str) -> XmlSnapshot:
    """Return what libvirt's XML of a snapshot says."""
    root = domain_xml.parse(text)
    memory, domain = root.find("memory"), root.find("domain")
    listed = [disk for disk in root.findall("disks/disk") if disk.get("name")]
    sources = ((disk.get("name", ""), disk.find("source")) for disk in listed)
    mark = domain.find(f"metadata/{MARK}") if domain is not None else None
    return XmlSnapshot(
        name=root.findtext("name") or "",
        parent=root.findtext("parent/name"),
        description=root.findtext("description") or "",
        creation_time=int(root.findtext("creationTime") or 0),
        state=root.findtext("state") or "",
        memory=memory.get("snapshot", LEFT_OUT) if memory is not None else LEFT_OUT,
        memory_file=memory.get("file", "") if memory is not None else "",
        kinds={disk.get("name", ""): disk.get("snapshot", LEFT_OUT) for disk in listed},
        overlays={name: path for name, source in sources if (path := domain_xml.path_of(source))},
        frozen=domain_xml.images(domain) if domain is not None else (),
        mark=mark.get("id", "") if mark is not None else "",
        owner=mark.get("domain", "") if mark is not None else "",
        root=root,
    )


@attrs.frozen
class Record:
    """What libvirt's record of a snapshot is to say.

    Attributes:
        id: of the snapshot of ours.
        owner: the uuid in the catalog of the domain that has it.
        name: its name.
        parent: the name of the one it descends from, or None.
        description: free text.
        creation_time: seconds since the epoch.
        state: libvirt's word.
        memory_file: or empty.
        frozen: the images that hold the disks at the point.
        overlays: by target, what is over them; of a disk that is taken inside its image, nothing.
        others: targets of the disks that were left out.
    """

    id: str
    owner: str
    name: str
    parent: str | None
    description: str
    creation_time: int
    state: str
    memory_file: str
    frozen: tuple[DeviceDisk, ...]
    overlays: Mapping[str, str]
    others: tuple[str, ...] = ()

    def agrees(self, found: XmlSnapshot) -> bool:
        """Return whether libvirt's record says it already."""
        images, on = {disk.target: disk.path for disk in found.frozen}, found.overlays
        return (
            (self.name, self.parent, self.id, self.owner) == (found.name, found.parent, found.mark, found.owner)
            and self.description == found.description
            and all(images.get(disk.target) == disk.path for disk in self.frozen)
            and all(on.get(target) == path for target, path in self.overlays.items())
            and found.root.find("revertDisks") is None
        )

    def made(self, domain: str, inactive: str) -> str:
        """Return the XML of a record that libvirt has not got yet.

        Args:
            domain: libvirt's XML of the domain at the point.
            inactive: what it would have been started from next.
        """
        root = Element("domainsnapshot")
        for tag, text in (("name", self.name), ("state", self.state), ("creationTime", str(self.creation_time))):
            _child(root, tag).text = text
        memory = {"snapshot": EXTERNAL, "file": self.memory_file} if self.memory_file else {"snapshot": LEFT_OUT}
        root.append(Element("memory", memory))
        _child(root, "disks")
        root.append(domain_xml.parse(domain))
        root.append(_renamed(domain_xml.parse(inactive), "inactiveDomain"))
        return self.changed(root)

    def changed(self, root: Element) -> str:
        """Return a record's XML brought up to date: all that is not named in this class stays as it is."""
        root = copy.deepcopy(root)
        _text(root, "name", self.name)
        _text(root, "description", self.description)
        _drop(root, "parent")
        if self.parent is not None:
            _child(_child(root, "parent"), "name").text = self.parent
        _drop(root, "revertDisks")  # of a revert by libvirt, whose overlays may not be the present ones any more
        self._put_disks(root)
        for domain in (root.find("domain"), root.find("inactiveDomain")):
            if domain is not None:
                domain_xml.put_images(domain, self.frozen)
        if (domain := root.find("domain")) is not None:
            _mark(domain, self.id, self.owner)
        return domain_xml.text_of(root)

    def _put_disks(self, root: Element) -> None:
        disks = root.find("disks")
        if disks is None:
            disks = _child(root, "disks")
        known = {disk.get("name", ""): disk for disk in disks}
        inside = [disk.target for disk in self.frozen if disk.target not in self.overlays]
        kinds = dict.fromkeys(self.others, LEFT_OUT) | dict.fromkeys(inside, INTERNAL)
        for target, kind in kinds.items():
            if target not in known:
                disks.append(Element("disk", {"name": target, "snapshot": kind}))
        for target, path in self.overlays.items():
            if target in known:
                disks.remove(known[target])
            disk = Element("disk", {"name": target, "snapshot": EXTERNAL, "type": "file"})
            disk.append(Element("driver", {"type": "qcow2"}))
            disk.append(Element("source", {"file": path}))
            disks.append(disk)


def _child(parent: Element, tag: str) -> Element:
    made = Element(tag)
    parent.append(made)
    return made


def _text(root: Element, tag: str, text: str) -> None:
    found = root.find(tag)
    if found is None and text:
        found = _child(root, tag)
    if found is not None:
        found.text = text


def _drop(parent: Element, tag: str) -> None:
    for child in parent.findall(tag):
        parent.remove(child)


def _renamed(root: Element, tag: str) -> Element:
    root.tag = tag
    return root


def _mark(domain: Element, id_: str, owner: str) -> None:
    metadata = domain.find("metadata")
    if metadata is None:
        metadata = Element("metadata")
        domain.append(metadata)
    _drop(metadata, MARK)
    metadata.append(Element(MARK, {"id": id_, "domain": owner}))


def marked(root: Element, id_: str, owner: str) -> str:
    """Return a record's XML with our mark, and nothing else changed."""
    root = copy.deepcopy(root)
    if (domain := root.find("domain")) is not None:
        _mark(domain, id_, owner)
    return domain_xml.text_of(root)


def in_order(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return records, parents before their children; one whose parent is none of them is a root."""
    left = {record.name: record for record in records}
    found: list[Record] = []
    while left:
        ready = [record for record in left.values() if record.parent not in left]
        if not ready:
            raise AssertionError(f"snapshots descend from each other: {', '.join(sorted(left))}")
        found += ready
        for record in ready:
            del left[record.name]
    return tuple(found)
