"""What each kind of operation does, in which order, and what undoes it: tables, no I/O.

A *phase* is a barrier: all lanes of all participants finish it before anyone begins the next. Inside a phase the
*lanes* run side by side, each its own steps in order. So while the memory lane opens its stream every disk makes
its overlay, and they meet at the point; with several participants the very same rows make a consistency group
(pause all, switch all, arm all, resume all).

A step's name is the name of a method of the actor that performs it (`snaporch.operations.create.Participant`, for
example). The rollback tables name the compensations in the order in which they must run, each with the steps that
make it necessary. A compensation looks at what is really there and is idempotent: it is run for a step that has
*begun*, done or not, and again by `recover` after a crash.
"""

from __future__ import annotations

import enum

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


@attrs.frozen
class Phase:
    """A row of a table.

    Attributes:
        signal: sent to the operation's state machine before the first step.
        domain: steps of the domain lane.
        disk: steps of each disk's lane.
        inside: steps of the lane of each disk whose point is inside its image.
        memory: steps of the memory lane.
        paused: the guest stands still for a LIVE point: no database write, no fsync, nothing but the hypervisor.
        goes_on: what it does goes on, or can be done again, without us: it may be left; see
            `snaporch.engine.replay`.
    """

    signal: Signal
    domain: tuple[str, ...] = ()
    disk: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    paused: bool = False
    goes_on: bool = False

    def lanes(self) -> tuple[tuple[Lane, tuple[str, ...]], ...]:
        """Return the lanes that have something to do."""
        rows = (
            (Lane.DOMAIN, self.domain),
            (Lane.DISK, self.disk),
            (Lane.INSIDE, self.inside),
            (Lane.MEMORY, self.memory),
        )
        return tuple(row for row in rows if row[1])


@attrs.frozen
class Undo:
    """A compensation: run when any of the steps `after` has begun."""

    name: str
    lane: Lane
    after: frozenset[str]


_PREPARE = Phase(
    Signal.PREPARE,
    domain=("post_guard",),  # it stands by until the guest runs again, should we die in between
    disk=("make_overlay", "add_node"),
    memory=("make_memory_file", "open_stream"),
)
_PREPARE_OFFLINE = Phase(Signal.PREPARE, disk=("make_overlay",))
_SEAL = Phase(Signal.SEAL, domain=("dismiss_guard",), disk=("seal_image",), memory=("seal_memory",), goes_on=True)

CREATE: dict[Strategy, tuple[Phase, ...]] = {
    # The point is where the guest stands; RAM is write-protected there and streams while the guest runs on.
    Strategy.BACKGROUND: (
        _PREPARE,
        Phase(Signal.PAUSE, domain=("pause",)),  # not `paused`: its row in the journal covers the whole pause
        Phase(Signal.SWITCH, domain=("switch",), paused=True),
        Phase(Signal.ARM, memory=("start_stream", "await_armed"), paused=True),
        Phase(Signal.RESUME, domain=("resume",), paused=True),
        Phase(
            Signal.STREAM,
            domain=("dismiss_guard",),
            disk=("seal_image",),
            memory=("finish_stream", "seal_memory"),
            goes_on=True,
        ),
    ),
    # The point is where the hypervisor itself stops the guest: the last page is sent and nothing moves.
    Strategy.PRECOPY: (
        _PREPARE,
        Phase(Signal.STREAM, memory=("start_stream", "finish_stream")),
        Phase(Signal.SWITCH, domain=("switch",), paused=True),
        Phase(Signal.RESUME, domain=("resume",), paused=True),
        _SEAL,
    ),
    # The guest stands from the point until its memory is on disk.
    Strategy.PAUSED: (
        _PREPARE,
        Phase(Signal.PAUSE, domain=("pause",)),
        Phase(Signal.SWITCH, domain=("switch",)),
        Phase(Signal.STREAM, memory=("start_stream", "finish_stream", "seal_memory")),
        Phase(Signal.RESUME, domain=("resume",)),
        Phase(Signal.SEAL, domain=("dismiss_guard",), disk=("seal_image",), goes_on=True),
    ),
    # The hypervisor stops the guest, saves memory and disks inside the images, and lets it run, all by itself.
    Strategy.INTERNAL: (
        Phase(Signal.PREPARE),
        Phase(Signal.STREAM, domain=("save_inside",)),
        Phase(Signal.SEAL, inside=("seal_inside",), goes_on=True),
    ),
    # An inactive domain: its disks stand still by themselves.
    Strategy.NONE: (
        _PREPARE_OFFLINE,
        Phase(Signal.SWITCH, inside=("keep_inside",)),
        Phase(Signal.SEAL, disk=("seal_image",), inside=("seal_inside",), goes_on=True),
    ),
}

_FREEZE = Phase(Signal.FREEZE, domain=("freeze",))
# No row in the journal: while file systems are frozen a guest can do next to nothing.
_THAW = Phase(Signal.THAW, domain=("thaw",), paused=True)


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
        Phase(Signal.PREPARE, domain=("post_guard",)),
        _FREEZE,
        Phase(Signal.STREAM, domain=("save_inside",)),
        _THAW,
        Phase(Signal.SEAL, domain=("dismiss_guard",), inside=("seal_inside",)),
    ),
    # The disks alone of a guest that runs.
    Strategy.NONE: (
        Phase(Signal.PREPARE, domain=("post_guard",), disk=("make_overlay", "add_node")),
        _FREEZE,
        Phase(Signal.SWITCH, domain=("switch",), paused=True),
        _THAW,
        Phase(Signal.SEAL, domain=("dismiss_guard",), disk=("seal_image",)),
    ),
}


