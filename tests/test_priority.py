"""While a guest is paused our thread has real-time priority, where it may; nothing that it starts has it."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from trio.testing import MockClock

from snaporch import CreateFlag, DomainSnapshot, open_orchestrator
from snaporch.engine.realtime import prompt
from snaporch.testing import SimulatedDriver, ThreadsHoldTime, open_simulated_world


def policy(thread: int = 0) -> int:
    return os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK


def may_have_priority() -> bool:
    """Whether the kernel gives a process of ours real-time priority."""
    asked = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", asked], capture_output=True, check=False).returncode == 0


@pytest.fixture
def wanted() -> Iterator[int]:
    """What the thread has while a guest is paused; before and after it has what it had."""
    before = os.sched_getscheduler(0)
    yield os.SCHED_RR if may_have_priority() else os.SCHED_OTHER
    assert os.sched_getscheduler(0) in {before, before | os.SCHED_RESET_ON_FORK}


def test_side_by_side(wanted: int) -> None:
    """Of several that stand at one time the first takes it and the last gives it back, whichever that is."""
    first, second = prompt(), prompt()
    for each in (first, second):
        each.__enter__()
        assert policy() == wanted
    first.__exit__(None, None, None)
    assert policy() == wanted
    second.__exit__(None, None, None)
    assert policy() == os.SCHED_OTHER


@pytest.mark.usefixtures("wanted")
def test_nobody_else() -> None:
    """Threads and processes that are started meanwhile do not have it."""
    found: list[int] = []
    with prompt():
        thread = Thread(target=lambda: found.append(policy()))
        thread.start()
        thread.join()
        asked = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
        found.append(int(subprocess.run(asked, capture_output=True, check=True).stdout))
    assert found == [os.SCHED_OTHER] * 2


@pytest.mark.usefixtures("wanted")
def test_the_program_has_chosen() -> None:
    """A thread that has another policy already keeps it."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        with prompt():
            assert policy() == os.SCHED_IDLE
        assert policy() == os.SCHED_IDLE
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.parametrize("realtime", [True, False])
async def test_create(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, wanted: int, realtime: bool
) -> None:
    """It is had from before the guest is paused until it runs, and at no other time; or never, when so asked."""
    had: dict[str, int] = {}
    async with open_simulated_world(tmp_path) as world:
        world.host.on_call = lambda at, _domain: had.__setitem__(at, policy())
        driver = SimulatedDriver(world.host)
        async with open_orchestrator(tmp_path, drivers={"simulated": driver}, realtime=realtime) as orch:
            await orch.create(world.domain, DomainSnapshot("point"), CreateFlag.LIVE)
    stands = {at for at, found in had.items() if found != os.SCHED_OTHER}
    pause = {"machine.pause", "machine.switch", "stream.start", "stream.armed", "machine.resume"}
    assert stands == (pause if realtime and wanted == os.SCHED_RR else set())
