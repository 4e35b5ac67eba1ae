"""The values that go between snaporch and its drivers."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import Any

import attrs

from snaporch.model.domain import DiskStatus, DomainDefinition, DomainState, ForwardedPort, Handle
from snaporch.model.formats import versioned
from snaporch.model.record import FileRecord
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeviceDisk, DiskSnapshot
from snaporch.model.upcasts import without_node

Binary = RawIOBase | BufferedIOBase  # a stream of bytes that is written to in worker threads
Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all, as far as known: bytes, or parts where bytes are not known."""


def untold(_done: int, _total: int) -> None:
    """Report no progress."""


class Trait(enum.StrEnum):
    """What one can do and another cannot; the protocols are in `snaporch.drivers.base.traits`."""

    MEMORY_STREAMS = "memory-streams"
    """Of a machine: its memory can be streamed to a file."""
    BACKGROUND_STREAMS = "background-streams"
    """Of a machine: memory can be write-protected, and streamed while the guest runs on."""
    LATE_STOPS = "late-stops"
    """Of a machine: a background stream can begin while the guest runs, which is stopped in time for the point."""
    LOADS_MEMORY = "loads-memory"
    """Of a machine: one that was launched for it takes memory from a file."""
    LOADS_LAZILY = "loads-lazily"
    """Of a machine: one that was launched for it lets its guest run before all of its memory is there."""
    OVERLAYS = "overlays"
    """Of a machine: its disks can go over to overlays, and back."""
    LIVE_MERGES = "live-merges"
    """Of a machine: images that it has open can be merged down."""
    LIVE_COPIES = "live-copies"
    """Of a machine: images that it has open can be copied up."""
    POINTS_INSIDE = "points-inside"
    """Of a machine: memory and disks can be kept inside its images."""
    GUEST_AGENT = "guest-agent"
    """Of a machine: there is a channel to a guest agent; whether one answers is another question."""
    DIRTY_RATE = "dirty-rate"
    """Of a machine: it can be told how quickly the guest writes to its memory."""
    RESETS = "resets"
    """Of a machine: its guest can be reset."""
    SCREENS = "screens"
    """Of a machine: a picture of its screen can be taken."""
    STARTS_BESIDE = "starts-beside"
    """Of a driver: a second machine of a domain can be started beside the first; else a name is one machine."""
    DISCOVERS = "discovers"
    """Of a driver: it can list what could be attached to."""
    KEEPS_RECORDS = "keeps-records"
    """Of a driver: the domains' manager has a list of snapshots of its own."""
    CLONES = "clones"
    """Of a driver: a second domain can be made that is like another one and runs beside it."""
    OFFLINE_MERGES = "offline-merges"
    """Of a storage: images that nobody has open can be merged."""
    IMAGE_POINTS = "image-points"
    """Of a storage: a disk can be kept inside its image."""
    CHAIN_COSTS = "chain-costs"
    """Of a storage: what a chain costs can be measured."""
    ARCHIVES = "archives"
    """Of a storage: snapshots go to archives and come from them."""


class GuestVerb(enum.StrEnum):
    """What is done to a machine that is there, as far as it depends on what the guest does just then."""

    CREATE = "create"
    """Its memory is saved, to a file or inside its images."""
    QUIESCE = "create --quiesce"
    """Its file systems are frozen by the guest's agent."""
    REVERT = "revert"
    """Another machine takes its place."""
    REVERT_INSIDE = "revert (inside images)"
    """It goes back to a point inside its images by itself."""
    MERGE = "delete, flatten"
    """Images that it has open are merged."""
    PAUSE = "domain pause"
    RESUME = "domain resume"
    SHUTDOWN = "domain shutdown"
    RESET = "domain reset"


@attrs.frozen
class Info:
    """What a driver is: known without a connection to anything.

    Attributes:
        name: the driver's.
        traits: all that it, its storage and its machines may have; a machine may have less.
        one_call: a machine is launched and its memory loaded in one call: `Driver.restore` is all there is, and
            nothing can be launched that waits for memory.
        logs: the names of the files that it writes to in a domain's directory, and that stay there.
    """

    name: str
    traits: frozenset[Trait] = frozenset()
    one_call: bool = False
    logs: tuple[str, ...] = ()


