"""How recovery treats an interrupted operation: a table over its last row in the journal, no I/O.

The row names the state. A phase's row is written before its first step; no row is written while a guest is paused
for a LIVE point (`snaporch.engine.states`, rule 3). So:

- In a state before the guest ran on, or in the one in which that happened, nobody can say any more whether the
  point was complete when the guest ran: the operation is undone.
- In a later state the point is complete and the guest has run on. What is left is to wait for the memory stream,
  which goes on without snaporch, and to seal files: the operation is gone on with. It is undone only if that fails,
  or where undoing it had begun: a file that it made is gone. The disks alone of a running guest have no file that
  would say so before an image that was frozen is written to again: that is always undone.
- A revert is not complete before its commit: it is undone, and the old guest is there or is put back. After it, it
  is tidied up. Where there is no old guest any more and the new one may run (`Row.goes_on`), it is gone on with,
  and undone only if that fails: the old guest's state was kept.
- A verify or a clone is undone: nobody has anything yet that could be lost.
- A delete goes forward only.
- A flatten has changed nothing that a guest or snapshot sees: it is given up, and what it has copied stays.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from snaporch.engine.states import OperationState, Signal, State
from snaporch.engine.steps import CREATE, QUIESCED, Phase, create_phases
from snaporch.engine.ways import REVERTS, WAYS
from snaporch.model.request import Strategy
from snaporch.model.way import Way

# The last phase that cannot be gone on from: after it the point is held, and the guest is as it is to be.
_HOLDS = {
    Strategy.BACKGROUND: Signal.RESUME,
    Strategy.PRECOPY: Signal.RESUME,
    Strategy.PAUSED: Signal.RESUME,
    Strategy.INTERNAL: Signal.STREAM,
    Strategy.NONE: Signal.SWITCH,
}


class Action(enum.StrEnum):
    """What is done."""

    UNDO = "undo"
    GO_ON = "go on"
    TIDY_UP = "tidy up"
    NOTHING = "nothing"


def walk(phases: Sequence[Phase]) -> tuple[State, ...]:
    """Return the state of each phase of a table, and that of the commit after them."""
    machine = OperationState()
    return tuple(machine.send(signal) for signal in [*(phase.signal for phase in phases), Signal.COMMIT])


def phases_left(phases: Sequence[Phase], state: State) -> tuple[Phase, ...]:
    """Return the phases from the one that an operation was in; none when it was committing.

    A state that is passed twice counts as its last time.
    """
    states = walk(phases)
    last = len(states) - 1 - states[::-1].index(state)
    return tuple(phases[last:])


def phases_begun(phases: Sequence[Phase], state: State) -> tuple[Phase, ...]:
    """Return the phases of which a step may have begun, by the state in a row.

    Those of the row's state and before it, and after them those that write none. All of them where the row does not
    say it: the operation was being rolled back, or could not be.
    """
    states = walk(phases)
    if state not in states:
        return tuple(phases)
    end = min(len(states) - states[::-1].index(state), len(phases))
    while end < len(phases) and phases[end].paused:
        end += 1
    return tuple(phases[:end])


def after_create(strategy: Strategy, state: State, *, quiesce: bool = False) -> Action:
    """Return what to do about a create that was cut short in a state."""
    if state in {State.COMPLETE, State.ROLLED_BACK}:
        return Action.NOTHING
    if quiesce and strategy is Strategy.NONE:
        return Action.UNDO
    phases, holds = create_phases(strategy, quiesce=quiesce), Signal.THAW if quiesce else _HOLDS[strategy]
    held = next(i for i, phase in enumerate(phases) if phase.signal is holds)
    return Action.GO_ON if state in walk(phases)[held + 1 :] else Action.UNDO


def after_revert(state: State, way: Way = Way.BESIDE) -> Action:
    """Return what to do about a revert, a verify or a clone that was cut short in a state."""
    if state is State.ROLLED_BACK:
        return Action.NOTHING
    if state in WAYS[way].goes_on:
        return Action.GO_ON
    return Action.TIDY_UP if state is State.COMPLETE else Action.UNDO


def after_delete(state: State) -> Action:
    """Return what to do about a delete that was cut short in a state."""
    return Action.NOTHING if state is State.COMPLETE else Action.GO_ON


def after_flatten(state: State) -> Action:
    """Return what to do about a flatten that was cut short in a state."""
    if state in {State.COMPLETE, State.ROLLED_BACK}:
        return Action.NOTHING
    return Action.GO_ON if state is State.COMMITTING else Action.UNDO


def table() -> str:
    """Return all of it as a Markdown table; docs/explanation/recovery.md holds it, and a test compares the two."""
    rows: dict[str, dict[State, Action]] = {
        f"create, {strategy}": {state: after_create(strategy, state) for state in walk(phases)}
        for strategy, phases in CREATE.items()
    }
    rows |= {
        f"create, {strategy}, quiesced": {s: after_create(strategy, s, quiesce=True) for s in walk(phases)}
        for strategy, phases in QUIESCED.items()
    }
    rows |= {
        f"revert, {way}" if way in REVERTS else way.value: {
            state: after_revert(state, way) for state in (*walk(row.phases), State.COMPLETE)
        }
        for way, row in WAYS.items()
    }
    rows["delete"] = {state: after_delete(state) for state in (State.PREPARING, State.MERGING, State.COMMITTING)}
    rows["flatten"] = {state: after_flatten(state) for state in (State.PREPARING, State.MERGING, State.COMMITTING)}
    lines = ["| operation | the row says | what is done |", "|---|---|---|"]
    for name, found in rows.items():
        for action in dict.fromkeys(found.values()):
            states = ", ".join(state for state, does in found.items() if does is action)
            lines.append(f"| {name} | {states} | {action} |")
    return "\n".join(lines) + "\n"
