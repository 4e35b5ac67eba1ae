"""Domains: how they are launched, what the catalog knows of them, and what they are this moment.

Everything here is frozen and says nothing about how it is stored or sent: see `snaporch.model.convert` for that.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.formats import versioned
from snaporch.model.names import TARGET, UUID, check_name, new_uuid
from snaporch.model.rfc import DeviceDisk
from snaporch.model.upcasts import with_handles
from snaporch.model.way import WayBack

LEAST_MEMORY = 2**20


class DomainState(enum.StrEnum):
    """What a domain does, as far as a user is concerned."""

    INACTIVE = "inactive"
    RUNNING = "running"
    PAUSED = "paused"


_CHOICES = {"accel": ("auto", "kvm", "tcg"), "clock": ("set", "keep"), "firmware": ("bios", "uefi")}
GENID = re.compile(rf"auto|none|{UUID.pattern}")


def _disk_faults(disk: Mapping[str, Any], taken: set[str]) -> Iterator[str]:
    target, format_ = disk.get("target"), disk.get("format")
    if isinstance(target, str):
        if not TARGET.fullmatch(target):
            yield f"{target!r:.60} is not a disk target: up to 16 letters and digits, for example vda"
        elif target in taken:
            yield f"the disk target {target} is used twice"
        taken.add(target)
    if isinstance(format_, str) and format_ not in {"qcow2", "raw"}:
        yield f"{target}: format {format_!r:.60} is neither qcow2 nor raw"


def _word_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, choices in _CHOICES.items():
        if isinstance(value := values.get(key), str) and value not in choices:
            yield key, f"{key} {value!r:.60} is none of {', '.join(choices)}"
    if isinstance(genid := values.get("genid"), str) and not GENID.fullmatch(genid):
        yield "genid", f"genid {genid!r:.60} is none of auto, none, or a UUID"
    if values.get("nvram") is not None and values.get("firmware", "bios") == "bios":
        yield "nvram", 'a variable store is for `firmware = "uefi"`'
    tpm = values.get("tpm")
    if isinstance(tpm, Mapping) and isinstance(version := tpm.get("version", "2.0"), str) and version != "2.0":
        yield "tpm", f"a TPM of version {version!r:.60} is not known; leave it out, or say 2.0"
    if (nvram := values.get("nvram")) is not None and isinstance(nvram, Mapping):
        yield from (("nvram", words) for words in _disk_faults({"target": NVRAM} | dict(nvram), set()))


def faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the values of a definition, with their keys; passes over what is of a wrong type."""
    name, memory, vcpus = values.get("name"), values.get("memory"), values.get("vcpus")
    if isinstance(name, str):
        try:
            check_name(name, "domain")
        except InvalidInput as error:
            yield "name", str(error)
    if type(memory) is int and memory < LEAST_MEMORY:
        yield "memory", f"needs at least 1 MiB of memory, and {memory} is in bytes"
    if isinstance(memory, str):
        yield "memory", f"{memory!r:.60} is not a size; write for example 1073741824, 512MiB or 1GiB"
    if type(vcpus) is int and vcpus < 1:
        yield "vcpus", "needs at least one vcpu"
    yield from _word_faults(values)
    taken: set[str] = set()
    disks = values.get("disks")
    for disk in disks if isinstance(disks, list | tuple) else ():
        if isinstance(disk, Mapping):
            yield from (("disks", words) for words in _disk_faults(disk, taken))


class XenKind(enum.StrEnum):
    """The kinds of Xen guests that can be defined."""

    PV = "pv"
    PVH = "pvh"


@attrs.frozen
class XenOptions:
    """What a definition says for Xen: the table ``[xen]``.

    Attributes:
        kind: ``pv`` or ``pvh``.
    """

    kind: XenKind = XenKind.PV


@attrs.frozen
class VariableStore:
    """Where UEFI firmware keeps its variables: the table ``[nvram]``.

    Attributes:
        path: the image; one that is not there is made, from the firmware's template.
        format: ``raw`` or ``qcow2``.
    """

    path: str
    format: str = "raw"


@attrs.frozen
class TpmOptions:
    """What a definition says of the machine's TPM: the table ``[tpm]``.

    Attributes:
        version: ``2.0``; snaporch starts no other.
    """

    version: str = "2.0"


NVRAM = "nvram"
"""The target of the disk that is the variable store of a domain with UEFI firmware."""


