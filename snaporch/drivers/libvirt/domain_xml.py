"""libvirt's XML of a domain: read, and written anew with other disks; no I/O."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element

import attrs

from snaporch.errors import Unsupported
from snaporch.model.names import TARGET
from snaporch.model.rfc import DeviceDisk

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
AGENT_CHANNEL = "org.qemu.guest_agent.0"
_COMMAND_LINE, _ARGUMENT = f"{{{QEMU_NAMESPACE}}}commandline", f"{{{QEMU_NAMESPACE}}}arg"
_OF_THE_NETWORK = {"source", "target", "script", "downscript", "virtualport", "filterref", "bandwidth", "vlan"}
_FORMATS = {"qcow2", "raw"}
_UNITS = {"b": 1, "bytes": 1, "KB": 10**3, "k": 2**10, "KiB": 2**10, "MB": 10**6, "M": 2**20, "MiB": 2**20}
_UNITS |= {"GB": 10**9, "G": 2**30, "GiB": 2**30, "TB": 10**12, "T": 2**40, "TiB": 2**40}

ET.register_namespace("qemu", QEMU_NAMESPACE)


def parse(text: str) -> Element:
    """Return the document; it comes from libvirtd, or from a memory file whose checksum was compared."""
    return ET.fromstring(text)  # noqa: S314 - see above; and expat bounds what entities grow to


def text_of(root: Element) -> str:
    """Return the document as text."""
    return ET.tostring(root, encoding="unicode")


@attrs.frozen
class XmlDisk:
    """A disk with an image, as a domain's XML has it.

    Attributes:
        target: its name.
        alias: libvirt's id of the device, in the XML of a running domain; else empty.
        chain: paths, the active image first; in the XML of an inactive domain only that.
        format: of the active image.
        readonly: the guest cannot write to it.
    """

    target: str
    alias: str
    chain: tuple[str, ...]
    format: str
    readonly: bool

    @property
    def device(self) -> DeviceDisk:
        """The disk on its active image."""
        return DeviceDisk(self.target, self.chain[0], self.format, self.readonly)


def _devices(root: Element) -> Element:
    devices = root.find("devices")
    if devices is None:
        raise Unsupported("libvirt's XML of the domain has no devices")
    return devices


def _target(disk: Element) -> str:
    target = disk.find("target")
    return target.get("dev", "") if target is not None else ""


def path_of(source: Element | None) -> str | None:
    """Return the file or the block device that a source names; None: neither."""
    return None if source is None else source.get("file") or source.get("dev")


def _sources(disk: Element) -> Iterator[str]:
    """Yield the paths of a disk's chain."""
    found: Element | None = disk
    while found is not None:
        if (path := path_of(found.find("source"))) is None:
            return
        yield path
        found = found.find("backingStore")


def targets(root: Element) -> tuple[str, ...]:
    """Return the names of all disks, of empty drives too."""
    return tuple(_target(disk) for disk in _devices(root).findall("disk"))


def disks(root: Element) -> tuple[XmlDisk, ...]:
    """Return the disks that have an image: not empty drives.

    Raises:
        Unsupported: a disk is of a kind that snaporch cannot take or leave alone.
    """
    found = []
    for disk in _devices(root).findall("disk"):
        chain = tuple(_sources(disk))
        if problem := _problem(disk, chain):
            raise Unsupported(f"disk {_target(disk)}: {problem}")
        if not chain:
            continue
        driver, alias = disk.find("driver"), disk.find("alias")
        found.append(
            XmlDisk(
                target=_target(disk),
                alias=alias.get("name", "") if alias is not None else "",
                chain=chain,
                format=driver.get("type", "") if driver is not None else "",
                readonly=disk.find("readonly") is not None,
            )
        )
    return tuple(found)


def without_chains(text: str) -> str:
    """Return a domain's XML that does not say what backs its disks' images: the images do.

    Where it is said libvirt goes by that, also for an image that somebody puts there instead: then what is between
    would be left out.
    """
    root = parse(text)
    for disk in root.findall("devices/disk"):
        _drop(disk, {"backingStore"})
    return text_of(root)


