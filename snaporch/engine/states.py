"""The states of an operation, as one table.

Rule 1: an operation is in exactly one state, and only `OperationState.send` changes it.
Rule 2: a transition that is not in `TRANSITIONS` is a bug in snaporch: it raises and changes nothing.
Rule 3: a state that a crash leaves in the journal says by itself what has been touched. A phase's signal
        is therefore sent *before* its first step: in SWITCHING the disks may or may not have switched.
Rule 4: FAIL is legal from every state in which something may have been touched, and leads to ROLLING_BACK only.

The strategies differ in the order in which they walk through the same states:

    background   preparing  pausing  switching  arming  resuming  streaming  committing
    precopy      preparing  streaming  switching  resuming  sealing  committing
    paused       preparing  pausing  switching  streaming  resuming  sealing  committing
    internal     preparing  streaming  sealing  committing
    disk-only    preparing  switching  sealing  committing
    quiesced     freezing after preparing, thawing as soon as the guest runs on
    revert       preparing  loading  swapping  committing
    lazy         preparing  swapping  loading  committing
    displace     preparing  displacing  loading  swapping  committing
    proven       preparing  proving  keeping  displacing  loading  swapping  committing
    clone        preparing  loading  swapping  committing
    (a revert to a point inside images walks the same ways)
    delete, flatten  preparing  merging  committing

This module imports nothing that does I/O. The diagram in docs/reference/states.md is generated from the table.
"""

from __future__ import annotations

import enum

import attrs


class State(enum.StrEnum):
    """What an operation is doing. The value is what the catalog and the command line show."""

    NEW = "new"
    PREPARING = "preparing"
    """Files, block nodes or a second process are made beside the domain; the guest notices nothing."""
    FREEZING = "freezing"
    """QUIESCE: the guest agent freezes the guest's file systems."""
    PAUSING = "pausing"
    """The guest's CPUs are being stopped, or are."""
    SWITCHING = "switching"
    """The disks go over to their overlays, all in one transaction."""
    ARMING = "arming"
    """The hypervisor takes the point: device state saved, RAM write-protected."""
    RESUMING = "resuming"
    THAWING = "thawing"
    """QUIESCE: the guest agent thaws them."""
    STREAMING = "streaming"
    """Memory goes to its file."""
    SEALING = "sealing"
    """Files are fsynced and their checksums computed."""
    PROVING = "proving"
    """A throw-away copy shows that the point loads; the guest notices nothing."""
    KEEPING = "keeping"
    """The old guest is paused, and what it holds goes to a file."""
    DISPLACING = "displacing"
    """The old hypervisor process is ended before the new one is loaded."""
    LOADING = "loading"
    """A new hypervisor process, beside the old one or in its place, loads the point; its guest may run already."""
    SWAPPING = "swapping"
    """The old guest is paused, the new one runs; then the old process goes. Clones begin to run."""
    MERGING = "merging"
    """Images merge. A delete goes forward only: `recover` goes on with what stops it; a flatten is given up."""
    COMMITTING = "committing"
    COMPLETE = "complete"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"
    STRANDED = "stranded"


class Signal(enum.StrEnum):
    """What moves an operation: the beginning of a phase, or an end."""

    PREPARE = "prepare"
    FREEZE = "freeze"
    PAUSE = "pause"
    SWITCH = "switch"
    ARM = "arm"
    RESUME = "resume"
    THAW = "thaw"
    STREAM = "stream"
    SEAL = "seal"
    PROVE = "prove"
    KEEP = "keep"
    DISPLACE = "displace"
    LOAD = "load"
    SWAP = "swap"
    MERGE = "merge"
    COMMIT = "commit"
    DONE = "done"
    FAIL = "fail"
    UNDONE = "undone"
    STUCK = "stuck"


_FAIL = {Signal.FAIL: State.ROLLING_BACK}

