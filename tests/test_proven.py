"""One guest after the other: proved first, kept meanwhile, put back if it fails; in the simulated hypervisor."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    DomainSnapshot,
    DomainState,
    NotEnoughSpace,
    OperationFailed,
    RevertFlag,
    Stranded,
)
from snaporch.drivers.local.memory import free_ram
from snaporch.engine.states import State
from snaporch.model.record import EventKind
from snaporch.testing import SimulatedHost, SimulatedWorld, ThreadsHoldTime, open_simulated_world

GIB = 2**30


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[SimulatedWorld]:
    """A domain that can be there only once, a snapshot of it, and what it has come to since."""
    async with open_simulated_world(tmp_path, host=SimulatedHost(alone=True)) as made:
        await made.orchestrator.create(made.domain, DomainSnapshot("point"), CreateFlag.LIVE)
        await trio.sleep(1000)
        yield made


async def revert(world: SimulatedWorld, flags: RevertFlag = RevertFlag(0)) -> object:  # noqa: B008 - immutable
    return await world.orchestrator.revert(world.domain, "point", flags)


async def test_what_it_takes_is_said_and_counted(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Bytes and seconds beforehand; the outage is from the old guest's last instruction to the new one's first."""
    async with world.orchestrator.events() as events:
        back = await world.orchestrator.revert(world.domain, "point")
        notes = []
        while (event := events.receive_nowait()).state != State.COMPLETE:
            notes += [event.text] if event.kind is EventKind.NOTE else []
    (note,) = notes
    assert note.startswith("web1: only one web1 can run at a time, so the guest is kept in a file and is paused")
    assert note.endswith(": about 1,073,741,824 bytes, 1.1 s")
    assert (back.way, back.lazy) == ("proven", False)
    speed = world.host.speed
    least = GIB / speed.bandwidth + GIB / speed.load_bandwidth
    assert least < (back.outage_seconds or 0) < least + 1
    assert back.total_seconds > 3 + least  # the copy ran for three seconds
    await world.check_consistent()


async def test_too_little_ram(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """The copy has no room beside the guest: both figures are said, and nothing was touched."""
    world.host.ram = GIB + GIB // 2
    before = await world.everything()
    with pytest.raises(NotEnoughSpace) as caught:
        await revert(world)
    assert (caught.value.needed, caught.value.free, caught.value.where) == (GIB, GIB // 2, "host memory")
    assert await world.everything() == before


async def test_too_little_space(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """What the guest holds has no room: both figures are said, and nothing was touched."""
    host = SimulatedHost(alone=True)
    host.mount(str(tmp_path), 3 * GIB // 2)
    async with open_simulated_world(tmp_path, host=host) as world:
        await world.orchestrator.create(world.domain, DomainSnapshot("point"), CreateFlag.LIVE)
        before = await world.everything()
        with pytest.raises(NotEnoughSpace) as caught:
            await revert(world)
        assert caught.value.needed > GIB > caught.value.free
        assert await world.everything() == before


async def test_neither_the_one_nor_the_other(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Neither loads: the operation is stranded and says where the old guest is; `recover` puts it back later."""
    was = await world.number()
    fault = world.host.faults.add("machine.load", nth=2, times=2)  # the first is the copy's
    with pytest.raises(Stranded) as caught:
        await revert(world)
    assert caught.value.exit_code == 5
    (kept,) = [path for path in world.host.files() if path.endswith(".kept")]
    assert f"{kept} is the only copy of the old guest's memory, and is kept" in str(caught.value)
    assert "cannot put back" in str(caught.value)
    assert "snaporch recover" in str(caught.value)
    assert not world.host.processes()
    world.host.faults.faults.remove(fault)
    (record,) = await world.orchestrator.recover()
    assert record.state == State.ROLLED_BACK
    assert await world.number() >= was
    await world.check_consistent()
    assert kept not in world.host.files()


async def test_put_back_as_it_was(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A guest that its user has paused is put back, and is paused."""
    await world.orchestrator.pause(world.domain)
    was = await world.number()
    world.host.faults.add("machine.load", nth=2)
    with pytest.raises(OperationFailed):
        await revert(world)
    assert await world.number() == was
    await world.check_still()
    await world.orchestrator.resume(world.domain)
    await world.check_consistent()


async def test_not_proved(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A copy that does not load ends it, and the guest has run all the time."""
    before = await world.everything()
    stops: list[str] = []
    world.host.on_call = lambda at, _domain: stops.append(at) if at == "machine.pause" else None
    world.host.faults.add("machine.load")
    with pytest.raises(OperationFailed):
        await revert(world)
    assert await world.everything() == before
    assert not stops


async def test_let_run_while_it_is_kept(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A guest that somebody lets run is not what is kept of it: it is not ended, and nothing is left."""

    def let_run(at: str, _domain: str) -> None:
        if at == "stream.seal":
            for process in world.host.running(world.domain):
                process.cont()

    world.host.on_effect = let_run
    before = await world.everything()
    with pytest.raises(OperationFailed, match="another program let the guest run"):
        await revert(world)
    assert await world.everything() == before
    await world.check_consistent()


async def test_force_gives_the_old_guest_up(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """With FORCE nothing is kept; but a copy has loaded the point before the old guest is ended."""
    before = await world.everything()
    world.host.faults.add("machine.load")
    with pytest.raises(OperationFailed):
        await world.orchestrator.revert(world.domain, "point", RevertFlag.FORCE)
    assert await world.everything() == before
    back = await world.orchestrator.revert(world.domain, "point", RevertFlag.FORCE)
    assert back.way == "displace"
    assert back.outage_seconds is not None
    await world.check_consistent()


async def test_force_without_room_for_a_copy(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """With FORCE a host that has no RAM for a copy is no reason to stop; that nothing was tried is said."""
    world.host.ram = GIB + GIB // 2
    back = await world.orchestrator.revert(world.domain, "point", RevertFlag.FORCE)
    assert back.way == "displace"
    await world.check_consistent()


async def test_what_shows_only_when_it_starts(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Where the new guest does not come up beside the old one, they go one after the other."""
    world.host.alone = False
    world.host.faults.add("driver.launch")  # of the new one; then the copy's comes
    back = await world.orchestrator.revert(world.domain, "point")
    assert back.way == "proven"
    assert [record.state for record in await world.orchestrator.operations(world.domain)][-2:] == [
        State.ROLLED_BACK,
        State.COMPLETE,
    ]
    await world.check_consistent()


async def test_to_stand(
    world: SimulatedWorld, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A guest that is to stand at the point has no first instruction yet: nobody knows the outage."""
    back = await world.orchestrator.revert(world.domain, "point", RevertFlag.PAUSED)
    assert (back.way, back.outage_seconds) == ("proven", None)
    assert (await world.orchestrator.domain_info(world.domain)).state is DomainState.PAUSED
    await world.check_still()


def test_free_ram(tmp_path: Path) -> None:
    """Of this host, and of one that does not say."""
    assert (free_ram() or 0) > 2**20
    (tmp_path / "meminfo").write_text("MemTotal: 2 kB\n")
    assert free_ram(tmp_path / "meminfo") is None
