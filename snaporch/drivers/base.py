"""The interface between snaporch and a hypervisor.

A driver has three faces:

- `Driver` launches, attaches to and connects to the processes that run domains;
- `Machine` is an open connection to one of them, exclusive while it is open;
- `Storage` is where its images and memory files live.

The rest of snaporch asks `Capabilities`, never the driver's name. What a driver promises is what the conformance
suite in `snaporch.testing` checks; the docstrings here give the details.

Errors: a driver raises `CommandRefused` when the hypervisor said no (nothing was changed), `ConnectionGone` when
it is gone, `OutcomeUnknown` when it did not answer. File errors are `OSError`.
"""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path, PurePath
from typing import Any

import attrs

from snaporch.errors import Unsupported
from snaporch.images.kinds import Traced
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainState, Handle, MachineShape
from snaporch.model.formats import versioned
from snaporch.model.record import FileRecord
from snaporch.model.request import MergeOptions, Strategy
from snaporch.model.reserved import check_in_root
from snaporch.model.rfc import DeviceDisk
from snaporch.model.upcasts import without_node

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all, as far as known: bytes, or parts where bytes are not known."""


def untold(_done: int, _total: int) -> None:
    """Tell nobody how far something is."""


@attrs.frozen
class Capabilities:
    """What one running machine can do.

    Attributes:
        hypervisor: for people, for example ``QEMU 10.0.2``.
        background: RAM can be write-protected and streamed while the guest runs.
        background_blocker: why not, when not.
        memory_blocker: why its memory cannot be streamed at all as it is now, or empty.
        precopy_caveat: why a precopy's memory may not be right here; it is then never chosen by itself.
        keeps_paused: a paused guest's memory can be streamed and the guest then still is as it was.
        versions: what a memory file is bound to: it loads only where all of these are the same.
        ram: bytes of guest RAM.
        agent: there is a channel to a guest agent; whether one answers is another question.
        features: further names, for `doctor`.
    """

    hypervisor: str
    background: bool
    background_blocker: str = ""
    memory_blocker: str = ""
    precopy_caveat: str = ""
    keeps_paused: bool = True
    versions: Mapping[str, str] = attrs.field(factory=dict)
    ram: int = 0
    agent: bool = False
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
class Journal:
    """Where a guard finds in which state an operation was when we died.

    Attributes:
        catalog: the file.
        operation: its id.
    """

    catalog: Path
    operation: str


@attrs.frozen
class PauseNote:
    """What a guard has to know of a guest that we pause.

    Attributes:
        keep_stream: a memory stream that is under way when we die goes on; else it is ended, as one that stops the
            guest at its end would.
        rival: a machine that was to take the guest's place; it is ended before the guest runs again.
        journal: if this says that the operation is complete, the rival has taken the place.
        thaw: have the guest's file systems thawed as well.
    """

    keep_stream: bool
    rival: Handle | None = None
    journal: Journal | None = None
    thaw: bool = False


@attrs.frozen
class LoadNote:
    """What a guard has to know of a guest that goes back to a point inside its images.

    Attributes:
        tag: the point's name inside.
        kept: that of what the guest held before; where it is not there any more the guest holds that again.
        targets: the disks that it is of; the first one's image has the memory.
        journal: says, by the state of the revert, whether the load may have begun.
        run: the guest is to run afterwards.
    """

    tag: str
    kept: str
    targets: tuple[str, ...]
    journal: Journal
    run: bool = True


@attrs.frozen
class PivotNote:
    """How it is noted, outside of the hypervisor, that a disk goes over from an image to the one below it.

    Should we die about then, and the hypervisor with us, this is what says which of the two is the newest.

    Attributes:
        write: called when both images read the same, nothing is written to either, and the disk is about to go
            over: from its return on, by which the note is durable, the upper one grows old.
        catalog: what it writes to (another image in `DomainRecord.active`); None: it removes the upper image.
    """

    write: Callable[[], Awaitable[None]]
    catalog: Path | None = None


@versioned("overlay", without_node)
@attrs.frozen
class Overlay:
    """A disk's move from the image `base` to a new overlay, planned in full before anything is done.

    Attributes:
        base: the disk as it is before; its active image is what will be frozen.
        path: the overlay's file; it does not exist yet.
    """

    base: DiskStatus
    path: str

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
    """

    path: str
    strategy: Strategy
    bandwidth: int = 0
    settings: dict[str, Any] = attrs.field(factory=dict)


