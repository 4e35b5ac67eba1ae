"""Traits: what a machine, a driver or a storage may be able to do beside what all of them can.

A class that has a trait inherits from its protocol *and* names the trait in its record: `Info.traits` of a driver,
`Capabilities.traits` of a machine (which may have less than its driver), `Storage.traits`. The record is asked
(`has`) before anything is touched; `need` returns the object as the trait's protocol, or raises Unsupported.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from snaporch.drivers.base.machine import Guard, Machine, Stream
from snaporch.drivers.base.storage_traits import Archives, ChainCosts, ImagePoints, OfflineMerges
from snaporch.drivers.base.values import (
    Copied,
    Launch,
    LazyLoad,
    LoadNote,
    Original,
    Overlay,
    PivotNote,
    Place,
    Progress,
    StreamPlan,
    Theirs,
    Trait,
)
from snaporch.errors import Unsupported
from snaporch.model.domain import Discovered, DomainRecord, Handle
from snaporch.model.record import SnapshotRecord
from snaporch.model.request import MergeOptions

T = TypeVar("T")

# --- of machines --------------------------------------------------------------------------------------------------


@runtime_checkable
class MemoryStreams(Protocol):
    """Memory can be streamed to a file."""

    @abc.abstractmethod
    async def settings(self) -> dict[str, Any]:
        """Return those of the hypervisor's settings that a stream changes, for the journal (JSON)."""

    @abc.abstractmethod
    def stream(self, plan: StreamPlan) -> Stream:
        """Return a stream for this machine; nothing happens before `Stream.open`."""


@runtime_checkable
class LoadsMemory(Protocol):
    """A machine that was launched for it takes memory from a file."""

    @abc.abstractmethod
    async def load(self, path: str, offset: int = 0) -> None:
        """Load memory, which begins at an offset of a file; the machine is PAUSED afterwards, at the point."""


@runtime_checkable
class LoadsLazily(Protocol):
    """A machine that was launched for it lets its guest run before all of its memory is there."""

    @abc.abstractmethod
    async def why_not_lazy(self, load: LazyLoad) -> str:
        """Return why this machine cannot, by a trial, or an empty string; make the index where it is missing.

        Raises:
            DamagedSnapshot: the memory file, which was read for that, is not what was saved.
        """

    @abc.abstractmethod
    async def begin_lazily(self, load: LazyLoad) -> None:
        """Load what the guest needs to run; the machine is PAUSED afterwards, at the point, and can be let run.

        Raises:
            OperationFailed: the memory file is not what was saved, or cannot be read.
        """

    @abc.abstractmethod
    async def finish_lazily(self, load: LazyLoad, progress: Progress) -> None:
        """Return when all of the memory is there.

        No page is given that is not what was saved: the guest waits for it until it is ended.

        Raises:
            OperationFailed: the memory file is not what was saved, or cannot be read.
        """


@runtime_checkable
class Overlays(Protocol):
    """Disks can go over to overlays, and back: what a snapshot of a running guest needs."""

    @abc.abstractmethod
    async def open_overlay(self, overlay: Overlay) -> None:
        """Open an overlay without attaching it."""

    @abc.abstractmethod
    async def close_overlay(self, overlay: Overlay) -> None:
        """Close an overlay that no disk uses. Idempotent."""

    @abc.abstractmethod
    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """Put all disks on their overlays: all of them or, with CommandRefused, none."""

    @abc.abstractmethod
    async def settle_merges(self, active: Mapping[str, str]) -> None:
        """End what merges that were cut short have left: jobs, limits, images open without need or for writing.

        Args:
            active: by target, the image that the disk is to be on as its `PivotNote` has it.
        """

    @abc.abstractmethod
    async def merge_back(self, overlay: Overlay, note: PivotNote) -> None:
        """Put a disk that is on an overlay back on its base, with everything that the guest has written since.

        It is what undoes `switch`, and must come to an end: a guest that writes faster than it copies is paused for
        the rest. `note` is as in `LiveMerges.commit_image`.
        """


