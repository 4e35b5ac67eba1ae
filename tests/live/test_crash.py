"""SIGKILL of snaporch in every state: the guest runs on without anyone's help, and recovery completes or undoes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from snaporch.drivers.qmp import QMPClient, Subscription, open_qmp
from snaporch.engine.replay import Action, after_create, walk
from snaporch.engine.states import State
from snaporch.engine.steps import CREATE
from snaporch.engine.ways import WAYS
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.model.way import Way
from snaporch.testing.dying import Mortals
from tests.live.world import LOSES_PAGES, NAME, SECONDS, SLOW, SLOW_BANDWIDTH, MakeWorld, World, port_for_itself

pytestmark = pytest.mark.live

# `scripts/bench recovery` measures this against 250 ms; here other tests run at the same time.
STANDS_SECONDS = 1.0
MOMENT = re.compile(r"[0-9]+\.[0-9]{6}")


_mortals: list[Mortals] = []


@pytest.fixture(autouse=True, scope="module")
def mortals() -> Iterator[None]:
    """Have the programs that are killed here forked by one: most of what each costs is its imports."""
    _mortals.append(Mortals())
    yield
    _mortals.pop().close()


async def killed(world: World, where: str, *arguments: object, who: str = "us") -> float:
    """Have another process operate on the world and kill itself or `who`; return when, since the epoch."""
    words = [str(world.root), NAME, where, who, *map(str, arguments)]
    if _mortals:
        await _mortals[0].start(*words)
        status, said = await _mortals[0].ended()
    else:
        program = [sys.executable, "-m", "snaporch.testing.dying"]
        done = await trio.run_process([*program, *words], capture_stdout=True, check=False)
        status, said = done.returncode, done.stdout.decode()
    moments = [line for line in said.splitlines() if MOMENT.fullmatch(line)]
    assert moments, f"it was never {where}"
    assert status < 0 or who == "qemu", f"it was never {where}"
    return float(moments[-1])


@asynccontextmanager
async def watched(world: World) -> AsyncIterator[tuple[QMPClient, Subscription]]:
    """Give a monitor of the domain's QEMU and what it tells of the guest's CPUs."""
    path = Path(await world.socket()).with_name("query.sock")
    async with open_qmp(path, label=NAME, timeout=SECONDS) as qmp:
        with qmp.subscribe("STOP", "RESUME") as events:
            yield qmp, events


async def stood(qmp: QMPClient, events: Subscription, since: float) -> float:
    """Wait until the guest runs; return for how many seconds after an instant it did not."""
    with trio.fail_after(SECONDS):
        while not (await qmp.execute("query-status"))["running"]:  # noqa: ASYNC110 - it may run already
            await trio.sleep(0.002)
    resumed = since
    while True:
        try:
            event = events.receive_nowait()
        except trio.WouldBlock:
            return max(0.0, resumed - since)
        resumed = event.timestamp


async def die_in_create(world: World, strategy: Strategy, state: State, name: str) -> None:
    """Kill a create in a state, see the guest run on, recover, and see that it is complete or undone."""
    before = await world.everything()
    async with watched(world) as (qmp, events):
        slow = SLOW_BANDWIDTH if state is State.STREAMING else 0
        died = await killed(world, state, "create", name, strategy, slow)
        assert await stood(qmp, events, died) < STANDS_SECONDS, state
    await world.check_runs(3)
    (ended,) = await world.orch.recover()
    complete = name in [record.name for record in await world.orch.list(NAME)]
    assert complete == (after_create(strategy, state) is Action.GO_ON), state
    assert ended.state == (State.COMPLETE if complete else State.ROLLED_BACK), state
    if not complete:
        await world.check_same(before, state)
    await world.check_runs(3)
    await world.check_no_orphans()
    assert not await world.orch.recover()


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED])
async def test_create(make_world: MakeWorld, request: pytest.FixtureRequest, strategy: Strategy) -> None:
    """Killed in each state: afterwards it is undone, or gone on with and as good as any other."""
    world = await make_world(append=SLOW)
    if strategy is Strategy.PRECOPY and world.qemu.old:
        request.applymarker(LOSES_PAGES)
    for state in walk(CREATE[strategy]):
        await die_in_create(world, strategy, state, f"in-{state}")
    for record in await world.orch.list(NAME):
        await world.revert(record.name)
        await world.check_consistent()


@pytest.mark.parametrize("step", ["pause", "switch", "start_stream", "await_armed", "resume"])
async def test_create_between_the_steps_of_the_pause(make_world: MakeWorld, step: str) -> None:
    """Killed after each command of the pause: whatever QEMU was told last, the guest runs on and all is undone."""
    world = await make_world()
    before = await world.everything()
    async with watched(world) as (qmp, events):
        died = await killed(world, f"after:{step}#1", "create", "point", Strategy.BACKGROUND)
        assert await stood(qmp, events, died) < STANDS_SECONDS
    (ended,) = await world.orch.recover()
    assert ended.state == State.ROLLED_BACK
    await world.check_same(before)
    await world.check_runs(3)


async def test_recovery_killed_in_its_merges(make_world: MakeWorld) -> None:
    """Recovery that is killed while QEMU merges an overlay back: the next one ends that job, and undoes all."""
    world = await make_world()
    before = await world.everything()
    await killed(world, "after:resume#1", "create", "point", Strategy.BACKGROUND)
    for where in ("after:block-commit#1", "after:block-commit#2", "after:job-complete#1"):
        await killed(world, where, "recover")
        await world.check_runs(3)
    (ended,) = await world.orch.recover()
    assert ended.state == State.ROLLED_BACK
    await world.check_same(before)
    await world.check_runs(3)


# A disk is about to go over to the image below it: what says so is not there yet; is there; it has been told to.
PIVOT = ["after:job-complete#1", "before:job-finalize#1", "after:job-finalize#1"]


@pytest.mark.parametrize("who", ["us", "both"])
@pytest.mark.parametrize("verb", ["delete", "recover"])
@pytest.mark.parametrize("place", PIVOT)
async def test_pivot(make_world: MakeWorld, place: str, verb: str, who: str) -> None:
    """Killed in a delete, or in undoing a create, while QEMU holds what the guest writes to a disk: it writes on.

    It does so to the image that is then said to be the newest: QEMU dies with us, or later, and nothing is lost.
    """
    world = await make_world()
    await (killed(world, "after:resume#1", "create", "point") if verb == "recover" else world.create("point"))
    await world.check_runs(3)
    async with watched(world) as (qmp, _):
        await killed(world, place, verb, "point", who=who)
        with trio.fail_after(SECONDS):
            # A guard tells nobody that it is done.
            while who == "us" and await qmp.execute("query-jobs"):  # noqa: ASYNC110
                await trio.sleep(0.01)
    if who == "us":
        await world.check_runs(3)
        subprocess.run(["kill", "-KILL", str(await world.pid())], check=True)
    (ended,) = await world.orch.recover()
    assert ended.state == (State.ROLLED_BACK if verb == "recover" else State.COMPLETE)
    await world.check_no_orphans()
    await world.check_nothing_lost()


@pytest.mark.window("the rate of the stream")
async def test_the_next_operation_adopts(make_world: MakeWorld) -> None:
    """A memory stream that outlives us is waited for by the domain's next operation, and its point is kept."""
    world = await make_world(append=SLOW)
    await killed(world, State.STREAMING, "create", "first", Strategy.BACKGROUND, SLOW_BANDWIDTH)
    assert not await world.orch.recover(patience=0.05)  # it is left as it is
    await world.create("second")
    first, second = await world.orch.list(NAME)
    assert (first.name, second.name, second.parent) == ("first", "second", "first")
    assert first.timings.pause is not None
    for record in (first, second):
        await world.revert(record.name)
        await world.check_consistent()


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("who", ["sink", "qemu"])
async def test_adoption_of_what_died_too(make_world: MakeWorld, who: str) -> None:
    """With what wrote the memory dead as well the create is undone; what the guest wrote since is kept."""
    world = await make_world(append=SLOW)
    before = await world.everything()
    await killed(world, State.STREAMING, "create", "point", Strategy.BACKGROUND, SLOW_BANDWIDTH)
    victim = world.sinks()[0] if who == "sink" else await world.pid()
    subprocess.run(["kill", "-KILL", str(victim)], check=True)
    (ended,) = await world.orch.recover()
    assert ended.state == State.ROLLED_BACK
    assert not await world.orch.list(NAME)
    if who == "sink":
        await world.check_same(before)
        await world.check_runs(3)
    else:
        await world.check_nothing_lost()


