"""Connections, processes and storage of the simulated hypervisor, and what would be a bug in snaporch."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch.drivers.base import Address, Launch, StreamPlan
from snaporch.drivers.simulated import (
    GuestModel,
    SimulatedDriver,
    SimulatedHost,
)
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    DamagedSnapshot,
    OperationFailed,
    Refused,
)
from snaporch.model.domain import DomainDefinition, DomainState
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeviceDisk
from tests.simulated.world import (
    BESIDE,
    DISKS,
    FROZEN,
    GIB,
    MEMORY,
    WEB,
    background,
    merged_back,
    overlays,
    restored,
    running,
)

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
