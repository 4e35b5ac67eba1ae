"""Whatever is killed or cancelled, at whichever await, and recovery too: complete, or as it was before.

An operation is cancelled, or snaporch is killed, or the hypervisor with it, at any step of any of its tasks (Trio
says when one is taken: after each await). What follows in a program that is dead reaches neither the host nor the
catalog.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snaporch.engine.states import State
from tests.conformance.cutting import (
    HOWS,
    KINDS,
    Cut,
    Place,
    check,
    check_clones,
    check_goes_on,
    counted,
    new_world,
    numbers,
    perform,
    prepare,
    recover,
    run,
)


@attrs.frozen
class Story:
    """An operation that is cut, and then its recovery, once or more."""

    kind: str
    cuts: tuple[Cut, ...]


@st.composite
def stories(draw: st.DrawFn) -> Story:
    cuts = st.builds(Cut, st.floats(0, 1), st.sampled_from(HOWS))
    return Story(draw(st.sampled_from(list(KINDS))), tuple(draw(st.lists(cuts, min_size=1, max_size=3))))


async def tell(story: Story, root: Path, steps: int) -> None:
    """Cut, recover, and check what has become of everything."""
    kind = KINDS[story.kind]
    async with new_world(root) as world:
        await prepare(world, kind)
        before, points, orch = await world.everything(), await numbers(world), world.orchestrator
        old = tuple(world.host.processes())
        (was,) = [world.host.guest(process).ticks for process in old] or [0]
        done = len(await orch.operations(world.domain))
        for number, cut in enumerate(story.cuts):
            operation = recover if number else kind.run
            await perform(world, operation, cut.how, 1 + int(cut.share * steps), strands=kind.strands)
            world.host.faults.clear()
            await check_goes_on(world, kind, old)
        assert {record.state for record in await orch.recover()} <= {State.COMPLETE, State.ROLLED_BACK}
        assert not await orch.recover()
        begun = (await orch.operations(world.domain))[done:]
        complete = State.COMPLETE in {record.state for record in begun}
        now = await numbers(world)
        assert now.keys() == (points.keys() ^ kind.changes if complete else points.keys())
        assert all(points.get(name, number) == number for name, number in now.items())
        if story.kind.startswith("clone"):
            await check_clones(world, complete=complete)
            complete = False  # they are gone, and all is as it was
        for guest in map(world.host.guest, world.host.processes()):
            assert (guest.ticks < was) == (complete and story.kind.startswith("revert"))
        if kind.alone:  # the old guest may be in another process now
            before = {**before, "processes": world.host.processes()}
        await check(world, before, complete=complete and not story.kind.startswith("verify"))


@settings(max_examples=int(os.environ.get("SNAPORCH_CRASHES", "60")), deadline=None)
@given(stories())
@example(Story("revert by force", (Cut(0.5, "us"),)))
@example(Story("revert by force", (Cut(0.5, "both"), Cut(0.3, "us"))))
def test_any_crash(story: Story) -> None:
    """Cut anywhere, and its recovery again: nothing is left, nothing is lost, and there is nothing more to do."""
    steps = counted(story.kind)
    with tempfile.TemporaryDirectory() as root:
        run(tell, story, Path(root), steps)


# At one step in so many each kind of operation is cut in a run of the suite, in each way at steps of its own.
STRIDE = int(os.environ.get("SNAPORCH_STRIDE", "16"))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step(kind: str, how: str, tmp_path: Path) -> None:
    """Cut at one step after the other, from the first to the last."""
    steps = counted(kind)
    first = STRIDE * HOWS.index(how) // len(HOWS)
    for number, step in enumerate(range(first, steps, STRIDE)):
        (root := tmp_path / str(number)).mkdir()
        run(tell, Story(kind, (Cut(step / steps, how),)), root, steps)


async def die_while_recovery_merges_back(root: Path, place: str, how: str) -> None:
    """Tell the story of the test below."""
    async with new_world(root) as world:
        await perform(world, KINDS["create background"].run, "us", place=Place("machine.switch"))
        await trio.sleep(1)
        await perform(world, recover, how, place=Place(place))
        await trio.sleep(1)
        await world.orchestrator.recover()
        if how == "both":
            await world.start()
        await world.check_consistent()


async def die_about_the_end_of_the_old_guest(root: Path, place: Place, how: str) -> None:
    """Tell the story of the tests below."""
    kind = KINDS["revert one after the other"]
    async with new_world(root) as world:
        await prepare(world, kind)
        old = world.host.processes()
        await perform(world, kind.run, how, place=place, strands=True)
        await check_goes_on(world, kind, old)
        if place.before:
            world.host.crash(old[0])
            await world.orchestrator.recover()
            assert not world.host.processes(), "it was put back, and had run on"
            await world.start()
        await world.orchestrator.recover()
        await world.check_consistent()


@pytest.mark.parametrize("how", ["us", "stop"])
@pytest.mark.parametrize("place", ["stream.forget", "guard.dismiss"])
def test_die_about_the_end_of_the_old_guest(place: str, how: str, tmp_path: Path) -> None:
    """No old guest is left paused: it has ended, or its guard lets it run."""
    run(die_about_the_end_of_the_old_guest, tmp_path, Place(place), how)


def test_die_just_before_the_end_of_the_old_guest(tmp_path: Path) -> None:
    """The old guest runs on, and is not put back once it has ended by itself: its disks are newer than its file."""
    place = Place("driver.kill", before=True, nth=2)  # the first ends the copy that was the proof
    run(die_about_the_end_of_the_old_guest, tmp_path, place, "us")


@pytest.mark.parametrize("how", ["us", "both"])
@pytest.mark.parametrize("place", ["storage.remove", "machine.commit_image", "machine.close_overlay"])
def test_die_while_recovery_merges_back(place: str, how: str, tmp_path: Path) -> None:
    """Killed once more, and the hypervisor too, about when a disk is merged back: what it has written is kept."""
    run(die_while_recovery_merges_back, tmp_path, place, how)
