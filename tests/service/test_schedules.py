"""The service runs plans when they are due."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

import os
from pathlib import Path

import httpx2
import trio
from trio.testing import MockClock

from snaporch.drivers.simulated import ThreadsHoldTime
from snaporch.service.app import make_app
from snaporch.service.service import open_service
from snaporch.testing import open_simulated_world
from tests.service.conftest import ROOT_PEER, peer

PLAN = """
name = "each-minute"
select = { globs = ["*"] }
schedule = { cron = "* * * * *" }
"""


async def test_schedules(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Plans in the root's directory run when they are due, and it can be asked how things stand."""
    plans = tmp_path / "root/plans"
    async with open_simulated_world(tmp_path / "root") as world:
        plans.mkdir()
        (plans / "a.toml").write_text(PLAN)
        os.utime(plans / "a.toml", (1, 1))  # long ago: a run was missed, and is made up for at once
        async with open_service(world.orchestrator) as service:
            transport = httpx2.ASGITransport(app=make_app(service))
            async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
                with peer(ROOT_PEER):
                    while not (found := (await http.get("/v1/schedules")).json())[0]["outcome"]:  # noqa: ASYNC110
                        await trio.sleep(1)
    assert [(each["plan"], each["outcome"], each["error"]) for each in found] == [("each-minute", "complete", "")]
