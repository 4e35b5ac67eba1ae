"""What is foretold of a real guest is about what then happens."""

from __future__ import annotations

import pytest

from snaporch.errors import InvalidInput, Refused
from snaporch.model.request import Strategy
from tests.live.world import MIB, NAME, MakeWorld

pytestmark = pytest.mark.live

BUSY = "ram=64 dirty=20"  # MiB a second
IDLE = "ram=64 dirty=0"


async def test_it_comes_true(make_world: MakeWorld) -> None:
    """After a checkpoint the next one is as foretold, and the record says both; before any, all is assumed."""
    world = await make_world(append=IDLE)
    first = await world.create("first", Strategy.BACKGROUND)
    assert first.expected is not None
    assert first.expected.known == 0
    assert first.expected.bytes == world.definition.memory
    told = await world.orch.estimate(NAME)
    second = await world.create("second", Strategy.BACKGROUND)
    assert second.expected is not None
    assert (second.expected.bytes, second.expected.seconds) == (told.bytes, told.seconds)
    assert told.known == 1
    assert second.memory_size == pytest.approx(told.bytes, rel=0.2)
    assert told.seconds is not None
    assert told.seconds / 5 < second.timings.total < told.seconds * 5  # hosts are noisy


async def test_the_dirty_rate_is_measured(make_world: MakeWorld) -> None:
    """A guest that writes more is seen to; one that stands is not watched, and would not be paused."""
    world = await make_world(append=BUSY)
    busy = await world.orch.estimate(NAME, Strategy.PRECOPY)
    assert busy.dirty_rate is not None
    assert 2 * MIB < busy.dirty_rate < 80 * MIB
    assert busy.bytes > world.definition.memory  # pages are sent again
    doctor = (await world.orch.doctor(NAME))[NAME]
    assert doctor["expected of background"]["seconds"] > 0
    await world.orch.pause(NAME)
    standing = await world.orch.estimate(NAME, Strategy.PAUSED)
    assert (standing.dirty_rate, standing.pause) == (None, None)


async def test_what_cannot_be_foretold(make_world: MakeWorld) -> None:
    """No strategy, or no memory."""
    world = await make_world()
    with pytest.raises(InvalidInput, match="no way to save memory"):
        await world.orch.estimate(NAME, Strategy.AUTO)
    await world.orch.destroy(NAME)
    with pytest.raises(Refused, match="inactive"):
        await world.orch.estimate(NAME)
