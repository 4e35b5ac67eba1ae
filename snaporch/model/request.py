"""Options of create, clone, delete and flatten beyond the RFC's structures and flags."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.domain import DomainState
from snaporch.model.limits import MOST_BYTES, MOST_CLONES, MOST_SECONDS, within


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
    """The guest is paused from the point until its memory is on disk."""
    INTERNAL = "internal"
    """Inside the qcow2 images, by the hypervisor itself, which pauses the guest meanwhile."""
    NONE = "none"


class OnTimeout(enum.StrEnum):
    """What is done when the time is up of a precopy, or of a merge that has to catch up with a guest."""

    PAUSE = "pause"
    """Pause the guest and finish."""
    FAIL = "fail"
    """Give up: a create is rolled back; what a delete cannot merge stays, and merges another time."""


def _targets(targets: Iterable[str]) -> frozenset[str]:
    if isinstance(targets, str):  # a string is a sequence of letters
        raise InvalidInput(
            f"exclude: {targets!r} is one string; give the targets as a collection, as ({targets!r},)"
        )
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
        even_if_no_way_back: take a checkpoint also where it is known that the domain could never go back to it.
        late_stop: with BACKGROUND, let the guest run through most of what its hypervisor has to do before the
            point; not done where that would gain nothing, or cannot be done: the record says what was done.
        expires: seconds after its point from which on it is needed no longer: see `SnapshotRecord.expires`.
    """

    strategy: Strategy = Strategy.AUTO
    bandwidth: int = attrs.field(default=0, validator=within(0, MOST_BYTES))
    max_seconds: float | None = attrs.field(default=None, validator=within(0, MOST_SECONDS))
    on_timeout: OnTimeout = OnTimeout.FAIL
    exclude: frozenset[str] = attrs.field(default=frozenset(), converter=_targets)
    wait: bool = False
    even_if_no_way_back: bool = False
    late_stop: bool = False
    expires: float | None = attrs.field(default=None, validator=within(0, MOST_SECONDS))


@attrs.frozen
class CloneOptions:
    """What clones may be told.

    Attributes:
        count: how many; None: one, of the very name that is given.
        state: RUNNING or PAUSED in place of what the domain did at the point.
        keep_network: with the original's network addresses they may be in its network.
        wait: wait for a running operation on the domain instead of raising Busy.
    """

    count: int | None = attrs.field(default=None, validator=within(1, MOST_CLONES))
    state: DomainState | None = None
    keep_network: bool = False
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

    bandwidth: int = attrs.field(default=0, validator=within(0, MOST_BYTES))
    max_seconds: float | None = attrs.field(default=None, validator=within(0, MOST_SECONDS))
    on_timeout: OnTimeout = OnTimeout.FAIL