@runtime_checkable
class LiveMerges(Protocol):
    """Images that the machine has open can be merged down."""

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
            note: used where a disk is active on `top`. If snaporch dies about then, the disk goes on with the image
                that the note says, and so does the guest.
            options: how.
            progress: told how far it is.

        Raises:
            NotConverging: the guest outruns it, slowed down too, and is not to be paused; it runs on as before.
        """


@runtime_checkable
class LiveCopies(Protocol):
    """Images that the machine has open can be copied up. `Capabilities.copies_into_middle` says into which."""

    @abc.abstractmethod
    async def stream_image(self, top: str, base: str | None, *, options: MergeOptions, progress: Progress) -> None:
        """Copy up into `top` all that is between it and `base`, which then backs it (None: nothing does)."""


@runtime_checkable
class PointsInside(Protocol):
    """Memory and disks can be kept inside the images that the disks are on."""

    @abc.abstractmethod
    async def save_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Save memory and disks, at one point, inside the images that these disks are on; memory in the first.

        The guest is paused meanwhile, and is then as it was before, also if snaporch dies. While it is at it, the
        hypervisor answers nothing; a call that is cut short goes on. One that fails may have left some images with
        the snapshot.
        """

    @abc.abstractmethod
    async def load_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Go back to what `save_inside` has saved, in the same machine; it is PAUSED afterwards, at the point.

        The guest must be paused, or have been launched and never run. What it holds is lost, also where this fails.
        """

    @abc.abstractmethod
    async def delete_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Delete a snapshot inside the images that these disks are on, wherever it is. Idempotent."""

    @abc.abstractmethod
    async def load_guard(self, note: LoadNote) -> Guard:
        """Return a guard for this machine's guest, which runs, while it goes back to a point inside its images.

        When snaporch dies before the load it lets the guest run on; from then on it loads the point, once more if
        need be, and lets that run.
        """


@runtime_checkable
class GuestAgent(Protocol):
    """There is a channel to a guest agent."""

    @abc.abstractmethod
    async def check_agent(self) -> None:
        """Return when the guest agent has answered.

        Raises:
            Unsupported: there is no channel to one, or none answers.
        """

    @abc.abstractmethod
    async def freeze(self) -> None:
        """Have the guest agent freeze the guest's file systems, which runs on; within a deadline.

        Call `thaw` even if this raises.

        Raises:
            Unsupported: there was nothing to freeze.
        """

    @abc.abstractmethod
    async def thaw(self) -> None:
        """Have the guest agent thaw the guest's file systems; within a deadline. Idempotent; the guest must run."""

    @abc.abstractmethod
    async def set_clock(self) -> float:
        """Have the guest agent set the guest's clock, if it runs; within a deadline.

        Returns:
            By how many seconds that is then behind the host's, as the agent says.

        Raises:
            HypervisorError: no agent answers, or it cannot.
        """


@runtime_checkable
class DirtyRate(Protocol):
    """It can be seen how quickly the guest writes to its memory."""

    @abc.abstractmethod
    async def dirty_rate(self, seconds: int = 1) -> float:
        """Watch the guest for so long, and return how many bytes of its RAM it writes to in a second.

        The guest runs on meanwhile; pages that are written to again within the time count once.
        """


@runtime_checkable
class Resets(Protocol):
    """The guest can be reset, as by the button of a computer."""

    @abc.abstractmethod
    async def reset(self) -> None:
        """Have the guest boot anew in the same machine, on the images that its disks are on, once it runs.

        A machine that runs goes on running; one that does not is PAUSED afterwards, before its first instruction.
        """


@runtime_checkable
class Screens(Protocol):
    """There may be a screen that can be looked at."""

    @abc.abstractmethod
    async def screenshot(self) -> bytes:
        """Return a picture of the guest's screen, as a PNG.

        Raises:
            Unsupported: it has no screen.
        """


# --- of drivers ---------------------------------------------------------------------------------------------------


@runtime_checkable
class StartsBeside(Protocol):
    """A second machine of a domain can be started beside the first one."""

    @abc.abstractmethod
    async def beside_blocker(self, launch: Launch) -> str:
        """Return why the launch cannot run beside the domain's present machine, or an empty string."""


@runtime_checkable
class Discovers(Protocol):
    """What could be attached to can be listed."""

    @abc.abstractmethod
    async def discover(self, known: Mapping[str, Handle]) -> Sequence[Discovered]:
        """Return the hypervisor's domains; nothing is changed by that, and no secret of theirs is told.

        Args:
            known: by name, the handles of this root's domains that are this driver's.
        """


@runtime_checkable
class KeepsRecords(Protocol):
    """The domains' manager has a list of snapshots of its own, which other programs read and add to.

    `Driver.publish` puts the snapshots of a domain whose record says so into it.
    """

    @abc.abstractmethod
    async def theirs(self, record: DomainRecord, *, known: Collection[str] = ()) -> Theirs | None:
        """Return what the manager has of a domain; None where it has no such domain at present.

        Args:
            record: the domain's.
            known: the ids of snapshots whose files need not be looked at.

        Raises:
            HypervisorError: nobody answers.
        """

    @abc.abstractmethod
    async def mark_records(self, record: DomainRecord, ids: Mapping[str, str]) -> None:
        """Note in the manager's list which snapshots are which here; by name, their ids. Idempotent."""

    @abc.abstractmethod
    async def remove_records(self, record: DomainRecord, snapshots: Sequence[SnapshotRecord]) -> None:
        """Take out of the manager's list what snaporch has put into it. Idempotent.

        Args:
            record: the domain's.
            snapshots: all of the domain's that snaporch knows.
        """


