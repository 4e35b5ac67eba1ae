"""What each verb does in each run state of a guest: the table, and the verbs in the simulator that ask it."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from snaporch import CreateFlag, DomainSnapshot, OperationFailed, Refused
from snaporch.drivers.base import GuestVerb
from snaporch.drivers.qmp.run_states import RUN_STATES, refusal, table
from snaporch.drivers.simulated import GuestModel
from snaporch.engine.states import State
from snaporch.orchestrator import catalog_of
from snaporch.testing import SimulatedHost, SimulatedWorld, ThreadsHoldTime, open_simulated_world
from snaporch.testing._support import in_state

QUIESCE = CreateFlag.DISK_ONLY | CreateFlag.QUIESCE

# What asks the table: the verbs as a caller has them. The world has the snapshots `point` and `inside`.
VERBS: dict[GuestVerb, Callable[[SimulatedWorld], Awaitable[object]]] = {
    GuestVerb.CREATE: lambda w: w.orchestrator.create(w.domain, DomainSnapshot("new")),
    GuestVerb.QUIESCE: lambda w: w.orchestrator.create(w.domain, DomainSnapshot("new", memory=False), QUIESCE),
    GuestVerb.REVERT: lambda w: w.orchestrator.revert(w.domain, "point"),
    GuestVerb.MERGE: lambda w: w.orchestrator.delete(w.domain, "point"),
    GuestVerb.PAUSE: lambda w: w.orchestrator.pause(w.domain),
    GuestVerb.RESUME: lambda w: w.orchestrator.resume(w.domain),
    GuestVerb.SHUTDOWN: lambda w: w.orchestrator.shutdown(w.domain),
}


def test_the_table_in_the_docs() -> None:
    """`python -c 'from snaporch.drivers.qmp.run_states import table; print(table())'` made it."""
    page = (Path(__file__).parents[1] / "docs/reference/run-states.md").read_text()
    assert table() in page


def test_an_unknown_state_is_refused() -> None:
    assert "'new-one' is not one that snaporch knows" in refusal("new-one", GuestVerb.CREATE)


@pytest.mark.parametrize("status", [name for name in RUN_STATES if name not in {"running", "prelaunch"}])
async def test_every_verb_asks_before_it_touches_anything(
    tmp_path: Path, status: str, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Each is refused in words, with all as it was, or done."""
    host = SimulatedHost(model=GuestModel(agent=True))
    async with open_simulated_world(tmp_path, host=host) as world:
        await world.orchestrator.create(world.domain, DomainSnapshot("point"), CreateFlag.LIVE)
        done = RUN_STATES[status].done
        for verb, call in sorted(VERBS.items(), key=lambda item: item[0] in done):
            host.get_into(world.process(), "" if status == "paused" else status)
            if verb in done:
                await call(world)
                continue
            before = await world.everything()
            with pytest.raises(Refused, match="web1: ") as caught:
                await call(world)
            assert RUN_STATES[status].words in str(caught.value)
            assert await world.everything() == before


async def test_a_guest_that_falls_asleep_meanwhile(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """An operation that fails and is undone says what the guest does now, where it is not what it did before."""
    async with open_simulated_world(tmp_path) as world:
        world.host.faults.add("stream.half", nth=1, times=2)
        create = partial(world.orchestrator.create, world.domain, DomainSnapshot("c1"), CreateFlag.LIVE)
        with pytest.raises(OperationFailed, match="everything is as it was before"):
            await create()
        words = r"web1 was running before, and now is suspended: .*S3"
        async with world.orchestrator.events() as events, trio.open_nursery() as nursery:
            nursery.start_soon(in_state, events, State.STREAMING, partial(fall_asleep, world))
            with pytest.raises(OperationFailed, match=words) as caught:
                await create()
        assert "as it was before" not in str(caught.value)
        assert not await catalog_of(world.orchestrator).snapshots(world.domain)


async def fall_asleep(world: SimulatedWorld) -> None:
    """Let the guest sleep."""
    await trio.lowlevel.checkpoint()
    world.host.get_into(world.process(), "suspended")
