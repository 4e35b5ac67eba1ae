"""Steps, and the tables of a create: which steps run, in which order, and what undoes them; no I/O.

A *phase* is a barrier: all lanes of all participants finish it before anyone begins the next. Inside a phase the
*lanes* run side by side, each its own steps in order. So while the memory lane opens its stream every disk makes
its overlay, and they meet at the point; with several participants the very same rows make a consistency group
(pause all, switch all, arm all, resume all).

A step is performed by the method of its name of the actor whose turn it is (see `snaporch.engine.actor`). The
rollback tables name the compensations in the order in which they must run, each with the steps that make it
necessary. A compensation looks at what is really there and is idempotent: it is run for a step that has *begun*,
done or not, and again by `recover` after a crash.

The tables of a revert and of a verify are in `snaporch.engine.ways`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Self

import attrs

from snaporch.engine.states import Signal
from snaporch.model.request import Strategy


class Lane(enum.StrEnum):
    """Who performs a step: once a domain, once a disk that gets an overlay, or once for its memory."""

    DOMAIN = "domain"
    DISK = "disk"
    INSIDE = "inside"
    """Once a disk whose point is inside its image."""
    MEMORY = "memory"

    @property
    def has_target(self) -> bool:
        """Whether a step of this lane is called with the target of a disk."""
        return self in {Lane.DISK, Lane.INSIDE}


class Step(enum.StrEnum):
    """A step, or a compensation: its value is the name of the method that performs it.

    Attributes:
        lane: in which it is performed, always.
    """

    lane: Lane

    def __new__(cls, name: str, lane: Lane = Lane.DOMAIN) -> Self:
        """Make a member, of a lane."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.lane = lane
        return member

    POST_GUARD = "post_guard"
    MAKE_OVERLAY = "make_overlay", Lane.DISK
    OPEN_OVERLAY = "open_overlay", Lane.DISK
    MAKE_MEMORY_FILE = "make_memory_file", Lane.MEMORY
    OPEN_STREAM = "open_stream", Lane.MEMORY
    DISMISS_GUARD = "dismiss_guard"
    SEAL_IMAGE = "seal_image", Lane.DISK
    SEAL_MEMORY = "seal_memory", Lane.MEMORY
    SYNC_IMAGES = "sync_images"
    PAUSE = "pause"
    SWITCH = "switch"
    START_STREAM = "start_stream", Lane.MEMORY
    AWAIT_ARMED = "await_armed", Lane.MEMORY
    RESUME = "resume"
    FINISH_STREAM = "finish_stream", Lane.MEMORY
    SAVE_INSIDE = "save_inside"
    SEAL_INSIDE = "seal_inside", Lane.INSIDE
    KEEP_INSIDE = "keep_inside", Lane.INSIDE
    FREEZE = "freeze"
    THAW = "thaw"
    LAUNCH = "launch"
    LOAD = "load"
    BEGIN_LOADING = "begin_loading"
    FINISH_LOADING = "finish_loading"
    STAND_STILL = "stand_still"
    TAKE_OVER = "take_over"
    END_OLD = "end_old"
    KEEP_PRESENT = "keep_present"
    LOAD_INSIDE = "load_inside"
    KEEP_IMAGE = "keep_image", Lane.INSIDE
    GO_BACK = "go_back", Lane.INSIDE
    BRING_UP = "bring_up"
    RUN_AWHILE = "run_awhile"
    PROVE = "prove"
    KEEP_OLD = "keep_old"
    ABORT_STREAM = "abort_stream", Lane.MEMORY
    REMOVE_MEMORY_FILE = "remove_memory_file", Lane.MEMORY
    SWITCH_BACK = "switch_back"
    FORGET_INSIDE = "forget_inside", Lane.INSIDE
    CLOSE_OVERLAY = "close_overlay", Lane.DISK
    REMOVE_OVERLAY = "remove_overlay", Lane.DISK
    END_NEW = "end_new"
    LOAD_PRESENT = "load_present"
    RUN_OLD = "run_old"
    RESTORE_IMAGE = "restore_image", Lane.INSIDE
    FORGET_KEPT = "forget_kept", Lane.INSIDE
    MOURN_OLD = "mourn_old"
    END_PROOF = "end_proof"
    ABORT_KEEPING = "abort_keeping"
    PUT_BACK = "put_back"
    REMOVE_KEPT = "remove_kept"
    LEAVE_NOTHING = "leave_nothing"
    COPY_TPM = "copy_tpm"
    SEAL_TPM = "seal_tpm"
    REMOVE_TPM_COPY = "remove_tpm_copy"
    MAKE_TPM = "make_tpm"
    REMOVE_TPM = "remove_tpm"


