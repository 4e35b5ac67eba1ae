"""What a checkpoint is foretold to take."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import pytest
from trio.testing import MockClock

from snaporch import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot
from snaporch.model.record import PastCheckpoint
from snaporch.model.request import Strategy
from snaporch.operations.estimate import ASSUMED_RATE, COMMANDS_SECONDS, DOWNTIME_SECONDS, estimate
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime, open_simulated_world

GIB = 2**30


def test_without_a_past_all_is_assumed() -> None:
    """All of the RAM, at a usual disk's rate; a background pause has a fixed part."""
    told = estimate(Strategy.BACKGROUND, GIB, ())
    assert (told.bytes, told.known) == (GIB, 0)
    assert told.seconds == pytest.approx(GIB / ASSUMED_RATE)
    assert COMMANDS_SECONDS < (told.pause or 0) < 0.1


def test_it_goes_by_the_last_ones() -> None:
    """The median of sizes, rates and pauses: one that was slow for once changes nothing."""
    sizes = (100e6, 110e6, 120e6)
    past = [PastCheckpoint(Strategy.BACKGROUND, int(size), size / 1e8, 0.01) for size in sizes]
    past.append(PastCheckpoint(Strategy.BACKGROUND, int(115e6), 60.0, 0.5))
    told = estimate(Strategy.BACKGROUND, GIB, past)
    assert told.bytes == pytest.approx(112.5e6)
    assert told.seconds == pytest.approx(1.125)
    assert told.pause == pytest.approx(0.01)
    assert told.known == 4


def test_standing_it_pauses_for_all_of_it() -> None:
    """A guest that is not live is paused until its memory is saved, whatever live ones took."""
    told = estimate(Strategy.PAUSED, GIB, [PastCheckpoint(Strategy.BACKGROUND, int(1e8), 1.0, 0.01)])
    assert told.pause == told.seconds == pytest.approx(1.0)


def test_a_precopy_sends_again_what_is_written() -> None:
    """At half the rate of the stream: twice as much; at more than that it never ends."""
    past = [PastCheckpoint(Strategy.BACKGROUND, int(1e8), 1.0, 0.01)]
    told = estimate(Strategy.PRECOPY, GIB, past, dirty_rate=5e7)
    assert told.bytes == pytest.approx(2e8)
    assert told.seconds == pytest.approx(2.0)
    assert told.pause == DOWNTIME_SECONDS
    never = estimate(Strategy.PRECOPY, GIB, past, dirty_rate=1e8)
    assert (never.seconds, never.pause) == (None, None)
    assert estimate(Strategy.BACKGROUND, GIB, past, dirty_rate=1e9).seconds == pytest.approx(1.0)


def test_an_unmeasured_precopy_goes_by_precopies() -> None:
    """Their sizes have what was sent again in them; those of others have not."""
    past = [
        PastCheckpoint(Strategy.PRECOPY, int(3e8), 3.0, 0.2),
        PastCheckpoint(Strategy.BACKGROUND, int(1e8), 1.0, 0.01),
    ]
    told = estimate(Strategy.PRECOPY, GIB, past)
    assert (told.bytes, told.pause) == (int(3e8), 0.2)
    assert told.seconds == pytest.approx(3.0)
    assert estimate(Strategy.BACKGROUND, GIB, past).bytes == int(1e8)


async def test_how_the_last_ones_went(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """The catalog tells it of the last few that have memory, in files of its own or inside the images."""
    inside = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
    async with open_simulated_world(tmp_path / "root") as world:
        orch, name = world.orchestrator, world.domain
        wanted = [await orch.create(name, DomainSnapshot(each), CreateFlag.LIVE) for each in ("a", "b", "c")]
        wanted.append(await orch.create(name, DomainSnapshot("d", disks=inside)))
        await orch.destroy(name)
        await orch.create(name, DomainSnapshot("e", memory=False))
        told = await catalog_of(orch).checkpoints(name, 3)
    assert told == tuple(
        PastCheckpoint(r.strategy, r.memory_size, r.timings.total, r.timings.pause, r.way_back.way, r.timings.setup)
        for r in wanted[1:]
        if r.way_back is not None
    )
    assert told[-1].strategy is Strategy.INTERNAL
    assert told[-1].bytes > 0