class Stream(abc.ABC):
    """One memory stream of a machine, from its preparation to its sealed file."""

    @abc.abstractmethod
    async def open(self) -> None:
        """Make everything ready for writing to the memory file, which exists; the guest notices nothing."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Begin; with BACKGROUND the point is taken after this and before `armed` returns."""

    @abc.abstractmethod
    async def armed(self) -> None:
        """Return when the point is held whatever the guest does from now on (BACKGROUND only)."""

    @abc.abstractmethod
    async def finished(self, progress: Progress) -> None:
        """Return when all memory has left the hypervisor."""

    @abc.abstractmethod
    async def limit(self, bandwidth: int) -> None:
        """Let it take so many bytes a second from now on, 0 for no limit; beside `finished` only.

        One that was adopted after a crash of ours may keep to what it was told before.
        """

    async def hold(self, seconds: float) -> None:  # noqa: B027 - only where a stream takes CPUs from the guests
        """Let a BACKGROUND stream take next to nothing for so long; with 0, let it go on."""

    @abc.abstractmethod
    async def seal(self) -> FileRecord:
        """Put the hypervisor's settings back, and return the file's record once it is fsynced.

        May be called again, by whoever goes on after a crash of ours, until `forget`.
        """

    @abc.abstractmethod
    async def forget(self) -> None:
        """Remove what `seal` needed: its answer is in the journal. Idempotent."""

    @abc.abstractmethod
    async def abort(self) -> None:
        """End the stream, whatever it is doing, and put the hypervisor's settings back.

        Idempotent; returns quietly when the process is gone.
        """


class Guard(abc.ABC):
    """Stands by while a guest is paused by us: if our process dies meanwhile, it lets the guest run again.

    It lives outside of our process, does nothing as long as we live, and leaves nothing behind.
    """

    @abc.abstractmethod
    async def post(self) -> None:
        """Have it stand by; from here on until `dismiss` the guest is never left paused by our death."""

    @abc.abstractmethod
    async def dismiss(self) -> None:
        """Send it away. Idempotent; nothing happens where none was posted."""


