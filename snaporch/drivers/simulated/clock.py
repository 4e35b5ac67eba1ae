"""Virtual time beside real threads.

A clock that jumps does so when all tasks wait, and does not know that one of them waits for a thread: while the
catalog writes, for a millisecond, it jumps to the next deadline, and whatever that guards is cancelled. So wherever
more than the simulator runs under `MockClock(autojump_threshold=0)`, this instrument belongs beside it.
"""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock, active_thread_count


class ThreadsHoldTime(trio.abc.Instrument):
    """Keep a clock from jumping while a thread of `trio.to_thread.run_sync` works.

        clock = MockClock(autojump_threshold=0)
        trio.run(main, clock=clock, instruments=[ThreadsHoldTime(clock)])

    With pytest-trio: a fixture that takes `autojump_clock` and returns this; a test names both.
    """

    def __init__(self, clock: MockClock) -> None:
        self._clock = clock
        self._threshold = clock.autojump_threshold

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - whichever it was
        """See Instrument: a task may just have begun to wait for a thread, or ceased to."""
        threshold = math.inf if active_thread_count() else self._threshold
        if threshold != self._clock.autojump_threshold:
            self._clock.autojump_threshold = threshold
