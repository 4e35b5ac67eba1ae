"""The state machine of an operation, and the tables of steps that walk through it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import trio

from snaporch import operations
from snaporch.engine.actor import Actor
from snaporch.engine.replay import Action, after_create, phases_begun, table, walk
from snaporch.engine.states import TERMINAL, TRANSITIONS, IllegalTransition, OperationState, Signal, State, diagram
from snaporch.engine.steps import CREATE, QUIESCED, ROLLBACK_CREATE, Phase, Step, Undo, all_steps, steps_of
from snaporch.engine.ways import REVERTS, WAYS, Keeps, performed
from snaporch.engine.ways import table as ways_table
from snaporch.model.request import Strategy
from snaporch.model.way import Way
from snaporch.operations.clone import Cloner
from snaporch.operations.create import Participant
from snaporch.operations.revert import Reverter
from snaporch.operations.trial import Trial


def test_every_state_has_a_row_and_terminal_ones_an_empty_one() -> None:
    """The table is whole."""
    assert set(TRANSITIONS) == set(State)
    assert {state for state, row in TRANSITIONS.items() if not row} == TERMINAL


@pytest.mark.parametrize("state", list(State))
def test_an_illegal_signal_raises_and_changes_nothing(state: State) -> None:
    """What is not in the table is a bug, and leaves the operation where it was."""
    for signal in set(Signal) - set(TRANSITIONS[state]):
        machine = OperationState(state)
        with pytest.raises(IllegalTransition, match=f"{signal} in state {state}"):
            machine.send(signal)
        assert machine.state is state


def test_whatever_is_not_over_can_fail() -> None:
    """From every state in which something may have been touched a failure leads to the rollback, and only there."""
    for state in set(State) - TERMINAL - {State.ROLLING_BACK, State.MERGING}:
        assert OperationState(state).send(Signal.FAIL) is State.ROLLING_BACK


ALL = [
    *((f"create {s}", phases) for s, phases in CREATE.items()),
    *((f"create {s}, quiesced", phases) for s, phases in QUIESCED.items()),
    *((f"revert {way}", row.phases) for way, row in WAYS.items()),
]


@pytest.mark.parametrize(("name", "phases"), ALL, ids=[name for name, _ in ALL])
def test_every_table_of_steps_is_a_legal_walk(name: str, phases: tuple[Phase, ...]) -> None:
    """From new through its phases to complete, by the transitions there are."""
    machine = OperationState()
    for phase in phases:
        machine.send(phase.signal)
    machine.send(Signal.COMMIT)
    assert machine.send(Signal.DONE) is State.COMPLETE, name


def actors() -> list[type[Actor]]:
    """Return all actors that there are."""
    for module in pkgutil.iter_modules(operations.__path__, f"{operations.__name__}."):
        importlib.import_module(module.name)
    found: list[Any] = []
    look: list[Any] = [Actor]
    while look:
        class_ = look.pop()
        look += class_.__subclasses__()
        # Of a class with slots attrs has made two.
        found += [class_] if getattr(sys.modules[class_.__module__], class_.__name__, None) is class_ else []
    return [class_ for class_ in found if not inspect.isabstract(class_) and class_.performs]


def test_every_step_has_a_class_that_performs_it() -> None:
    """And every class is asked for just what it performs: its tables' steps, and what undoes them."""
    assert set(actors()) == {Cloner, Participant, Reverter, Trial}
    assert frozenset[Step]().union(*(actor.performs for actor in actors())) == set(Step)
    assert Participant.performs == all_steps([*CREATE.values(), *QUIESCED.values()], ROLLBACK_CREATE)
    assert Reverter.performs == performed(REVERTS.values())
    assert Trial.performs == performed([WAYS[Way.VERIFY]])
    assert Cloner.performs == performed([WAYS[Way.CLONE]])


@pytest.mark.parametrize(
    ("tables", "rollback"),
    [
        ([*CREATE.values(), *QUIESCED.values()], ROLLBACK_CREATE),
        ([row.phases for row in REVERTS.values()], REVERTS[Way.BESIDE].rollback),
        ([WAYS[Way.PROVEN].phases], WAYS[Way.PROVEN].rollback),
        ([WAYS[Way.VERIFY].phases], WAYS[Way.VERIFY].rollback),
    ],
)
def test_every_compensation_answers_a_step(tables: Iterable[tuple[Phase, ...]], rollback: tuple[Undo, ...]) -> None:
    """None is for something that is never done."""
    undone = {step for undo in rollback for step in undo.after}
    assert undone <= {step for table in tables for step in steps_of(table)}


def test_a_step_that_nobody_performs_fails_at_import() -> None:
    """A class that lacks the method of a step, or has one that its lane does not call so, is not made."""
    with pytest.raises(TypeError, match=r"Lazy needs a method `async def pause\(self\)`"):
        type("Lazy", (Actor,), {"performs": frozenset({Step.PAUSE})})

    async def make_overlay(_self: Actor) -> None:
        await trio.lowlevel.checkpoint()

    with pytest.raises(TypeError, match=r"`async def make_overlay\(self, target\)`"):
        type("Lazy", (Actor,), {"performs": frozenset({Step.MAKE_OVERLAY}), "make_overlay": make_overlay})