class Machine(abc.ABC):
    """A connection to a hypervisor process that runs one domain."""

    capabilities: Capabilities

    @abc.abstractmethod
    async def state(self) -> DomainState:
        """Return RUNNING or PAUSED."""

    @abc.abstractmethod
    async def disks(self) -> tuple[DiskStatus, ...]:
        """Return every disk that has an image, in the guest's order."""

    async def shape(self) -> MachineShape:
        """Return what the machine is made of."""
        return MachineShape(self.capabilities.ram, 0, await self.disks())

    async def oddities(self) -> Mapping[str, Traced]:
        """Return, by target, what stands between a disk and a plain image, as a snapshot cannot hold that."""
        return {}

    async def settings(self) -> dict[str, Any]:
        """Return those of the hypervisor's settings that a stream changes, for the journal (JSON)."""
        return {}

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop the CPUs; on return no disk request is in flight."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Let the CPUs run; nothing happens when they do."""

    async def dirty_rate(self, seconds: int = 1) -> float:
        """Watch the guest for so long, and return how many bytes of its RAM it writes to in a second.

        The guest runs on meanwhile; pages that are written to again within the time count once.

        Raises:
            Unsupported: this driver cannot tell.
        """
        raise Unsupported(f"this driver cannot tell how much a guest writes in {seconds} s")

    @abc.abstractmethod
    def guard(self, note: PauseNote) -> Guard:
        """Return a guard for this machine's guest, which runs; nothing happens before `Guard.post`."""

    async def load_guard(self, note: LoadNote) -> Guard:
        """Return a guard for this machine's guest, which runs, while it goes back to a point inside its images.

        When we die before the load it lets the guest run on; from then on it loads the point, once more if need be,
        and lets that run.
        """
        raise Unsupported(f"this driver keeps nothing inside images ({note})")

    async def check_agent(self) -> None:
        """Return when the guest agent has answered.

        Raises:
            Unsupported: there is no channel to one, or none answers.
        """
        raise Unsupported("this driver knows no guest agent")

    async def freeze(self) -> None:
        """Have the guest agent freeze the guest's file systems, which runs on; within a deadline.

        They are to be thawed whatever this raises.

        Raises:
            Unsupported: there was nothing to freeze.
        """
        raise Unsupported("this driver knows no guest agent")

    async def thaw(self) -> None:
        """Have the guest agent thaw the guest's file systems; within a deadline. Idempotent; the guest must run."""
        raise Unsupported("this driver knows no guest agent")

    @abc.abstractmethod
    def pause_times(self) -> tuple[float, float] | None:
        """Return when the last pause since `forget_pauses` began and ended: the hypervisor's own time stamps."""

    @abc.abstractmethod
    def run_changes(self) -> int:
        """Return how often the guest was stopped or let run since `forget_pauses`, by us or by anybody else."""

    @abc.abstractmethod
    def forget_pauses(self) -> None:
        """Begin a new account of pauses."""

    @abc.abstractmethod
    async def add_node(self, overlay: Overlay) -> None:
        """Open an overlay without attaching it."""

    @abc.abstractmethod
    async def remove_node(self, overlay: Overlay) -> None:
        """Close an overlay that no disk uses. Idempotent."""

    @abc.abstractmethod
    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """Put all disks on their overlays: all of them or, with CommandRefused, none."""

    @abc.abstractmethod
    async def commit_image(
        self, top: str, base: str, *, note: PivotNote, options: MergeOptions, progress: Progress
    ) -> None:
        """Merge `top`, and what is between, down into `base`, which takes its place in the chains that are open.

        Works on a running guest and on a paused one, and loses nothing that the guest writes. A call that is cut
        short leaves every image readable as before from `top` on, and a disk that was active there on one side.

        Args:
            top: the upper image.
            base: the lower one.
            note: used where a disk is active on `top`. Should we die about then, the disk goes on with the image
                that the note says, and so does the guest.
            options: how.
            progress: told how far it is.

        Raises:
            NotConverging: the guest outruns it, slowed down too, and is not to be paused; it runs on as before.
        """

    @abc.abstractmethod
    async def settle_merges(self, active: Mapping[str, str]) -> None:
        """End what merges that were cut short have left: jobs, limits, images open without need or for writing.

        Args:
            active: by target, the image that the disk is to be on as its `PivotNote` has it.
        """

    async def stream_image(self, top: str, base: str | None, *, options: MergeOptions, progress: Progress) -> None:
        """Copy up into `top` all that is between it and `base`, which then backs it (None: nothing does).

        Raises:
            Unsupported: this driver does not merge.
        """
        raise Unsupported(f"merging into {top} down to {base}: this driver cannot ({options}, {progress})")

    @abc.abstractmethod
    def stream(self, plan: StreamPlan) -> Stream:
        """Return a stream for this machine; nothing happens before `Stream.open`."""

    @abc.abstractmethod
    async def load(self, path: str) -> None:
        """Load a memory file into a machine launched for it; it is PAUSED afterwards, at the point."""

    async def save_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Save memory and disks, at one point, inside the images that these disks are on; memory in the first.

        The guest stands meanwhile and is then as it was before, whatever becomes of us. While it is at it, the
        hypervisor answers nothing; a call that is cut short goes on. One that fails may have left some images with
        the snapshot.

        Raises:
            Unsupported: this driver keeps nothing inside images.
        """
        raise Unsupported(f"{tag}: this driver keeps nothing inside images ({targets})")

    async def load_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Go back to what `save_inside` has saved, in the same machine; it is PAUSED afterwards, at the point.

        The guest must stand, or have been launched and never run. What it holds is lost, also where this fails.
        """
        raise Unsupported(f"{tag}: this driver keeps nothing inside images ({targets})")

    async def delete_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Delete a snapshot inside the images that these disks are on, wherever it is. Idempotent."""
        raise Unsupported(f"{tag}: this driver keeps nothing inside images ({targets})")

    @abc.abstractmethod
    async def shutdown(self) -> None:
        """Ask the guest to power off (ACPI); returns at once."""

    @abc.abstractmethod
    async def quit(self) -> None:
        """End the process, without asking the guest; returns when it is gone."""


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
    """

    definition: DomainDefinition
    disks: tuple[DeviceDisk, ...]
    directory: Path
    incoming: bool = False
    isolated: bool = False
    template: Handle | None = None


