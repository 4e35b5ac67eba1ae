"""Every driver passes the suite that `snaporch.testing` publishes."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from snaporch.drivers.base import TRAITS, Info
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.drivers.simulated.driver import SimulatedDriver
from snaporch.drivers.simulated.machine import SimulatedMachine, SimulatedStream
from snaporch.drivers.simulated.storage import SimulatedStorage
from snaporch.model.request import Strategy
from snaporch.testing import (
    CHECKS,
    CRASH_CHECKS,
    Check,
    CrashCheck,
    ExampleDriver,
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
    checks_for,
    open_simulated_world,
)
from snaporch.testing.example import ExampleMachine, ExampleStorage
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


class ExampleWorld(SimulatedWorld):
    """A world of the example driver, whose machines meet no faults; its files do."""

    def troubles(self, strategy: Strategy) -> Sequence[str]:
        """See World."""
        return [trouble for trouble in super().troubles(strategy) if trouble.startswith("storage.")]


@pytest.mark.parametrize("check", checks_for(ExampleDriver.info), ids=name)
async def test_example(
    check: Check, tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """The driver of docs/how-to/write-a-driver.md passes what its few traits select."""
    host = SimulatedHost()
    async with open_simulated_world(tmp_path, host=host, driver=ExampleDriver(host)) as world:
        await check(ExampleWorld(world.root, host, world.orchestrator))


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


def test_traits_select_checks() -> None:
    """All of them for who has all traits; for the example neither merges of open images nor points inside."""
    assert checks_for(SimulatedDriver.info) == checks_for(QemuDriver().info) == CHECKS
    left = {name(check) for check in CHECKS} - {name(check) for check in checks_for(ExampleDriver.info)}
    assert {"internal", "delete", "flatten", "cancelled_revert"} <= left
    assert not left & {"paused", "repeated_reverts", "delete_inactive", "verify"}


@pytest.mark.parametrize(
    ("info", "classes"),
    [
        (QemuDriver().info, (QemuDriver, QemuMachine, LocalStorage)),
        (SimulatedDriver.info, (SimulatedDriver, SimulatedMachine, SimulatedStorage)),
        (ExampleDriver.info, (ExampleDriver, ExampleMachine, ExampleStorage)),
    ],
    ids=lambda value: value.name if isinstance(value, Info) else "",
)
def test_who_names_a_trait_has_it(info: Info, classes: tuple[type, ...]) -> None:
    """Its protocol, with every method; and one that a machine or a driver has is named."""
    for protocol, (trait, _) in TRAITS.items():
        if trait in info.traits:
            assert any(issubclass(each, protocol) for each in classes), trait
        else:
            assert not any(issubclass(each, protocol) for each in classes[:2]), trait


def test_names() -> None:
    """Each check says in a sentence what it checks."""
    for check in (*CHECKS, *CRASH_CHECKS):
        assert (check.__doc__ or "").endswith("."), check
