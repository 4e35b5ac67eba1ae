"""The service's thread is not kept waiting for a CPU by what has more work than it."""

from __future__ import annotations

import os

import structlog

_log = structlog.get_logger("snaporch.service")

LOWEST = 1  # of the real-time priorities: above everything that has none


def take_priority() -> bool:
    """Have the kernel run this thread as soon as it has something to do; return whether it may have that.

    It works for milliseconds at a time, and a guest stands, or somebody waits for an answer, while it waits for a
    CPU: on a host whose CPUs are all busy that is up to tenths of a second. Only this thread gets it, none that it
    starts and no hypervisor (sched(7): SCHED_RR, SCHED_RESET_ON_FORK). It takes root, or RLIMIT_RTPRIO.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(LOWEST))
    except OSError as error:
        _log.info("no real-time priority: on a busy host pauses and answers take longer", why=error.strerror)
        return False
    return True
