"""For tests: a hypervisor in memory, and the conformance suite that every driver passes.

The simulated driver rehearses whatever snaporch does, on Trio's clock and with faults that can be injected: see
`snaporch.drivers.simulated`, whose names are all here.

The suite says what a driver is to do, in coroutines that need no test framework. Who writes a driver puts a domain
around it (`World`; `SimulatedWorld` is an example) whose guest finds out by itself whether its memory and its disks
are of one point, and parametrises pytest over the checks for the driver's traits, one fresh world for each:

    from snaporch.testing import Check, checks_for

    @pytest.mark.parametrize("check", checks_for(MyDriver.info), ids=lambda check: check.__name__)
    async def test_my_driver(check: Check, tmp_path: Path) -> None:
        async with open_my_world(tmp_path) as world:
            await check(world)

A check's docstring is the sentence that it checks; what it raises is an AssertionError. Where the world can also
have snaporch killed (`CrashWorld`), `CRASH_CHECKS` are to be passed too. Under virtual time the catalog, which is a
real one, needs `ThreadsHoldTime`:

    @pytest.fixture
    def threads_hold_time(autojump_clock: MockClock) -> ThreadsHoldTime:
        return ThreadsHoldTime(autojump_clock)

    @pytest.mark.parametrize("check", CHECKS + CRASH_CHECKS, ids=lambda check: check.__name__)
    async def test_simulated(check, tmp_path, autojump_clock, threads_hold_time) -> None:
        async with open_simulated_world(tmp_path) as world:
            await check(world)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from snaporch.drivers.base import Info
from snaporch.drivers.simulated import (
    POINTS,
    Fault,
    FaultPlan,
    Guest,
    GuestModel,
    SimulatedDriver,
    SimulatedHost,
    SimulatedKill,
    SimulatedSpeed,
    ThreadsHoldTime,
)
from snaporch.testing._cloning import check_clone
from snaporch.testing._deleting import check_cancelled_delete, check_delete, check_delete_inactive, check_flatten
from snaporch.testing._inside import check_internal, check_internal_cancelled, check_internal_mixed
from snaporch.testing._points import (
    check_background,
    check_branches,
    check_disks_only,
    check_paused,
    check_paused_guest,
    check_precopy,
    check_repeated_reverts,
    check_revert_states,
    check_taken_names,
)
from snaporch.testing._quiesce import check_quiesce
from snaporch.testing._simulated import SimulatedWorld, open_simulated_world
from snaporch.testing._telling import check_events, check_timings
from snaporch.testing._traits import needs_of
from snaporch.testing._troubles import (
    check_broken_background,
    check_broken_paused,
    check_broken_precopy,
    check_busy,
    check_cancelled_background,
    check_cancelled_paused,
    check_cancelled_precopy,
    check_cancelled_revert,
    check_damaged_memory,
    check_proven,
    check_proven_cancelled,
    check_recovery,
    check_verify,
)
from snaporch.testing._world import CrashWorld, World
from snaporch.testing.example import ExampleDriver

Check = Callable[[World], Awaitable[None]]
CrashCheck = Callable[[CrashWorld], Awaitable[None]]

CHECKS: tuple[Check, ...] = (
    check_background,
    check_precopy,
    check_paused,
    check_repeated_reverts,
    check_branches,
    check_paused_guest,
    check_revert_states,
    check_disks_only,
    check_taken_names,
    check_cancelled_background,
    check_cancelled_precopy,
    check_cancelled_paused,
    check_cancelled_revert,
    check_proven,
    check_proven_cancelled,
    check_broken_background,
    check_broken_precopy,
    check_broken_paused,
    check_busy,
    check_damaged_memory,
    check_verify,
    check_events,
    check_timings,
    check_internal,
    check_internal_mixed,
    check_internal_cancelled,
    check_quiesce,
    check_delete,
    check_delete_inactive,
    check_cancelled_delete,
    check_flatten,
    check_clone,
)
"""What every driver passes, in the order in which a new one learns it."""


def checks_for(info: Info) -> tuple[Check, ...]:
    """Return the checks that a driver passes: those that need no more than the traits that its record names."""
    return tuple(check for check in CHECKS if needs_of(check.__name__) <= info.traits)


CRASH_CHECKS: tuple[CrashCheck, ...] = (check_recovery,)
"""What it passes besides, where snaporch can be killed in its world."""

__all__ = [  # noqa: RUF022 - in the order in which a reader needs them
    # the conformance suite
    "CHECKS",
    "CRASH_CHECKS",
    "checks_for",
    "Check",
    "CrashCheck",
    "World",
    "CrashWorld",
    "SimulatedWorld",
    "open_simulated_world",
    "check_background",
    "check_precopy",
    "check_paused",
    "check_repeated_reverts",
    "check_branches",
    "check_paused_guest",
    "check_revert_states",
    "check_disks_only",
    "check_taken_names",
    "check_cancelled_background",
    "check_cancelled_precopy",
    "check_cancelled_paused",
    "check_cancelled_revert",
    "check_proven",
    "check_proven_cancelled",
    "check_broken_background",
    "check_broken_precopy",
    "check_broken_paused",
    "check_busy",
    "check_damaged_memory",
    "check_verify",
    "check_events",
    "check_timings",
    "check_recovery",
    "check_internal",
    "check_internal_mixed",
    "check_internal_cancelled",
    "check_quiesce",
    "check_delete",
    "check_delete_inactive",
    "check_cancelled_delete",
    "check_flatten",
    # a driver to begin with
    "ExampleDriver",
    # the simulated hypervisor
    "SimulatedHost",
    "SimulatedDriver",
    "SimulatedSpeed",
    "SimulatedKill",
    "GuestModel",
    "Guest",
    "FaultPlan",
    "Fault",
    "POINTS",
    "ThreadsHoldTime",
]
