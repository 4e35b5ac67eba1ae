"""One operation a domain at a time, in one process or several; looking is always possible."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import trio

from snaporch.drivers.qmp import open_qmp
from snaporch.engine.states import State
from snaporch.errors import Busy, SnaporchError
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.operations.create import Participant
from tests.live.world import NAME, NEVER_CONVERGES, SLOW, SLOW_BANDWIDTH, MakeWorld, World, when

pytestmark = pytest.mark.live

OTHER_PROCESS = """
import json, sys, trio
from snaporch import open_orchestrator, CreateFlag, DomainSnapshot
from snaporch.errors import Busy
from snaporch.model.request import CreateOptions

async def main():
    async with open_orchestrator(sys.argv[1]) as orch:
        info = await orch.domain_info("guest")
        try:
            options = CreateOptions(wait=sys.argv[2] == "wait")
            await orch.create("guest", DomainSnapshot("second"), CreateFlag.LIVE, options)
            said = "complete"
        except Busy as error:
            said = [error.domain, error.operation, error.running, str(error)]
        print(json.dumps([info.state, len(info.disks), said]))

trio.run(main)
"""


async def other_process(world: World, how: str) -> list[object]:
    """Create `second` in another process, and return what it saw and how that went."""
    done = await trio.run_process(
        [sys.executable, "-c", OTHER_PROCESS, str(world.root), how], capture_stdout=True, stdin=subprocess.DEVNULL
    )
    found: list[object] = json.loads(done.stdout)
    return found


async def streaming(world: World, nursery: trio.Nursery, strategy: Strategy = Strategy.AUTO) -> None:
    """Start a slow create, and return while it streams."""
    reached = trio.Event()
    await nursery.start(when, world.orch, State.STREAMING, reached.set)
    nursery.start_soon(lambda: world.create("first", strategy, bandwidth=SLOW_BANDWIDTH))
    await reached.wait()


async def test_a_look_sets_nothing(make_world: MakeWorld) -> None:
    """Who looks beside an operation leaves alone what migrations are set to, even for a moment."""
    world = await make_world()
    seen: list[bool] = []
    async with trio.open_nursery() as nursery, open_qmp(await world.socket(), label=NAME) as control:

        async def watch() -> None:
            while True:
                found = await control.execute("query-migrate-capabilities")
                seen.append(any(each["state"] for each in found))

        nursery.start_soon(watch)
        for _ in range(30):
            await world.orch.domain_info(NAME)
        nursery.cancel_scope.cancel()
    assert seen
    assert not any(seen)


@pytest.mark.window("the stream's end waits for an event")
async def test_two_creates(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two creates is told what runs; a reader is not held up; all others are refused as well."""
    all_asked, finish = trio.Event(), Participant.finish_stream

    async def held(participant: Participant) -> None:
        await all_asked.wait()
        await finish(participant)

    monkeypatch.setattr(Participant, "finish_stream", held)
    async with trio.open_nursery() as nursery:
        await streaming(world, nursery)
        (running,) = await world.orch.operations(NAME)
        for call in (
            world.create("second"),
            world.revert("first"),
            world.orch.pause(NAME),
            world.orch.destroy(NAME),
            world.orch.undefine(NAME),
        ):
            with pytest.raises((Busy, SnaporchError)) as caught:
                await call
            if isinstance(caught.value, Busy):
                assert (caught.value.domain, caught.value.operation) == (NAME, running.id)
                assert caught.value.running == "create first"
                assert "create first" in str(caught.value)
                assert running.id in str(caught.value)
            else:
                assert "no snapshot 'first'" in str(caught.value)
        info = await world.orch.domain_info(NAME)
        assert info.state is DomainState.RUNNING
        assert [disk.target for disk in info.disks] == ["vda", "vdb"]
        assert (await world.orch.operations(NAME))[-1].state == State.STREAMING
        all_asked.set()
    assert [record.name for record in await world.orch.list(NAME)] == ["first"]


async def test_two_at_once(world: World) -> None:
    """Two creates begun in the same moment: one is complete, the other is told of it."""
    refused: list[str] = []

    async def attempt(name: str) -> None:
        try:
            await world.create(name)
        except Busy as error:
            refused.append(error.running)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, "a")
        nursery.start_soon(attempt, "b")
    (record,) = await world.orch.list(NAME)
    assert refused == [f"create {record.name}"]


@pytest.mark.window("the rate of the stream")
async def test_waiting(make_world: MakeWorld) -> None:
    """With `wait` the second begins when the first is through."""
    world = await make_world(append=SLOW)
    async with trio.open_nursery() as nursery:
        await streaming(world, nursery)
        await world.create("second", wait=True)
    assert [record.name for record in await world.orch.list(NAME)] == ["first", "second"]


@pytest.mark.window("the rate of the stream; precopy that never converges")
@pytest.mark.parametrize("how", ["refuse", "wait"])
async def test_two_processes(make_world: MakeWorld, how: str) -> None:
    """The same between processes; the second, in opening the orchestrator, leaves the first one's work alone."""
    world = await make_world(append=SLOW if how == "wait" else NEVER_CONVERGES)
    async with trio.open_nursery() as nursery:
        await streaming(world, nursery, Strategy.BACKGROUND if how == "wait" else Strategy.PRECOPY)
        (running,) = await world.orch.operations(NAME)
        state, disks, said = await other_process(world, how)
        assert (state, disks) == (DomainState.RUNNING, 2)
        if how == "refuse":
            assert isinstance(said, list)
            assert said[:3] == [NAME, running.id, "create first"]
            assert (await world.orch.operations(NAME))[-1].state == State.STREAMING
            nursery.cancel_scope.cancel()
        else:
            assert said == "complete"
    names = [record.name for record in await world.orch.list(NAME)]
    assert names == ([] if how == "refuse" else ["first", "second"])
    await world.check_runs()
    for name in names:
        await world.revert(name)
        await world.check_consistent()
