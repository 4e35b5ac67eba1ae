"""SIGSTOP of snaporch while it holds a guest: the guest runs after some seconds, and what was begun is rolled back.

A long pause of a snaporch that works goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

import pytest
import trio

from snaporch.drivers.local import leash
from snaporch.drivers.local.guard import SILENCE
from snaporch.model.request import Strategy
from snaporch.testing.dying import hypervisors
from tests.live.world import MIB, NAME, SECONDS, SLOW, SLOW_BANDWIDTH, MakeWorld, World

pytestmark = pytest.mark.live

# Guards count whole seconds, and the machine may be busy.
STANDS_SECONDS = 3.0 * SILENCE


@asynccontextmanager
async def stopped(world: World, where: str, *arguments: object) -> AsyncIterator[trio.Process]:
    """Have another process operate on the world, stop at a place, and go on, and fail, when the body is left."""
    module = [sys.executable, "-m", "snaporch.testing.dying"]
    words = [*module, str(world.root), NAME, where, "stop", *map(str, arguments)]
    process = await trio.lowlevel.open_process(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        with trio.fail_after(SECONDS):
            while not await process.stdout.receive_some():
                pass
        yield process
    finally:
        os.kill(process.pid, signal.SIGCONT)
        with trio.fail_after(2 * SECONDS, shield=True):
            said = b"".join([chunk async for chunk in process.stderr])
            await process.wait()
    assert process.returncode == 1, said
    assert b"everything is as it was" in said


@contextmanager
def one_monitor(socket: Path) -> Iterator[None]:
    """Have QEMU's second monitor out of sight."""
    hidden = socket.rename(socket.with_name("hidden"))
    try:
        yield
    finally:
        hidden.rename(socket)


async def stop(world: World, where: str, *arguments: object, alone: bool = False) -> None:
    """Stop it, see the old guest run, let it go on, and see that all is as it was before."""
    before = await world.everything()
    aside = Path(await world.socket()).with_name("query.sock")
    with one_monitor(aside) if alone else nullcontext():
        async with stopped(world, where, *arguments):
            with trio.fail_after(STANDS_SECONDS):
                while len(hypervisors(str(world.root), NAME)) > 1:  # noqa: ASYNC110 - nothing tells us
                    await trio.sleep(0.05)
                await world.check_runs(3)
    await world.check_same(before, where)
    await world.check_runs(3)
    await world.check_no_orphans()
    assert not await world.orch.recover()
    assert not list((world.root / "locks").glob("*.verdict"))


@pytest.mark.window("snaporch is stopped at a fault point")
async def test_create(make_world: MakeWorld) -> None:
    """Stopped in the pause of a create: the guest runs, and its memory and disks never become a snapshot."""
    world = await make_world(append=SLOW)
    # QEMU 7.2 lets the guest run by itself once it has what it needs.
    for place in ("after:pause#1", "after:switch#1", "after:start_stream#1")[: 2 if world.qemu.old else 3]:
        await stop(world, place, "create", "point", Strategy.BACKGROUND)
    await stop(world, "after:start_stream#1", "create", "point", Strategy.PAUSED, SLOW_BANDWIDTH)
    await stop(world, "after:finish_stream#1", "create", "point", Strategy.PRECOPY)


@pytest.mark.window("snaporch is stopped at a fault point")
async def test_revert(make_world: MakeWorld) -> None:
    """Stopped when the old guest is paused, and when the new one runs: the old one runs again, and never both."""
    world = await make_world()
    await world.create("point")
    for place in ("after:stand_still#1", "after:take_over#1"):
        await stop(world, place, "revert", "point")


@pytest.mark.window("snaporch is stopped at a fault point")
async def test_one_monitor(make_world: MakeWorld) -> None:
    """Of a QEMU with one monitor snaporch's connection is ended, and all is undone over another."""
    world = await make_world()
    await stop(world, "after:switch#1", "create", "point", Strategy.BACKGROUND, alone=True)
    await world.create("point")
    await stop(world, "after:stand_still#1", "revert", "point", alone=True)


@pytest.mark.window("the rate of the stream")
async def test_long_pause(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause much longer than the guard's patience is no matter, as snaporch works: the create is complete."""
    monkeypatch.setattr(leash, "BEAT_SECONDS", 0.5)
    world = await make_world(append="ram=64")
    record = await world.create("point", Strategy.PAUSED, bandwidth=64 * MIB // (SILENCE + 3))
    assert record.timings.pause is not None
    assert record.timings.pause > SILENCE + 1
    await world.revert("point")
    await world.check_consistent()
