"""What a stream makes of what QEMU says, where that is a matter of microseconds in a real one."""

from __future__ import annotations

import pytest
import trio

from snaporch.drivers.base import StreamPlan, untold
from snaporch.drivers.qmp.stream import QemuStream, Source, foreseen
from snaporch.model.request import Strategy
from tests.qmp.conftest import Connect, Peer


@pytest.mark.parametrize("how", ["finished", "abort"])
async def test_the_run_state_comes_later(connect: Connect, how: str) -> None:
    """A migration says that it is completed, and for a moment `cont` would still be refused: that is waited for."""
    answers = {
        "query-migrate": {"status": "completed", "ram": {"transferred": 1}},
        "query-status": {"status": "finish-migrate", "running": False},
    }
    asked: list[str] = []

    async def answering(peer: Peer) -> None:
        while True:
            command = await peer.receive()
            asked.append(command["execute"])
            if asked.count("query-status") == 3:
                answers["query-status"] = {"status": "postmigrate", "running": False}
            await peer.answer(command, answers.get(command["execute"]))

    plan = StreamPlan("/nowhere/memory", Strategy.PAUSED, settings={"capabilities": [], "parameters": {}})
    async with connect() as (client, peer), trio.open_nursery() as nursery:
        nursery.start_soon(answering, peer)
        with client.subscribe("MIGRATION") as events:
            stream = QemuStream(Source(client, 0, events, cancellable=True), plan)
            await (stream.finished(untold) if how == "finished" else stream.abort())
        assert asked.count("query-status") == (3 if how == "finished" else 4)  # and once for its images
        nursery.cancel_scope.cancel()


SECONDS = 5.0
STANDING = ["query-status", "stop", "query-status", "migrate_cancel"]


@pytest.mark.parametrize(
    ("states", "asked", "goes_on"),
    [
        (["running", "paused"], STANDING, True),
        (["running", "finish-migrate"], STANDING[:3], True),
        (["finish-migrate", "finish-migrate"], STANDING[:1] * 2, False),
        (["paused", "paused"], [*STANDING[:1] * 2, "migrate_cancel"], False),
    ],
)
async def test_a_cancelled_precopy_stands(
    connect: Connect, states: list[str], asked: list[str], *, goes_on: bool
) -> None:
    """No precopy is cancelled while its guest runs, nor when its end has begun: QEMU 7.2 aborts then."""
    left = [*states, "postmigrate"]
    commands: list[str] = []

    async def answering(peer: Peer) -> None:
        while True:
            command = await peer.receive()
            answer: dict[str, object] = {}
            if command["execute"] == "query-status":
                state = left.pop(0) if len(left) > 1 else left[0]
                answer = {"status": state, "running": state == "running"}
            elif command["execute"] == "query-migrate":
                answer = {"status": "completed" if len(left) == 1 else "active"}
            if command["execute"] in {*STANDING, "cont"}:
                commands.append(command["execute"])
            await peer.answer(command, answer)

    plan = StreamPlan("/nowhere/memory", Strategy.PRECOPY, settings={"capabilities": [], "parameters": {}})
    async with connect() as (client, peer), trio.open_nursery() as nursery:
        nursery.start_soon(answering, peer)
        with client.subscribe("MIGRATION") as events, trio.fail_after(SECONDS):
            await QemuStream(Source(client, 0, events, cancellable=True), plan).abort()
        nursery.cancel_scope.cancel()
    assert commands[: len(asked)] == asked
    assert ("cont" in commands) == goes_on
    assert "migrate_cancel" not in commands[len(asked) :]


@pytest.mark.parametrize(
    ("total", "left", "sent", "expected"),
    [
        (100, 100, 0, (0, 0)),  # nothing was looked at
        (100, 50, 0, (0, 0)),
        (100, 50, 10, (10, 20)),  # as much of the rest is zero
        (100, 0, 20, (20, 20)),
        (100, 10, 300, (300, 310)),  # of what is sent again nothing is
    ],
)
def test_what_will_be_sent(total: int, left: int, sent: int, expected: tuple[int, int]) -> None:
    """Not all of RAM: pages that are zero take nothing."""
    assert foreseen({"total": total, "remaining": left, "transferred": sent}) == expected
    assert foreseen({}) == (0, 0)