TRANSITIONS: dict[State, dict[Signal, State]] = {
    State.NEW: {Signal.PREPARE: State.PREPARING, **_FAIL},
    State.PREPARING: {
        Signal.PREPARE: State.PREPARING,  # several phases, one state, see `steps`
        Signal.FREEZE: State.FREEZING,
        Signal.PAUSE: State.PAUSING,
        Signal.STREAM: State.STREAMING,
        Signal.SWITCH: State.SWITCHING,
        Signal.LOAD: State.LOADING,
        Signal.PROVE: State.PROVING,
        Signal.DISPLACE: State.DISPLACING,
        Signal.SWAP: State.SWAPPING,
        Signal.MERGE: State.MERGING,
        **_FAIL,
    },
    State.FREEZING: {
        Signal.PAUSE: State.PAUSING,
        Signal.SWITCH: State.SWITCHING,
        Signal.STREAM: State.STREAMING,
        **_FAIL,
    },
    State.PAUSING: {Signal.SWITCH: State.SWITCHING, **_FAIL},
    State.SWITCHING: {
        Signal.ARM: State.ARMING,
        Signal.STREAM: State.STREAMING,
        Signal.RESUME: State.RESUMING,
        Signal.THAW: State.THAWING,
        Signal.SEAL: State.SEALING,
        **_FAIL,
    },
    State.ARMING: {Signal.RESUME: State.RESUMING, **_FAIL},
    State.RESUMING: {
        Signal.THAW: State.THAWING,
        Signal.STREAM: State.STREAMING,
        Signal.SEAL: State.SEALING,
        **_FAIL,
    },
    State.THAWING: {Signal.STREAM: State.STREAMING, Signal.SEAL: State.SEALING, **_FAIL},
    State.STREAMING: {
        Signal.SWITCH: State.SWITCHING,
        Signal.RESUME: State.RESUMING,
        Signal.THAW: State.THAWING,
        Signal.SEAL: State.SEALING,
        Signal.COMMIT: State.COMMITTING,
        **_FAIL,
    },
    State.SEALING: {Signal.COMMIT: State.COMMITTING, **_FAIL},
    State.PROVING: {Signal.KEEP: State.KEEPING, Signal.DISPLACE: State.DISPLACING, **_FAIL},
    State.KEEPING: {Signal.DISPLACE: State.DISPLACING, **_FAIL},
    State.DISPLACING: {Signal.LOAD: State.LOADING, Signal.SWAP: State.SWAPPING, **_FAIL},
    State.LOADING: {Signal.SWAP: State.SWAPPING, Signal.COMMIT: State.COMMITTING, **_FAIL},
    # Of a group all old guests are paused before the first new one runs: several phases, one state, see `steps`.
    State.SWAPPING: {
        Signal.SWAP: State.SWAPPING,
        Signal.LOAD: State.LOADING,
        Signal.COMMIT: State.COMMITTING,
        **_FAIL,
    },
    State.MERGING: {Signal.COMMIT: State.COMMITTING, Signal.STUCK: State.STRANDED, **_FAIL},
    State.COMMITTING: {Signal.DONE: State.COMPLETE, **_FAIL},
    State.COMPLETE: {},
    State.ROLLING_BACK: {Signal.UNDONE: State.ROLLED_BACK, Signal.STUCK: State.STRANDED},
    State.ROLLED_BACK: {},
    # `recover` tries again to undo what could not be undone, or to finish what could not be finished.
    State.STRANDED: {Signal.MERGE: State.MERGING, **_FAIL},
}

TERMINAL = frozenset({State.COMPLETE, State.ROLLED_BACK})


class IllegalTransition(RuntimeError):
    """A signal that the present state does not know: a bug in snaporch."""


@attrs.define
class OperationState:
    """Where one operation is."""

    state: State = State.NEW

    def send(self, signal: Signal) -> State:
        """Move on and return the new state.

        Raises:
            IllegalTransition: the table has no such row; the state is unchanged.
        """
        try:
            self.state = TRANSITIONS[self.state][signal]
        except KeyError:
            raise IllegalTransition(f"{signal} in state {self.state}") from None
        return self.state


def diagram() -> str:
    """Return the table as a Mermaid state diagram; docs/reference/states.md holds it, and a test compares both."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.NEW}"]
    for state, row in TRANSITIONS.items():
        lines += [f"    {state} --> {target}: {signal}" for signal, target in row.items()]
        lines += [f"    {state} --> [*]"] if state in TERMINAL else []
    return "\n".join(lines) + "\n"
