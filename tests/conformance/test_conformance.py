"""Every driver passes the suite that `snaporch.testing` publishes."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from snaporch.drivers.simulated.machine import SimulatedMachine, SimulatedStream
from snaporch.drivers.simulated.storage import SimulatedStorage
from snaporch.testing import (
    CHECKS,
    CRASH_CHECKS,
    Check,
    CrashCheck,
    GuestModel,
    SimulatedHost,
    SimulatedWorld,
    ThreadsHoldTime,
    check_background,
    check_broken_background,
    check_cancelled_background,
    check_cancelled_paused,
    check_cancelled_precopy,
    check_damaged_memory,
    check_precopy,
    check_quiesce,
    open_simulated_world,
)
from tests.conformance.worlds import QemuWorld
from tests.live.world import LOSES_PAGES


def name(check: Callable[..., object]) -> str:
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", CHECKS, ids=name)
async def test_simulated(
    check: Check, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, simulated: SimulatedWorld
) -> None:
    """The simulated driver."""
    await check(simulated)


@pytest.mark.parametrize("check", CRASH_CHECKS, ids=name)
async def test_simulated_crash(
    check: CrashCheck, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, simulated: SimulatedWorld
) -> None:
    """The simulated driver, snaporch being killed."""
    await check(simulated)


async def test_without_background(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A hypervisor without background snapshots conforms too, when it says why."""
    host = SimulatedHost(model=GuestModel(background_blocker="its RAM is shared"))
    async with open_simulated_world(tmp_path, host=host) as world:
        await check_background(world)


async def test_with_agent(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """A guest with an agent in it can be quiesced."""
    async with open_simulated_world(tmp_path, host=SimulatedHost(model=GuestModel(agent=True))) as world:
        await check_quiesce(world)


@pytest.mark.live
@pytest.mark.parametrize("check", CHECKS, ids=name)
async def test_qemu(check: Check, real: QemuWorld, request: pytest.FixtureRequest) -> None:
    """The QEMU driver, on each of the QEMUs; it is killed in tests/live."""
    if check is check_precopy and real.live.qemu.old:
        request.applymarker(LOSES_PAGES)
    await check(real)


async def nothing(*_: object) -> None:
    await trio.lowlevel.checkpoint()


BUGS: dict[str, tuple[type, str, Check]] = {
    "the point is not awaited": (SimulatedStream, "armed", check_background),
    "disks are not put back": (SimulatedMachine, "commit_image", check_cancelled_background),
    "nodes stay open": (SimulatedMachine, "close_overlay", check_cancelled_paused),
    "a stream goes on": (SimulatedStream, "abort", check_cancelled_precopy),
    "files are left": (SimulatedStorage, "remove", check_broken_background),
    "nothing is compared": (SimulatedStorage, "check", check_damaged_memory),
}


@pytest.mark.parametrize("bug", BUGS)
async def test_finds(
    bug: str,
    autojump_clock: MockClock,
    threads_hold_time: ThreadsHoldTime,
    simulated: SimulatedWorld,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The suite finds a driver that does nothing where it has promised something."""
    class_, method, check = BUGS[bug]
    monkeypatch.setattr(class_, method, nothing)
    with pytest.raises(AssertionError):
        await check(simulated)


def test_names() -> None:
    """Each check says in a sentence what it checks."""
    for check in (*CHECKS, *CRASH_CHECKS):
        assert (check.__doc__ or "").endswith("."), check
