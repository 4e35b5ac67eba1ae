"""A guest's clock after a revert: its agent sets it, unless it is to stay, and what is not set is told."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch import DomainSnapshot, Event, EventKind, InvalidInput, RevertFlag
from snaporch.drivers.simulated import GuestModel, SimulatedHost
from snaporch.model.convert import definition_from
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime, open_simulated_world

AGE = 3600


def notes(events: trio.MemoryReceiveChannel[Event]) -> list[str]:
    """Return what has been told for people."""
    told = []
    with suppress(trio.WouldBlock):
        while True:
            if (event := events.receive_nowait()).kind is EventKind.NOTE:
                told.append(event.text)
    return told


@pytest.mark.parametrize("agent", [True, False])
async def test_it_is_set_by_the_agent(
    agent: bool, tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Without one, how far it is behind is in the answer, in the domain's record and in its later snapshots."""
    async with open_simulated_world(tmp_path, host=SimulatedHost(model=GuestModel(agent=agent))) as world:
        orch = world.orchestrator
        await orch.create("web1", DomainSnapshot("one"))
        await trio.sleep(AGE)
        async with orch.events() as events:
            back = (await orch.revert("web1", "one")).clock_behind_seconds
            told = notes(events)
        assert back is not None
        assert (await orch.domain_info("web1")).clock_behind_seconds == back
        if agent:
            assert (back, told) == (0, [])
            kept = (await orch.revert("web1", "one", RevertFlag.KEEP_CLOCK)).clock_behind_seconds
            assert AGE < (kept or 0) < AGE + 60
            return
        assert AGE < back < AGE + 60
        assert "its clock is 36" in told[0]
        await orch.create("web1", DomainSnapshot("two"))
        await trio.sleep(AGE)
        twice = (await orch.revert("web1", "two")).clock_behind_seconds
        assert 2 * AGE < (twice or 0) < 2 * AGE + 60


async def test_a_definition_can_keep_it(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Which may be changed at any time: earlier snapshots can be gone back to as before, and the change stays."""
    async with open_simulated_world(tmp_path, host=SimulatedHost(model=GuestModel(agent=True))) as world:
        orch = world.orchestrator
        before = (await orch.create("web1", DomainSnapshot("one"))).definition
        await orch.destroy("web1")
        assert (await orch.domain_info("web1")).clock_behind_seconds is None
        await orch.define(attrs.evolve(before, clock="keep"))
        await trio.sleep(AGE)
        assert ((await orch.revert("web1", "one")).clock_behind_seconds or 0) > AGE
        assert (await catalog_of(orch).domain("web1")).definition.clock == "keep"
        await orch.destroy("web1")
        await orch.start("web1")
        assert (await orch.domain_info("web1")).clock_behind_seconds is None


def test_other_words_are_refused() -> None:
    """With what there is."""
    with pytest.raises(InvalidInput, match="clock 'off' is none of set, keep"):
        definition_from({"name": "web1", "clock": "off"}, Path("/"))