@versioned("definition")
@attrs.frozen
class DomainDefinition:
    """How a domain is launched: the contents of its TOML file, with absolute paths.

    Attributes:
        name: the domain's name.
        memory: RAM in bytes.
        vcpus: number of virtual CPUs.
        accel: ``auto``, ``kvm`` or ``tcg``; auto takes KVM only where a guest really runs under it.
        machine: QEMU machine type; empty: QEMU's default.
        kernel: direct boot, as are `initrd` and `append`; empty: boot from disk.
        serial: the guest's serial port is appended to this file; empty: none.
        emulator: the QEMU binary; empty: ``qemu-system-x86_64`` (or ``$SNAPORCH_QEMU``).
        extra_args: passed to QEMU as they are.
        guest_agent: the guest has a serial port for the QEMU guest agent, which QUIESCE needs.
        disks: in the order in which the guest sees them.
        driver: the hypervisor driver, for example ``qemu`` or ``xen``.
        xen: what is said for Xen.
        clock: ``set``: when the domain has gone back to a point and runs, its guest agent sets the guest's clock;
            ``keep``: the clock stays at the time of the point.
        genid: the machine has a generation id, another one after each revert: ``auto``, or the first one, a UUID;
            ``none``: it has none.
        firmware: ``bios`` or ``uefi``.
        nvram: of ``uefi``, the variable store, as it was written down; in a domain's record it is the disk `NVRAM`.
        tpm: the machine has a TPM; None: it has none.
    """

    name: str
    memory: int = 512 * 2**20
    vcpus: int = 1
    accel: str = "auto"
    machine: str = ""
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    serial: str = ""
    emulator: str = ""
    extra_args: tuple[str, ...] = ()
    guest_agent: bool = False
    disks: tuple[DeviceDisk, ...] = ()
    driver: str = "qemu"
    xen: XenOptions | None = None
    clock: str = "set"
    genid: str = "none"
    firmware: str = "bios"
    nvram: VariableStore | None = None
    tpm: TpmOptions | None = None

    def __attrs_post_init__(self) -> None:
        found = [words for _, words in faults(attrs.asdict(self))]
        if found:
            raise InvalidInput("; ".join(f"{self.name}: {words}" for words in found))

    @property
    def machine_only(self) -> DomainDefinition:
        """What of it makes the machine: without what may be changed at any time, as the memory does not know it."""
        return attrs.evolve(self, clock="set")

    def new_generation(self) -> str:
        """Return a generation id that no machine of it has had; empty where it is to have none."""
        return "" if self.genid == "none" else new_uuid()

    def first_generation(self) -> str:
        """Return the generation id of a domain that has never gone back; empty where it is to have none."""
        return self.new_generation() if self.genid in {"auto", "none"} else self.genid


@attrs.frozen
class Handle:
    """By which a driver finds a running machine again.

    Two handles are equal when they are of one driver and have one id: then they are of the same machine, however it
    is reached.

    Attributes:
        driver: the name of the driver that made it.
        id: tells this machine from every other one that the driver has, earlier ones too.
        data: how the machine is reached, JSON; nobody but that driver reads it.
    """

    driver: str
    id: str
    data: dict[str, Any] = attrs.field(factory=dict, eq=False)


@attrs.frozen
class ForwardedPort:
    """A port of the host behind which a clone's guest is.

    Attributes:
        protocol: ``tcp`` or ``udp``.
        host: the address that is listened at; empty: all.
        port: the clone's.
        was: the original's.
        to: the address and port in the guest; or what of the hypervisor listens there, for example ``vnc``.
    """

    protocol: str
    host: str
    port: int
    was: int
    to: str


@versioned("origin")
@attrs.frozen
class Origin:
    """Where a clone comes from.

    Attributes:
        domain: the domain whose snapshot it was made from.
        name: the snapshot's name then.
        id: the snapshot's id.
        files: all files that were made for it, by snaporch or by its machine: its disks' first images and its logs.
        ports: those that the host forwards to it, or that its machine listens at.
        discarded: it is being forgotten, and its disks may be gone.
    """

    domain: str
    name: str
    id: str
    files: tuple[str, ...] = ()
    ports: tuple[ForwardedPort, ...] = ()
    discarded: bool = False


