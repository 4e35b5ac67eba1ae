"""A checkpoint holds one point: under heavy writes the guest itself says so after each revert."""

from __future__ import annotations

import pytest

from snaporch.model.request import Strategy
from tests.live.world import HEAVY, LOSES_PAGES, MIB, MakeWorld

pytestmark = pytest.mark.live

TRIES = 5  # scripts/bench pause does the large numbers
LIVE = (Strategy.BACKGROUND, Strategy.PRECOPY)


@pytest.mark.parametrize("strategy", [*LIVE, Strategy.PAUSED])
async def test_consistent(make_world: MakeWorld, strategy: Strategy, request: pytest.FixtureRequest) -> None:
    """Number in RAM and on every disk are the same in each of several checkpoints of one running guest."""
    world = await make_world(append=HEAVY)
    if strategy is Strategy.PRECOPY and world.qemu.old:
        request.applymarker(LOSES_PAGES)
    taken: list[int] = []
    for number in range(TRIES):
        taken.append((await world.reports(2))[-1].seq)
        record = await world.create(f"c{number}", strategy)
        assert record.strategy is strategy
    await world.check_runs()
    for number, before in enumerate(taken):
        await world.revert(f"c{number}")
        assert (await world.check_consistent()).seq >= before


async def test_pauses(make_world: MakeWorld) -> None:
    """Background pauses the guest for less time than precopy and pausing it do, by QEMU's own events."""
    # Large enough that they are an order of magnitude apart: precopy pauses for up to its downtime limit of 300 ms,
    # of which a guest of a few MiB takes little.
    world = await make_world(memory=512 * MIB, append="rate=50 dirty=100 ram=400")
    pauses: dict[Strategy, float] = {}
    for strategy in (*LIVE, Strategy.PAUSED):
        pause = (await world.create(strategy, strategy)).timings.pause
        assert pause is not None
        pauses[strategy] = pause
    assert 0 < pauses[Strategy.BACKGROUND] < pauses[Strategy.PRECOPY]
    assert pauses[Strategy.BACKGROUND] < pauses[Strategy.PAUSED]
    assert pauses[Strategy.BACKGROUND] < 0.2
