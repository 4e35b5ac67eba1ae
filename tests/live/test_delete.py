"""Deletes change nothing for the guest and for every other snapshot, wherever in the tree and however cut short."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import snaporch.operations.delete
from scripts.benchlib.tree import Tree
from snaporch.drivers.base import PivotNote
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qmp import blockjob
from snaporch.drivers.qmp.blockjob import BlockJob
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.drivers.qmp.merge import Merger
from snaporch.engine.states import State
from snaporch.errors import InvalidInput, NotFound, Stranded
from snaporch.model.merge import MergePlan
from snaporch.model.record import Event
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeleteFlag, RevertFlag
from snaporch.operations.merging import Merging
from tests.live.world import MIB, NAME, SECONDS, MakeWorld, World, when

pytestmark = pytest.mark.live

NUMBERS = 2  # that the guest has to write on every disk to be believed
LIGHT = {"memory": 40 * MIB, "append": "ram=2 dirty=1 rate=200 report=20"}  # it is the disks that matter here


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A world with a running guest of two qcow2 disks, under heavy writes, and little RAM."""
    return await make_world(**LIGHT)


class CrashError(Exception):
    """Stands for the end of this process: nothing here catches it."""


async def delete(world: World, name: str, flags: DeleteFlag = DeleteFlag(0)) -> MergePlan:  # noqa: B008
    """Delete, and assert that nothing is wrong with what remains."""
    plan = await world.orch.delete(NAME, name, flags)
    assert not plan.doomed & set(await names(world))
    await check_files(world)
    return plan


async def names(world: World) -> list[str]:
    return [record.name for record in await world.orch.list(NAME)]


async def check_files(world: World) -> None:
    """Assert that each snapshot is what was saved, that every file is known, and that the user's own are there."""
    records = await world.orch.list(NAME)
    parents = {record.parent for record in records}
    for record in records:
        if record.name not in parents:  # the chains of the others are in its chain
            report = await world.orch.verify(NAME, record.name)
            assert report.ok, report.problems
        for file in {file for files in record.images.values() for file in files}:
            await LocalStorage().check(file, thorough=True)
    await world.check_no_orphans()
    assert all(Path(disk.path).exists() for disk in world.definition.disks)
    assert not any(record.deleting for record in records)


async def check_guest(world: World, what: str = "on") -> None:
    """Ask the guest; see `scripts.benchlib.tree.Check`."""
    if what in {"on", "restored"}:
        await world.check_runs(NUMBERS)
    else:
        found = await world.wait_report(lambda report: report.checked > 0)
        assert found.errors == 0


async def check_reverts(world: World) -> None:
    """Assert that each snapshot can be reverted to, and is whole."""
    for record in await world.orch.list(NAME):
        await world.revert(record.name, RevertFlag.RUNNING)
        await check_guest(world, "restored" if record.memory else "boots")


async def chain(world: World, *names: str) -> None:
    """Create snapshots, the guest writing after each."""
    for name in names:
        await world.create(name)
        await world.check_runs(NUMBERS)


def kinds(plan: MergePlan) -> set[tuple[str, str]]:
    return {(step.kind, step.where) for step in plan.steps}


async def test_everywhere_in_a_chain(world: World) -> None:
    """The first, one in the middle, and the one that the domain runs on top of: live, and the guest goes on."""
    await chain(world, "a", "b", "c", "d")
    middle = await delete(world, "b")
    assert {where for _, where in kinds(middle)} == {"live"}
    await world.check_runs(NUMBERS)
    assert (await world.orch.show(NAME, "c")).parent == "a"
    first = await delete(world, "a")
    assert kinds(first) == {("commit", "live")}  # into the user's own disk, which stays
    assert {step.base for step in first.steps} == {disk.path for disk in world.definition.disks}
    await world.check_runs(NUMBERS)
    assert await world.orch.current(NAME) == "d"
    last = await delete(world, "d")
    assert {where for _, where in kinds(last)} == {"live"}
    await world.check_runs(NUMBERS)
    assert await world.orch.current(NAME) == "c"
    assert kinds(middle) | kinds(last) | kinds(first) == {("commit", "live"), ("stream", "live")}
    await check_reverts(world)
    await delete(world, "c")
    assert not world.images()
    assert [d.chain for d in (await world.orch.domain_info(NAME)).disks] == [
        (disk.path,) for disk in world.definition.disks
    ]
    await world.check_runs(NUMBERS)
    await world.orch.destroy(NAME)
    await world.check_nothing_lost()


