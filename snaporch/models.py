"""The values that snaporch speaks in: the RFC's structures and flags, and the records around them.

`DomainSnapshot`, `DiskSnapshot`, `DeviceDisk` and the three flag enums are those of the *Libxl Domain Snapshot
API* RFC V6, with its numbers. What the RFC has not and a user needs (parent, state of the domain at the point,
sizes, checksums, timings, the launch definition) is in `SnapshotRecord` around them.

Everything here is frozen and says nothing about how it is stored or sent: see `snaporch.convert` for that.
Sizes are bytes, durations seconds, instants seconds since the epoch (UTC); paths are absolute strings.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Any

import attrs

from snaporch.errors import InvalidInput

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A target becomes part of QEMU node names, which end at 31 characters: "sp-" + 8 of the operation's id + "-".
TARGET = re.compile(r"[A-Za-z][A-Za-z0-9]{0,15}")


def check_name(name: str, what: str = "snapshot") -> str:
    """Return `name` when it is a valid domain or snapshot name.

    Raises:
        InvalidInput: it is not.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a {what} name: 1 to 64 of letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )
    return name


def joined(domains: Iterable[str]) -> str:
    """Return what an operation on these domains has as its domain: their names, sorted, joined by commas.

    Raises:
        InvalidInput: one is no domain's name, or is there twice; or there is none.
    """
    names = sorted(check_name(name, "domain") for name in domains)
    if not names or len(set(names)) < len(names):
        raise InvalidInput("a group is of one domain or more, each named once")
    return ",".join(names)


def members_of(domain: str) -> tuple[str, ...]:
    """Return the names that `joined` has joined."""
    return tuple(domain.split(","))


class CreateFlag(enum.Flag):
    """Flags of `create`; DISK_ONLY and LIVE have the RFC's numbers."""

    DISK_ONLY = 1
    """No memory, disks only."""
    LIVE = 2
    """The guest runs while its memory is saved."""
    QUIESCE = 4
    """The guest agent freezes the guest's file systems around the point."""


class DeleteFlag(enum.Flag):
    """Flags of `delete`; CHILDREN has the RFC's number."""

    CHILDREN = 1
    CHILDREN_ONLY = 2
    ALONE = 4
    """Of a snapshot that was taken with others as a group: this one only, whatever becomes of the others."""


class RevertFlag(enum.Flag):
    """Flags of `revert`, with the RFC's numbers."""

    RUNNING = 1
    PAUSED = 2
    FORCE = 4
    ALONE = 8
    """Of a snapshot that was taken with others as a group: this domain only, the others stay where they are."""


class Strategy(enum.StrEnum):
    """How the memory of a checkpoint is streamed.

    `AUTO` is only ever asked for; a record says what was chosen. `NONE` is a snapshot without memory.
    """

    AUTO = "auto"
    BACKGROUND = "background"
    """The point is at the start; RAM is write-protected and streamed while the guest runs."""
    PRECOPY = "precopy"
    """The point is at the end, as in a live migration."""
    PAUSED = "paused"
    """The guest stands still from the point until its memory is on disk."""
    INTERNAL = "internal"
    """Inside the qcow2 images, by the hypervisor itself, which lets the guest stand meanwhile."""
    NONE = "none"


class OnTimeout(enum.StrEnum):
    """What is done when the time is up of a precopy, or of a merge that has to catch up with a guest."""

    PAUSE = "pause"
    """Pause the guest and finish."""
    FAIL = "fail"
    """Give up: a create is rolled back; what a delete cannot merge stays, and merges another time."""


class DomainState(enum.StrEnum):
    """What a domain does, as far as a user is concerned."""

    INACTIVE = "inactive"
    RUNNING = "running"
    PAUSED = "paused"


class Outcome(enum.StrEnum):
    """How an operation ended."""

    COMPLETE = "complete"
    ROLLED_BACK = "rolled-back"
    STRANDED = "stranded"


