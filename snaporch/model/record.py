"""What the catalog keeps of snapshots and operations, and the answers about them.

Everything here is frozen and says nothing about how it is stored or sent: see `snaporch.model.convert` for that.
Sizes are bytes, durations seconds, instants seconds since the epoch (UTC); paths are absolute strings.
"""

from __future__ import annotations

import enum
from typing import Any

import attrs

from snaporch.model.domain import DomainDefinition, DomainState, ForwardedPort, Handle, MachineShape
from snaporch.model.formats import versioned
from snaporch.model.request import Strategy
from snaporch.model.rfc import DomainSnapshot
from snaporch.model.upcasts import domains_listed, with_handles
from snaporch.model.way import WayBack


class Outcome(enum.StrEnum):
    """How an operation ended."""

    COMPLETE = "complete"
    ROLLED_BACK = "rolled-back"
    STRANDED = "stranded"


@attrs.frozen
class Group:
    """The snapshots that were taken together: one instant of several domains, the snapshots of one name.

    Attributes:
        id: of the operation that took them; a name may be used again, an id is not.
        members: the names of the domains, sorted.
    """

    id: str
    members: tuple[str, ...]


@versioned("file")
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


def index_of(memory: str) -> str:
    """Return the file that says where each page is in a memory file; it is made anew where it is missing."""
    return f"{memory}.index"


@attrs.frozen
class Timings:
    """How long the phases of an operation took, in seconds.

    Attributes:
        pause: from the hypervisor's own STOP to its RESUME event; None where the guest was not paused by snaporch.
        total: the whole operation.
        between: snaporch's own time between the commands of the pause: the pause less what QEMU took to answer.
        phases: by name, in order.
        setup: what the hypervisor had to do before it took the point of a background stream, by its own clock.
        foreseen: what `setup` was expected to be where the guest was to run through most of it (`late_stop`); None:
            it stood still for all of it.
        missed: the guest was stopped too late for that, so all was done once more with a guest that stood still.
    """

    pause: float | None = None
    total: float = 0.0
    between: float | None = None
    phases: dict[str, float] = attrs.field(factory=dict)
    setup: float | None = None
    foreseen: float | None = None
    missed: bool = False


@attrs.frozen
class PastCheckpoint:
    """How a checkpoint went: the next one's estimate is made from it.

    Attributes:
        strategy: how memory was saved.
        bytes: of memory that were saved, as `SnapshotRecord.memory_size`.
        seconds: all of it.
        pause: seconds that the guest was paused; None where it was not paused by snaporch.
        way_back: how the domain would have gone back to it then, as `WayBack.way`; empty: not known.
        setup: as `Timings.setup`.
    """

    strategy: Strategy
    bytes: int
    seconds: float
    pause: float | None
    way_back: str = ""
    setup: float | None = None


@versioned("estimate")
@attrs.frozen
class Estimate:
    """What a checkpoint is expected to take; see `snaporch.operations.estimate`.

    Attributes:
        strategy: how memory would be saved.
        bytes: of memory that would be saved.
        seconds: from the request to the record; None: it would not end, as the guest writes more than is sent.
        pause: seconds that the guest would be paused; None: it would not end, or the guest is already paused.
        known: how many earlier checkpoints it goes by; with none, all is assumed.
        dirty_rate: bytes of RAM a second that the guest was seen to write to; None where that was not measured.
    """

    strategy: Strategy
    bytes: int
    seconds: float | None
    pause: float | None
    known: int = 0
    dirty_rate: float | None = None