@attrs.frozen
class Capabilities:
    """What one running machine can do.

    Attributes:
        hypervisor: for people, for example ``QEMU 10.0.2``.
        background: RAM can be write-protected and streamed while the guest runs.
        background_blocker: why not, when not.
        memory_blocker: why its memory cannot be streamed at all as it is now, or empty.
        live_blocker: why its memory cannot be saved while the guest runs, or empty.
        ends_blocker: why a stream that is not a background one cannot come to its end, or empty.
        precopy_caveat: why a precopy's memory may not be right here; it is then never chosen by itself.
        keeps_paused: a paused guest's memory can be streamed and the guest then still is as it was.
        versions: what a memory file is bound to: it loads only where all of these are the same.
        ram: bytes of guest RAM.
        traits: what it can do.
        stops_itself: a memory stream that is not a background one stops the guest by itself, which must run when
            the stream begins: a create without LIVE pauses nothing, and takes the steps of a precopy.
        limits_streams: a memory stream keeps to a bandwidth.
        copies_into_middle: images are copied up into any image; else only into the active one.
        inside_memory_in_file: of a point inside the images, memory is in a file of its own.
        features: further names, for `doctor`.
    """

    hypervisor: str
    background: bool
    background_blocker: str = ""
    memory_blocker: str = ""
    live_blocker: str = ""
    ends_blocker: str = ""
    precopy_caveat: str = ""
    keeps_paused: bool = True
    versions: Mapping[str, str] = attrs.field(factory=dict)
    ram: int = 0
    traits: frozenset[Trait] = frozenset()
    stops_itself: bool = False
    limits_streams: bool = True
    copies_into_middle: bool = True
    inside_memory_in_file: bool = False
    features: tuple[str, ...] = ()


@attrs.frozen
class ImageStatus:
    """One image of a chain: where it is, and its sizes in bytes; `allocated` is what it holds itself."""

    path: str
    format: str
    virtual_size: int
    allocated: int


@attrs.frozen
class ChainCost:
    """What a chain costs, measured here and now: seconds to open it, and seconds to read 64 KiB of the disk."""

    open_seconds: float
    read_seconds: float


@attrs.frozen
class PauseNote:
    """What a guard needs to know about a guest that snaporch pauses.

    Attributes:
        keep_stream: a memory stream that is under way when snaporch dies goes on; else the stream is ended, because
            it would pause the guest again at its end.
        rival: a machine that was to take the guest's place; it is ended before the guest runs again.
        verdict: a file. Where it says ``complete``, the rival has taken the place. Where it says ``end``, snaporch
            is about to end the guest: the guard lets it run only if snaporch is dead. Else, and before it lets the
            guest run, the guard makes that ``undone``.
        thaw: have the guest's file systems thawed as well.
    """

    keep_stream: bool
    rival: Handle | None = None
    verdict: Path | None = None
    thaw: bool = False


@attrs.frozen
class LoadNote:
    """What a guard needs to know about a guest that goes back to a point inside its images.

    Attributes:
        tag: the point's name inside.
        kept: the name of the guest's state from before, inside; if it does not exist any more, the guest has that
            state again.
        targets: the disks of the point; the first disk's image has the memory.
        verdict: a file; where it says ``load``, the load may have begun, else it says ``undone`` from then on.
        run: the guest is to run afterwards.
    """

    tag: str
    kept: str
    targets: tuple[str, ...]
    verdict: Path
    run: bool = True


@attrs.frozen
class PivotNote:
    """A note, outside of the hypervisor, that a disk moves from an image to the one below it.

    If snaporch and the hypervisor both die near that moment, this tells recovery which image is the newest.

    Attributes:
        write: called when both images read the same, nothing is written to either, and the disk is about to go
            over: from its return on, by which the note is durable, the upper one grows old.
        verdict: a file, which `write` makes first; where it is not there when snaporch dies, or is stopped, the
            disk stays, and the file says ``stay`` from then on, which `write` must then respect.
    """

    write: Callable[[], Awaitable[None]]
    verdict: Path


@versioned("overlay", without_node)
@attrs.frozen
class Overlay:
    """A disk's move from the image `base` to a new overlay, planned in full before anything is done.

    Attributes:
        base: the disk as it is before; its active image is what will be frozen.
        path: the overlay's file; it does not exist yet.
        owner: the user and the group who must be able to open it, as `OverlayPlace.owner`.
    """

    base: DiskStatus
    path: str
    owner: tuple[int, int] | None = None

    @property
    def target(self) -> str:
        """The disk's name in the domain."""
        return self.base.target


@attrs.frozen
class Inside:
    """A disk's point inside the image that the disk is on and stays on.

    Attributes:
        base: the disk as it is.
        tag: the snapshot's name in the image.
    """

    base: DiskStatus
    tag: str

    @property
    def target(self) -> str:
        """The disk's name in the domain."""
        return self.base.target


@attrs.frozen
class StreamPlan:
    """How memory is to be streamed.

    Attributes:
        path: the memory file.
        strategy: background, precopy or paused.
        bandwidth: bytes a second, 0 for no limit.
        settings: what `Machine.settings` said before, to be put back afterwards.
        index: a file for where each page is in it (`SnapshotRecord.index`), made on the way if that is possible;
            empty: none is wanted.
    """

    path: str
    strategy: Strategy
    bandwidth: int = 0
    settings: dict[str, Any] = attrs.field(factory=dict)
    index: str = ""