# --- the RFC's structures ---------------------------------------------------------------------------------


@attrs.frozen
class DeviceDisk:
    """`libxl_device_disk`, reduced to what a snapshot needs.

    Attributes:
        target: the disk's name in its domain, for example ``vda``.
        path: the image; empty in a request where it is for snaporch to fill in.
        format: ``qcow2`` or ``raw``.
        readonly: the guest cannot write to it; such a disk is never switched.
    """

    target: str
    path: str = ""
    format: str = "qcow2"
    readonly: bool = False


@attrs.frozen
class DiskSnapshot:
    """`libxl_disk_snapshot`: what a snapshot does with one disk.

    Attributes:
        disk: the original disk, whose image holds the point.
        name: the name inside the image of an internal snapshot; else the snapshot's name.
        external: the point is kept in files of its own.
        external_sn: the overlay that the domain writes to from the point on; None exactly when internal.
    """

    disk: DeviceDisk
    name: str = ""
    external: bool = True
    external_sn: DeviceDisk | None = attrs.field(
        default=attrs.Factory(lambda self: DeviceDisk(self.disk.target) if self.external else None, takes_self=True)
    )

    def __attrs_post_init__(self) -> None:
        if (self.external_sn is None) is self.external:
            raise InvalidInput(f"{self.disk.target}: external_sn is None exactly when external is false")


@attrs.frozen
class DomainSnapshot:
    """`libxl_domain_snapshot`: a named point of a domain.

    Attributes:
        name: unique in the domain; empty in a request: made from the UTC time.
        description: free text.
        creation_time: seconds since the epoch; 0 in a request.
        memory: RAM and device state are held too: a system checkpoint.
        memory_file: where, when external; empty in a request: a file under the root.
        disks: in a request, the disks that need saying something about: all other writable disks are taken
            externally. In a record, every disk that was taken.
    """

    name: str = ""
    description: str = ""
    creation_time: int = 0
    memory: bool = True
    memory_file: str = ""
    disks: tuple[DiskSnapshot, ...] = ()


# --- requests ---------------------------------------------------------------------------------------------


def _targets(targets: Iterable[str]) -> frozenset[str]:
    return frozenset(targets)


@attrs.frozen
class CreateOptions:
    """What a create may be told beyond the RFC's structure and flags.

    Attributes:
        strategy: how memory is streamed with LIVE.
        bandwidth: bytes a second that the memory stream may take; 0 is no limit.
        max_seconds: the time that a LIVE stream may take, or None.
        on_timeout: what happens then.
        exclude: targets that are left out of the snapshot.
        wait: wait for a running operation on the domain instead of raising Busy.
    """

    strategy: Strategy = Strategy.AUTO
    bandwidth: int = 0
    max_seconds: float | None = None
    on_timeout: OnTimeout = OnTimeout.FAIL
    exclude: frozenset[str] = attrs.field(default=frozenset(), converter=_targets)
    wait: bool = False


@attrs.frozen
class MergeOptions:
    """How images merge, in a delete or a flatten.

    Attributes:
        bandwidth: bytes a second that a merge may write; 0 is no limit.
        max_seconds: the time that the merge of the image that a running guest writes to may take to catch up with
            the guest; None: for as long as it comes nearer. After that the guest's writes to that disk are slowed
            down, and it has as much time again.
        on_timeout: what happens then. The other merges do not depend on the guest and have no limit.
    """

    bandwidth: int = 0
    max_seconds: float | None = None
    on_timeout: OnTimeout = OnTimeout.FAIL


# --- domains ----------------------------------------------------------------------------------------------


def _checked_target(disk: DeviceDisk) -> str:
    if not TARGET.fullmatch(disk.target):
        raise InvalidInput(f"{disk.target!r} is not a disk target: up to 16 letters and digits, for example vda")
    if disk.format not in {"qcow2", "raw"}:
        raise InvalidInput(f"{disk.target}: format {disk.format!r} is neither qcow2 nor raw")
    return disk.target