@attrs.frozen(init=False)
class Phase:
    """A row of a table.

    Attributes:
        signal: sent to the operation's state machine before the first step.
        steps: what is done; those of one lane in this order.
        paused: the guest is paused for a LIVE point: no journal row, no database write, no fsync, nothing but the
            hypervisor.
        goes_on: what it does goes on, or can be done again, without snaporch: it may be left; see
            `snaporch.engine.replay`.
    """

    signal: Signal
    steps: tuple[Step, ...]
    paused: bool
    goes_on: bool

    def __init__(self, signal: Signal, *steps: Step, paused: bool = False, goes_on: bool = False) -> None:
        self.__attrs_init__(signal, steps, paused, goes_on)

    def lanes(self) -> tuple[tuple[Lane, tuple[Step, ...]], ...]:
        """Return the lanes that have something to do."""
        rows = ((lane, tuple(step for step in self.steps if step.lane is lane)) for lane in Lane)
        return tuple(row for row in rows if row[1])


@attrs.frozen(init=False)
class Undo:
    """A compensation: run when any of the steps `after` has begun."""

    step: Step
    after: frozenset[Step]

    def __init__(self, step: Step, *after: Step) -> None:
        self.__attrs_init__(step, frozenset(after))


def steps_of(phases: Iterable[Phase]) -> frozenset[Step]:
    """Return the steps of some phases."""
    return frozenset(step for phase in phases for step in phase.steps)


def all_steps(tables: Iterable[Iterable[Phase]], rollback: Iterable[Undo]) -> frozenset[Step]:
    """Return everything that somebody performs who goes by these tables: their steps, and what undoes them."""
    return frozenset[Step]().union(*map(steps_of, tables), (undo.step for undo in rollback))


# The guard is there from before the pause until the guest runs again, in case snaporch dies in between.
_PREPARE = Phase(
    Signal.PREPARE, Step.POST_GUARD, Step.MAKE_OVERLAY, Step.OPEN_OVERLAY, Step.MAKE_MEMORY_FILE, Step.OPEN_STREAM
)
_PREPARE_OFFLINE = Phase(Signal.PREPARE, Step.COPY_TPM, Step.MAKE_OVERLAY)
# Just before a pause, in which the hypervisor would flush images. No guest is paused while another one syncs.
_SYNC = Phase(Signal.PREPARE, Step.SYNC_IMAGES)
_SEAL = Phase(Signal.SEAL, Step.DISMISS_GUARD, Step.SEAL_IMAGE, Step.SEAL_MEMORY, goes_on=True)

CREATE: dict[Strategy, tuple[Phase, ...]] = {
    # The point is where the guest is paused; RAM is write-protected there and streams while the guest runs on.
    Strategy.BACKGROUND: (
        _PREPARE,
        _SYNC,
        Phase(Signal.PAUSE, Step.PAUSE),  # not `paused`: its row in the journal covers the whole pause
        Phase(Signal.SWITCH, Step.SWITCH, paused=True),
        Phase(Signal.ARM, Step.START_STREAM, Step.AWAIT_ARMED, paused=True),
        Phase(Signal.RESUME, Step.RESUME, paused=True),
        Phase(
            Signal.STREAM, Step.DISMISS_GUARD, Step.SEAL_IMAGE, Step.FINISH_STREAM, Step.SEAL_MEMORY, goes_on=True
        ),
    ),
    # The point is where the hypervisor itself stops the guest: the last page is sent and nothing moves.
    Strategy.PRECOPY: (
        _PREPARE,
        Phase(Signal.STREAM, Step.START_STREAM, Step.FINISH_STREAM),
        Phase(Signal.SWITCH, Step.SWITCH, paused=True),
        Phase(Signal.RESUME, Step.RESUME, paused=True),
        _SEAL,
    ),
    # The guest is paused from the point until its memory is on disk.
    Strategy.PAUSED: (
        _PREPARE,
        _SYNC,
        Phase(Signal.PAUSE, Step.PAUSE),
        Phase(Signal.SWITCH, Step.SWITCH),
        Phase(Signal.STREAM, Step.START_STREAM, Step.FINISH_STREAM, Step.SEAL_MEMORY),
        Phase(Signal.RESUME, Step.RESUME),
        Phase(Signal.SEAL, Step.DISMISS_GUARD, Step.SEAL_IMAGE, goes_on=True),
    ),
    # The hypervisor stops the guest, saves memory and disks inside the images, and lets it run, all by itself.
    Strategy.INTERNAL: (
        Phase(Signal.PREPARE),
        Phase(Signal.STREAM, Step.SAVE_INSIDE),
        Phase(Signal.SEAL, Step.SEAL_INSIDE, goes_on=True),
    ),
    # An inactive domain: nobody writes to its disks.
    Strategy.NONE: (
        _PREPARE_OFFLINE,
        Phase(Signal.SWITCH, Step.KEEP_INSIDE),
        Phase(Signal.SEAL, Step.SEAL_TPM, Step.SEAL_IMAGE, Step.SEAL_INSIDE, goes_on=True),
    ),
}