@versioned("snapshot", with_handles)
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
        shape: what the machine was made of at the point; None: it was inactive, or that is not known.
        way_back: how the domain would have gone back to it then; None: it was inactive, or that is not known.
        foreign: what has made it, for example ``libvirt``; empty: snaporch.
        blocker: why snaporch cannot go back to it, or empty.
        id: 32 hexadecimal digits, never used again, though the name may be.
        clock_behind_seconds: see `DomainRecord.clock_behind_seconds`, at the point.
        saved_by_revert: a revert has taken it, of what it was about to replace; retention is about it, too.
        tpm: a copy of the state of the machine's TPM; None: it has none, had never been started, or the state is
            in the memory.
        expires: the instant from which on it is needed no longer, by the host's clock: a service deletes it then,
            and so does ``prune``, unless it is pinned or has clones. None: never.
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
    template: Handle | None = None
    hypervisor: dict[str, Any] = attrs.field(factory=dict)
    timings: Timings = Timings()
    outcome: Outcome = Outcome.COMPLETE
    deleting: bool = False
    pinned: bool = False
    quiesced: bool = False
    group: Group | None = None
    expected: Estimate | None = None
    shape: MachineShape | None = None
    way_back: WayBack | None = None
    foreign: str = ""
    blocker: str = ""
    id: str = ""
    clock_behind_seconds: float | None = None
    saved_by_revert: bool = False
    tpm: FileRecord | None = None
    expires: float | None = None

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
        what = f"{what}, by {self.foreign}" if self.foreign else what
        what = f"{what}, quiesced" if self.quiesced else what
        return f"{what}, saved by a revert" if self.saved_by_revert else what

    @property
    def frozen(self) -> tuple[FileRecord, ...]:
        """The images that must stay byte for byte what they were."""
        return tuple(file for chain in self.images.values() for file in chain)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Its sealed files: memory, the TPM's state, and frozen images."""
        return tuple(file for file in (self.memory, self.tpm) if file is not None) + self.frozen

    @property
    def index(self) -> str:
        """The file that says where each page is in the memory file, if it is there; empty: it has no such file."""
        return index_of(self.memory.path) if self.memory is not None else ""

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


class Boot(enum.StrEnum):
    """What became of a throw-away copy of a snapshot's guest."""

    RAN = "ran"
    """It loaded, and ran for a while."""
    FAILED = "failed"
    """It did not load, or stopped by itself."""
    NOT_POSSIBLE = "not-possible"
    """It cannot be tried here: that says nothing of the snapshot."""


@versioned("verify-report")
@attrs.frozen
class VerifyReport:
    """Answer of `verify`.

    Attributes:
        domain: the domain's name.
        name: the snapshot's.
        ok: everything is what was saved.
        problems: what is not, one sentence each.
        booted: whether a throw-away copy loaded and ran; None where that was not asked for, or was not possible.
        files: ``good`` or ``damaged``: whether they are what was saved.
        boot: what became of the copy; None where that was not asked for, or the files are damaged.
        reason: why it was not possible here, or what failed.
    """

    domain: str
    name: str
    ok: bool
    problems: tuple[str, ...] = ()
    booted: bool | None = None
    files: str = "good"
    boot: Boot | None = None
    reason: str = ""


@versioned("revert-record")
@attrs.frozen
class RevertRecord:
    """Answer of `revert`: how a domain went back.

    Attributes:
        domain: the domain's name.
        name: the snapshot's.
        point: the instant that it holds, by the host's clock.
        way: how: `beside`, `proven`, `in-place`, `displace`, `inactive` or `inside`.
        outage_seconds: from the last instruction of the old guest to the first of the new one, by the hypervisor's
            own events where it has them; None where there was no old guest that ran, or no new one runs.
        total_seconds: all of it.
        lazy: the guest ran before all of its memory was in.
        lazy_reason: why it did not, though that was asked for; else empty.
        clock_behind_seconds: how far the guest's clock is behind, as its agent says once the clock is set, or by
            the age of the point; None: there is no guest, or it boots and reads the time by itself.
        outcome: `complete`.
        problems: hooks after it that failed, a sentence each.
    """

    domain: str
    name: str
    point: float
    way: str
    outage_seconds: float | None
    total_seconds: float
    lazy: bool = False
    lazy_reason: str = ""
    clock_behind_seconds: float | None = None
    outcome: Outcome = Outcome.COMPLETE
    problems: tuple[str, ...] = ()


@versioned("sync-report")
@attrs.frozen
class SyncReport:
    """Answer of `sync`.

    Attributes:
        domain: the domain's name.
        imported: the names of snapshots of others that are known here from now on.
        gone: those of snapshots of others that they have deleted.
        followed: the snapshot to which others had put the domain back; None: its disks are where they were left.
        problems: what could not be taken over, or not in full, one sentence each.
        records: snapshots of ours are put into the manager's list.
    """

    domain: str
    imported: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    followed: str | None = None
    problems: tuple[str, ...] = ()
    records: bool = True