@attrs.frozen
class DomainDefinition:
    """How a domain is launched: the TOML file of the specification, paths made absolute.

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
        driver: the hypervisor driver, ``qemu`` or ``simulated``.
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

    def __attrs_post_init__(self) -> None:
        check_name(self.name, "domain")
        targets = [_checked_target(disk) for disk in self.disks]
        if len(set(targets)) != len(targets):
            raise InvalidInput(f"{self.name}: a disk target is used twice")
        if self.accel not in {"auto", "kvm", "tcg"}:
            raise InvalidInput(f"{self.name}: accel {self.accel!r} is none of auto, kvm, tcg")
        if self.memory < 2**20 or self.vcpus < 1:
            raise InvalidInput(f"{self.name}: needs at least 1 MiB of memory and one vcpu")


@attrs.frozen
class Process:
    """The hypervisor process that runs a domain.

    Attributes:
        pid: its process id.
        started: its start time in the kernel's clock ticks, which tells it from a later process of that id.
        socket: the QMP socket.
        attached: something else started it; `argv` is then the command line found at the socket's other end.
        cwd: the directory that relative paths in `argv` are relative to.
        boot: the host's boot in which it started: after the next, the same id and time may be another's. "" is any.
    """

    pid: int
    started: int
    socket: str
    attached: bool = False
    argv: tuple[str, ...] = ()
    cwd: str = "/"
    boot: str = ""


@attrs.frozen
class DomainRecord:
    """What the catalog knows of a domain.

    Attributes:
        definition: how it is launched.
        active: the image that each disk writes to now, by target, when it is not the definition's.
        current: the snapshot that the present state descends from.
        process: the hypervisor process, when one runs.
        template: of a domain that was attached to: the process as it was found; its command line says how the
            domain is launched, the definition only what could be seen.
        tags: names that batches select it by.
        max_depth: a disk's chain that becomes longer is flattened after the create that made it so; 0: none is.
        frozen: the guest, which stands, went back to a point at which its file systems were frozen: to be thawed.
    """

    definition: DomainDefinition
    active: dict[str, DeviceDisk] = attrs.field(factory=dict)
    current: str | None = None
    process: Process | None = None
    template: Process | None = None
    tags: tuple[str, ...] = ()
    max_depth: int = 0
    frozen: bool = False

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
class DomainInfo:
    """Answer of `domain_info`: a domain as it is this moment."""

    name: str
    state: DomainState
    disks: tuple[DiskStatus, ...]
    current: str | None
    pid: int | None = None
    driver: str = "qemu"
    tags: tuple[str, ...] = ()
    max_depth: int = 0


# --- snapshots --------------------------------------------------------------------------------------------


@attrs.frozen
class Group:
    """The snapshots that were taken together: one instant of several domains, the snapshots of one name.

    Attributes:
        id: of the operation that took them; a name may be used again, an id is not.
        members: the names of the domains, sorted.
    """

    id: str
    members: tuple[str, ...]


@attrs.frozen
class FileRecord:
    """A file as it was when it was sealed.

    Attributes:
        path: where it is.
        size: in bytes.
        checksum: ``xxh3-128:HEX`` over the whole file: finds damage, is no defence against forgery.
        identity: device, inode, size, mtime and ctime then; while they are the same, nothing has written to the
            file and its checksum need not be computed again. `verify` computes it nevertheless.
    """

    path: str
    size: int
    checksum: str
    identity: tuple[int, ...] = ()


@attrs.frozen
class Timings:
    """How long the phases of an operation took, in seconds.

    Attributes:
        pause: from the hypervisor's own STOP to its RESUME event; None where the guest was not paused by us.
        total: the whole operation.
        between: our own time between the commands of the pause: the pause less what QEMU took to answer.
        phases: by name, in order.
    """

    pause: float | None = None
    total: float = 0.0
    between: float | None = None
    phases: dict[str, float] = attrs.field(factory=dict)


@attrs.frozen
class PastCheckpoint:
    """How a checkpoint went: what the next one is foretold by.

    Attributes:
        strategy: how memory was saved.
        bytes: of memory that were saved, as `SnapshotRecord.memory_size`.
        seconds: all of it.
        pause: seconds that the guest stood; None where it was not paused by us.
    """

    strategy: Strategy
    bytes: int
    seconds: float
    pause: float | None


@attrs.frozen
class Estimate:
    """What a checkpoint is expected to take; see `snaporch.estimate`.

    Attributes:
        strategy: how memory would be saved.
        bytes: of memory that would be saved.
        seconds: from the request to the record; None: it would not end, as the guest writes more than is sent.
        pause: seconds that the guest would stand; None: it would not end, or the guest stands already.
        known: how many earlier checkpoints it goes by; with none, all is assumed.
        dirty_rate: bytes of RAM a second that the guest was seen to write to; None where that was not measured.
    """

    strategy: Strategy
    bytes: int
    seconds: float | None
    pause: float | None
    known: int = 0
    dirty_rate: float | None = None


@attrs.frozen
class SnapshotRecord:
    """A snapshot in the catalog: the RFC's structure and what a user needs beside it.

    Attributes:
        domain: the domain's name.
        snapshot: the RFC's structure, every field filled in.
        parent: the snapshot that the domain descended from at the point, or None.
        domain_state: what the domain did at the point.
        strategy: how memory was streamed.
        reason: why that strategy was chosen.
        point: the instant that the snapshot holds, by the host's clock.
        memory: the sealed memory file, or None: no memory, or it is inside the image of the first disk.
        images: by target, the sealed chain that holds the disk's point: the frozen image first, its base last. Of a
            point inside an image, only what is below that image.
        inside: by target, the point inside an image: the image's path, the bytes that are the snapshot's (memory
            too), and their checksum. The file around it may change.
        definition: the launch definition at the point.
        template: as in `DomainRecord`, at the point.
        hypervisor: version and machine type that the memory belongs to.
        timings: how long it took.
        outcome: `complete`, for everything that the catalog holds.
        deleting: a delete of it has begun: it can no longer be reverted to.
        pinned: no retention deletes it.
        quiesced: the guest's file systems were frozen at the point.
        group: of which it is a part, when several domains were taken at this one point.
        expected: what it was expected to take, before it was begun; None without memory.
    """

    domain: str
    snapshot: DomainSnapshot
    parent: str | None
    domain_state: DomainState
    strategy: Strategy
    reason: str
    point: float
    memory: FileRecord | None
    images: dict[str, tuple[FileRecord, ...]]
    definition: DomainDefinition
    inside: dict[str, FileRecord] = attrs.field(factory=dict, kw_only=True)
    template: Process | None = None
    hypervisor: dict[str, Any] = attrs.field(factory=dict)
    timings: Timings = Timings()
    outcome: Outcome = Outcome.COMPLETE
    deleting: bool = False
    pinned: bool = False
    quiesced: bool = False
    group: Group | None = None
    expected: Estimate | None = None

    @property
    def name(self) -> str:
        """The snapshot's name."""
        return self.snapshot.name

    @property
    def kind(self) -> str:
        """For people: ``checkpoint`` or ``disks``, and where it is kept when not in files of its own."""
        what = "checkpoint" if self.snapshot.memory else "disks"
        external = any(disk.external for disk in self.snapshot.disks)
        what = f"{what}, {'partly ' if external else ''}internal" if self.inside else what
        return f"{what}, quiesced" if self.quiesced else what

    @property
    def frozen(self) -> tuple[FileRecord, ...]:
        """The images that must stay byte for byte what they were."""
        return tuple(file for chain in self.images.values() for file in chain)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Its sealed files: memory and frozen images."""
        return ((self.memory,) if self.memory is not None else ()) + self.frozen

    @property
    def paths(self) -> frozenset[str]:
        """All files that something of the snapshot is in."""
        return frozenset(file.path for file in (*self.files, *self.inside.values()))

    @property
    def memory_size(self) -> int:
        """Bytes of memory that were saved; of memory inside an image, all that is inside."""
        return self.memory.size if self.memory is not None else sum(file.size for file in self.inside.values())

    @property
    def size(self) -> int:
        """Bytes of its own: memory, each disk's frozen image (not the bases), and what is inside an image."""
        own = [chain[0].size for target, chain in self.images.items() if target not in self.inside]
        own += [file.size for file in self.inside.values()]
        return sum(own) + (self.memory.size if self.memory is not None else 0)