async def test_branches(world: World) -> None:
    """An image with two branches on it stays as a link, and merges when one is left."""
    await chain(world, "root", "a")
    await world.revert("a")
    await chain(world, "left")
    await world.revert("a")
    await chain(world, "right")
    plan = await delete(world, "a")
    assert not plan.steps
    assert [reason.partition(";")[0] for _, reason in plan.kept] == ["2 images are backed by it"] * 2
    assert await world.orch.tree(NAME) == {None: ("root",), "root": ("left", "right")}
    links = {path for path, _ in plan.kept}
    plan = await delete(world, "left")
    assert not plan.kept
    info = await world.orch.domain_info(NAME)
    merged = {step.top if step.kind == "commit" else step.base for step in plan.steps}
    assert links <= merged | {path for disk in info.disks for path in disk.chain}
    await world.check_runs(NUMBERS)
    await check_reverts(world)


async def test_descendants(world: World) -> None:
    """CHILDREN_ONLY leaves the snapshot, CHILDREN nothing; the guest, which descends from them, goes on."""
    await chain(world, "a", "b")
    await world.revert("a")
    await chain(world, "c")
    with pytest.raises(InvalidInput):
        await world.orch.delete(NAME, "a", DeleteFlag.CHILDREN | DeleteFlag.CHILDREN_ONLY)
    with pytest.raises(NotFound):
        await world.orch.delete(NAME, "z")
    plan = await delete(world, "a", DeleteFlag.CHILDREN_ONLY)
    assert plan.doomed == {"b", "c"}
    assert await names(world) == ["a"]
    assert await world.orch.delete(NAME, "a", DeleteFlag.CHILDREN_ONLY) == MergePlan()
    await world.check_runs(NUMBERS)
    await chain(world, "d")
    plan = await delete(world, "a", DeleteFlag.CHILDREN)
    assert plan.doomed == {"a", "d"}
    assert not world.images()
    assert await world.orch.current(NAME) is None
    await world.check_runs(NUMBERS)


async def test_inactive(world: World) -> None:
    """With no hypervisor qemu-img merges; a dry run says the same and touches nothing."""
    await chain(world, "a", "b")
    await world.orch.destroy(NAME)
    async with world.unchanged():
        dry = await world.orch.delete(NAME, "a", dry_run=True)
    assert {where for _, where in kinds(dry)} == {"offline"}
    assert await delete(world, "a") == dry
    await delete(world, "b")
    await world.check_nothing_lost()
    await world.create("c")
    async with world.unchanged():
        dry = await world.orch.delete(NAME, "c", dry_run=True)
    assert {where for _, where in kinds(dry)} == {"live"}


async def test_paused(world: World) -> None:
    """A guest that has stood since a paused checkpoint, its images inactive before 9.0, stands on, and is whole."""
    await chain(world, "a")
    await world.orch.pause(NAME)
    await world.create("b", Strategy.PAUSED)
    assert kinds(await delete(world, "a")) == {("commit", "live")}
    await delete(world, "b")
    await world.check_still()
    assert not world.images()
    await world.orch.resume(NAME)
    await world.check_runs(NUMBERS)


# --- cut short ----------------------------------------------------------------------------------------------------


async def check_recovers(world: World, *, starts: bool = False) -> None:
    """Assert that `recover` finishes the delete of `b`, and that what is left is whole."""
    (ended,) = await world.orch.recover()
    assert (ended.kind, ended.subject, ended.state) == ("delete", "b", State.COMPLETE)
    assert ended.ended is not None
    assert await world.orch.recover() == ()
    assert "b" not in await names(world)
    await check_files(world)
    if starts:
        await world.check_nothing_lost()
    else:
        await world.check_runs(NUMBERS)


def second_step(event: Event) -> bool:
    return event.state == State.MERGING and event.done > 0


async def test_cancelled(world: World) -> None:
    """It is stranded: what goes can no longer be reverted to, what remains is whole after `recover`."""
    await chain(world, "a", "b", "c")
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        await nursery.start(when, world.orch, second_step, scope.cancel)
        with scope, pytest.raises(Stranded, match="recover"):
            await world.orch.delete(NAME, "b")
        nursery.cancel_scope.cancel()
    assert (await world.orch.operations(NAME))[-1].state == State.STRANDED
    assert (await world.orch.show(NAME, "b")).deleting
    await world.check_runs(NUMBERS)
    with pytest.raises(NotFound, match="no snapshot 'b'"):  # any next operation finishes the delete first
        await world.revert("b")
    assert (await world.orch.operations(NAME))[-1].state == State.COMPLETE
    assert await world.orch.recover() == ()
    await check_files(world)
    await check_reverts(world)


