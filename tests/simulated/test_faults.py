"""Faults and cancellation, anywhere in the simulated hypervisor."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch.drivers.base import StreamPlan
from snaporch.drivers.simulated import (
    POINTS,
    GuestModel,
    SimulatedDriver,
    SimulatedHost,
    SimulatedKill,
    SimulatedSpeed,
    ThreadsHoldTime,
)
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    OutcomeUnknown,
)
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from tests.simulated.world import DISKS, GIB, MEMORY, background, nothing, overlays, running

# --- faults -----------------------------------------------------------------------------------------------


async def test_a_fault_strikes_the_nth_call_of_its_domain(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    fault = host.faults.add("machine.pause", nth=2, domain="web1")
    other = host.faults.add("machine.pause", domain="web2")
    async with driver.connect(process, "web1") as machine:
        await machine.pause()
        await machine.resume()
        with pytest.raises(CommandRefused, match="injected"):
            await machine.pause()
        assert await machine.state() is DomainState.RUNNING
        await machine.pause()
    assert (fault.fired, other.fired) == (1, 0)


async def test_a_fault_after_the_effect_is_a_lost_answer(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    host.faults.add("machine.pause", error=OutcomeUnknown("web1", "stop", 30), after=True)
    async with driver.connect(process, "web1") as machine:
        with pytest.raises(OutcomeUnknown):
            await machine.pause()
        assert await machine.state() is DomainState.PAUSED


async def test_a_hang_lasts_until_it_is_cancelled(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    host.faults.add("machine.pause", hang=math.inf, times=math.inf)
    async with driver.connect(process, "web1") as machine:
        with trio.move_on_after(1000) as scope:
            await machine.pause()
        assert scope.cancelled_caught
        assert await machine.state() is DomainState.RUNNING


async def test_one_disk_of_a_transaction_undoes_all(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    host.faults.add("machine.switch.vdb")
    async with driver.connect(process, "web1") as machine:
        made = await overlays(driver, machine)
        with pytest.raises(CommandRefused):
            await machine.switch(made)
        assert [disk.active for disk in await machine.disks()] == ["/images/vda", "/images/vdb"]
        await machine.switch(made)
    assert host.consistent(process)


@pytest.mark.parametrize(("after", "expected"), [(False, ConnectionGone), (True, OutcomeUnknown)])
async def test_when_the_hypervisor_dies_ram_is_lost_and_disks_are_newest(
    autojump_clock: MockClock,
    host: SimulatedHost,
    driver: SimulatedDriver,
    expected: type[Exception],
    *,
    after: bool,
) -> None:
    process = await running(driver)
    guest = host.guest(process)
    host.faults.add("machine.disks", crash=True, after=after)
    async with driver.connect(process, "web1") as machine:
        with pytest.raises(expected):
            await machine.disks()
        with pytest.raises(ConnectionGone, match="crashed"):
            await machine.state()
        await machine.stream(StreamPlan(MEMORY, Strategy.PAUSED)).abort()
    assert not await driver.alive(process)
    assert not host.consistent(process)
    with pytest.raises(ConnectionGone):
        async with driver.connect(process, "web1"):
            raise AssertionError
    assert host.number("/images/vda") == host.number("/images/vdb") == guest.ticks


async def test_a_full_disk_fails_the_stream_and_the_guest_runs_on(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.mount("/snapshots", GIB // 2)
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        with pytest.raises(OSError, match="No space left") as caught:
            await background(driver, machine)
        assert caught.value.errno == errno.ENOSPC
        assert not host.settings(process)
        assert await machine.state() is DomainState.RUNNING
    assert await driver.storage.free("/snapshots/deep") == ("/snapshots", 0)
    await driver.storage.remove(f"{MEMORY}-s1")
    assert (await driver.storage.free("/snapshots"))[1] > GIB // 3


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"error": OSError(errno.ENOSPC, "full")}, OSError),
        ({"power_off": True}, ConnectionGone),
        ({"crash": True}, ConnectionGone),
    ],
)
async def test_in_mid_stream_anything_can_happen(
    autojump_clock: MockClock,
    host: SimulatedHost,
    driver: SimulatedDriver,
    fault: dict[str, Any],
    expected: type[Exception],
) -> None:
    process = await running(driver)
    host.faults.add("stream.half", **fault)
    async with driver.connect(process, "web1") as machine:
        with pytest.raises(expected):
            await background(driver, machine)
        assert await driver.alive(process) is (expected is OSError)


async def test_a_late_abort_lets_the_guest_run_that_precopy_stopped(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.model = GuestModel(dirty_rate=200e6)
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await driver.storage.make_directory("/snapshots")
        await driver.storage.make_file(MEMORY)
        stream = machine.stream(StreamPlan(MEMORY, Strategy.PRECOPY))
        await stream.open()
        await stream.start()
        for _ in range(1000):
            if await machine.state() is DomainState.PAUSED:
                break
            await trio.sleep(0.01)
        await stream.abort()
        await stream.abort()
        assert await machine.state() is DomainState.RUNNING
        with pytest.raises(CommandRefused, match="cancelled"):
            await stream.finished(nothing)
    assert not host.settings(process)
    assert host.consistent(process)


async def test_a_hung_process_answers_nothing_and_can_be_killed(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        host.hang(process)
        with pytest.raises(OutcomeUnknown, match="30 s"):
            await machine.state()
    with pytest.raises(ConnectionGone, match="nothing answers"):
        async with driver.connect(process, "web1"):
            raise AssertionError
    assert await driver.alive(process)
    await driver.kill(process)
    await driver.kill(process)
    assert not await driver.alive(process)


async def test_cancellation_does_not_take_back_what_was_sent(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    states = []
    async with driver.connect(process, "web1") as machine:
        for hook in ("on_call", "on_effect"):
            with trio.CancelScope() as scope:
                setattr(host, hook, lambda _at, _domain, scope=scope: scope.cancel())
                await machine.pause()
            setattr(host, hook, lambda _at, _domain: None)
            states.append(await machine.state())
    assert states == [DomainState.RUNNING, DomainState.PAUSED]


async def test_hooks_see_every_call_in_order(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    seen: list[tuple[str, str]] = []
    host.on_call = lambda at, domain: seen.append((at, domain))
    async with driver.connect(process, "web1") as machine:
        await machine.pause()
    await driver.storage.exists("/images")
    assert seen == [("driver.connect", "web1"), ("machine.pause", "web1"), ("storage.exists", "")]
    assert {at for at, _ in seen} <= POINTS


def test_a_fault_at_no_place_is_an_error(host: SimulatedHost) -> None:
    with pytest.raises(ValueError, match="no place"):
        host.faults.add("machine.pasue")
    with pytest.raises(ValueError, match="transaction"):
        host.faults.add("machine.switch.vda", crash=True)


async def test_a_killed_program_changes_nothing_more_and_the_next_takes_over(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    files = host.files()
    async with driver.connect(process, "web1") as machine:
        await machine.pause()
        driver.die()
        with pytest.raises(SimulatedKill):
            await machine.resume()
        with pytest.raises(SimulatedKill):
            await driver.storage.make_file("/images/new")
        async with SimulatedDriver(host).connect(process, "web1") as heir:
            assert await heir.state() is DomainState.PAUSED
    assert host.files() == files


async def test_the_next_program_adopts_or_aborts_a_stream(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    await driver.storage.make_directory("/snapshots")
    await driver.storage.make_file(MEMORY)
    plan = StreamPlan(MEMORY, Strategy.BACKGROUND)
    async with driver.connect(process, "web1") as machine:
        stream = machine.stream(plan)
        await stream.open()
        await stream.start()
        await stream.armed()
        driver.die()
    heir = SimulatedDriver(host)
    async with heir.connect(process, "web1") as machine:
        with pytest.raises(CommandRefused, match="in progress"):
            await machine.stream(plan).open()
        stream = machine.stream(plan)
        await stream.finished(nothing)
        assert (await stream.seal()).size == GIB
        await stream.abort()
    assert not host.settings(process)


# --- cancellation and faults everywhere -------------------------------------------------------------------


async def _calls_of_a_checkpoint(hook: str) -> list[str]:
    host, driver, seen = *fresh(), list[str]()
    setattr(host, hook, lambda at, _domain: seen.append(at))
    await checkpoint(driver)
    return seen


def fresh(speed: SimulatedSpeed | None = None) -> tuple[SimulatedHost, SimulatedDriver]:
    host = SimulatedHost(speed=speed or SimulatedSpeed())
    for disk in DISKS:
        host.add_image(disk.path)
    return host, SimulatedDriver(host)


async def checkpoint(driver: SimulatedDriver) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await background(driver, machine)


@pytest.mark.parametrize("hook", ["on_call", "on_effect"])
async def test_a_program_killed_at_any_call_leaves_a_world_that_can_be_looked_at(
    autojump_clock: MockClock, hook: str
) -> None:
    for nth in range(len(await _calls_of_a_checkpoint(hook))):
        host, driver = fresh()
        setattr(host, hook, _at(nth, driver.die))
        with pytest.raises(SimulatedKill):
            await checkpoint(driver)
        setattr(host, hook, lambda _at, _domain: None)
        heir = SimulatedDriver(host)
        assert [await heir.find(Path("/run"))] == list(host.processes() or [None])
        await trio.sleep(10)
        for process in host.processes():
            assert host.consistent(process)
            async with heir.connect(process, "web1") as machine:
                await machine.stream(StreamPlan(f"{MEMORY}-s1", Strategy.BACKGROUND)).abort()
                await machine.resume()
            assert host.settings(process) == {}


def _at(nth: int, act: Callable[[], None]) -> Callable[[str, str], None]:
    """Return a hook that acts at the nth call, counted from 0."""
    count = iter(range(10_000))
    return lambda _at, _domain: act() if next(count) == nth else None


async def test_everything_may_take_no_time_at_all(autojump_clock: MockClock) -> None:
    zero = SimulatedSpeed(
        **{
            field.name: 0.0
            for field in attrs.fields(SimulatedSpeed)
            if not field.name.endswith(("bandwidth", "rate", "deadline"))
        }
    )
    host, driver = fresh(attrs.evolve(zero, bandwidth=1e18, arm_rate=1e18))
    await checkpoint(driver)
    assert host.number(f"{MEMORY}-s1") == host.number("/images/vda")


async def test_time_does_not_jump_while_a_thread_works(
    autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    gate = threading.Event()

    async def work() -> None:
        await trio.to_thread.run_sync(gate.wait)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            assert autojump_clock.autojump_threshold == math.inf
            gate.set()
        assert trio.current_time() == 0
        await trio.sleep(5)
        assert trio.current_time() == 5


async def test_the_same_run_twice_is_the_same(autojump_clock: MockClock) -> None:
    first, second = [(await _numbers()) for _ in range(2)]
    assert first == second


async def _numbers() -> list[int]:
    host, driver = fresh()
    await checkpoint(driver)
    return [host.number(path) for path in (f"{MEMORY}-s1", "/images/vda", "/images/vdb")]
