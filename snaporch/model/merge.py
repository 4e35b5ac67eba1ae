"""What a delete or a flatten does to images: the answer of both, also in the journal.

`snaporch.images.merge` makes it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

import attrs

from snaporch.model.formats import versioned


class MergeKind(enum.StrEnum):
    """Which way the data goes."""

    COMMIT = "commit"
    """Down: the upper image goes."""
    STREAM = "stream"
    """Up: the lower images go."""


class Where(enum.StrEnum):
    """Who merges."""

    LIVE = "live"
    """The hypervisor that has the images open."""
    OFFLINE = "offline"
    """qemu-img; nobody has them open."""

    @classmethod
    def of(cls, image: str, opened: Collection[str]) -> Where:
        """Return who merges an image, of the open ones or not."""
        return cls.LIVE if image in opened else cls.OFFLINE


@attrs.frozen
class MergeStep:
    """One merge. Paths are as they are when the step begins, after those in `after`.

    Attributes:
        kind: ``commit`` (down) or ``stream`` (up).
        target: a disk of the domain whose chains the images are in.
        top: the uppermost image: what is committed, or what is streamed into.
        base: the lowest image: what is committed into, or the last whose content is streamed up.
        new_backing: what the surviving image is backed by after the step.
        bytes: to move, at most.
        where: ``live``: the hypervisor that has the images open does it; ``offline``: qemu-img does.
        active: a disk of the domain is on `top`; to commit that live, the hypervisor must pivot.
        repoint: of a commit: all images that were backed by `top` and are backed by `base` afterwards. Those that
            are open are seen to by the hypervisor, the headers of all others must be rewritten.
        after: indices of the steps that must be done before.
    """

    kind: MergeKind
    target: str
    top: str
    base: str
    new_backing: str | None
    bytes: int
    where: Where
    active: bool = False
    repoint: tuple[str, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def survivor(self) -> str:
        """The image that is written to and remains."""
        return self.base if self.kind is MergeKind.COMMIT else self.top


@versioned("merge-plan")
@attrs.frozen
class MergePlan:
    """All that a delete does to images.

    Attributes:
        doomed: the snapshots that it removes.
        steps: the merges; those that do not depend on each other may run side by side.
        unlink: files to remove when all steps are done, in this order: no image before what is backed by it.
        kept: images that nobody holds and that stay nevertheless, each with the reason.
        bytes: of all steps.
        moved: points and active images whose path changes, old to new.
        resealed: files in chains of remaining points that are changed: their checksums are to be computed anew.
    """

    doomed: frozenset[str] = frozenset()
    steps: tuple[MergeStep, ...] = ()
    unlink: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    bytes: int = 0
    moved: Mapping[str, str] = attrs.field(factory=dict)
    resealed: tuple[str, ...] = ()
