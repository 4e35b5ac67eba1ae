"""Gives snaporch's thread real-time priority while a guest is paused, or always, so that no pause waits for a CPU.

It works for milliseconds at a time; on a host whose CPUs are all busy it would wait for up to tenths of a second.
The priority is the lowest of those that are real-time (sched(7): SCHED_RR), and this thread's alone: with
SCHED_RESET_ON_FORK no thread or process that it starts has it, no hypervisor above all. It takes root, or
RLIMIT_RTPRIO; without, everything works as before, and waits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

_log = structlog.get_logger("snaporch")

_LOWEST = os.sched_param(1)
_OURS = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_NONE = os.sched_param(0)
_PLAIN = frozenset({os.SCHED_OTHER, os.SCHED_BATCH})


class _Holds(threading.local):
    """How many bodies of `prompt` there are in this thread, and what it had before the first."""

    count = 0
    policy = os.SCHED_OTHER


_holds = _Holds()


def take_priority() -> bool:
    """Take the priority for good; return whether that is permitted."""
    try:
        os.sched_setscheduler(0, _OURS, _LOWEST)
    except OSError as error:
        _log.info("no real-time priority: on a busy host pauses and answers take longer", why=error.strerror)
        return False
    return True


@contextmanager
def prompt() -> Iterator[None]:
    """Have the priority while the body runs, if permitted; of several in one thread, until the last has ended."""
    if not _holds.count:
        _holds.policy = os.sched_getscheduler(0)
        if _holds.policy & ~os.SCHED_RESET_ON_FORK not in _PLAIN:
            yield  # the program has chosen another
            return
        with suppress(OSError):
            os.sched_setscheduler(0, _OURS, _LOWEST)
    _holds.count += 1
    try:
        yield
    finally:
        _holds.count -= 1
        if not _holds.count:
            try:
                os.sched_setscheduler(0, _holds.policy, _NONE)
            except PermissionError:  # who may take a priority may not take the flag off again
                os.sched_setscheduler(0, _holds.policy | os.SCHED_RESET_ON_FORK, _NONE)