def test_the_pause_of_a_live_point_is_covered_by_one_row_of_the_journal() -> None:
    """Between the pause and the resume of a LIVE create nothing but the hypervisor is waited for."""
    for strategy in (Strategy.BACKGROUND, Strategy.PRECOPY):
        signals = [(phase.signal, phase.paused) for phase in CREATE[strategy]]
        first = next(i for i, (signal, _) in enumerate(signals) if signal is Signal.SWITCH)
        last = next(i for i, (signal, _) in enumerate(signals) if signal is Signal.RESUME)
        assert all(paused for _, paused in signals[first : last + 1])


def test_images_are_synced_right_before_every_pause() -> None:
    """In a phase of its own, so that nobody of a group stands while others sync; and before file systems freeze."""
    pausing = [phases for phases in (*CREATE.values(), *QUIESCED.values()) if Step.PAUSE in steps_of(phases)]
    assert len(pausing) == 4
    for phases in pausing:
        signals = [phase.signal for phase in phases]
        synced = next(i for i, phase in enumerate(phases) if Step.SYNC_IMAGES in phase.steps)
        assert phases[synced].steps == (Step.SYNC_IMAGES,)
        assert signals[synced + 1 : signals.index(Signal.PAUSE)] in ([], [Signal.FREEZE])


def test_images_are_synced_before_the_old_guest_is_paused_for_the_new_one() -> None:
    """While nobody has no guest yet: the new one is loaded, and all that is left is to change them over."""
    steps = [phase.steps for phase in WAYS[Way.BESIDE].phases]
    synced = next(i for i, each in enumerate(steps) if Step.SYNC_IMAGES in each)
    assert steps[synced][-1] is Step.SYNC_IMAGES
    assert Step.STAND_STILL in steps[synced + 1]


def test_the_diagram_in_the_docs_is_that_of_the_table() -> None:
    """`python -c 'from snaporch.engine.states import diagram; print(diagram())'` made it."""
    page = (Path(__file__).parents[1] / "docs/reference/states.md").read_text()
    assert diagram() in page


def test_the_table_in_the_docs_is_that_of_recovery() -> None:
    """`python -c 'from snaporch.engine.replay import table; print(table())'` made it."""
    page = (Path(__file__).parents[1] / "docs/explanation/recovery.md").read_text()
    assert table() in page


def test_the_ways_in_the_docs_are_those_of_the_table() -> None:
    """`python -c 'from snaporch.engine.ways import table; print(table())'` made it."""
    page = (Path(__file__).parents[1] / "docs/explanation/recovery.md").read_text()
    assert ways_table() in page


def test_every_way_has_a_row() -> None:
    """But the one that no hypervisor goes yet, and none at all."""
    assert set(Way) - set(WAYS) == {Way.IN_PLACE, Way.NONE}


@pytest.mark.parametrize("way", list(REVERTS))
def test_no_way_gives_up_the_old_guest_before_the_new_one_is_there(way: Way) -> None:
    """Without FORCE: what ends the old process has proved that the point loads, and kept what the guest held."""
    row = WAYS[way]
    steps = [step for phase in row.phases for step in phase.steps]
    if row.ends_old and way not in {Way.DISPLACE, Way.INSIDE_DISPLACE}:
        assert steps.index(Step.PROVE) < steps.index(Step.KEEP_OLD) < steps.index(Step.END_OLD)
        assert row.keeps is Keeps.FILE
    assert row.ends_old == (Step.END_OLD in steps)
    assert (row.keeps is Keeps.DISKS) == (row.ends_old and Step.KEEP_OLD not in steps)


@pytest.mark.parametrize("strategy", list(CREATE))
def test_only_what_holds_its_point_is_gone_on_with(strategy: Strategy) -> None:
    """From the first state that is gone on with there is no way back to one that is not."""
    actions = [after_create(strategy, state) for state in walk(CREATE[strategy])]
    assert actions == sorted(actions, key=[Action.UNDO, Action.GO_ON].index)
    assert {actions[0], actions[-1]} == {Action.UNDO, Action.GO_ON}


@pytest.mark.parametrize("strategy", list(CREATE))
def test_what_may_be_left_is_what_is_gone_on_with(strategy: Strategy) -> None:
    """A phase is marked as one that goes on without snaporch exactly where recovery goes on with it."""
    for phase, state in zip(CREATE[strategy], walk(CREATE[strategy]), strict=False):
        assert phase.goes_on == (after_create(strategy, state) is Action.GO_ON), state
    assert not any(phase.goes_on for row in WAYS.values() for phase in row.phases)


def test_what_may_have_begun_is_what_the_row_says() -> None:
    """The state of the row and those before; the pause's, which have no rows, with the one from before it."""
    phases = CREATE[Strategy.BACKGROUND]
    assert phases_begun(phases, State.PREPARING) == phases[:2]
    assert phases_begun(phases, State.PAUSING) == phases[:6]
    assert phases_begun(phases, State.STREAMING) == phases
    assert phases_begun(CREATE[Strategy.PAUSED], State.PAUSING) == CREATE[Strategy.PAUSED][:3]
    assert phases_begun(phases, State.STRANDED) == phases
