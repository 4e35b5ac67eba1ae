"""When a merge that has to catch up with a guest has had time enough."""

# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

import trio
from trio.testing import MockClock

from snaporch.drivers.qmp.blockjob import STAGNANT_SECONDS, Patience


async def test_without_a_limit_it_may_take_as_long_as_it_comes_nearer(autojump_clock: MockClock) -> None:
    """Hours, if need be; what it has reached before and lost again does not count."""
    patience = Patience(None)
    for remaining in range(1000, 0, -1):
        await trio.sleep(STAGNANT_SECONDS - 1)
        assert not patience.spent(remaining)
    await trio.sleep(STAGNANT_SECONDS / 2)
    assert not patience.spent(500)
    await trio.sleep(STAGNANT_SECONDS / 2)
    assert patience.spent(1)


async def test_with_a_limit_nothing_else_counts(autojump_clock: MockClock) -> None:
    """However near it has come."""
    patience = Patience(5.0)
    await trio.sleep(4.9)
    assert not patience.spent(10**9)
    await trio.sleep(0.1)
    assert patience.spent(0)
