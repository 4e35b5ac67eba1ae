"""Groups of real guests: all members are taken, go back and are deleted, or none, whoever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.engine.states import State
from snaporch.errors import OperationFailed
from snaporch.guest.report import parse, parse_errors
from snaporch.model.domain import DomainState
from snaporch.model.record import OperationRecord
from snaporch.model.request import CreateOptions
from snaporch.model.rfc import CreateFlag, DomainSnapshot
from tests.live.world import NAME, SECONDS, SLOW, SLOW_BANDWIDTH, MakeWorld, World, make_image, when

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
OTHER = "other"
BOTH = (NAME, OTHER)
GROUP = f"{NAME},{OTHER}"
ROUNDS = 2
SOAK_SECONDS = 300.0


@attrs.frozen
class Pair:
    """The guest of a world, and another one beside it."""

    world: World
    log: Path

    async def create(self, name: str, bandwidth: int = 0) -> None:
        """Take both at one point, while they run."""
        options = CreateOptions(bandwidth=bandwidth)
        await self.world.orch.create_group(BOTH, DomainSnapshot(name), CreateFlag.LIVE, options)

    async def names(self) -> list[list[str]]:
        """Return the names of the snapshots of each."""
        return [[record.name for record in await self.world.orch.list(name)] for name in BOTH]

    async def last(self) -> OperationRecord:
        """Return the last operation, which was one on both."""
        one, two = [(await self.world.orch.operations(name))[-1] for name in BOTH]
        assert one == two
        return one

    async def pids(self) -> list[int | None]:
        """Return the process of each."""
        return [(await self.world.orch.domain_info(name)).pid for name in BOTH]

    async def check_run(self) -> None:
        """Assert that both run, and find their memory and their disks to be of one instant."""
        since = self.log.stat().st_size
        await self.world.check_consistent()
        with trio.fail_after(SECONDS):
            while len(found := parse(self.text(since))) < 5:  # noqa: ASYNC110 - nothing tells us
                await trio.sleep(0.01)
        assert found[-1].errors == 0, parse_errors(self.text(since))

    def text(self, since: int = 0) -> str:
        """Return what the other one has said since a place in its log."""
        return self.log.read_bytes()[since:].decode(errors="replace")

    async def killed(self, where: str, verb: str, name: str) -> None:
        """Have another process operate on the group and be killed, and then recover."""
        words = [
            sys.executable,
            "-m",
            "snaporch.testing.dying",
            str(self.world.root),
            GROUP,
            where,
            "us",
            verb,
            name,
        ]
        done = await trio.run_process(words, capture_stdout=True, check=False)
        assert done.returncode == -signal.SIGKILL, f"it was never {where}"
        await self.world.orch.recover()
        assert not await self.world.orch.recover()


@asynccontextmanager
async def pair(make_world: MakeWorld, append: str = "") -> AsyncIterator[Pair]:
    """Give two running guests in one orchestrator."""
    world = await make_world(append=append)
    disk = attrs.evolve(world.definition.disks[0], path=str(world.directory / f"{OTHER}.qcow2"))
    make_image(world.qemu, Path(disk.path))
    log = world.directory / f"{OTHER}.log"
    await world.orch.define(attrs.evolve(world.definition, name=OTHER, disks=(disk,), serial=str(log)))
    try:
        await world.orch.start(OTHER)
        with trio.fail_after(SECONDS):
            while not log.exists() or not parse(log.read_text(errors="replace")):  # noqa: ASYNC110 - nothing tells us
                await trio.sleep(0.01)
        yield Pair(world, log)
    finally:
        with trio.CancelScope(shield=True):
            await world.orch.destroy(OTHER)
        (world.directory / f"{OTHER}.qcow2").unlink()


async def test_group(make_world: MakeWorld) -> None:
    """Both go back to the point, again and again, and nothing but the point is gone when it is deleted."""
    async with pair(make_world) as two:
        orch = two.world.orch
        await two.create("g1")
        await two.create("g2")
        for name in ("g1", "g1"):
            old = await two.pids()
            await orch.revert_group(BOTH, name)
            assert not set(old) & set(await two.pids())
            await two.check_run()
        plans = await orch.delete_group(BOTH, "g1")
        assert set(plans) == set(BOTH)
        assert await two.names() == [["g2"], ["g2"]]
        assert (await two.last()).kind == "delete"
        await orch.revert_group(BOTH, "g2")
        await two.check_run()
        await orch.delete_group(BOTH, "g2")
        await two.world.check_runs()
        await two.world.check_no_orphans()


@pytest.mark.parametrize("qemu", ["10.0"], indirect=True)  # one is enough: what is killed is us
async def test_killed(make_world: MakeWorld) -> None:
    """We are killed in a create, a revert, a delete, with one member done and the other not: all old or all new."""
    async with pair(make_world) as two:
        await two.killed("after:switch#1", "create", "g0")
        assert await two.names() == [[], []]
        await two.create("g1")
        old = await two.pids()
        for where in ("after:take_over#1", "after:take_over#2"):
            await two.killed(where, "revert", "g1")
            assert (await two.last()).state == State.ROLLED_BACK, where
            assert await two.pids() == old, where
            await two.world.check_runs()
        await two.killed("before:settle_merges#2", "delete", "g1")
        assert (await two.last()).state == State.COMPLETE
        assert await two.names() == [[], []]
        await two.check_run()
        await two.world.check_no_orphans()


async def test_one_dies(make_world: MakeWorld) -> None:
    """A member's QEMU is killed in the midst of a create: the other is as before, and this one loses nothing."""
    async with pair(make_world, append=SLOW) as two:
        orch = two.world.orch
        before = await two.world.everything()
        _, pid = await two.pids()
        assert pid is not None

        def kill() -> None:
            os.kill(pid, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            await nursery.start(when, orch, State.STREAMING, kill)
            with pytest.raises(OperationFailed, match=OTHER):
                await two.create("g1", SLOW_BANDWIDTH)
        assert (await two.last()).state == State.ROLLED_BACK
        del before["processes"]  # there is one less
        await two.world.check_same(before)
        await two.world.check_runs()
        assert (await orch.domain_info(OTHER)).state is DomainState.INACTIVE
        said = parse(two.text())[-1].seq
        since = two.log.stat().st_size
        await orch.start(OTHER)
        with trio.fail_after(SECONDS):
            while not (found := parse(two.text(since))):  # noqa: ASYNC110 - nothing tells us
                await trio.sleep(0.01)
        assert found[0].seq >= said
        await two.create("g1")
        await two.check_run()


def test_nobody_has_heard_what_was_not_sent(tmp_path: Path) -> None:
    """Guests that send each other numbers, taken as a group, agree on what was sent, by `proof groups`."""
    page = tmp_path / "group.md"
    words = ["--count", str(ROUNDS), "--work", str(tmp_path), "--page", str(page)]
    command = [sys.executable, "-m", "proofs.groups", *words]
    done = subprocess.run(
        command, cwd=ROOT / "scripts", capture_output=True, text=True, check=False, timeout=SOAK_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| group | {ROUNDS} | 0 |" in page.read_text()
