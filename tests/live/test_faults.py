"""What can break does, at every moment: each create is complete or rolled back, and no guest data is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

import snaporch.drivers.qemu.driver
import snaporch.engine.gone
from snaporch.drivers.base.traits import Overlays
from snaporch.engine.states import State
from snaporch.errors import (
    ConnectionGone,
    HypervisorError,
    OperationFailed,
    Refused,
    Stranded,
)
from snaporch.model.domain import DomainState
from snaporch.model.record import Event
from snaporch.model.request import Strategy
from snaporch.operations.create import Participant
from tests.live.world import HELD_BANDWIDTH, MIB, NAME, SLOW, SLOW_BANDWIDTH, MakeWorld, Qemu, World

pytestmark = pytest.mark.live

BACKGROUND = [
    State.PREPARING,
    State.PAUSING,
    State.SWITCHING,
    State.ARMING,
    State.RESUMING,
    State.STREAMING,
    State.COMMITTING,
]
KILLS = [
    *((Strategy.BACKGROUND, state) for state in BACKGROUND),
    (Strategy.PRECOPY, State.SWITCHING),
    (Strategy.PRECOPY, State.SEALING),
    (Strategy.PAUSED, State.STREAMING),
]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the memory file and not much more."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m,mode=700", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> None:
    """Leave no room on a file system."""
    with (place / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(MIB))


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED])
async def test_full_disk(make_world: MakeWorld, small: Path, strategy: Strategy) -> None:
    """A disk that becomes full in mid-stream rolls back with the system's words; the guest runs on."""
    world = await make_world(append=SLOW)
    file = str(small / "m.mem")
    async with world.unchanged():
        with pytest.raises(OperationFailed, match=os.strerror(errno.ENOSPC)) as caught:
            await world.during(
                State.STREAMING,
                lambda: fill(small),
                world.create("full", strategy, memory_file=file, bandwidth=HELD_BANDWIDTH),
            )
        assert file in str(caught.value)
        await world.check_runs()
        (small / "ballast").unlink()
    await world.create("next", strategy, memory_file=file)
    await world.revert("next")
    await world.check_consistent()


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize(("strategy", "state"), KILLS)
async def test_qemu_killed(make_world: MakeWorld, strategy: Strategy, state: State) -> None:
    """QEMU killed in any phase: complete or rolled back, no orphans, and the disks hold the guest's last word."""
    world = await make_world(append=SLOW)
    try:
        pid = await world.pid()
        ends = strategy is Strategy.PRECOPY  # these states come when its stream has ended
        call = world.create("killed", strategy, bandwidth=0 if ends else HELD_BANDWIDTH)
        await world.during(state, lambda: os.kill(pid, signal.SIGKILL), call)
        complete = True
    except OperationFailed:
        complete = False
    assert [record.name for record in await world.orch.list(NAME)] == (["killed"] if complete else [])
    assert (await world.orch.operations(NAME))[-1].state == (State.COMPLETE if complete else State.ROLLED_BACK)
    await world.check_no_orphans()
    await world.check_nothing_lost()
    await world.create("next", strategy)
    if complete:
        await world.revert("killed")
        await world.check_consistent()