def images(root: Element) -> tuple[DeviceDisk, ...]:
    """Return the disks that have an image, of whatever kind; of a kind that is not a file or a device, none."""
    found = []
    for disk in root.findall("devices/disk"):
        driver, chain = disk.find("driver"), tuple(_sources(disk))
        if chain:
            kind = driver.get("type", "") if driver is not None else ""
            found.append(DeviceDisk(_target(disk), chain[0], kind, disk.find("readonly") is not None))
    return tuple(found)


def put_images(root: Element, wanted: Iterable[DeviceDisk]) -> None:
    """Put disks on these images, in place; the disks that are not named stay as they are."""
    images = {image.target: image for image in wanted}
    for disk in root.findall("devices/disk"):
        if (image := images.get(_target(disk))) is not None and path_of(disk.find("source")) != image.path:
            _put(disk, image)


def _problem(disk: Element, chain: tuple[str, ...]) -> str:
    """Return why a disk cannot be part of a domain here, or an empty string."""
    kind, driver = disk.get("type", ""), disk.find("driver")
    if kind not in {"file", "block"}:
        return f"it is of type {kind!r}; snaporch takes files and block devices"
    if not chain:
        return "" if disk.get("device") in {"cdrom", "floppy"} else "it has no source"
    format_ = driver.get("type") if driver is not None else None
    problems = {
        "its target is no name of a disk": not TARGET.fullmatch(_target(disk)),
        f"its format is {format_ or 'not given'}; snaporch takes qcow2 and raw": format_ not in _FORMATS,
        "it is encrypted; an overlay over it would not be": disk.find(".//encryption") is not None,
        "it is a slice of its file": disk.find("source/slices") is not None,
        "it is transient": disk.find("transient") is not None,
    }
    return next((words for words, there in problems.items() if there), "")


def memory(root: Element) -> int:
    """Return the bytes of RAM that the domain may have."""
    found = root.find("memory")
    if found is None or found.text is None:
        raise Unsupported("libvirt's XML of the domain does not say how much memory it has")
    return int(found.text) * _UNITS[found.get("unit", "KiB")]


def vcpus(root: Element) -> int:
    """Return the number of virtual CPUs."""
    found = root.find("vcpu")
    return int(found.get("current", found.text or "1")) if found is not None else 1


def name(root: Element) -> str:
    """Return the domain's name."""
    found = root.find("name")
    return (found.text or "") if found is not None else ""


def machine_type(root: Element) -> str:
    """Return QEMU's machine type."""
    found = root.find("os/type")
    return found.get("machine", "") if found is not None else ""


def security_models(capabilities: Element) -> tuple[str, ...]:
    """Return the security models that confine guests, from the XML of a host's capabilities."""
    return tuple(each.text or "" for each in capabilities.findall("host/secmodel/model"))


def has_agent(root: Element) -> bool:
    """Return whether the domain has a channel to the QEMU guest agent."""
    targets = (channel.find("target") for channel in _devices(root).findall("channel"))
    return any(target is not None and target.get("name") == AGENT_CHANNEL for target in targets)


def memory_blocker(root: Element) -> str:
    """Return what keeps the domain's memory from being saved, or an empty string."""
    devices = _devices(root)
    if devices.find("hostdev") is not None:
        return "a device of the host is passed through to it, whose state no hypervisor can save"
    if (tpm := devices.find("tpm/backend")) is not None and tpm.get("type") != "emulator":
        return f"it has a TPM of type {tpm.get('type')!r}, whose state is outside of QEMU"
    if root.find("launchSecurity") is not None:
        return "its memory is encrypted (launchSecurity)"
    if any(each.find("driver[@type='virtiofs']") is not None for each in devices.findall("filesystem")):
        return "a directory of the host is shared with it by virtiofs, which keeps QEMU from saving memory"
    return ""


def with_disks(text: str, images: Iterable[DeviceDisk]) -> str:
    """Return a domain's XML with disks on other images; the disks that are not named stay as they are.

    Raises:
        Unsupported: the domain has no such disk.
    """
    root, wanted = parse(text), {image.target: image for image in images}
    for disk in _devices(root).findall("disk"):
        image = wanted.pop(_target(disk), None)
        if image is not None and path_of(disk.find("source")) != image.path:
            _put(disk, image)
    if wanted:
        raise Unsupported(f"{name(root)} has no disk {', '.join(sorted(wanted))} in libvirt's definition")
    return text_of(root)


