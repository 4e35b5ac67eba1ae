"""What is not as the catalog has it: answers of `fsck`, and records that cannot be read."""

from __future__ import annotations

import enum

import attrs

from snaporch.model.formats import versioned


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
    UNREADABLE = "unreadable"
    """A record in the catalog cannot be read: it is damaged, or a newer snaporch has written it."""
    FROZEN_WRITTEN = "frozen-written"
    """A process has an image of a snapshot open for writing."""


@versioned("finding")
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


@versioned("unreadable")
@attrs.frozen
class Unreadable:
    """Something in the catalog whose record cannot be read: damaged, or written by a newer snaporch.

    Attributes:
        kind: ``domain``, ``snapshot`` or ``operation``.
        domain: the name of the domain that it is of.
        name: the domain's or snapshot's name, or the operation's id.
        reason: why.
        paths: all paths that the record names: nothing that is there is removed.
    """

    kind: str
    domain: str
    name: str
    reason: str
    paths: tuple[str, ...] = ()
