"""What only a real Unix socket can show: descriptors, long paths, who listens, memory."""

from __future__ import annotations

import array
import json
import os
import socket
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snaporch.drivers.qmp import LINE_LIMIT, open_qmp, open_qmp_stream
from snaporch.errors import ConnectionGone, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}\n'
)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Listen on ``qmp`` in the test's folder, with room for one that waits."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "qmp"))
        server.listen(0)
        yield server


async def _accept(listener: socket.socket) -> trio.socket.SocketType:
    listener.setblocking(False)
    with trio.socket.from_stdlib_socket(listener.dup()) as server:
        return (await server.accept())[0]


async def _receive(peer: trio.socket.SocketType) -> tuple[int, list[int]]:
    data, ancillary, _, _ = await peer.recvmsg(65536, socket.CMSG_SPACE(4 * 8))
    fds = array.array("i")
    for _, _, piece in ancillary:
        fds.frombytes(piece)
    return int(json.loads(data)["id"]), list(fds)


async def _answer(peer: trio.socket.SocketType, number: int) -> None:
    await peer.send(b'{"return": {}, "id": %d}\r\n' % number)


async def _negotiate(peer: trio.socket.SocketType) -> None:
    await peer.send(GREETING)
    await _answer(peer, (await _receive(peer))[0])


async def test_descriptors_go_with_the_command() -> None:
    """The receiver of the command has the descriptors with it; they stay open here."""
    ours, theirs = trio.socket.socketpair()
    reader, writer = os.pipe()

    async def qemu() -> None:
        await _negotiate(theirs)
        number, fds = await _receive(theirs)
        assert len(fds) == 2
        for fd in fds:
            os.write(fd, b"x")
            os.close(fd)
        await _answer(theirs, number)

    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu)
            async with open_qmp_stream(trio.SocketStream(ours), label="web1") as client:
                assert client.peer_pid == os.getpid()
                await client.execute("getfd", {"fdname": "x"}, fds=[writer, writer])
    assert os.read(reader, 8) == b"xx"
    os.write(writer, b"still open")
    os.close(reader)
    os.close(writer)


async def test_a_closed_descriptor_is_not_sent() -> None:
    """A descriptor that is not open raises OSError, and the connection stays good."""
    ours, theirs = trio.socket.socketpair()
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)

    async def qemu() -> None:
        await _negotiate(theirs)
        number, fds = await _receive(theirs)
        assert fds == []
        await _answer(theirs, number)

    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu)
            async with open_qmp_stream(trio.SocketStream(ours), label="web1") as client:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    await client.execute("getfd", {"fdname": "x"}, fds=[writer])
                await client.execute("query-status")
                assert client.statistics().unanswered == 0


@pytest.mark.parametrize("length", [107, 108, 250])
async def test_paths_of_any_length(tmp_path: Path, length: int) -> None:
    """A path longer than the kernel's limit for socket addresses is connected to all the same."""
    folder = tmp_path / ("d" * (length - len(f"{tmp_path}//qmp")))
    folder.mkdir()
    assert len(f"{folder}/qmp") == length
    with socket.socket(socket.AF_UNIX) as server:
        directory = os.open(folder, os.O_PATH)
        server.bind(f"/proc/self/fd/{directory}/qmp")
        os.close(directory)
        server.listen(1)

        async def qemu() -> None:
            with await _accept(server) as peer:
                await _negotiate(peer)
                assert await peer.recv(1) == b""

        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu)
            async with open_qmp(folder / "qmp", label="web1") as client:
                assert client.greeting.version == (10, 0, 2)


@pytest.mark.parametrize("name", ["absent", "file", "x" * 200])
async def test_nobody_listens(tmp_path: Path, name: str) -> None:
    """A path without a listener is a ConnectionGone with label and path."""
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionGone, match=f"web1: cannot connect to {tmp_path}/{name}: "):
        async with open_qmp(tmp_path / name, label="web1"):
            pytest.fail("entered")


@pytest.mark.usefixtures("listener")
async def test_too_many_wait(tmp_path: Path) -> None:
    """Where the listener's queue stays full, that is said after the time for it."""
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(tmp_path / "qmp"))
        with pytest.raises(ConnectionGone, match=r"web1: .*/qmp has had no room for another connection for 0\.1 s"):
            async with open_qmp(tmp_path / "qmp", label="web1", timeout=0.1):
                pytest.fail("entered")


async def test_room_is_waited_for(tmp_path: Path, listener: socket.socket) -> None:
    """Where the listener's queue is full for a while, the client waits for its turn."""

    async def qemu() -> None:
        await wait_all_tasks_blocked()  # the client has found no room
        with await _accept(listener):
            pass
        with await _accept(listener) as peer:
            await _negotiate(peer)
            assert await peer.recv(1) == b""

    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(tmp_path / "qmp"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu)
            async with open_qmp(tmp_path / "qmp", label="web1") as client:
                assert client.greeting.version == (10, 0, 2)


async def test_a_line_without_end_is_cut_off(tmp_path: Path, listener: socket.socket) -> None:
    """Of 100 MiB without a newline little more than the limit is ever held, and the sender is hung up on."""

    async def flood() -> None:
        async with trio.SocketStream(await _accept(listener)) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await _send_often(stream, b"x" * 65536, 1600)

    tracemalloc.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            with pytest.raises(ProtocolError, match=r"web1: .* a line of more than 16,777,216 bytes"):
                async with open_qmp(tmp_path / "qmp", label="web1"):
                    pytest.fail("entered")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Growing copies: the old and the new buffer exist together for a moment.
    assert peak < 3 * LINE_LIMIT


async def _send_often(stream: trio.SocketStream, chunk: bytes, times: int) -> None:
    for _ in range(times):
        await stream.send_all(chunk)
