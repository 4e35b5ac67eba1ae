"""The simulated hypervisor, through what it offers in public: a guest, its clock, checkpoints of it."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch.drivers.base import Launch, StreamPlan
from snaporch.drivers.simulated import (
    GuestModel,
    SimulatedDriver,
    SimulatedHost,
)
from snaporch.errors import (
    CommandRefused,
)
from snaporch.model.domain import DomainDefinition, DomainState
from snaporch.model.request import Strategy
from tests.simulated.world import (
    DISKS,
    FROZEN,
    GIB,
    MEMORY,
    WEB,
    background,
    merged_back,
    nothing,
    overlays,
    restored,
    running,
)

# --- the guest and the clock ------------------------------------------------------------------------------


async def test_a_guest_ticks_while_its_cpus_run_and_only_then(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await driver.launch(Launch(WEB, DISKS, Path("/run")))
    guest = host.guest(process)
    assert (guest.ticks, guest.running) == (7, False)
    async with driver.connect(process, "web1") as machine:
        await machine.resume()
        assert await machine.state() is DomainState.RUNNING
        await trio.sleep(10)
        await machine.pause()
        then = guest.ticks
        await trio.sleep(10)
        assert await machine.state() is DomainState.PAUSED
    assert guest.ticks == then == pytest.approx(10e6, rel=0.01)
    assert host.number("/images/vda") == host.number("/images/vdb") == then
    assert host.consistent(process)


async def test_the_pause_is_measured_by_the_hypervisor(autojump_clock: MockClock, driver: SimulatedDriver) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        assert machine.pause_times() is None
        await machine.pause()
        assert machine.pause_times() is None
        await trio.sleep(3)
        await machine.resume()
        times = machine.pause_times()
        assert times is not None
        assert times[1] - times[0] == pytest.approx(3.001, abs=1e-6)
        machine.forget_pauses()
        assert machine.pause_times() is None


def test_a_host_outlives_a_run_of_trio_and_its_time_stands_still_between() -> None:
    host = SimulatedHost()
    host.add_image("/images/vda")
    definition = attrs.evolve(WEB, disks=DISKS[:1])
    process = trio.run(running, SimulatedDriver(host), definition, clock=MockClock(autojump_threshold=0))
    then = host.guest(process).ticks
    assert then == host.guest(process).ticks > 0

    async def again() -> int:
        assert host.guest(process).ticks == then
        await trio.sleep(2)
        return host.guest(process).ticks

    later = trio.run(again, clock=MockClock(autojump_threshold=0))
    assert later - then == pytest.approx(2e6, abs=1)


async def test_ten_thousand_domains_need_no_task_and_no_second(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    for number in range(10_000):
        disk = host.add_image(f"/images/{number}")
        host.boot(DomainDefinition(f"d{number}", disks=(attrs.evolve(disk, target="vda"),)))
    before = trio.lowlevel.current_statistics().tasks_living
    await trio.sleep(3600)
    for process in host.processes()[:100]:
        async with driver.connect(process, "d") as machine:
            await machine.pause()
        await driver.storage.free("/images")
    assert trio.lowlevel.current_statistics().tasks_living == before


# --- checkpoints ------------------------------------------------------------------------------------------


async def test_background_in_the_right_order_is_a_checkpoint(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await background(driver, machine)
        times = machine.pause_times()
        assert await machine.state() is DomainState.RUNNING
    assert times is not None
    assert times[1] - times[0] == pytest.approx(0.012, abs=1e-6)  # pause, switch, and 10 ms to arm one GiB
    frozen = host.number("/images/vda")
    assert host.number(f"{MEMORY}-s1") == host.number("/images/vdb") == frozen
    assert host.number("/snapshots/s1-vda") == host.guest(process).ticks > frozen
    second = await restored(driver, FROZEN, f"{MEMORY}-s1")
    assert host.guest(second).ticks == frozen
    assert host.consistent(second)


async def test_resuming_before_armed_is_found_out_and_stays_so(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await background(driver, machine, too_early=True)
    assert host.number(f"{MEMORY}-s1") > host.number("/images/vda")
    second = await restored(driver, FROZEN, f"{MEMORY}-s1")
    assert not host.consistent(second)
    async with driver.connect(second, "web1") as machine:
        await machine.resume()
        await trio.sleep(1)
    assert not host.consistent(second)
    assert host.guest(second).torn == {"vda", "vdb"}


async def test_switching_a_running_guest_is_found_out(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        made = await overlays(driver, machine)
        await driver.storage.make_file(MEMORY)
        stream = machine.stream(StreamPlan(MEMORY, Strategy.BACKGROUND))
        await stream.open()
        await machine.switch(made)
        await machine.pause()
        await stream.start()
        await stream.armed()
    assert host.number(MEMORY) > host.number("/images/vda")


async def test_precopy_stops_the_guest_at_its_point(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        made = await overlays(driver, machine)
        await driver.storage.make_file(MEMORY)
        stream = machine.stream(StreamPlan(MEMORY, Strategy.PRECOPY))
        await stream.open()
        assert host.settings(process)
        await stream.start()
        await stream.finished(nothing)
        assert not host.settings(process)
        assert await machine.state() is DomainState.PAUSED
        await machine.switch(made)
        await machine.resume()
        record = await stream.seal()
        times = machine.pause_times()
    assert times is not None
    assert 0.05 < times[1] - times[0] < 0.3
    assert record.size > GIB
    assert host.number(MEMORY) == host.number("/images/vda")
    assert host.consistent(await restored(driver, FROZEN, MEMORY))


async def test_precopy_of_a_busy_guest_ends_when_it_is_paused(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.model = GuestModel(dirty_rate=2e9)
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await driver.storage.make_directory("/snapshots")
        await driver.storage.make_file(MEMORY)
        stream = machine.stream(StreamPlan(MEMORY, Strategy.PRECOPY))
        await stream.open()
        await stream.start()
        with trio.move_on_after(100) as scope:
            await stream.finished(nothing)
        assert scope.cancelled_caught
        await machine.pause()
        with trio.fail_after(4):
            await stream.finished(nothing)
        assert (await stream.seal()).size > 50 * GIB
    assert host.number(MEMORY) == host.number("/images/vda")


@pytest.mark.parametrize("strategy", [Strategy.PAUSED, Strategy.BACKGROUND])
async def test_a_paused_guest_stays_paused(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver, strategy: Strategy
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await driver.storage.make_directory("/snapshots")
        await driver.storage.make_file(MEMORY)
        stream = machine.stream(StreamPlan(MEMORY, strategy, bandwidth=2**29))
        await stream.open()
        await machine.pause()
        began = trio.current_time()
        heard: list[tuple[int, int]] = []
        await stream.start()
        await stream.finished(lambda done, total: heard.append((done, total)))
        assert trio.current_time() - began == pytest.approx(2, rel=0.01)
        assert await machine.state() is DomainState.PAUSED
        assert (await stream.seal()).size == GIB
    assert heard == sorted(heard)
    assert heard[-1] == (GIB, GIB)
    assert host.number(MEMORY) == host.guest(process).ticks


async def test_merging_back_loses_nothing_and_leaves_no_trace(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    before = host.files()
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        made = await overlays(driver, machine)
        await machine.switch(made[:1])
        with pytest.raises(CommandRefused):
            await machine.close_overlay(made[0])
        await trio.sleep(1)
        await merged_back(driver, machine, made[:1])
        for overlay in made:
            await machine.close_overlay(overlay)
            await machine.close_overlay(overlay)
            await driver.storage.remove(overlay.path)
        assert [disk.chain for disk in await machine.disks()] == [("/images/vda",), ("/images/vdb",)]
        await trio.sleep(1)
    assert host.consistent(process)
    assert host.nodes(process) == ()
    assert host.files() == before


async def test_a_memory_file_binds_to_its_hypervisor_and_must_be_whole(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await background(driver, machine)
    host.versions = {"hypervisor": "simulated 2"}
    with pytest.raises(CommandRefused, match="error while loading"):
        await restored(driver, FROZEN, f"{MEMORY}-s1")
