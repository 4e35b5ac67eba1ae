"""What a stream makes of what QEMU says, where that is a matter of microseconds in a real one."""

from __future__ import annotations

import pytest
import trio

from snaporch.drivers.base import StreamPlan, untold
from snaporch.drivers.qemu.stream import QemuStream
from snaporch.models import Strategy
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
            stream = QemuStream(client, 0, events, plan, cancellable=True)
            await (stream.finished(untold) if how == "finished" else stream.abort())
        assert asked.count("query-status") == 3
        nursery.cancel_scope.cancel()