REVERT_PLACES: list[str] = list(dict.fromkeys(walk(WAYS[Way.BESIDE].phases)))
REVERT_PLACES += [State.COMPLETE, "after:stand_still#1", "after:take_over#1"]


async def test_revert(make_world: MakeWorld) -> None:
    """Killed anywhere in a revert: the old guest runs on, or the new one does; never none and never two.

    Every other place with one QEMU, and the rest with the other one; where both guests are there with both.
    """
    world = await make_world()
    await world.create("point")
    both = (State.SWAPPING, State.COMPLETE)
    for place in [p for n, p in enumerate(REVERT_PLACES) if n % 2 == world.qemu.old or p in both]:
        before, old = await world.everything(), await world.pid()
        async with watched(world) as (qmp, events):
            died = await killed(world, place, "revert", "point")
            if place != State.COMPLETE:  # there the new one runs
                assert await stood(qmp, events, died) < STANDS_SECONDS, place
        (ended,) = await world.orch.recover()
        if place == State.COMPLETE:
            assert await world.pid() != old
            await world.check_consistent()
        else:
            assert ended.state == State.ROLLED_BACK, place
            await world.check_same(before, place)
        await world.check_runs(3)
        await world.check_no_orphans()


async def test_the_end_of_the_old_guest(make_world: MakeWorld) -> None:
    """Killed when what the old guest holds is in a file, and when its end is decided: it runs on, nobody waits."""
    world = await make_world(extra_args=port_for_itself())
    await world.create("point")
    before = await world.everything()
    for place in ("before:end_old#1", "after:insist#1"):
        async with watched(world) as (qmp, events):
            died = await killed(world, place, "revert", "point")
            assert await stood(qmp, events, died) < STANDS_SECONDS, place
        await world.check_runs(3)
        (ended,) = await world.orch.recover()
        assert ended.state == State.ROLLED_BACK, place
        await world.check_same(before, place)
        await world.check_runs(3)
        await world.check_no_orphans()
        assert not list((world.root / "locks").glob("*.verdict*"))


async def test_paused_by_its_user(make_world: MakeWorld) -> None:
    """A guest that its user had paused is paused afterwards: nobody lets it run but its user."""
    world = await make_world()
    await world.create("point")
    await world.orch.pause(NAME)
    for where, verb in ((State.SWITCHING, "create"), ("after:stand_still#1", "revert")):
        await killed(world, where, verb, "point" if verb == "revert" else "again", *["paused"] * (verb == "create"))
        await world.check_still()
        await world.orch.recover()
        await world.check_still()
        assert await world.state() is DomainState.PAUSED
    await world.orch.resume(NAME)
    await world.check_runs(3)
