"""A guest agent and a QEMU that say what they like: bounded in memory and time, and errors of their kind."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from snaporch.drivers.local.process import LocalProcess
from snaporch.drivers.qmp import agent, open_qmp_stream
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.drivers.qmp.shapes import _SHAPES, check_answer  # the table itself is the subject
from snaporch.errors import HypervisorError, ProtocolError
from tests.qmp.conftest import GREETING

ANSWERS: dict[str, bytes] = {
    "junk": b"hello\n",
    "list": b"[]\n",
    "deep": b'{"return":' * 50_000 + b"\n",
    "a string": b'{"return":"x"}\n',
    "a list of errors": b'{"error":[1]}\n',
    "an error that is a string": b'{"error":"x"}\n',
    "a huge number": b'{"return":1' + b"0" * 5000 + b"}\n",
    "a large number": b'{"return":1' + b"0" * 3000 + b"}\n",
    "nothing": b'{"return":null}\n',
    "a number": b"17\n",
    "true": b'{"return":true}\n',
    "less than none": b'{"return":-1}\n',
    "no text": b"\xfe\xfe\n",
}
SYNCS = {"junk": b"\xffnot json\n", "list": b"\xff[1]\n", "deep": b"\xff" + b"[" * 100_000 + b"\n", "wrong id": b""}


@asynccontextmanager
async def listening(path: Path, talk: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """Answer at a unix socket, as QEMU's end of a guest's port does."""
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()

    async def talk_to(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the other side has had enough
            await talk(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, talk_to, [trio.SocketListener(sock)]))
        yield str(path)
        nursery.cancel_scope.cancel()


async def requests(stream: trio.SocketStream) -> AsyncIterator[dict[str, Any]]:
    """Yield what an agent is asked."""
    received = b""
    async for data in stream:
        received += data
        *lines, received = received.split(b"\n")
        for line in lines:
            if text := line.lstrip(b"\xff").strip():
                yield json.loads(text)


async def hostile(stream: trio.SocketStream, sync: bytes | None, answer: bytes | None) -> None:
    """Answer as told; None: as an agent should, or not at all."""
    async for request in requests(stream):
        if request["execute"] != "guest-sync-delimited":
            await stream.send_all(answer or b"")
        elif sync is None:
            await stream.send_all(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
        else:
            await stream.send_all(sync or b'\xff{"return": 1}\n')


@pytest.mark.parametrize("name", ANSWERS)
async def test_answers_of_an_agent(tmp_path: Path, autojump_clock: MockClock, name: str) -> None:
    """An agent that answers a freeze with no number of file systems has failed, and nothing else has."""
    async with listening(tmp_path / "a", partial(hostile, sync=None, answer=ANSWERS[name])) as path:
        with pytest.raises(HypervisorError):
            await agent.freeze(path, "g")
        if name not in {"less than none", "a large number"}:  # times, if odd ones
            with pytest.raises(HypervisorError):
                await agent.set_clock(path, "g")
        with trio.fail_after(agent.THAW_SECONDS + 1):
            if name in {"a string", "nothing", "true", "less than none", "a large number"}:
                await agent.thaw(path, "g")  # it answers: what a guest says of itself is its own affair
            else:
                with pytest.raises(HypervisorError):
                    await agent.thaw(path, "g")


@pytest.mark.parametrize("name", SYNCS)
async def test_an_agent_that_does_not_come_to_an_understanding(
    tmp_path: Path, autojump_clock: MockClock, name: str
) -> None:
    """Whatever comes in place of the answer that marks the beginning is passed over, for so many seconds."""
    async with listening(tmp_path / "a", partial(hostile, sync=SYNCS[name], answer=None)) as path:
        with (
            trio.fail_after(agent.SYNC_SECONDS + 1),
            pytest.raises(HypervisorError, match="no guest agent answers"),
        ):
            await agent.freeze(path, "g")


@pytest.mark.parametrize("what", [b"x", b"\xff", b"\n", b"\xff\n", b"\xff{}\n"], ids=str)
async def test_a_flood_from_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: bytes) -> None:
    """An agent that never stops takes no memory to speak of, and no more time than one that is silent."""
    monkeypatch.setattr(agent, "SYNC_SECONDS", 0.5)

    async def flood(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(what * (65536 // len(what)))

    async with listening(tmp_path / "a", flood) as path:
        tracemalloc.start()
        try:
            with trio.fail_after(10), pytest.raises(HypervisorError):
                await agent.freeze(path, "g")
            assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
        finally:
            tracemalloc.stop()


WRONG: tuple[Any, ...] = (None, 1, True, "x", {"status": 1}, [1], [[]], [{"id": 1}], [{"name": None}])
FITS = (
    ("qom-get", "x"),
    ("query-migrate-parameters", {"status": 1}),
    ("query-cpus-fast", [{"id": 1}]),
    ("query-cpus-fast", [{"name": None}]),
)


def test_shapes() -> None:
    """Every answer that we read is refused in every other shape, and the place is named."""
    for command in _SHAPES:
        for wrong in WRONG:
            if (command, wrong) not in FITS:
                with pytest.raises(ProtocolError, match=command):
                    check_answer("web1", command, wrong)
    check_answer("web1", "query-status", {"status": "running", "running": True, "more": 1})
    check_answer("web1", "transaction", ["anything"])
    image = {"filename": "a", "virtual-size": "1"}
    inserted = {"drv": "qcow2", "ro": False, "image": image}
    with pytest.raises(ProtocolError, match=r"\[1\]\.inserted\.image\.virtual-size: no whole number"):
        check_answer("web1", "query-block", [{"device": ""}, {"device": "", "inserted": inserted}])


@pytest.mark.parametrize("value", [None, [], {}, "x", 1, [{}], [None], {"status": []}])
async def test_a_machine_of_no_shape(value: Any) -> None:
    """A QEMU whose answers are something else is an error of QEMU's, whatever it is asked."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def answer() -> None:
        await theirs.send_all(json.dumps(GREETING).encode() + b"\r\n")
        received = b""
        async for data in theirs:
            received += data
            *lines, received = received.split(b"\n")
            for line in lines:
                request = json.loads(line)
                good = {} if request["execute"] == "qmp_capabilities" else value
                await theirs.send_all(json.dumps({"return": good, "id": request["id"]}).encode() + b"\r\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        async with open_qmp_stream(ours, label="web1") as qmp:
            machine = QemuMachine(qmp, QemuProcess(LocalProcess(1, 1), "/nowhere"))
            with pytest.raises(ProtocolError, match="no such answer"):
                await machine.opened().__aenter__()
            with pytest.raises(ProtocolError):
                await machine.state()
        nursery.cancel_scope.cancel()