LOADING = "loading"
"""The name of `LazyLoad.status` in the directory of its machine."""


@attrs.frozen
class LazyLoad:
    """Memory that comes while the guest runs.

    Attributes:
        memory: its file.
        index: the file that says where its pages are in it, see `SnapshotRecord.index`.
        status: a file for what is known of the work, in a directory of the machine's.
    """

    memory: FileRecord
    index: str
    status: str


@attrs.frozen
class Launch:
    """What to launch.

    Attributes:
        definition: the domain's.
        disks: the images to run on, in place of the definition's.
        directory: for what belongs to this one process (sockets); the driver makes it.
        incoming: memory will be loaded into it.
        isolated: without network and without the outside's serial ports: for a throw-away copy.
        template: for an attached domain: the machine that the new one is to be like, instead of the definition.
        generation: the machine's generation id; empty: it has none.
        tpm: the directory with the state of the machine's TPM, see `Driver.make_tpm`; empty: it has none.
    """

    definition: DomainDefinition
    disks: tuple[DeviceDisk, ...]
    directory: Path
    incoming: bool = False
    isolated: bool = False
    template: Handle | None = None
    generation: str = ""
    tpm: str = ""


@attrs.frozen
class Original:
    """What clones are made like.

    Attributes:
        definition: a domain's at the point.
        template: as in `Launch`, at the point.
        memory: clones get the memory of the point, with the addresses and ids that the guest has there.
        keep_network: a second guest with these may be in the original's network.
    """

    definition: DomainDefinition
    template: Handle | None = None
    memory: bool = False
    keep_network: bool = False


@attrs.frozen
class Place:
    """Where a clone is: its name, its directory, and the images of its disks."""

    name: str
    directory: str
    disks: tuple[DeviceDisk, ...]


@attrs.frozen
class Copied:
    """How a clone is defined.

    Attributes:
        definition: with a name, disks and whatever else one process alone can have of the clone's own.
        template: likewise, where the original was attached to.
        ports: those of the host that it has in place of the original's.
        files: those that its machine makes in its directory, beside its driver's logs.
    """

    definition: DomainDefinition
    template: Handle | None = None
    ports: tuple[ForwardedPort, ...] = ()
    files: tuple[str, ...] = ()


@attrs.frozen
class Writer:
    """Somebody who has a file open for writing: in words, for example ``process 123``, and the file's path."""

    who: str
    path: str


@attrs.frozen
class OverlayPlace:
    """Where the overlays of a disk go.

    Attributes:
        directory: absolute.
        owner: the user and the group who must be able to open them; None: the user who runs snaporch.
    """

    directory: str
    owner: tuple[int, int] | None = None


@attrs.frozen
class Address:
    """Where a running domain is found that something else started; which of it is needed is the driver's.

    Attributes:
        qmp: the path of a QMP socket.
        uri: of the manager that has the domain.
        of: the domain's name there, where that is another one.
    """

    qmp: str = ""
    uri: str = ""
    of: str = ""


@attrs.frozen
class Foreign:
    """A snapshot in the list of a domain's manager, whoever has made it.

    Attributes:
        name: its name there.
        id: of the snapshot of snaporch's that it is; empty: it is not known here.
        parent: the name of the one that it descends from, or None.
        description: free text.
        creation_time: seconds since the epoch.
        state: what the domain did at the point.
        has_memory: its memory is held, too.
        memory_file: where, as far as it is in a file of its own.
        disks: of each disk that is in files of its own, as in a record of ours.
        memory: bytes of RAM that the domain had.
        vcpus: virtual CPUs that it had.
        versions: what its memory is bound to, as `Capabilities.versions`.
        by: what has made it, or has it: the manager's name.
        blocker: why only the manager itself can go back to it, or empty.
    """

    name: str
    id: str
    parent: str | None
    description: str
    creation_time: int
    state: DomainState
    has_memory: bool
    memory_file: str
    disks: tuple[DiskSnapshot, ...]
    memory: int
    vcpus: int
    versions: Mapping[str, str]
    by: str
    blocker: str = ""


@attrs.frozen
class Theirs:
    """What a domain's manager has of it at present.

    Attributes:
        disks: on their active images.
        current: the name of the snapshot that the present state descends from, or None.
        snapshots: oldest first.
        running: it has a machine.
        blocker: why nothing of it may be changed at present, and what ends that; or empty.
    """

    disks: tuple[DeviceDisk, ...]
    current: str | None
    snapshots: tuple[Foreign, ...]
    running: bool
    blocker: str = ""
