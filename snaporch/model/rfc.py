"""The structures and flags of the *Libxl Domain Snapshot API* RFC V6, with its numbers.

What the RFC has not and a user needs (parent, state of the domain at the point, sizes, checksums, timings, the
launch definition) is in `snaporch.model.record.SnapshotRecord` around them. Paths are absolute strings.
"""

from __future__ import annotations

import enum

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.limits import MOST_ITEMS, MOST_TEXT, no_longer_than, within


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
    KEEP_CLOCK = 16
    """The guest's clock is left at the time of the point, also where its agent could set it."""
    LAZY = 32
    """The guest runs before its memory is there, where that can be."""


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
    description: str = attrs.field(default="", validator=no_longer_than(MOST_TEXT))
    creation_time: int = attrs.field(default=0, validator=within(0, 2**53))
    memory: bool = True
    memory_file: str = ""
    disks: tuple[DiskSnapshot, ...] = attrs.field(default=(), validator=no_longer_than(MOST_ITEMS))
