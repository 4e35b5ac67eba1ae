"""Fixtures for batches."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from snaporch.testing import ThreadsHoldTime


@pytest.fixture
def virtual_time(autojump_clock: MockClock) -> ThreadsHoldTime:
    """Hours pass at once; pytest-trio takes the clock and the instrument from a test's own arguments."""
    return ThreadsHoldTime(autojump_clock)