_FREEZE = Phase(Signal.FREEZE, Step.FREEZE)
# No row in the journal: while file systems are frozen a guest can do next to nothing.
_THAW = Phase(Signal.THAW, Step.THAW, paused=True)


def _quiesced(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Return a table in which file systems are frozen from before the pause until after it."""
    found: list[Phase] = []
    for phase in phases:
        found += {Signal.PAUSE: [_FREEZE, phase], Signal.RESUME: [phase, _THAW]}.get(phase.signal, [phase])
    return tuple(found)


# With QUIESCE. There is none for precopy: it would keep the file systems frozen for as long as memory streams.
QUIESCED: dict[Strategy, tuple[Phase, ...]] = {
    Strategy.BACKGROUND: _quiesced(CREATE[Strategy.BACKGROUND]),
    Strategy.PAUSED: _quiesced(CREATE[Strategy.PAUSED]),
    Strategy.INTERNAL: (
        Phase(Signal.PREPARE, Step.POST_GUARD),
        _FREEZE,
        Phase(Signal.STREAM, Step.SAVE_INSIDE),
        _THAW,
        Phase(Signal.SEAL, Step.DISMISS_GUARD, Step.SEAL_INSIDE),
    ),
    # The disks alone of a guest that runs.
    Strategy.NONE: (
        Phase(Signal.PREPARE, Step.POST_GUARD, Step.MAKE_OVERLAY, Step.OPEN_OVERLAY),
        _FREEZE,
        Phase(Signal.SWITCH, Step.SWITCH, Step.COPY_TPM, paused=True),
        _THAW,
        Phase(Signal.SEAL, Step.DISMISS_GUARD, Step.SEAL_TPM, Step.SEAL_IMAGE),
    ),
}


def create_phases(strategy: Strategy, *, quiesce: bool) -> tuple[Phase, ...]:
    """Return the table of a create."""
    return (QUIESCED if quiesce else CREATE)[strategy]


# The guest runs again first: what comes after works on a running guest, and a pause costs users most.
ROLLBACK_CREATE: tuple[Undo, ...] = (
    Undo(Step.ABORT_STREAM, Step.OPEN_STREAM, Step.START_STREAM),
    Undo(Step.RESUME, Step.PAUSE, Step.START_STREAM, Step.FINISH_STREAM),
    Undo(Step.THAW, Step.FREEZE),
    Undo(Step.DISMISS_GUARD, Step.POST_GUARD),
    Undo(Step.REMOVE_MEMORY_FILE, Step.MAKE_MEMORY_FILE),  # a full disk has room again
    Undo(Step.REMOVE_TPM_COPY, Step.COPY_TPM),
    Undo(Step.SWITCH_BACK, Step.SWITCH),
    Undo(Step.FORGET_INSIDE, Step.SAVE_INSIDE, Step.KEEP_INSIDE),
    Undo(Step.CLOSE_OVERLAY, Step.OPEN_OVERLAY),
    Undo(Step.REMOVE_OVERLAY, Step.MAKE_OVERLAY),
)