@versioned("clone-record")
@attrs.frozen
class CloneRecord:
    """Answer of `clone`: a domain that was made.

    Attributes:
        name: the clone's name.
        state: what it does.
        domain: the domain whose snapshot it was made from.
        snapshot: that snapshot's name.
        ports: those of the host behind which it is, in place of the original's.
    """

    name: str
    state: DomainState
    domain: str
    snapshot: str
    ports: tuple[ForwardedPort, ...] = ()


class OperationKind(enum.StrEnum):
    """What an operation does. The value is what the catalog, the service and the command line show."""

    CREATE = "create"
    REVERT = "revert"
    DELETE = "delete"
    FLATTEN = "flatten"
    VERIFY = "verify"
    CLONE = "clone"
    RECOVER = "recover"
    FSCK = "fsck"
    EXPORT = "export"
    IMPORT = "import"
    # Short ones, which are in no journal: they are named in the Busy error of an operation that finds them.
    START = "start"
    SHUTDOWN = "shutdown"
    DESTROY = "destroy"
    PAUSE = "pause"
    RESUME = "resume"
    RESET = "reset"
    SCREENSHOT = "screenshot"
    DEFINE = "define"
    UNDEFINE = "undefine"
    ATTACH = "attach"
    TAG = "tag"
    LIMIT_DEPTH = "limit-depth"
    PIN = "pin"
    EDIT = "edit"
    DOCTOR = "doctor"
    SYNC = "sync"
    ESTIMATE = "estimate"

    @property
    def only_reads(self) -> bool:
        """Whether it can be ended at any time and nothing is lost: a recover leaves what it has begun as it was."""
        return self in {OperationKind.VERIFY, OperationKind.FSCK, OperationKind.RECOVER}


class EventKind(enum.StrEnum):
    """What an event tells."""

    STATE = "state"
    """The operation entered its state."""
    PROGRESS = "progress"
    """So many bytes are done, of so many."""
    NOTE = "note"
    """Something for people."""


@versioned("operation", domains_listed)
@attrs.frozen
class OperationRecord:
    """A running or past operation.

    Attributes:
        id: 32 hexadecimal digits; eight in what snaporch 0.1 has written.
        kind: what it does.
        domains: the names of the domains that it works on, sorted; more than one: of a group.
        subject: the snapshot's name.
        state: a state of `snaporch.engine.states`.
        begun: by the host's clock.
        ended: or None while it runs (or was cut short and awaits `recover`).
        phases: seconds each phase took.
        error: the error's text, when it failed.
        notes: while it runs: what `recover` needs to go on with it, by domain (JSON).
    """

    id: str
    kind: OperationKind
    domains: tuple[str, ...]
    subject: str
    state: str
    begun: float
    ended: float | None = None
    phases: dict[str, float] = attrs.field(factory=dict)
    error: str = ""
    notes: dict[str, str] = attrs.field(factory=dict)

    @property
    def who(self) -> str:
        """The names of the domains, for people."""
        return ", ".join(self.domains)


@versioned("given-up")
@attrs.frozen
class GivenUp:
    """What it means to give an operation up.

    Attributes:
        operation: its id.
        kept: what is as it was, or is where: a sentence each.
        lost: what is lost by it: a sentence each.
        done: it was given up; else this is only what it would mean.
    """

    operation: str
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    done: bool = False


@versioned("event", domains_listed)
@attrs.frozen
class Event:
    """Something that happened in an operation; `Orchestrator.events` yields them.

    Attributes:
        operation: the operation's id.
        domains: the names of the domains that it works on.
        kind: what it tells.
        time: by the host's clock.
        state: the operation's state.
        done: bytes streamed.
        total: bytes to stream, as far as is known.
        text: for people.
    """

    operation: str
    domains: tuple[str, ...]
    kind: EventKind
    time: float
    state: str
    done: int = 0
    total: int = 0
    text: str = ""
