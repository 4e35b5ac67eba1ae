"""Whatever fails, wherever: a create of the simulated driver is complete, or everything is as it was before."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    CreateOptions,
    DeviceDisk,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    OperationFailed,
    Refused,
    RevertFlag,
    SnaporchError,
    Stranded,
    Strategy,
)
from snaporch.engine.steps import CREATE, QUIESCED, Step, create_phases
from snaporch.testing import GuestModel, SimulatedHost, SimulatedWorld, ThreadsHoldTime, open_simulated_world

# What the steps of the tables call on the driver.
CALLS = {
    "post_guard": "guard.post",
    "dismiss_guard": "guard.dismiss",
    "make_overlay": "storage.make_overlay",
    "open_overlay": "machine.open_overlay",
    "make_memory_file": "storage.make_file",
    "open_stream": "stream.open",
    "sync_images": "storage.write_back",
    "pause": "machine.pause",
    "switch": "machine.switch",
    "start_stream": "stream.start",
    "await_armed": "stream.armed",
    "resume": "machine.resume",
    "finish_stream": "stream.finished",
    "seal_memory": "stream.seal",
    "seal_image": "storage.seal",
    "freeze": "machine.freeze",
    "thaw": "machine.thaw",
    "save_inside": "machine.save_inside",
    "keep_inside": "storage.save_inside",
    "seal_inside": "storage.seal_inside",
}

WAYS = [(strategy, False) for strategy in CREATE] + [(strategy, True) for strategy in QUIESCED]


@attrs.frozen
class Failure:
    """Something that goes wrong in a step.

    Attributes:
        step: its name.
        kind: an error, the hypervisor's death, the guest's power off, or a cancellation of the create.
        after: the step's effect is there.
        nth: for which of its disks.
    """

    step: str
    kind: str
    after: bool
    nth: int


@attrs.frozen
class Story:
    """A create in which things go wrong."""

    strategy: Strategy
    failures: tuple[Failure, ...]
    quiesce: bool = False


def steps_of(strategy: Strategy, *, quiesce: bool) -> list[str]:
    phases = create_phases(strategy, quiesce=quiesce)
    found = {step for phase in phases for _, steps in phase.lanes() for step in steps}
    return sorted(found - {Step.COPY_TPM, Step.SEAL_TPM})  # the simulator has no TPM: nothing can fail there


@st.composite
def stories(draw: st.DrawFn) -> Story:
    strategy, quiesce = draw(st.sampled_from(WAYS))
    failures = st.builds(
        Failure,
        st.sampled_from(steps_of(strategy, quiesce=quiesce)),
        st.sampled_from(["error", "crash", "power_off", "cancel"]),
        st.booleans(),
        st.integers(1, 2),
    )
    return Story(strategy, tuple(draw(st.lists(failures, min_size=1, max_size=2))), quiesce)


def plan_failure(world: SimulatedWorld, failure: Failure, scope: trio.CancelScope) -> None:
    at = CALLS[failure.step]
    if failure.kind == "error":
        world.host.faults.add(at, after=failure.after, nth=failure.nth)
    elif failure.kind == "crash":
        world.host.faults.add(at, after=failure.after, nth=failure.nth, crash=True)
    elif failure.kind == "power_off":
        world.host.faults.add(at, after=failure.after, nth=failure.nth, power_off=True)
    elif failure.after:
        world.host.on_effect = canceller(at, failure.nth, scope)
    else:
        world.host.on_call = canceller(at, failure.nth, scope)


def canceller(at: str, nth: int, scope: trio.CancelScope) -> Callable[[str, str], None]:
    seen = 0

    def hook(name: str, _domain: str) -> None:
        nonlocal seen
        seen += name == at
        if seen == nth:
            scope.cancel()

    return hook


async def tell(story: Story, root: Path) -> None:
    """Run a create, and check what has become of everything."""
    async with open_simulated_world(root, host=SimulatedHost(model=GuestModel(agent=True))) as world:
        if story.strategy is Strategy.NONE and not story.quiesce:
            await world.orchestrator.destroy(world.domain)
        before = await world.everything()
        scope = trio.CancelScope()
        for failure in story.failures:
            plan_failure(world, failure, scope)
        error = await failed(world, story, scope)
        world.host.faults.clear()
        world.host.on_call = world.host.on_effect = lambda _at, _domain: None
        if isinstance(error, Stranded):  # the failures were in what undoes them too
            assert len(story.failures) > 1, error
            await world.orchestrator.recover()
        else:
            assert error is None or isinstance(error, OperationFailed | Refused), repr(error)
        complete = bool(await world.orchestrator.list(world.domain))
        assert error is None or not complete
        await check(world, before, complete=complete)
        assert not await world.orchestrator.recover()


async def failed(world: SimulatedWorld, story: Story, scope: trio.CancelScope) -> SnaporchError | None:
    """Create a snapshot and return how that failed."""
    strategy = story.strategy
    snapshot, flags, options = DomainSnapshot("s1"), CreateFlag.LIVE, CreateOptions(strategy=strategy)
    if strategy is Strategy.NONE:
        flags, options = CreateFlag.DISK_ONLY, CreateOptions()
        if not story.quiesce:  # each disk in its own way
            snapshot = attrs.evolve(snapshot, disks=(DiskSnapshot(DeviceDisk("vda"), external=False),))
    elif strategy is Strategy.INTERNAL:
        disks = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
        snapshot, flags, options = attrs.evolve(snapshot, disks=disks), CreateFlag(0), CreateOptions()
    elif strategy is Strategy.PAUSED:
        flags, options = CreateFlag(0), CreateOptions()
    flags |= CreateFlag.QUIESCE if story.quiesce else CreateFlag(0)
    try:
        with scope:
            await world.orchestrator.create(world.domain, snapshot, flags, options)
    except SnaporchError as error:
        return error
    return None


async def check(world: SimulatedWorld, before: Mapping[str, object], *, complete: bool) -> None:
    """Check that nothing is left of a create but, complete, its snapshot; and that no guest has lost anything."""
    after = await world.everything()
    if not complete:
        assert after["files"] == before["files"]
    if after["processes"]:
        assert after == {**before, "files": after["files"]}
        await world.check_consistent()
    else:  # it died, or was inactive
        info = await world.orchestrator.domain_info(world.domain)
        assert info.state is DomainState.INACTIVE
        assert len({world.host.number(disk.active) for disk in info.disks}) == 1
        await world.start()
        await world.check_consistent()
    if complete:
        await world.orchestrator.revert(world.domain, "s1", RevertFlag.FORCE)  # what is inside goes back in place
        if world.host.processes(world.domain):
            await world.check_consistent()


@settings(max_examples=60, deadline=None)
@given(stories())
@example(Story(Strategy.BACKGROUND, (Failure("switch", "error", True, 1),)))
@example(Story(Strategy.BACKGROUND, (Failure("switch", "error", True, 1), Failure("resume", "error", False, 1))))
@example(Story(Strategy.INTERNAL, (Failure("save_inside", "cancel", True, 1),), quiesce=True))
def test_any_fault(story: Story) -> None:
    """One or two failures in any steps of any strategy: nothing is left, nothing is lost, or recover mends it."""
    clock = MockClock(autojump_threshold=0)
    with tempfile.TemporaryDirectory() as root:
        trio.run(tell, story, Path(root), clock=clock, instruments=[ThreadsHoldTime(clock)])


def test_every_step_can_fail() -> None:
    """The tables name no step that these stories leave out."""
    assert {step for strategy, quiesce in WAYS for step in steps_of(strategy, quiesce=quiesce)} == set(CALLS)


async def test_images_are_synced_before_each_pause(
    simulated: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """In a create and in a revert: what would be flushed while the guest is paused is on disk before."""
    orch, domain, calls = simulated.orchestrator, simulated.domain, list[str]()
    simulated.host.on_call = lambda at, _domain: calls.append(at)
    await orch.create(domain, DomainSnapshot("s1"), CreateFlag.LIVE, CreateOptions(strategy=Strategy.BACKGROUND))
    await orch.revert(domain, "s1")
    pair = ["storage.write_back", "machine.pause"]
    assert [at for at in calls if at in pair] == pair * 2


async def test_let_run_by_others(
    simulated: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A guest that somebody lets run before a point inside its images is loaded is stopped again, and loaded."""
    orch, domain, host = simulated.orchestrator, simulated.domain, simulated.host
    disks = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
    first = await simulated.number()
    await orch.create(domain, DomainSnapshot("point", disks=disks))
    await simulated.go_on()
    before = await simulated.number()

    def let_run(at: str, _domain: str) -> None:
        if at == "machine.save_inside":  # what the guest holds is kept; now the point is to be loaded
            for process in host.running(domain):
                process.cont()

    host.on_effect = let_run
    await orch.revert(domain, "point")
    assert first <= await simulated.number() < before
    await simulated.check_consistent()
