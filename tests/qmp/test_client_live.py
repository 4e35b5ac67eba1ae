"""The client against a real QEMU without a machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snaporch.drivers.qmp import QMPClient, open_qmp, open_qmp_stream
from snaporch.errors import CommandRefused, ConnectionGone, OutcomeUnknown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.live


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start QEMU with its QMP socket at ``qmp`` in the test's folder."""
    command = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-qmp", "stdio"]
    command += ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        # It greets on its output once all its sockets listen: no need to look for them again and again.
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"QMP"')
        yield process
        process.kill()


async def test_greeting_and_status(tmp_path: Path, qemu: subprocess.Popen[bytes]) -> None:
    """A real greeting is understood, and a real answer comes."""
    async with open_qmp(tmp_path / "qmp", label="web1") as client:
        assert client.greeting.version >= (5, 0, 0)
        assert client.peer_pid == qemu.pid
        assert (await client.execute("query-status"))["status"] in ("running", "prelaunch")


@pytest.mark.usefixtures("qemu")
async def test_commands_at_once(tmp_path: Path) -> None:
    """More commands than QEMU queues are all answered."""
    async with open_qmp(tmp_path / "qmp", label="web1") as client:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(client.execute, "query-version")
        assert client.statistics().sent == 101


@pytest.mark.usefixtures("qemu")
async def test_unknown_command(tmp_path: Path) -> None:
    """QEMU's refusal comes with its class, and the connection stays good."""
    async with open_qmp(tmp_path / "qmp", label="web1") as client:
        with pytest.raises(CommandRefused, match="web1: the hypervisor refused no-such") as caught:
            await client.execute("no-such")
        assert caught.value.error_class == "CommandNotFound"
        await client.execute("query-status")


@pytest.mark.usefixtures("qemu")
async def test_events(tmp_path: Path) -> None:
    """QEMU's events arrive before the answer that they belong to, with a time."""
    async with open_qmp(tmp_path / "qmp", label="web1") as client:
        await client.execute("cont")
        with client.subscribe("STOP") as events:
            await client.execute("stop")
            assert events.receive_nowait().timestamp > 1.6e9


@pytest.mark.usefixtures("qemu")
async def test_a_pipe_is_handed_over(tmp_path: Path) -> None:
    """QEMU holds the pipe that was sent: it ends only when QEMU closes it."""
    reader, writer = os.pipe()
    async with trio.lowlevel.FdStream(reader) as end, open_qmp(tmp_path / "qmp", label="web1") as client:
        await client.execute("getfd", {"fdname": "there"}, fds=[writer])
        os.close(writer)
        with trio.move_on_after(0.05) as scope:
            await end.receive_some()
        assert scope.cancelled_caught
        await client.execute("closefd", {"fdname": "there"})
        assert await end.receive_some() == b""


@pytest.mark.usefixtures("qemu")
async def test_two_clients(tmp_path: Path) -> None:
    """The second client is told why it waits in vain; once the first is gone, another is served."""
    async with open_qmp(tmp_path / "qmp", label="web1"):
        with pytest.raises(ConnectionGone, match=r"web1: no greeting within 0\.2 s; another client is probably"):
            async with open_qmp(tmp_path / "qmp", label="web1", timeout=0.2):
                pytest.fail("entered")
    async with open_qmp(tmp_path / "qmp", label="web1") as client:
        await client.execute("query-status")


# Of most clients that leave with answers unread QEMU hands those to the next one; on a busy host of few.
LEAVERS, MOST_LEAVERS = 40, 1_000


def _leave(path: Path) -> socket.socket:
    """Be a client that asks and leaves before it has read; return one that has waited in the queue meanwhile."""
    # The answer to so many is larger than the socket's buffer.
    commands = [b'{"execute": "%s"}\n' % name for name in (b"qmp_capabilities", *[b"query-qmp-schema"] * 3)]
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(str(path))
        first.sendall(b"".join(commands))
        first.recv(1, socket.MSG_WAITALL)
        second = socket.socket(socket.AF_UNIX)
        second.connect(str(path))
    return second


@pytest.mark.usefixtures("qemu")
async def test_after_one_that_left_with_answers_unread(tmp_path: Path) -> None:
    """QEMU tells us what it still had to tell the earlier client; we take none of it for ours."""
    foreign = left = 0
    while left < LEAVERS or (not foreign and left < MOST_LEAVERS):
        left += 1
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(_leave(tmp_path / "qmp")))
        async with open_qmp_stream(stream, label="web1", timeout=60.0) as client:
            assert set(await client.execute("query-kvm")) == {"enabled", "present"}
            foreign += client.statistics().foreign
    assert foreign


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Keep QEMU from answering, and return once it really is stopped."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


async def test_killed_with_a_command_outstanding(tmp_path: Path, qemu: subprocess.Popen[bytes]) -> None:
    """When QEMU dies, who waits learns that the outcome is unknown, and the body goes on."""

    async def ask(client: QMPClient) -> None:
        with pytest.raises(OutcomeUnknown, match="outcome of query-status unknown: the connection was lost"):
            await client.execute("query-status")

    async with open_qmp(tmp_path / "qmp", label="web1") as client:
        _stop(qemu)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, client)
            await wait_all_tasks_blocked()
            qemu.kill()
        await client.wait_closed()
        with pytest.raises(ConnectionGone):
            await client.execute("query-status")