@attrs.frozen
class VerifyReport:
    """Answer of `verify`.

    Attributes:
        domain: the domain's name.
        name: the snapshot's.
        ok: everything is what was saved.
        problems: what is not, one sentence each.
        booted: whether a throw-away copy loaded and ran; None where that was not asked for.
    """

    domain: str
    name: str
    ok: bool
    problems: tuple[str, ...] = ()
    booted: bool | None = None


# --- operations -------------------------------------------------------------------------------------------


class Trouble(enum.StrEnum):
    """What `fsck` finds."""

    UNFINISHED = "unfinished"
    """An operation was cut short."""
    BUSY = "busy"
    """An operation runs: the domain was not looked at."""
    GONE_PROCESS = "gone-process"
    """The domain's process is gone."""
    ORPHAN_PROCESS = "orphan-process"
    """A process was launched for the domain and is not its process."""
    ORPHAN_FILE = "orphan-file"
    """Nothing needs a file."""
    BROKEN_DISK = "broken-disk"
    """A disk's image, or one that backs it, cannot be read."""
    OTHER_IMAGE = "other-image"
    """A running domain is on another image than it was left on."""
    DAMAGED_SNAPSHOT = "damaged-snapshot"
    """A file of a snapshot is missing or is not what was saved."""
    FROZEN_WRITTEN = "frozen-written"
    """A process has an image of a snapshot open for writing."""