@attrs.frozen
class Writer:
    """Somebody who has a file open for writing: in words, for example ``process 123``, and the file's path."""

    who: str
    path: str


class Storage(abc.ABC):
    """Where images and memory files live. Paths are absolute; files are made 0600, directories 0700."""

    @abc.abstractmethod
    async def exists(self, path: str) -> bool:
        """Return whether there is anything at `path`."""

    async def check_place(self, root: str, domain: str, path: str, what: str) -> None:
        """Refuse a path that is in the root and not in the domain's directory there, or is one of its own names.

        Args:
            root: the root.
            domain: whose request names the path.
            path: absolute.
            what: what it is for.

        Raises:
            InvalidInput: so it is.
        """
        if PurePath(path).is_relative_to(root):
            check_in_root(PurePath(path).relative_to(root), domain, what)

    @abc.abstractmethod
    async def check_writable(self, directory: str) -> None:
        """Raise Refused when files cannot be made in `directory`; makes nothing."""

    @abc.abstractmethod
    async def make_directory(self, directory: str) -> None:
        """Make a directory and its parents, where they are missing."""

    @abc.abstractmethod
    async def free(self, directory: str) -> tuple[str, int]:
        """Return an id of the file system that `directory` is (or will be) on, and the bytes free in it."""

    @abc.abstractmethod
    async def chain(self, path: str, format_: str, *, still: bool = False) -> tuple[DeviceDisk, ...]:
        """Return the chain of the image at `path`, itself first.

        Raises:
            Refused: a link is missing or is no image; or, where it is to be `still`, a process has one of them open
                for writing.
        """

    async def trace(self, path: str, format_: str) -> tuple[Traced, ...]:
        """Return every file that is read by whoever opens the image at `path`, itself first, as it is this moment.

        Raises:
            Refused: one cannot be looked at, or is not what it is said to be.
        """
        raise Unsupported(f"{path}: this driver cannot tell what it reads ({format_})")

    async def identities(self, paths: Collection[str]) -> Mapping[str, str]:
        """Return what files are (`Traced.identity`), by path; those that are not there are left out.

        Raises:
            Refused: one cannot be looked at.
        """
        raise Unsupported(f"this driver cannot tell one file from another ({', '.join(paths)})")

    async def openers(self, identities: Collection[str]) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002 - see below
        """Return, by identity, the other processes that have a file open, as far as they can be seen."""
        return {}

    async def mark(self, path: str, root: str) -> None:  # noqa: B027 - nothing where there are no marks
        """Mark an image as frozen for a root directory, for others to see, where it can be marked. Idempotent."""

    async def unmark(self, path: str, root: str) -> None:  # noqa: B027 - as above
        """Take a root's mark off an image. Idempotent."""

    async def marks(self, path: str) -> tuple[str, ...]:  # noqa: ARG002 - as above
        """Return the root directories for which an image is marked as frozen."""
        return ()

    @abc.abstractmethod
    async def check_image(self, path: str, format_: str) -> None:
        """Check the structure of an image that nothing writes to.

        Raises:
            DamagedSnapshot: it has errors (leaked clusters are none).
        """

    @abc.abstractmethod
    async def virtual_size(self, path: str, format_: str) -> int:
        """Return the size of the disk in an image, in bytes."""

    @abc.abstractmethod
    async def make_file(self, path: str) -> None:
        """Make an empty file, durable on return; whatever it raises, it has then left no file.

        Raises:
            FileExistsError: there is a file; it is untouched.
        """

    @abc.abstractmethod
    async def make_overlay(self, path: str, base: DeviceDisk, size: int) -> None:
        """Make an empty qcow2 over `base`, durable on return; whatever it raises, it has then left no file.

        Raises:
            FileExistsError: there is a file; it is untouched.
        """

    @abc.abstractmethod
    async def commit_overlay(self, path: str) -> None:
        """Merge an overlay, which no process has open, into its backing image; the overlay is then empty.

        Raises:
            OperationFailed: it cannot: a process has it open, or a file is missing.
        """

    async def inspect(self, path: str, format_: str) -> tuple[ImageStatus, ...]:
        """Return the chain of the image at `path`, itself first, with sizes; as `chain`."""
        raise Unsupported(f"{path}: this driver does not tell what an image holds ({format_})")

    async def read_cost(self, path: str, format_: str) -> ChainCost:
        """Measure what the chain of the image at `path` costs; reads a few MiB of it, from all over the disk."""
        raise Unsupported(f"{path}: this driver cannot tell what a chain costs ({format_})")

    async def commit_image(self, top: str, base: str, *, options: MergeOptions, progress: Progress) -> None:
        """Merge `top`, and what is between, down into `base`; no process has any of them open."""
        raise Unsupported(f"merging {top} into {base}: this driver cannot ({options}, {progress})")

    async def rebase(
        self,
        path: str,
        backing: DeviceDisk | None,
        *,
        content: bool,
        options: MergeOptions = MergeOptions(),  # noqa: B008 - an immutable value
        progress: Progress = untold,
    ) -> None:
        """Back an image by another; with `content` what it reads stays, copied up into it where need be."""
        what = f"{content}, {options}, {progress}"
        raise Unsupported(f"rebasing {path} to {backing} ({what}): this driver cannot")

    async def inside(self, path: str) -> tuple[str, ...]:
        """Return the names of the snapshots inside an image; none where there can be none. It may be in use.

        Raises:
            Refused: it cannot be read.
        """
        raise Unsupported(f"{path}: this driver keeps nothing inside images")

    async def save_inside(self, path: str, tag: str) -> None:
        """Keep what an image holds, which no process has open, in a snapshot inside it; durable on return."""
        raise Unsupported(f"{path}: this driver keeps nothing inside images ({tag})")

    async def restore_inside(self, path: str, tag: str) -> None:
        """Put an image, which no process has open, back to a snapshot inside it; durable on return. Idempotent.

        What it holds otherwise is lost, and so it is with images that are backed by it.
        """
        raise Unsupported(f"{path}: this driver keeps nothing inside images ({tag})")

    async def delete_inside(self, path: str, tag: str) -> None:
        """Delete a snapshot inside an image that no process has open; durable on return. Idempotent."""
        raise Unsupported(f"{path}: this driver keeps nothing inside images ({tag})")

    async def seal_inside(self, path: str, tag: str) -> FileRecord:
        """Return the record of a snapshot inside an image, which may be in use: of the bytes that are its own."""
        raise Unsupported(f"{path}: this driver keeps nothing inside images ({tag})")

    async def check_inside(self, record: FileRecord, tag: str) -> None:
        """Read a snapshot inside an image, which may be in use, in full, and compare it with its record.

        Raises:
            DamagedSnapshot: it is not there, or not what was saved.
        """
        raise Unsupported(f"{record.path}: this driver keeps nothing inside images ({tag})")

    async def extract_disk(self, path: str, tag: str, copy: str) -> None:
        """Copy the disk in a snapshot inside an image, which may be in use, into a new image without backing.

        Whatever it raises, it has then left no file.

        Raises:
            FileExistsError: there is a file; it is untouched.
        """
        raise Unsupported(f"{path}: this driver keeps nothing inside images ({tag}, {copy})")

    async def extract_memory(self, path: str, tag: str, copy: str) -> None:
        """Copy the memory in a snapshot inside an image to a new memory file; otherwise as `extract_disk`."""
        raise Unsupported(f"{path}: this driver keeps nothing inside images ({tag}, {copy})")

    async def release(self, paths: Collection[str]) -> None:  # noqa: B027 - nothing where all is done by ourselves
        """End programs that we had started to work on files, and that a crash of ours has left to themselves."""

    @abc.abstractmethod
    async def remove(self, path: str) -> None:
        """Unlink a file, if it is there; durable on return."""

    @abc.abstractmethod
    async def seal(self, path: str, known: FileRecord | None = None) -> FileRecord:
        """Make a file durable and return its record, `known` itself where that is still true."""

    @abc.abstractmethod
    async def check(self, record: FileRecord, *, thorough: bool = False) -> None:
        """Compare a file with its record; `thorough` reads it even when nothing seems to have touched it.

        Raises:
            DamagedSnapshot: it is missing, or its size or checksum differs.
        """