@pytest.mark.window("the rate of the stream")
async def test_qemu_quits(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that is told to quit in mid-stream: as one that is killed; if it hangs in that, once it is killed."""
    monkeypatch.setattr(snaporch.drivers.qemu.driver, "CONNECT_SECONDS", 2.0)
    monkeypatch.setattr(snaporch.engine.gone, "DYING_SECONDS", 0.2)
    world = await make_world(append=SLOW)
    pid = await world.pid()

    async def told_to_quit() -> None:
        with suppress(HypervisorError), trio.move_on_after(1):
            await world.qmp("quit")

    try:
        await world.during(State.STREAMING, told_to_quit, world.create("quit", bandwidth=SLOW_BANDWIDTH))
    except OperationFailed:
        pass
    except Stranded:
        # 7.2 cancels the stream first, whereupon a vCPU may wait for ever for a page, and QEMU for the vCPU.
        assert world.qemu.old
        os.kill(pid, signal.SIGKILL)
        await world.orch.destroy(NAME)
        await world.orch.recover()
    await world.check_no_orphans()
    await world.check_nothing_lost()


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY])
async def test_guest_powers_off(
    make_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
) -> None:
    """A guest that powers off in mid-stream: complete or rolled back, and all that it wrote is on its disks.

    Once a QEMU 7.2 answered nothing any more after that: it is stranded then, and mended when that QEMU is killed.
    """
    path, log = tmp_path / "serial.sock", tmp_path / "serial.log"
    serial = f"socket,id=serial0,path={path},server=on,wait=off,logfile={log}"
    world = await make_world(append=SLOW, serial="", extra_args=("-chardev", serial, "-serial", "chardev:serial0"))
    if world.qemu.old:
        monkeypatch.setattr(snaporch.drivers.qemu.driver, "CONNECT_SECONDS", 5.0)
        monkeypatch.setattr(snaporch.engine.gone, "DYING_SECONDS", 0.2)

    async def power_off() -> None:
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b"off\n")
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass

    try:
        await world.during(State.STREAMING, power_off, world.create("off", strategy, bandwidth=SLOW_BANDWIDTH))
    except Stranded:
        assert world.qemu.old
        await world.orch.destroy(NAME)
        await world.orch.recover()
    except OperationFailed:
        pass
    await world.check_no_orphans()
    await world.check_nothing_lost()


async def test_one_disk_of_three(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """One disk of three cannot switch: none has, and the guest runs on."""
    world = await make_world(disks={"vda": "qcow2", "vdb": "raw", "vdc": "qcow2"})
    pause = Participant.pause

    async def sabotage(participant: Participant) -> None:
        (overlay,) = (overlay for overlay in participant.plan.overlays if overlay.target == "vdb")
        machine: object = participant.machine
        assert isinstance(machine, Overlays)
        await machine.close_overlay(overlay)
        await pause(participant)

    async with world.unchanged():
        with monkeypatch.context() as patch:
            patch.setattr(Participant, "pause", sabotage)
            with pytest.raises(OperationFailed, match="guest: the hypervisor refused transaction"):
                await world.create("three")
        await world.check_runs()
    await world.create("next")
    await world.revert("next")
    await world.check_consistent()


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED])
async def test_sink_killed(make_world: MakeWorld, strategy: Strategy) -> None:
    """The process that writes the memory file is killed: rolled back, and the guest is not frozen."""
    world = await make_world(append=SLOW)

    def well_into_the_stream(event: Event) -> bool:
        return event.state == State.STREAMING and event.done > 0

    def kill_sink() -> None:
        (sink,) = world.sinks()
        os.kill(sink, signal.SIGKILL)

    async with world.unchanged():
        call = world.create("sink", strategy, bandwidth=HELD_BANDWIDTH)
        with pytest.raises(OperationFailed):
            await world.during(well_into_the_stream, kill_sink, call)
        await world.check_runs(50)
    await world.create("next", strategy)
    await world.revert("next")
    await world.check_consistent()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have little patience with what does not answer."""
    monkeypatch.setattr(snaporch.drivers.qemu.driver, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(snaporch.engine.gone, "DYING_SECONDS", 0.2)


@pytest.mark.window("the rate of the stream")
@pytest.mark.usefixtures("impatient")
async def test_qemu_hangs_and_dies(make_world: MakeWorld) -> None:
    """A QEMU that hangs in mid-stream and is then killed: what the guest wrote into the overlays is not lost."""
    world = await make_world(append=SLOW)
    pid = await world.pid()

    async def hang() -> None:
        await world.reports(3)  # of what it writes to the overlays
        os.kill(pid, signal.SIGSTOP)

    with pytest.raises(Stranded):
        await world.during(State.STREAMING, hang, world.create("hung", bandwidth=HELD_BANDWIDTH))
    os.kill(pid, signal.SIGKILL)
    await world.orch.recover()
    assert (await world.orch.operations(NAME))[-1].state == State.ROLLED_BACK
    await world.check_no_orphans()
    await world.check_nothing_lost()


@pytest.mark.window("the rate of the stream")
@pytest.mark.usefixtures("impatient")
async def test_qemu_hangs(make_world: MakeWorld) -> None:
    """A QEMU that answers no more in mid-stream strands the create; once it answers, `recover` undoes all."""
    world = await make_world(append=SLOW)
    pid = await world.pid()
    async with world.unchanged():
        with trio.fail_after(30), pytest.raises(Stranded, match="recover") as caught:
            await world.during(
                State.STREAMING,
                lambda: os.kill(pid, signal.SIGSTOP),
                world.create("hung", bandwidth=HELD_BANDWIDTH),
            )
        assert caught.value.remains
        os.kill(pid, signal.SIGCONT)
        await world.orch.recover()
        await world.check_runs()
    assert (await world.orch.operations(NAME))[-1].state == State.ROLLED_BACK
    await world.create("next")


async def test_qemu_hangs_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that does not answer at all: an error with the domain's name and the deadline, nothing touched."""
    monkeypatch.setattr(snaporch.drivers.qemu.driver, "CONNECT_SECONDS", 0.5)
    pid = await world.pid()
    async with world.unchanged():
        os.kill(pid, signal.SIGSTOP)
        with trio.fail_after(5), pytest.raises(ConnectionGone, match=r"^guest: .*0\.5 s"):
            await world.create("hung")
        os.kill(pid, signal.SIGCONT)
        await world.check_runs()


# --- something else at the socket ---

GREETING = {"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}


@asynccontextmanager
async def impostor(path: Path, *lines: bytes, answers: int = 0) -> AsyncIterator[None]:
    """Listen on a socket and say `lines`, then answer some commands, then nothing."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                for line in lines:
                    await stream.send_all(line)
                for _ in range(answers):
                    asked = json.loads(await stream.receive_some())
                    await stream.send_all(json.dumps({"return": {}, "id": asked["id"]}).encode() + b"\n")
                await trio.sleep_forever()

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield
        nursery.cancel_scope.cancel()


IMPOSTORS = {
    "silent": ((), 0, r"web1: no greeting within 0\.5 s.*domain discover"),
    "falls-silent": ((json.dumps(GREETING).encode() + b"\n",), 0, r"web1: .*0\.5 s.*domain discover"),
    "no-qemu": ((json.dumps(GREETING).encode() + b"\n",), 1, "web1: .* is no QEMU"),
    "garbage": ((b"SSH-2.0-OpenSSH_9.2\r\n",), 0, r"web1: what came is not QMP.*QMP socket"),
    "100-mib-line": ((b'{"QMP": "' + b"x" * 100 * MIB,), 0, r"web1: what came is not QMP.*QMP socket"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
async def test_impostor(
    make_world: MakeWorld, tmp_path: Path, qemu: Qemu, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no QEMU at a socket: a clear error with the domain's name, and where it is silent the deadline."""
    seconds = 10.0 if kind == "100-mib-line" else 0.5
    monkeypatch.setattr(snaporch.drivers.qemu.driver, "CONNECT_SECONDS", seconds)
    world = await make_world(start=False)
    lines, answers, words = IMPOSTORS[kind]
    path = tmp_path / f"{qemu.version}.sock"
    async with impostor(path, *lines, answers=answers):
        with trio.fail_after(20), pytest.raises(Refused, match=words):
            await world.orch.attach("web1", str(path))
    assert [info.name for info in await world.orch.domains()] == [NAME]
    assert (await world.orch.domains())[0].state is DomainState.INACTIVE