def create_phases(strategy: Strategy, *, quiesce: bool) -> tuple[Phase, ...]:
    """Return the table of a create."""
    return (QUIESCED if quiesce else CREATE)[strategy]


# The guest runs again first: what comes after works on a running guest, and a pause is the dearest thing we hold.
ROLLBACK_CREATE: tuple[Undo, ...] = (
    Undo("abort_stream", Lane.MEMORY, frozenset({"open_stream", "start_stream"})),
    Undo("resume", Lane.DOMAIN, frozenset({"pause", "start_stream", "finish_stream"})),
    Undo("thaw", Lane.DOMAIN, frozenset({"freeze"})),
    Undo("dismiss_guard", Lane.DOMAIN, frozenset({"post_guard"})),
    Undo("remove_memory_file", Lane.MEMORY, frozenset({"make_memory_file"})),  # a full disk has room again
    Undo("switch_back", Lane.DOMAIN, frozenset({"switch"})),
    Undo("forget_inside", Lane.INSIDE, frozenset({"save_inside", "keep_inside"})),
    Undo("remove_node", Lane.DISK, frozenset({"add_node"})),
    Undo("remove_overlay", Lane.DISK, frozenset({"make_overlay"})),
)

REVERT: dict[str, tuple[Phase, ...]] = {
    # The new guest is complete beside the old one before the old one is touched.
    "beside": (
        Phase(Signal.PREPARE, disk=("make_overlay",)),
        Phase(Signal.LOAD, domain=("launch", "load")),
        # Old and new guests of a group never run at one time. The guards stand until the revert is complete, which
        # is one row for all: until then they take every guest back.
        Phase(Signal.SWAP, domain=("post_guard", "stand_still")),
        Phase(Signal.SWAP, domain=("take_over",), paused=True),
    ),
    # FORCE, where both cannot stand side by side, or the old one no longer answers.
    "displace": (
        Phase(Signal.PREPARE, disk=("make_overlay",)),
        Phase(Signal.DISPLACE, domain=("end_old",)),
        Phase(Signal.LOAD, domain=("launch", "load")),
        Phase(Signal.SWAP, domain=("take_over",)),
    ),
    # The domain is to be inactive afterwards. The old guest runs until the catalog has that, and what is left is to
    # end it: stopped before, it would stand until somebody recovers what we had died in.
    "inactive": (Phase(Signal.PREPARE, disk=("make_overlay",)), Phase(Signal.SWAP)),
    # The point is inside the images that the running guest is on: it is loaded in the same process. What the guest
    # holds now is first kept inside too, and loaded again if that fails. From the load on it is the point that the
    # guard lets run, and recovery finds it running.
    "inside": (
        Phase(Signal.PREPARE, domain=("post_guard", "stand_still", "keep_present")),
        Phase(Signal.LOAD, domain=("load_inside",)),
        Phase(Signal.SWAP, domain=("take_over",)),
    ),
    # The point is inside images that nobody has open: they go back to it in place, and then a process may load it.
    "inside, inactive": (
        Phase(Signal.PREPARE, disk=("make_overlay",)),
        Phase(Signal.LOAD, inside=("keep_image", "go_back")),
        Phase(Signal.SWAP, domain=("bring_up",)),
    ),
    # FORCE, where the old process has them open.
    "inside, displace": (
        Phase(Signal.PREPARE, disk=("make_overlay",)),
        Phase(Signal.DISPLACE, domain=("end_old",)),
        Phase(Signal.LOAD, inside=("keep_image", "go_back")),
        Phase(Signal.SWAP, domain=("bring_up",)),
    ),
}

# A throw-away copy, nobody's place taken.
VERIFY: tuple[Phase, ...] = (
    Phase(Signal.PREPARE, disk=("make_overlay",)),
    Phase(Signal.LOAD, domain=("launch", "load")),
    Phase(Signal.SWAP, domain=("run_awhile",)),
)

ROLLBACK_VERIFY: tuple[Undo, ...] = (
    Undo("end_new", Lane.DOMAIN, frozenset({"launch"})),
    Undo("remove_overlay", Lane.DISK, frozenset({"make_overlay"})),
)

ROLLBACK_REVERT: tuple[Undo, ...] = (
    Undo("post_guard", Lane.DOMAIN, frozenset({"stand_still"})),
    Undo("end_new", Lane.DOMAIN, frozenset({"launch", "bring_up"})),
    Undo("load_present", Lane.DOMAIN, frozenset({"load_inside"})),
    Undo("run_old", Lane.DOMAIN, frozenset({"stand_still"})),
    Undo("dismiss_guard", Lane.DOMAIN, frozenset({"post_guard"})),
    Undo("restore_image", Lane.INSIDE, frozenset({"load_inside", "go_back"})),
    Undo("forget_kept", Lane.INSIDE, frozenset({"keep_present", "keep_image"})),
    Undo("mourn_old", Lane.DOMAIN, frozenset({"end_old"})),
    Undo("remove_overlay", Lane.DISK, frozenset({"make_overlay"})),
)
