"""The event loop is never held up, and our own process stays small, whatever the size of the guest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from snaporch.drivers.local.files import LocalStorage
from tests.live.world import MIB, NAME, MakeWorld, Qemu

pytestmark = [pytest.mark.live, pytest.mark.heavy]

TICK = 0.01
MOST = 0.05


def waited_for_a_cpu() -> float:
    """Return the seconds in which this thread was ready to run, and another one ran; see proc(5), schedstat."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


@asynccontextmanager
async def ticking() -> AsyncIterator[None]:
    """Assert that nothing in the body holds up the event loop; that others have the CPUs is not held against it."""
    late = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            due = trio.current_time() + TICK
            used, waited = os.times(), waited_for_a_cpu()
            await trio.sleep_until(due)
            now = os.times()
            # A machine that is busy with something else delays us too; then this thread has waited for a CPU, or
            # all of us have used little of the time.
            ours = now.user + now.system - used.user - used.system
            held = trio.current_time() - due - (waited_for_a_cpu() - waited)
            late = max(late, min(held, ours))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        await trio.sleep(10 * TICK)
        yield
        nursery.cancel_scope.cancel()
    assert late < MOST, f"late by {late * 1000:.0f} ms"


async def test_it_is_seen() -> None:
    """What does hold up the loop is found."""

    async def held_up() -> None:
        async with ticking():
            until = time.thread_time() + 3 * MOST
            while time.thread_time() < until:
                pass
            await trio.sleep(2 * TICK)

    with pytest.raises(AssertionError, match="late by"):
        await held_up()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of 1 GiB, some of it not zero."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        for number in range(64):
            file.seek(number * 16 * MIB)
            file.write(os.urandom(MIB))
        file.truncate(1024 * MIB)
    return path


async def test_checksum(large: Path) -> None:
    """While 1 GiB is checksummed a 10 ms ticker is not late."""
    async with ticking():
        record = await LocalStorage().seal(str(large))
    large.unlink()
    assert record.size == 1024 * MIB


async def test_create(make_world: MakeWorld) -> None:
    """While a guest of 1 GiB is checkpointed a 10 ms ticker is not late."""
    world = await make_world(memory=1024 * MIB, append="ram=200 dirty=100")
    async with ticking():
        await world.create("a")
    await world.check_runs()


OTHER_PROCESS = """
import sys, trio
from snaporch import open_orchestrator, CreateFlag, DomainSnapshot

async def main():
    async with open_orchestrator(sys.argv[1]) as orch:
        await orch.create("guest", DomainSnapshot("a"), CreateFlag.LIVE)

trio.run(main)
# Not ru_maxrss: that begins with what the process that started this one had.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


async def test_memory(make_world: MakeWorld, qemu: Qemu) -> None:
    """Our own process stays under 100 MiB while a guest of 2 GiB, most of it filled, is checkpointed."""
    world = await make_world(memory=2048 * MIB, append="ram=1500 dirty=50")
    done = await trio.run_process(
        [sys.executable, "-c", OTHER_PROCESS, str(world.root)], capture_stdout=True, stdin=subprocess.DEVNULL
    )
    record = await world.orch.show(NAME, "a")
    assert record.memory is not None
    assert 1500 * MIB < record.memory.size < 2048 * MIB * 1.02, qemu
    assert int(done.stdout) * 1024 < 100 * MIB
    await world.check_runs(2)
