"""Groups of domains that fail, or are cut, anywhere: all of a group, or none of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    DomainSnapshot,
    SnaporchError,
    Strategy,
)
from snaporch.engine.states import State
from snaporch.model.domain import Handle
from snaporch.orchestrator import Orchestrator
from snaporch.testing import ThreadsHoldTime
from tests.conformance.cutting import Cut, Place, perform_on, run
from tests.conformance.test_any_fault import CALLS, steps_of
from tests.group_world import NO_ROOM, REVERT_FAILURES, Group, open_group

# --- anything -------------------------------------------------------------------------------------------------


@attrs.frozen
class Failure:
    """Something that goes wrong with one member in one of the driver's calls."""

    at: str
    kind: str
    after: bool
    member: str


CREATE_CALLS = sorted({CALLS[step] for step in steps_of(Strategy.BACKGROUND, quiesce=False)})
REVERT_CALLS = [*REVERT_FAILURES, *NO_ROOM, "machine.pause", "guard.dismiss"]


@st.composite
def stories(draw: st.DrawFn) -> tuple[str, list[Failure]]:
    verb = draw(st.sampled_from(["create", "revert"]))
    failures = st.builds(
        Failure,
        st.sampled_from(CREATE_CALLS if verb == "create" else REVERT_CALLS),
        st.sampled_from(["error", "crash", "cancel"]),
        st.booleans(),
        st.sampled_from(["web0", "web1"]),
    )
    return verb, draw(st.lists(failures, min_size=1, max_size=2))


async def tell(verb: str, failures: list[Failure], root: Path) -> None:
    """Create or revert a group, and check what has become of everything."""
    async with open_group(root, 2) as group:
        await group.create(name="g0")
        before = {name: group.picture([name]) for name in group.names}
        files, scope = group.host.files(), trio.CancelScope()
        for failure in failures:
            plan_failure(group, failure, scope)
        with suppress(SnaporchError), scope:
            if verb == "create":
                await group.orch.create_group(group.names, DomainSnapshot("g1"), CreateFlag.LIVE)
            else:
                await group.orch.revert_group(group.names, "g0")
        group.host.faults.clear()
        group.host.on_call = group.host.on_effect = lambda _at, _domain: None
        await group.orch.recover()  # what is stranded, or complete and not tidied up
        done = (await group.orch.operations("web0"))[-1]
        assert done.state in {State.COMPLETE, State.ROLLED_BACK}
        if done.state == State.ROLLED_BACK:
            await group.check_undone(before, files, reverted=verb == "revert")
            assert {len(await group.orch.list(name)) for name in group.names} == {1}
        for name in group.names:
            if not group.host.processes(name):  # it died when all was done
                await group.orch.start(name)
        await trio.sleep(0.1)
        group.check_consistent(group.names)
        assert not await group.orch.recover()


def plan_failure(group: Group, failure: Failure, scope: trio.CancelScope) -> None:
    if failure.kind != "cancel":
        crash = failure.kind == "crash" and not failure.at.startswith("driver")
        group.host.faults.add(failure.at, domain=failure.member, after=failure.after, crash=crash)
        return

    def hook(at: str, domain: str) -> None:
        if at == failure.at and domain in {failure.member, ""}:
            scope.cancel()

    setattr(group.host, "on_effect" if failure.after else "on_call", hook)


@settings(max_examples=60, deadline=None)
@given(stories())
def test_any_fault(story: tuple[str, list[Failure]]) -> None:
    """One or two failures of any members in any steps: all of the group is done, or none of it."""
    clock = MockClock(autojump_threshold=0)
    with tempfile.TemporaryDirectory() as root:
        trio.run(tell, *story, Path(root), clock=clock, instruments=[ThreadsHoldTime(clock)])


# --- cut anywhere ---------------------------------------------------------------------------------------------


async def create_g1(orch: Orchestrator) -> None:
    await orch.create_group(NAMES, DomainSnapshot("g1"), CreateFlag.LIVE)


async def revert_to_g0(orch: Orchestrator) -> None:
    await orch.revert_group(NAMES, "g0")


async def mend(orch: Orchestrator) -> None:
    await orch.recover()


NAMES = ("web0", "web1")
CUT = {"create": create_g1, "revert": revert_to_g0, "create, failing": create_g1, "revert, failing": revert_to_g0}
FAULTS = {"create, failing": "stream.forget", "revert, failing": "machine.load"}
CUTS = st.builds(Cut, st.floats(0, 1), st.sampled_from(["us", "both", "cancel"]))


async def steps_in(verb: str, root: Path) -> int:
    async with open_group(root, len(NAMES)) as group:
        await group.create(name="g0")
        plan_fault(group, verb)
        return await perform_on(group.host, root, CUT[verb], "us", strands=True)


def plan_fault(group: Group, verb: str) -> None:
    if verb in FAULTS:
        group.host.faults.add(FAULTS[verb], domain="web1")