@versioned("domain", with_handles)
@attrs.frozen
class DomainRecord:
    """What the catalog knows of a domain.

    Attributes:
        definition: how it is launched.
        active: the image that each disk writes to now, by target, when it is not the definition's.
        current: the snapshot that the present state descends from.
        handle: the machine that runs it, when one does.
        template: of a domain that was attached to: the machine as it was found, by which the driver knows how the
            domain is launched; the definition has only what could be seen.
        tags: names that batches select it by.
        max_depth: a disk's chain that becomes longer is flattened after the create that made it so; 0: none is.
        frozen: the guest, which is paused, went back to a point at which its file systems were frozen: to be
            thawed.
        shape: what its machine was made of when it was attached to, or at the point that it went back to; None:
            that is not known.
        uuid: tells it from every other domain for ever; the name may change.
        way_back: how it would go back to a point of it, by what was last seen of its machine; None: not looked at.
        records: its snapshots are put into the list that its manager has, where it has one.
        clock_behind_seconds: how far the guest's clock was behind after the domain last went back to memory, once
            its agent had set it where it could; None: it has been started since, or that is not known.
        origin: of a clone: where it comes from.
        reads: all images of its disks' chains as it was defined or attached to, without symbolic links; empty: not
            known.
        below: by path of an image that snaporch has put a disk on, all images below it, as they were left.
        generation: the generation id that its machine has, or is to have at the next start; empty: none, or it has
            never been started.
        tpm: the directory with the state of its TPM; empty: it has none, or has never been started.
    """

    definition: DomainDefinition
    active: dict[str, DeviceDisk] = attrs.field(factory=dict)
    current: str | None = None
    handle: Handle | None = None
    template: Handle | None = None
    tags: tuple[str, ...] = ()
    max_depth: int = 0
    frozen: bool = False
    shape: MachineShape | None = None
    uuid: str = ""
    way_back: WayBack | None = None
    records: bool = True
    clock_behind_seconds: float | None = None
    origin: Origin | None = None
    reads: tuple[str, ...] = ()
    below: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    generation: str = ""
    tpm: str = ""

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.definition.name

    @property
    def disks(self) -> tuple[DeviceDisk, ...]:
        """The disks as they are now: the definition's, each on its active image."""
        return tuple(self.active.get(disk.target, disk) for disk in self.definition.disks)


@attrs.frozen
class DiskStatus:
    """One disk of a domain, as the hypervisor (or, inactive, the image chain) has it.

    Attributes:
        target: the disk's name in the domain.
        active: the image that is written to.
        format: of the active image.
        readonly: whether the guest cannot write to it.
        virtual_size: what the guest sees, in bytes.
        chain: from the active image to its base.
        node: the hypervisor's handle of the active image; empty when inactive.
    """

    target: str
    active: str
    format: str
    readonly: bool
    virtual_size: int
    chain: tuple[str, ...]
    node: str = ""


@attrs.frozen
class MachineShape:
    """What a machine is made of, as its hypervisor reports it: memory loads only into one of the same shape.

    Attributes:
        memory: bytes of guest RAM, with what was plugged in.
        vcpus: number of virtual CPUs; 0: not known.
        disks: every disk that has an image, in the guest's order.
        devices: of each device that was asked for or plugged in its name and its type; empty: not known.
    """

    memory: int
    vcpus: int
    disks: tuple[DiskStatus, ...]
    devices: tuple[str, ...] = ()

    @property
    def has_generation(self) -> bool:
        """Whether the machine has a generation id, which its guest is told of."""
        return any(device.endswith(": vmgenid") for device in self.devices)


@versioned("discovered")
@attrs.frozen
class Discovered:
    """A domain that something else runs, or why a driver cannot say which there are.

    Attributes:
        driver: by which it could be attached to.
        name: its name there; empty: it has none, or this is about the driver.
        pid: its process, or 0.
        user: whose process that is.
        domain: the domain of this root that it is already, or empty.
        sockets: by which it can be attached to, where the driver goes by sockets.
        uri: of the manager that has it.
        blocker: what stands in the way of attaching to it, or empty.
    """

    driver: str
    name: str
    pid: int = 0
    user: str = ""
    domain: str = ""
    sockets: tuple[str, ...] = ()
    uri: str = ""
    blocker: str = ""


@versioned("domain-info")
@attrs.frozen
class DomainInfo:
    """Answer of `domain_info`: a domain as it is this moment.

    Attributes:
        name: the domain's name.
        state: what it does.
        disks: its disks; of an image that cannot be read neither what backs it nor its size.
        current: the snapshot that the present state descends from.
        pid: of its hypervisor process.
        driver: the hypervisor driver.
        tags: names that batches select it by.
        max_depth: see `DomainRecord.max_depth`.
        problem: why not all of it could be seen; empty: it could.
        way_back: see `DomainRecord.way_back`.
        records: see `DomainRecord.records`; None: its manager has no list.
        clock_behind_seconds: see `DomainRecord.clock_behind_seconds`; None also of an inactive domain.
        origin: see `DomainRecord.origin`.
        generation: see `DomainRecord.generation`.
    """

    name: str
    state: DomainState
    disks: tuple[DiskStatus, ...]
    current: str | None
    pid: int | None = None
    driver: str = "qemu"
    tags: tuple[str, ...] = ()
    max_depth: int = 0
    problem: str = ""
    way_back: WayBack | None = None
    records: bool | None = None
    clock_behind_seconds: float | None = None
    origin: Origin | None = None
    generation: str = ""