@attrs.frozen
class Finding:
    """Something that is not as the catalog has it.

    Attributes:
        domain: the domain's name.
        trouble: what kind.
        subject: a path, a name, a target, the id of an operation or a process.
        text: for people.
        certain: it is certain what mends it, and that nothing is lost by that.
        repaired: that was done.
    """

    domain: str
    trouble: Trouble
    subject: str
    text: str
    certain: bool = False
    repaired: bool = False


@attrs.frozen
class OperationRecord:
    """A running or past operation.

    Attributes:
        id: eight hexadecimal digits.
        kind: ``create``, ``revert``, ``delete`` or ``verify``.
        domain: what it works on; of a group the names of all, sorted and joined by commas.
        subject: the snapshot's name.
        state: a state of `snaporch.states`.
        begun: by the host's clock.
        ended: or None while it runs (or was cut short and awaits `recover`).
        phases: seconds each phase took.
        error: the error's text, when it failed.
        notes: while it runs: what `recover` needs to go on with it, by domain (JSON).
    """

    id: str
    kind: str
    domain: str
    subject: str
    state: str
    begun: float
    ended: float | None = None
    phases: dict[str, float] = attrs.field(factory=dict)
    error: str = ""
    notes: dict[str, str] = attrs.field(factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the domains."""
        return members_of(self.domain)


@attrs.frozen
class Event:
    """Something that happened in an operation; `Orchestrator.events` yields them.

    Attributes:
        operation: the operation's id.
        domain: what it works on.
        kind: ``state`` (it entered `state`), ``progress`` (`done` of `total` bytes of memory) or ``note``.
        time: by the host's clock.
        state: the operation's state.
        done: bytes streamed.
        total: bytes to stream, as far as is known.
        text: for people.
    """

    operation: str
    domain: str
    kind: str
    time: float
    state: str
    done: int = 0
    total: int = 0
    text: str = ""
