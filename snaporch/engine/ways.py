"""The ways back to a point, one row each: the steps, what undoes them, and what users can expect; no I/O.

Without FORCE no way gives up the old guest before the new guest is there: until then either its process is kept, or
its memory and disks are. A way is chosen in `snaporch.operations.revert_plan`, by what the hypervisor can do.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import attrs

from snaporch.engine.states import Signal, State
from snaporch.engine.steps import Phase, Step, Undo, all_steps
from snaporch.model.way import Way


class Keeps(enum.StrEnum):
    """How the old guest is kept until the new one is there; the value is for people."""

    PROCESS = "its process, which is paused at most while the new guest takes its place"
    LOADED = "its process, which is paused from then on until all memory of the new guest is there"
    FILE = "its memory, in a file"
    INSIDE = "its memory and disks, inside its images"
    DISKS = "its disks only: --force gives up its memory"


@attrs.frozen
class Row:
    """What there is to know of a way.

    Attributes:
        phases: what is done.
        keeps: how the old guest is kept.
        rollback: what undoes them.
        same_process: the point is loaded in the process that runs the old guest, which stays the domain's.
        ends_old: the old process is ended before the point is loaded.
        two_guests: there is a time at which the host needs RAM for two guests.
        at_rest: images go back in place: no process may have them open.
        goes_on: states from which recovery goes on with what was cut short, if what it needs is there; in the
            others it is undone.
    """

    phases: tuple[Phase, ...]
    keeps: Keeps
    rollback: tuple[Undo, ...]
    same_process: bool = False
    ends_old: bool = False
    two_guests: bool = False
    at_rest: bool = False
    goes_on: frozenset[State] = frozenset()


_ROLLBACK: tuple[Undo, ...] = (
    Undo(Step.POST_GUARD, Step.STAND_STILL),
    Undo(Step.END_NEW, Step.LAUNCH, Step.BRING_UP),
    Undo(Step.LOAD_PRESENT, Step.LOAD_INSIDE),
    Undo(Step.RUN_OLD, Step.STAND_STILL),
    Undo(Step.DISMISS_GUARD, Step.POST_GUARD),
    Undo(Step.RESTORE_IMAGE, Step.LOAD_INSIDE, Step.GO_BACK),
    Undo(Step.FORGET_KEPT, Step.KEEP_PRESENT, Step.KEEP_IMAGE),
    Undo(Step.MOURN_OLD, Step.END_OLD),
    Undo(Step.REMOVE_TPM, Step.MAKE_TPM),
    Undo(Step.REMOVE_OVERLAY, Step.MAKE_OVERLAY),
)

# What is kept goes before the old guest may run again, see `snaporch.operations.keeping`: so no guard is posted
# anew; one that is there says by the verdict that it has let the guest run.
_ROLLBACK_PROVEN: tuple[Undo, ...] = (
    Undo(Step.END_PROOF, Step.PROVE),
    Undo(Step.END_NEW, Step.LAUNCH),
    Undo(Step.ABORT_KEEPING, Step.KEEP_OLD),
    Undo(Step.PUT_BACK, Step.END_OLD),
    Undo(Step.REMOVE_KEPT, Step.KEEP_OLD),
    Undo(Step.RUN_OLD, Step.STAND_STILL),
    Undo(Step.DISMISS_GUARD, Step.POST_GUARD),
    Undo(Step.REMOVE_TPM, Step.MAKE_TPM),
    Undo(Step.REMOVE_OVERLAY, Step.MAKE_OVERLAY),
)

_PREPARE = Phase(Signal.PREPARE, Step.MAKE_TPM, Step.MAKE_OVERLAY)
_END_OLD = Phase(Signal.DISPLACE, Step.END_OLD)
_LOAD = Phase(Signal.LOAD, Step.LAUNCH, Step.LOAD)
_LOAD_IMAGES = Phase(Signal.LOAD, Step.KEEP_IMAGE, Step.GO_BACK)
_BRING_UP = Phase(Signal.SWAP, Step.BRING_UP)

WAYS: dict[Way, Row] = {
    Way.BESIDE: Row(
        (
            _PREPARE,
            Phase(Signal.LOAD, Step.LAUNCH, Step.LOAD, Step.SYNC_IMAGES),
            # Old and new guests of a group never run at one time. The guards stay until the revert is complete,
            # which is one row for all: until then they take every guest back.
            Phase(Signal.SWAP, Step.POST_GUARD, Step.STAND_STILL),
            Phase(Signal.SWAP, Step.TAKE_OVER, paused=True),
        ),
        Keeps.PROCESS,
        _ROLLBACK,
        two_guests=True,
    ),
    # Until all memory is there the old guest can run again: its guard stays, and takes it back if snaporch dies.
    Way.LAZY: Row(
        (
            _PREPARE,
            Phase(Signal.PREPARE, Step.LAUNCH, Step.BEGIN_LOADING, Step.SYNC_IMAGES),
            Phase(Signal.SWAP, Step.POST_GUARD, Step.STAND_STILL),
            Phase(Signal.SWAP, Step.TAKE_OVER, paused=True),
            Phase(Signal.LOAD, Step.FINISH_LOADING),
        ),
        Keeps.LOADED,
        _ROLLBACK,
        two_guests=True,
    ),
    # Where both cannot be there at one time. From the end of the old process on there is no guest until the new one
    # runs; nobody can say whether it does, so from then on it is gone on with, as long as the new process is there.
    Way.PROVEN: Row(
        (
            _PREPARE,
            Phase(Signal.PROVE, Step.PROVE),
            Phase(Signal.KEEP, Step.POST_GUARD, Step.STAND_STILL, Step.KEEP_OLD),
            _END_OLD,
            _LOAD,
            Phase(Signal.SWAP, Step.TAKE_OVER),
        ),
        Keeps.FILE,
        _ROLLBACK_PROVEN,
        ends_old=True,
        two_guests=True,
        goes_on=frozenset({State.SWAPPING, State.COMMITTING}),
    ),
    # FORCE, where both cannot be there at one time, or the old one no longer answers. Its memory is given up, and
    # not for nothing: a copy has loaded the point before, wherever there can be one.
    Way.DISPLACE: Row(
        (
            _PREPARE,
            Phase(Signal.PROVE, Step.PROVE),
            _END_OLD,
            _LOAD,
            Phase(Signal.SWAP, Step.TAKE_OVER),
        ),
        Keeps.DISKS,
        (Undo(Step.END_PROOF, Step.PROVE), *_ROLLBACK),
        ends_old=True,
    ),
    # The domain is to be inactive afterwards. The old guest runs until the catalog has that, and what is left is to
    # end it: stopped before, it would stay paused until somebody runs recover, if snaporch dies.
    Way.INACTIVE: Row((_PREPARE, Phase(Signal.SWAP)), Keeps.PROCESS, _ROLLBACK),
    # What the guest holds now is first kept inside too, and loaded again if the point cannot be. From the load on
    # it is the point that the guard lets run, and recovery finds it running: there is no old guest any more.
    Way.INSIDE: Row(
        (
            Phase(Signal.PREPARE, Step.POST_GUARD, Step.STAND_STILL, Step.KEEP_PRESENT),
            Phase(Signal.LOAD, Step.LOAD_INSIDE),
            Phase(Signal.SWAP, Step.TAKE_OVER),
        ),
        Keeps.INSIDE,
        _ROLLBACK,
        same_process=True,
        goes_on=frozenset({State.LOADING, State.SWAPPING, State.COMMITTING}),
    ),
    Way.INSIDE_INACTIVE: Row((_PREPARE, _LOAD_IMAGES, _BRING_UP), Keeps.INSIDE, _ROLLBACK, at_rest=True),
    Way.INSIDE_DISPLACE: Row((_PREPARE, _END_OLD, _LOAD_IMAGES, _BRING_UP), Keeps.DISKS, _ROLLBACK, ends_old=True),
    Way.VERIFY: Row(
        (_PREPARE, _LOAD, Phase(Signal.SWAP, Step.RUN_AWHILE)),
        Keeps.PROCESS,
        (
            Undo(Step.END_NEW, Step.LAUNCH),
            Undo(Step.REMOVE_TPM, Step.MAKE_TPM),
            Undo(Step.REMOVE_OVERLAY, Step.MAKE_OVERLAY),
        ),
        two_guests=True,
    ),
    # All clones are complete before the first of them runs; they are domains when that is in the catalog.
    Way.CLONE: Row(
        (_PREPARE, _LOAD, Phase(Signal.SWAP, Step.TAKE_OVER)),
        Keeps.PROCESS,
        (
            Undo(Step.END_NEW, Step.LAUNCH),
            Undo(Step.REMOVE_TPM, Step.MAKE_TPM),
            Undo(Step.REMOVE_OVERLAY, Step.MAKE_OVERLAY),
            Undo(Step.LEAVE_NOTHING, Step.MAKE_TPM, Step.MAKE_OVERLAY, Step.LAUNCH),
        ),
        two_guests=True,
    ),
}

# Of a revert; the copy of a verify, and a clone, take nobody's place.
REVERTS = {way: row for way, row in WAYS.items() if way not in {Way.VERIFY, Way.CLONE}}


def performed(rows: Iterable[Row]) -> frozenset[Step]:
    """Return everything that somebody performs who goes some ways."""
    return frozenset[Step]().union(*(all_steps([row.phases], row.rollback) for row in rows))


def table() -> str:
    """Return the rows as a Markdown table; docs/explanation/recovery.md holds it, and a test compares the two."""
    lines = [
        "| way | states | kept of the old guest, until the new one is there | RAM for two |",
        "|---|---|---|---|",
    ]
    for way, row in REVERTS.items():
        states = " ".join(dict.fromkeys(phase.signal for phase in row.phases))
        lines.append(f"| {way} | {states} | {row.keeps} | {'yes' if row.two_guests else 'no'} |")
    return "\n".join(lines) + "\n"
