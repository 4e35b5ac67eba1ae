"""A pool of clones: ready when they are taken, gone afterwards; and the plugin for pytest."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    CloneOptions,
    CreateFlag,
    DomainSnapshot,
    DomainState,
    InvalidInput,
    NotEnoughSpace,
    NotFound,
    OperationFailed,
    Refused,
    open_pool,
)
from snaporch.batch.plan import Retention
from snaporch.batch.prune import prune
from snaporch.testing import SimulatedWorld, ThreadsHoldTime, open_simulated_world


@pytest.fixture
async def world(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> AsyncIterator[SimulatedWorld]:
    async with open_simulated_world(tmp_path) as world:
        await world.orchestrator.create(world.domain, DomainSnapshot("p"), CreateFlag.LIVE)
        yield world


async def names(world: SimulatedWorld) -> set[str]:
    return {info.name for info in await world.orchestrator.domains()}


async def test_each_is_fresh_and_gone_afterwards(world: SimulatedWorld) -> None:
    """As many as are asked for are ready; one that was saved is removed with its snapshots."""
    point, files = world.host.guest(world.process()).ticks, world.host.files()
    taken = []
    async with open_pool(world.orchestrator, world.domain, "p", size=2) as pool:
        for _ in range(5):
            async with pool.take() as clone:
                copy = world.of(clone.name)
                assert clone.state is DomainState.RUNNING
                assert await copy.number() < point + 10**5  # a tenth of a second
                await copy.check_consistent()
                await world.orchestrator.create(clone.name, DomainSnapshot("seen"), CreateFlag.LIVE)
                taken.append(clone.name)
        async with pool.take(), pool.take():
            pass
        assert len(world.host.processes()) <= 1 + 2 + 7
    assert len(set(taken)) == 5
    assert await names(world) == {world.domain}
    assert world.host.files() == files
    assert not await world.orchestrator.clones(world.domain)


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 3.0, 10.0])
async def test_nothing_is_left_of_one_that_is_cancelled(world: SimulatedWorld, seconds: float) -> None:
    """Whenever that is: while clones are made, while they wait, while one is used."""
    files = world.host.files()
    with trio.move_on_after(seconds):
        async with open_pool(world.orchestrator, world.domain, "p", size=3) as pool, pool.take():
            await trio.sleep_forever()
    assert await names(world) == {world.domain}
    assert world.host.files() == files
    assert len(world.host.processes()) == 1


async def test_what_cannot_be_made_is_said(world: SimulatedWorld) -> None:
    with pytest.raises(NotFound, match="has no snapshot 'none'"):
        async with open_pool(world.orchestrator, world.domain, "none") as pool, pool.take():
            pass
    with pytest.raises(InvalidInput, match="a pool of 0"):
        async with open_pool(world.orchestrator, world.domain, "p", size=0):
            pass


async def test_one_that_was_removed_by_its_user(world: SimulatedWorld) -> None:
    async with open_pool(world.orchestrator, world.domain, "p") as pool, pool.take() as clone:
        await world.orchestrator.destroy(clone.name)
        await world.orchestrator.undefine(clone.name, discard=True)
    assert await names(world) == {world.domain}


async def test_retention_leaves_what_a_clone_needs(world: SimulatedWorld) -> None:
    orch, domain = world.orchestrator, world.domain
    for name in ("q", "r"):
        await orch.create(domain, DomainSnapshot(name), CreateFlag.LIVE)
    await orch.clone(domain, "p", "copy")
    verdicts = await prune(orch, Retention(last=1), [domain], now=world.host.epoch + world.host.now())
    assert verdicts[domain].keep.keys() == {"p", "r"}
    assert [record.name for record in await orch.list(domain)] == ["p", "r"]
    await world.of("copy").check_consistent()
    await world.check_consistent()


async def test_the_host_has_too_little_memory(world: SimulatedWorld) -> None:
    """Both figures are named, and nothing was made."""
    world.host.ram = 3 * 2**30  # one guest of one GiB runs
    files = world.host.files()
    with pytest.raises(NotEnoughSpace, match=r"3,221,225,472 bytes.*2,147,483,648"):
        await world.orchestrator.clone(world.domain, "p", "copy", CloneOptions(count=3))
    assert await names(world) == {world.domain}
    assert world.host.files() == files


async def test_discarded_halfway(world: SimulatedWorld) -> None:
    """A clone whose images are partly gone is not started, and keeps nobody from anything; it can be discarded."""
    orch = world.orchestrator
    files = world.host.files()
    await orch.clone(world.domain, "p", "copy")
    await orch.destroy("copy")
    world.host.faults.add("storage.remove", error=OSError(5, "Input/output error"))
    with pytest.raises(OperationFailed):
        await orch.undefine("copy", discard=True)
    with pytest.raises(Refused, match="was being discarded"):
        await orch.start("copy")
    await orch.delete(world.domain, "p")
    await orch.undefine("copy", discard=True)
    assert await names(world) == {world.domain}
    assert len(world.host.files()) < len(files)


TESTS = """
import pytest
from pathlib import Path
from snaporch.pytest import Machine

pytest_plugins = ["snaporch.pytest"]

@pytest.fixture(autouse=True, scope="session")
def noted():
    with pytest.MonkeyPatch.context() as patch, Path("went").open("w") as went:
        patch.setattr(Machine, "go_back", lambda self: print(self.domain, self.snapshot, file=went))
        yield

def test_one(snaporch_machine):
    assert (snaporch_machine.domain, snaporch_machine.snapshot) == ("web", "clean")

@pytest.mark.snaporch(snapshot="other")
def test_two(snaporch_machine):
    assert snaporch_machine.snapshot == "other"

def test_three(snaporch_machine):
    assert False

@pytest.mark.snaporch(snapshot="")
def test_four(snaporch_machine):
    pass
"""


def plugged(directory: Path, *options: str) -> str:
    """Run these tests with the plugin, in a program of their own; return what it says."""
    (directory / "test_machine.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "snaporch.pytest", *options]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False).stdout


def test_the_plugin_goes_back_after_each_test(tmp_path: Path) -> None:
    """Also after one that fails; and before the first of each point."""
    said = plugged(tmp_path, "--snaporch-domain=web", "--snaporch-snapshot=clean")
    assert "1 failed, 3 passed" in said
    went = (tmp_path / "went").read_text().splitlines()
    assert went == ["web clean"] * 2 + ["web other"] * 2 + ["web clean"] * 2


def test_the_plugin_wants_to_know_which(tmp_path: Path) -> None:
    assert "say which, by snaporch_domain and snaporch_snapshot" in plugged(tmp_path)
