"""The simulated hypervisor, through what it offers in public."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch.drivers.base import Address, Launch, Overlay, PivotNote, StreamPlan, untold
from snaporch.drivers.simulated import (
    POINTS,
    GuestModel,
    SimulatedDriver,
    SimulatedHost,
    SimulatedKill,
    SimulatedSpeed,
    ThreadsHoldTime,
)
from snaporch.drivers.simulated.machine import SimulatedMachine
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    DamagedSnapshot,
    OperationFailed,
    OutcomeUnknown,
    Refused,
)
from snaporch.model.domain import DomainDefinition, DomainState, Handle
from snaporch.model.request import MergeOptions, Strategy
from snaporch.model.rfc import DeviceDisk

GIB = 2**30
MEMORY = "/snapshots/memory"
DISKS = (DeviceDisk("vda", "/images/vda"), DeviceDisk("vdb", "/images/vdb"))
WEB = DomainDefinition("web1", memory=GIB, disks=DISKS, driver="simulated")
BESIDE = Path("/run/beside")


@pytest.fixture
def host() -> SimulatedHost:
    """Give a host with the images of a domain of two disks."""
    host = SimulatedHost()
    for disk in DISKS:
        host.add_image(disk.path, number=7)
    return host


@pytest.fixture
def driver(host: SimulatedHost) -> SimulatedDriver:
    return SimulatedDriver(host)


def nothing(done: int, total: int) -> None:
    """Hear of progress."""


async def running(driver: SimulatedDriver, definition: DomainDefinition = WEB) -> Handle:
    """Launch a domain and let it run for a second."""
    process = await driver.launch(Launch(definition, definition.disks, Path("/run")))
    async with driver.connect(process, definition.name) as machine:
        await machine.resume()
    await trio.sleep(1)
    return process


async def overlays(driver: SimulatedDriver, machine: SimulatedMachine, name: str = "s1") -> list[Overlay]:
    """Make and open an overlay for each disk."""
    await driver.storage.make_directory("/snapshots")
    made = []
    for disk in await machine.disks():
        overlay = Overlay(disk, f"/snapshots/{name}-{disk.target}")
        base = DeviceDisk(disk.target, disk.active, disk.format)
        await driver.storage.make_overlay(overlay.path, base, disk.virtual_size)
        await machine.open_overlay(overlay)
        made.append(overlay)
    return made


async def background(
    driver: SimulatedDriver, machine: SimulatedMachine, *, name: str = "s1", too_early: bool = False
) -> list[Overlay]:
    """Take a checkpoint, or what looks like one; its memory is in MEMORY-NAME."""
    made = await overlays(driver, machine, name)
    path = f"{MEMORY}-{name}"
    await driver.storage.make_file(path)
    stream = machine.stream(StreamPlan(path, Strategy.BACKGROUND))
    await stream.open()
    await machine.pause()
    await machine.switch(made)
    await stream.start()
    if too_early:
        await machine.resume()
    await stream.armed()
    await machine.resume()
    await stream.finished(nothing)
    await stream.seal()
    return made


async def restored(driver: SimulatedDriver, frozen: dict[str, str], memory: str) -> Handle:
    """Launch a second domain on overlays over the frozen images and load the memory."""
    disks = []
    for target, path in frozen.items():
        await driver.storage.make_overlay(f"/snapshots/back-{target}", DeviceDisk(target, path), GIB)
        disks.append(DeviceDisk(target, f"/snapshots/back-{target}"))
    process = await driver.launch(Launch(WEB, tuple(disks), BESIDE, incoming=True))
    async with driver.connect(process, "web1") as machine:
        await machine.load(memory)
    return process


FROZEN = {disk.target: disk.path for disk in DISKS}


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


async def merged_back(
    driver: SimulatedDriver, machine: SimulatedMachine, made: Sequence[Overlay], *, removed: bool = True
) -> None:
    """Merge overlays that disks are on into what is below, as a rollback does, which has them removed."""
    for overlay in made:
        gone = partial(driver.storage.remove, overlay.path) if removed else trio.lowlevel.checkpoint
        note = PivotNote(gone, Path("verdict"))
        await machine.commit_image(
            overlay.path, overlay.base.active, note=note, options=MergeOptions(), progress=untold
        )


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


# --- connections and processes ----------------------------------------------------------------------------


async def test_a_connection_is_exclusive_but_one_may_look_beside(
    autojump_clock: MockClock, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        with pytest.raises(ConnectionGone, match="another client"):
            async with driver.connect(process, "web1"):
                raise AssertionError
        async with driver.query(process, "web1") as looker:
            assert await looker.state() is DomainState.RUNNING
            with pytest.raises(AssertionError, match="looking only"):
                await looker.pause()
    with pytest.raises(ConnectionGone, match="closed"):
        await machine.state()


async def test_a_second_connection_waits_for_the_end_of_the_first(
    autojump_clock: MockClock, driver: SimulatedDriver
) -> None:
    process = await running(driver)

    connected = trio.Event()

    async def first() -> None:
        async with driver.connect(process, "web1"):
            connected.set()
            await trio.sleep(5)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await connected.wait()
        async with driver.connect(process, "web1") as machine:
            assert await machine.state() is DomainState.RUNNING


async def test_a_guest_powers_off_when_asked_or_does_not(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.add_image("/images/deaf")
    host.models["deaf"] = GuestModel(acpi=False)
    deaf = await running(driver, DomainDefinition("deaf", disks=(DeviceDisk("vda", "/images/deaf"),)))
    process = await running(driver)
    for each in (process, deaf):
        async with driver.connect(each, "web1") as machine:
            await machine.shutdown()
            assert await driver.alive(each)
    began = trio.current_time()
    await driver.wait_gone(process)
    await driver.wait_gone(process)
    assert trio.current_time() - began == pytest.approx(2, abs=0.01)
    assert not await driver.alive(process)
    assert await driver.alive(deaf)
    assert host.number("/images/vda") == host.number("/images/vdb")
    async with driver.connect(deaf, "deaf") as machine:
        await machine.quit()
        assert not await driver.alive(deaf)


async def test_what_something_else_started_can_be_attached_to(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = host.boot(WEB)
    definition, found = await driver.attach("theirs", Address(process.data["socket"]))
    assert found == process
    assert (definition.name, definition.disks, definition.memory) == ("theirs", DISKS, GIB)
    second = await driver.launch(
        Launch(attrs.evolve(definition, disks=()), (), BESIDE, template=found),
    )
    assert await driver.alive(second)
    with pytest.raises(ConnectionGone, match="no such socket"):
        await driver.attach("theirs", Address("/run/nothing"))


async def test_two_machines_never_write_to_one_image(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    definition = attrs.evolve(WEB, extra_args=("-nic", "hostfwd,port=2222"))
    launch = Launch(definition, DISKS, BESIDE)
    assert await driver.beside_blocker(launch) == ""
    process = await running(driver, definition)
    assert "port 2222" in await driver.beside_blocker(launch)
    assert await driver.beside_blocker(Launch(definition, (), BESIDE, isolated=True)) == ""
    plain = Launch(WEB, DISKS, BESIDE)
    assert "writes to /images/vda" in await driver.beside_blocker(plain)
    with pytest.raises(Refused, match="writes to /images/vda"):
        await driver.launch(plain)
    assert await driver.beside_blocker(Launch(WEB, (), BESIDE)) == ""
    with pytest.raises(AssertionError, match="cleared"):
        await driver.clear(Path("/run"))
    host.crash(process)
    await driver.clear(Path("/run"))
    assert await driver.beside_blocker(launch) == ""
    assert await driver.alive(await driver.launch(launch))


async def test_a_launch_that_is_cancelled_leaves_no_process(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    with trio.move_on_after(0.05) as scope:
        await driver.launch(Launch(WEB, DISKS, BESIDE))
    assert scope.cancelled_caught
    assert host.processes() == ()
    host.faults.add("driver.launch", after=True)
    with pytest.raises(Refused):
        await driver.launch(Launch(WEB, DISKS, BESIDE))
    assert host.processes() == ()


async def test_the_doctor_knows_the_host(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.model = GuestModel(background_blocker="VFIO")
    process = await running(driver)
    assert (await driver.doctor())["background"] == "VFIO"
    async with driver.connect(process, "web1") as machine:
        assert machine.capabilities.background_blocker == "VFIO"
        await driver.storage.make_file("/images/memory")
        with pytest.raises(CommandRefused, match="VFIO"):
            await machine.stream(StreamPlan("/images/memory", Strategy.BACKGROUND)).open()


# --- storage ----------------------------------------------------------------------------------------------


async def test_nothing_that_exists_is_overwritten(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.add_file("/snapshots/theirs", 5)
    with pytest.raises(FileExistsError):
        await driver.storage.make_overlay("/snapshots/theirs", DISKS[0], GIB)
    with pytest.raises(FileExistsError):
        await driver.storage.make_file("/snapshots/theirs")
    with pytest.raises(FileNotFoundError):
        await driver.storage.make_file("/nowhere/new")
    await driver.storage.remove("/snapshots/nothing")
    assert "/snapshots/theirs" in host.files()


async def test_a_make_that_does_not_return_has_made_nothing(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    before = host.files()
    makes: list[Callable[[], Awaitable[None]]] = [
        lambda: driver.storage.make_overlay("/images/new", DISKS[0], GIB),
        lambda: driver.storage.make_file("/images/new"),
    ]
    for make in makes:
        with trio.move_on_after(0.001) as scope:
            await make()
        assert scope.cancelled_caught
        host.faults.add("storage.make_file", after=True)
        host.faults.add("storage.make_overlay", after=True)
        with pytest.raises(OSError, match="injected"):
            await make()
        host.faults.clear()
        assert host.files() == before


async def test_a_chain_is_whole_or_refused(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.add_image("/images/base.raw", format_="raw", number=3)
    host.add_image("/images/top", backing="/images/base.raw")
    chain = await driver.storage.chain("/images/top", "qcow2")
    assert [(disk.path, disk.format) for disk in chain] == [("/images/top", "qcow2"), ("/images/base.raw", "raw")]
    assert host.number("/images/top") == 3
    assert await driver.storage.virtual_size("/images/top", "qcow2") == GIB
    await driver.storage.remove("/images/base.raw")
    with pytest.raises(Refused, match="no such file"):
        await driver.storage.chain("/images/top", "qcow2")
    host.add_file("/images/text")
    with pytest.raises(Refused, match="format"):
        await driver.storage.chain("/images/text", "qcow2")


@pytest.mark.parametrize(
    ("silent", "thorough", "found"), [(False, False, True), (True, False, False), (True, True, True)]
)
async def test_damage_is_found_where_it_can_be(
    autojump_clock: MockClock,
    host: SimulatedHost,
    driver: SimulatedDriver,
    *,
    silent: bool,
    thorough: bool,
    found: bool,
) -> None:
    record = await driver.storage.seal("/images/vda")
    assert await driver.storage.seal("/images/vda", record) is record
    await driver.storage.check(record, thorough=True)
    await driver.storage.check_image("/images/vda", "qcow2")
    host.damage("/images/vda", silent=silent)
    with pytest.raises(DamagedSnapshot, match="structure"):
        await driver.storage.check_image("/images/vda", "qcow2")
    with pytest.raises(DamagedSnapshot, match="checksum") if found else nullcontext():
        await driver.storage.check(record, thorough=thorough)
    await driver.storage.remove("/images/vda")
    with pytest.raises(DamagedSnapshot, match="missing"):
        await driver.storage.check(record)


async def test_free_space_follows_what_guests_write(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.mount("/images/small", 10 * 2**20)
    host.model = GuestModel(disk_rate=2**20)
    disk = attrs.evolve(host.add_image("/images/small/vda"), target="vda")
    process = await running(driver, attrs.evolve(WEB, disks=(disk,)))
    _, before = await driver.storage.free("/images/small")
    await trio.sleep(2)
    system, after = await driver.storage.free("/images/small")
    assert system == "/images/small"
    assert before - after == pytest.approx(2 * 2**20, abs=2)
    await trio.sleep(100)
    assert (await driver.storage.free("/images/small"))[1] == 0
    assert host.consistent(process)


async def test_a_read_only_file_system_takes_nothing(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    host.mount("/cdrom", readonly=True)
    await driver.storage.check_writable("/images/deep/er")
    with pytest.raises(Refused, match="read-only"):
        await driver.storage.check_writable("/cdrom/deep")
    with pytest.raises(Refused, match="not a directory"):
        await driver.storage.check_writable("/images/vda/deep")
    with pytest.raises(OSError, match="Read-only"):
        await driver.storage.make_directory("/cdrom/deep")
    assert not await driver.storage.exists("/images/deep")


async def test_an_overlay_that_nobody_has_open_can_be_committed(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        made = await overlays(driver, machine)
        await machine.switch(made)
        await trio.sleep(1)
        with pytest.raises(OperationFailed, match="lock"):
            await driver.storage.commit_overlay(made[0].path)
        newest = host.guest(process).ticks
        await driver.kill(process)
    with pytest.raises(OperationFailed, match="open"):
        await driver.storage.commit_overlay("/snapshots/nothing")
    newest = max(newest, host.number(made[0].path))
    await driver.storage.commit_overlay(made[0].path)
    assert host.number("/images/vda") == host.number(made[0].path) == newest


# --- what would be a bug in snaporch ----------------------------------------------------------------------


async def test_an_image_that_two_rely_on_is_never_merged_into(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        made = await background(driver, machine)
        await restored(driver, FROZEN, f"{MEMORY}-s1")
        with pytest.raises((AssertionError, CommandRefused)):
            await merged_back(driver, machine, made)
        host.crash(process)
    for other in host.processes():
        host.crash(other)
    with pytest.raises(AssertionError, match="rely"):
        await driver.storage.commit_overlay(made[0].path)


async def test_a_frozen_image_is_never_written_to(
    autojump_clock: MockClock, host: SimulatedHost, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        await machine.switch(await overlays(driver, machine))
        await machine.quit()
    second = await driver.launch(Launch(WEB, DISKS, BESIDE))
    async with driver.connect(second, "web1") as machine:
        with pytest.raises(AssertionError, match="frozen"):
            await machine.resume()


async def test_a_file_that_a_guest_needs_is_never_removed(
    autojump_clock: MockClock, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        made = await overlays(driver, machine)
        await machine.switch(made)
    for path in ("/images/vda", made[0].path):
        with pytest.raises(AssertionError, match="depends on"):
            await driver.storage.remove(path)


async def test_an_overlay_that_was_merged_away_is_never_used_again(
    autojump_clock: MockClock, driver: SimulatedDriver
) -> None:
    process = await running(driver)
    async with driver.connect(process, "web1") as machine:
        made = await overlays(driver, machine)
        await machine.switch(made)
        await merged_back(driver, machine, made, removed=False)
        await machine.quit()
    disks = tuple(DeviceDisk(overlay.target, overlay.path) for overlay in made)
    with pytest.raises(AssertionError, match="went with a merge"):
        await driver.launch(Launch(WEB, disks, BESIDE))


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