def crash_in_pivot(patch: pytest.MonkeyPatch) -> None:
    """End this process when a disk is about to go over, before the catalog knows."""
    event = BlockJob.event

    async def pending(job: BlockJob, name: str) -> None:
        await event(job, name)
        if name == "BLOCK_JOB_PENDING":
            raise CrashError

    patch.setattr(BlockJob, "event", pending)
    patch.setattr(blockjob, "end", _nothing)


def crash_when_settled(patch: pytest.MonkeyPatch) -> None:
    """End this process when the catalog knows that a disk goes over, and it has not yet."""
    commit_image = QemuMachine.commit_image

    async def commit(machine: QemuMachine, top: str, base: str, *, note: PivotNote, **options: Any) -> None:
        async def noted_and_gone() -> None:
            await note.write()
            raise CrashError

        await commit_image(machine, top, base, note=PivotNote(noted_and_gone, note.verdict), **options)

    patch.setattr(QemuMachine, "commit_image", commit)
    patch.setattr(blockjob, "end", _nothing)


def crash_unknown(patch: pytest.MonkeyPatch) -> None:
    """End this process when a merge is done, and its images are still open and not in the catalog."""
    patch.setattr(Merger, "_close", _crash)
    patch.setattr(Merging, "_note", _crash)


def crash_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """End this process when all files are removed and the records are not."""
    patch.setattr(snaporch.operations.delete, "_farewell", _crash_at_once)


async def _nothing(*_: object) -> None:
    await trio.lowlevel.checkpoint()


async def _crash(*_: object) -> None:
    await trio.lowlevel.checkpoint()
    raise CrashError


def _crash_at_once(*_: object) -> None:
    raise CrashError


@pytest.mark.parametrize("killed", [False, True], ids=["qemu-lives", "qemu-dies"])
async def test_crash(world: World, *, killed: bool) -> None:
    """A crash at the worst moments, of QEMU too or not: `recover` finishes, nothing that was written is lost."""
    for crash in (crash_in_pivot, crash_when_settled, crash_at_the_end)[: 2 if killed else 3]:
        await chain(world, "b")
        await crashed(world, crash, killed=killed)
        assert not world.images()
    await chain(world, "a", "b", "c")  # a merge in the middle of what is open
    await crashed(world, crash_unknown, killed=killed)
    await world.revert("c", RevertFlag.RUNNING)
    await check_guest(world, "restored")


async def crashed(world: World, crash: Callable[[pytest.MonkeyPatch], None], *, killed: bool) -> None:
    """Delete `b`, crash, and recover from it."""
    with pytest.MonkeyPatch.context() as patch:
        crash(patch)
        with pytest.raises(CrashError):
            await world.orch.delete(NAME, "b")
    if killed:
        await world.orch.destroy(NAME)
    await check_recovers(world, starts=killed)


async def test_qemu_killed(world: World) -> None:
    """QEMU dies in mid-merge: `recover` finishes offline, and the domain starts with its newest data."""
    await chain(world, "a", "b", "c")
    pid = await world.pid()
    async with trio.open_nursery() as nursery:
        await nursery.start(when, world.orch, second_step, lambda: os.kill(pid, signal.SIGKILL))
        with pytest.raises(Stranded):
            await world.orch.delete(NAME, "b")
    await check_recovers(world, starts=True)
    await world.revert("c")
    await check_guest(world, "restored")


async def test_killed(world: World) -> None:
    """Another snaporch is killed in mid-delete: the next one finishes what it began."""
    await chain(world, "a", "b", "c")
    command = [sys.executable, "-m", "snaporch", "--root", str(world.root), "delete", NAME, "b"]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, check=False))
        with trio.fail_after(SECONDS):
            # Another process tells nobody how far it is.
            while not any(record.deleting for record in await world.orch.list(NAME)):
                assert process.poll() is None
                await trio.sleep(0.01)
        process.kill()
    await check_recovers(world)


# --- at random ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7])
async def test_random_tree(world: World, seed: int) -> None:
    """Random creates, reverts and deletes: each snapshot that stays is whole (`scripts/proof trees` does more)."""
    originals = tuple(Path(disk.path) for disk in world.definition.disks)
    chance = random.Random(seed)  # noqa: S311 - no secret
    tree = Tree(world.orch, NAME, world.root / NAME, chance, partial(check_guest, world), originals)
    for _ in range(12):
        await tree.step()
    await tree.revert_to_all()
