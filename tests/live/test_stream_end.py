"""A precopy that is ended when it was just about to end by itself, again and again: the guest runs on.

QEMU 7.2 aborts at one in some dozens of these moments when it is told to cancel while its guest runs (rule 6 of
stream.py, whose order of commands tests/qmp/test_stream.py has).
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from snaporch.drivers.base import Stream, StreamPlan, untold
from snaporch.drivers.local import guard
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp import guard as action
from snaporch.model.request import Strategy
from snaporch.orchestrator import catalog_of
from tests.live.world import HEAVY, NAME, MakeWorld, World

pytestmark = pytest.mark.live

End = Callable[[Stream], Awaitable[None]]


async def check_ended(world: World, prepare: Callable[[], End]) -> None:
    """End precopies at random moments in the last part of the time that the first takes; the guest runs on."""
    handle = (await catalog_of(world.orch).domain(NAME)).handle
    assert handle is not None
    path, most = world.directory / "memory", 0.0
    async with QemuDriver().connect(handle, NAME) as machine:
        for number in range(80 if world.qemu.old else 10):
            path.touch()
            stream = machine.stream(StreamPlan(str(path), Strategy.PRECOPY, settings=await machine.settings()))
            end = prepare() if number else None
            await stream.open()
            await stream.start()
            began = trio.current_time()
            if end is not None:
                await trio.sleep(random.uniform(most / 3, most))  # noqa: S311 - no secret
                await end(stream)
            else:
                await stream.finished(untold)
                most = trio.current_time() - began
            await stream.abort()
            await machine.resume()  # it had come to its end
    await world.check_runs(3)


async def test_abort(make_world: MakeWorld) -> None:
    """As of a create that is cancelled, fails or takes too long."""
    await check_ended(await make_world(append=HEAVY), lambda: Stream.abort)


async def test_guard(make_world: MakeWorld) -> None:
    """By the guard, as when snaporch dies."""
    world = await make_world(append=HEAVY)
    socket = Path(await world.socket()).with_name("query.sock")

    def prepare() -> End:
        command = [sys.executable, "-I", "-S", guard.__file__, action.__file__, "pause", str(socket)]
        command += ["-", "-", "cancel", "-", "-", "-"]
        posted = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

        async def end(_: Stream) -> None:
            await trio.to_thread.run_sync(posted.communicate)  # its leash ends
            assert posted.returncode == 0

        assert posted.stdout is not None
        assert posted.stdout.read(len(guard.READY)) == guard.READY
        return end

    await check_ended(world, prepare)