class Driver(abc.ABC):
    """A hypervisor on this host."""

    name: str
    storage: Storage
    logs: tuple[str, ...] = ()
    """The names of the files that it writes to in a domain's directory, and that stay there."""

    @abc.abstractmethod
    async def launch(self, launch: Launch) -> Handle:
        """Start a machine, CPUs stopped; it outlives us. Whatever this raises, none is then left.

        `Launch.directory` is made before anything else, and kept until `clear`.

        Raises:
            Refused: it cannot start; the error has its words.
        """

    @abc.abstractmethod
    async def find(self, directory: Path) -> Handle | None:
        """Return the machine that was launched with `directory`, if it runs: for one whose launch was cut short."""

    @abc.abstractmethod
    def connect(self, handle: Handle, label: str) -> AbstractAsyncContextManager[Machine]:
        """Connect to a machine; `label` is the domain's name for errors.

        Raises:
            ConnectionGone: nothing is there, or nothing answers.
        """

    @abc.abstractmethod
    def query(self, handle: Handle, label: str) -> AbstractAsyncContextManager[Machine]:
        """As `connect`, for a look beside a running operation, where the hypervisor allows a second client.

        It changes nothing in the hypervisor, not even for a moment; `background_blocker` may be left out for that.
        """

    async def await_inside(self, handle: Handle, label: str) -> None:  # noqa: B027 - only where one is silent then
        """Return when a machine that may be saving memory inside an image, or loading it, answers or is idle."""

    async def abandon(self, plan: StreamPlan) -> None:  # noqa: B027 - many a driver has nothing to do here
        """End whatever still writes to the memory file of a stream whose machine is gone; leave the file itself."""

    async def clear(self, directory: Path) -> None:  # noqa: B027 - as above
        """Remove what a machine that is gone has left in the directory that it was launched with; logs are kept."""

    async def forget(self, handle: Handle) -> None:  # noqa: B027 - as above
        """Remove what a machine that is gone has left, wherever that is; nothing if we did not start it."""

    @abc.abstractmethod
    async def alive(self, handle: Handle) -> bool:
        """Return whether exactly that machine still runs."""

    def pid(self, handle: Handle) -> int | None:  # noqa: ARG002 - for those that have one
        """Return the id of the process, on this host, that runs a machine; None where there is no such thing."""
        return None

    async def take_place(self, old: Handle, new: Handle) -> Handle:  # noqa: ARG002 - for those that have a place
        """Put a machine in the place of one that is gone, where others look for the domain: a path, a name.

        Idempotent.

        Returns:
            The handle of the new machine from now on.
        """
        return new

    @abc.abstractmethod
    async def writers_of(self, paths: Collection[str], besides: Handle | None = None) -> tuple[Writer, ...]:
        """Return who on this host has one of these files open for writing, beside that machine."""

    @abc.abstractmethod
    async def wait_gone(self, handle: Handle) -> None:
        """Return when that machine is gone."""

    @abc.abstractmethod
    async def kill(self, handle: Handle) -> None:
        """End a machine that may not answer; returns when it is gone. Does nothing when it is."""

    @abc.abstractmethod
    async def attach(self, name: str, socket: str) -> tuple[DomainDefinition, Handle]:
        """Find out what runs at the other end of a control socket."""

    @abc.abstractmethod
    async def beside_blocker(self, launch: Launch) -> str:
        """Return why the launch cannot stand beside the domain's present machine, or an empty string."""

    @abc.abstractmethod
    async def doctor(self) -> dict[str, Any]:
        """Return what this host can do and what stands in the way, one finding a key."""