@runtime_checkable
class Clones(Protocol):
    """A second domain can be made that is like another one, at a point of it, and runs beside it."""

    @abc.abstractmethod
    async def copies(self, original: Original, places: Sequence[Place]) -> tuple[Copied, ...]:
        """Return how clones are defined, one for each place; nothing is made.

        No two of them, and none of them and the original, have anything that one process alone can have.

        Raises:
            Unsupported: there is something of which it is not known what a clone is to have in its place.
        """


# --- how to get one -----------------------------------------------------------------------------------------------

TRAITS: Mapping[type, tuple[Trait, str]] = {
    MemoryStreams: (Trait.MEMORY_STREAMS, "cannot save a guest's memory"),
    LoadsMemory: (Trait.LOADS_MEMORY, "cannot load memory into a machine that it has launched"),
    LoadsLazily: (Trait.LOADS_LAZILY, "has all memory loaded before a guest runs"),
    Overlays: (Trait.OVERLAYS, "cannot put the disks of a running guest on overlays"),
    LiveMerges: (Trait.LIVE_MERGES, "cannot merge images while the guest runs; shut it down first"),
    LiveCopies: (Trait.LIVE_COPIES, "cannot copy images while the guest runs; shut it down first"),
    PointsInside: (Trait.POINTS_INSIDE, "keeps no memory inside images; leave out what asks for internal disks"),
    GuestAgent: (
        Trait.GUEST_AGENT,
        "has no channel to a guest agent; `guest_agent = true` in a definition makes one",
    ),
    Resets: (Trait.RESETS, "cannot reset a guest; `domain destroy` and `domain start` boot it anew"),
    Screens: (Trait.SCREENS, "takes no pictures of a screen"),
    DirtyRate: (Trait.DIRTY_RATE, "cannot tell how quickly a guest writes"),
    StartsBeside: (Trait.STARTS_BESIDE, "runs one machine of a name: no other starts beside it"),
    Discovers: (Trait.DISCOVERS, "cannot list what could be attached to"),
    KeepsRecords: (Trait.KEEPS_RECORDS, "has no list of snapshots of its own"),
    Clones: (Trait.CLONES, "cannot make clones"),
    OfflineMerges: (Trait.OFFLINE_MERGES, "cannot merge images"),
    ImagePoints: (Trait.IMAGE_POINTS, "keeps nothing inside images; leave out what asks for internal disks"),
    ChainCosts: (Trait.CHAIN_COSTS, "cannot measure what a chain costs"),
    Archives: (Trait.ARCHIVES, "keeps no files that could go into an archive"),
}
"""Each protocol's name in the records, and what somebody cannot do who has it not."""


class Bearer(Protocol):
    """A machine, a driver or a storage."""

    @property
    def traits(self) -> frozenset[Trait]:
        """The traits that its record names."""


def has(owner: Bearer, wanted: type) -> bool:
    """Return whether somebody's record names a trait."""
    return TRAITS[wanted][0] in owner.traits


def require(traits: frozenset[Trait], wanted: type, who: str) -> None:
    """Refuse what a record does not name.

    Args:
        traits: the record's.
        wanted: the trait's protocol.
        who: for the error: the domain's name.

    Raises:
        Unsupported: it is not among them.
    """
    name, cannot = TRAITS[wanted]
    if name not in traits:
        raise Unsupported(f"{who}: its hypervisor {cannot}")


def need(owner: Bearer, wanted: type[T], who: str) -> T:
    """Return somebody as one who has a trait.

    Args:
        owner: a machine, a driver or a storage.
        wanted: the trait's protocol.
        who: for the error: the domain's name.

    Raises:
        Unsupported: its record does not name the trait.
    """
    require(owner.traits, wanted, who)
    if not isinstance(owner, wanted):
        raise AssertionError(f"bug: {owner!r} names {wanted.__name__} and has it not")  # noqa: TRY004 - a bug
    return owner


def check_versions(machine: Machine, versions: Mapping[str, str], who: str) -> None:
    """Refuse memory that is bound to other versions than the machine's.

    Args:
        machine: that is to load it.
        versions: `Capabilities.versions` of where it comes from.
        who: for the error.

    Raises:
        Unsupported: they differ.
    """
    for key, value in machine.capabilities.versions.items():
        if versions.get(key) != value:
            raise Unsupported(
                f"{who} needs {key} {versions.get(key)}, and this is {value}: its memory would not load"
            )