def _put(disk: Element, image: DeviceDisk) -> None:
    disk.set("type", "file")
    _drop(disk, {"backingStore", "source"})
    # libvirt wants elements in any order, but reads like its own: the source behind the driver.
    position = next((n for n, child in enumerate(disk) if child.tag == "driver"), -1) + 1
    disk.insert(position, Element("source", {"file": image.path}))
    driver = disk.find("driver")
    if driver is None:
        driver = Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    driver.set("type", image.format)


def copied(
    text: str, name_: str, uuid: str, images: Iterable[DeviceDisk], directory: str, *, incoming: bool
) -> str:
    """Return the XML of a throw-away copy: the same devices, and no way out.

    Args:
        text: of the domain at the point.
        name_: the copy's.
        uuid: the copy's.
        images: its disks.
        directory: for files of its own.
        incoming: it waits for its memory.

    Raises:
        Unsupported: it has a device of which there cannot be two.
    """
    root = parse(with_disks(text, images))
    for tag, value in (("name", name_), ("uuid", uuid)):
        found = root.find(tag)
        if found is None:
            found = Element(tag)
            root.insert(0, found)
        found.text = value
    _isolate(_devices(root))
    if (variables := root.find("os/nvram")) is not None:
        variables.text = f"{directory}/nvram"
    if root.find(_COMMAND_LINE) is not None:
        raise Unsupported("libvirt's definition has QEMU arguments of its own (qemu:commandline)")
    if incoming:
        arguments = Element(_COMMAND_LINE)
        arguments.extend(Element(_ARGUMENT, {"value": word}) for word in ("-incoming", "defer"))
        root.append(arguments)
    return text_of(root)


def _isolate(devices: Element) -> None:
    """Cut off what reaches outside the guest; each device stays, or its state would not load."""
    for nic in devices.findall("interface"):
        _cut_off(nic)
    for port in [each for kind in ("serial", "console", "parallel") for each in devices.findall(kind)]:
        port.set("type", "null")
        _drop(port, {"source", "log"})
    for channel in devices.findall("channel"):
        _drop(channel, {"source"})
    for port in devices.findall("redirdev"):
        if port.get("type") != "spicevmc":
            port.set("type", "null")
            _drop(port, {"source"})
    for audio in devices.findall("audio"):
        if audio.get("type") != "spice":
            _drop(audio, {child.tag for child in audio})
            audio.attrib = {"id": audio.get("id", "1"), "type": "none"}
    spice = devices.find("graphics[@type='spice']") is not None
    _drop(devices, {"graphics"})
    if spice:  # other devices need one; this one nobody can reach
        graphics = Element("graphics", {"type": "spice"})
        graphics.append(Element("listen", {"type": "none"}))
        devices.append(graphics)


def _drop(parent: Element, tags: Collection[str]) -> None:
    for child in [child for child in parent if child.tag in tags]:
        parent.remove(child)


def _cut_off(nic: Element) -> None:
    """Put a network card on a tap that leads nowhere; of the same kind, or its state would not load."""
    if nic.get("type") in {"network", "bridge", "direct", "ethernet"}:
        _drop(nic, _OF_THE_NETWORK)
        nic.set("type", "ethernet")
    elif nic.get("type") not in {"user", "null"}:
        raise Unsupported(f"it has a network card of type {nic.get('type')!r}, of which there cannot be two")
    link = nic.find("link")
    if link is None:
        link = Element("link")
        nic.append(link)
    link.set("state", "down")


def overlays_xml(overlays: Mapping[str, str], others: Iterable[str]) -> str:
    """Return the XML of a disk snapshot that puts disks on overlays which exist.

    Args:
        overlays: paths, by target.
        others: targets of all other disks, which stay where they are.
    """
    root = Element("domainsnapshot")
    root.append(Element("memory", {"snapshot": "no"}))
    listed = Element("disks")
    for target, path in overlays.items():
        disk = Element("disk", {"name": target, "snapshot": "external", "type": "file"})
        disk.append(Element("driver", {"type": "qcow2"}))
        disk.append(Element("source", {"file": path}))
        listed.append(disk)
    listed.extend(Element("disk", {"name": target, "snapshot": "no"}) for target in others)
    root.append(listed)
    return text_of(root)


def alias_in(qdev: str, aliases: Iterable[str]) -> str | None:
    """Return the alias of the device that a QOM path of query-block is in."""
    parts = re.split(r"/", qdev)
    return next((alias for alias in aliases if alias and alias in parts), None)