@cache
def counted(verb: str) -> int:
    """Return how many steps of tasks an operation has."""
    with tempfile.TemporaryDirectory() as root:
        return run(steps_in, verb, Path(root))


async def check_all_old_or_new(group: Group, old: Mapping[str, Collection[Handle]]) -> None:
    """Check that of each member that is there a guest runs, with nobody's help: all the old or all the new."""
    await trio.sleep(1)
    there = [(name, process) for name in NAMES for process in group.host.processes(name)]
    running = [(name, process) for name, process in there if group.host.guest(process).runs]
    assert {name for name, _ in running} == {name for name, _ in there}
    assert len({process in old[name] for name, process in running}) <= 1


async def tell_cut(verb: str, cuts: Sequence[Cut], root: Path) -> None:
    """Cut an operation on a group, and its recovery, and check that it is one of all members or of none."""
    steps = counted(verb)
    async with open_group(root, len(NAMES)) as group:
        await group.create(name="g0")
        before, files = {name: group.picture([name]) for name in NAMES}, group.host.files()
        old = {name: group.host.processes(name) for name in NAMES}
        plan_fault(group, verb)
        for number, cut in enumerate(cuts):
            call = mend if number else CUT[verb]
            await perform_on(group.host, root, call, cut.how, 1 + int(cut.share * steps), strands=verb in FAULTS)
            group.host.faults.clear()
            await check_all_old_or_new(group, old)
        assert {record.state for record in await group.orch.recover()} <= {State.COMPLETE, State.ROLLED_BACK}
        assert not await group.orch.recover()
        last = (await group.orch.operations("web0"))[-1]
        done = last.state == State.COMPLETE and (last.kind, last.subject) != ("create", "g0")
        names = [[record.name for record in await group.orch.list(name)] for name in NAMES]
        assert names == [["g0", "g1"] if done and verb.startswith("create") else ["g0"]] * len(NAMES)
        if not done:
            await group.check_undone(before, files, reverted=verb.startswith("revert"))
        elif verb.startswith("revert"):
            assert not any(set(old[name]) & set(group.host.processes(name)) for name in NAMES)
        for name in NAMES:
            if not group.host.processes(name):  # it was killed, too
                await group.orch.start(name)
        await trio.sleep(0.1)
        group.check_consistent(NAMES)
        for name in NAMES:
            assert (await group.orch.verify(name, "g0")).ok


async def die_between_members(root: Path, place: str) -> None:
    """Tell the story of the test below."""
    async with open_group(root, len(NAMES)) as group:
        await group.create(name="g0")
        old = {name: group.host.processes(name) for name in NAMES}
        await perform_on(group.host, root, revert_to_g0, "us", place=Place(place))
        await check_all_old_or_new(group, old)


@pytest.mark.parametrize("place", ["machine.pause", "machine.resume", "guard.dismiss"])
def test_die_between_members(place: str, tmp_path: Path) -> None:
    """Killed when the first member of a group stands, is taken over or has no guard any more, and the other not."""
    run(die_between_members, tmp_path, place)


async def die_between_ends(root: Path, calls: int) -> None:
    """Tell the story of the test below."""
    async with open_group(root, len(NAMES)) as group:
        await group.create(name="g0")
        await trio.sleep(1000)
        old = {name: group.host.processes(name) for name in NAMES}
        ticks = [group.host.guest(old[name][0]).ticks for name in NAMES]
        group.host.alone = True
        await perform_on(group.host, root, revert_to_g0, "us", place=Place("driver.kill", nth=calls))
        left = [name for name in NAMES if group.host.processes(name) == old[name]]
        assert len(left) == 4 - calls
        assert all(group.host.guest(old[name][0]).running for name in left)
        await group.orch.recover()
        group.check_consistent(NAMES)
        for name, before in zip(NAMES, ticks, strict=True):
            (process,) = group.host.processes(name)
            assert (process in old[name]) == (name in left)
            assert group.host.guest(process).ticks >= before


@pytest.mark.parametrize("calls", [3, 4])  # the first two end the copies that were the proof
def test_die_between_ends(calls: int, tmp_path: Path) -> None:
    """Killed when one old guest, or each, has ended and is kept in a file: that is put back, the other runs on."""
    run(die_between_ends, tmp_path, calls)


@settings(max_examples=int(os.environ.get("SNAPORCH_CRASHES", "60")), deadline=None)
@given(st.sampled_from(sorted(CUT)), st.lists(CUTS, min_size=1, max_size=2))
def test_any_cut(verb: str, cuts: list[Cut]) -> None:
    """Cut at any step of any task, by any death or a cancellation, and so is recovery: all or none."""
    counted(verb)
    with tempfile.TemporaryDirectory() as root:
        run(tell_cut, verb, cuts, Path(root))
