"""Points inside qcow2 images of a real guest: taken, gone back to, deleted, and mixed with those outside."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from snaporch.drivers.local import guard, qcow2
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu import driver
from snaporch.drivers.qmp import guard as action
from snaporch.drivers.qmp import open_qmp
from snaporch.engine.states import State
from snaporch.errors import ConnectionGone, DamagedSnapshot, OperationFailed, Unsupported
from snaporch.model.domain import DomainState
from snaporch.model.record import SnapshotRecord
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, RevertFlag
from tests.live.test_crash import killed
from tests.live.world import MIB, NAME, SECONDS, MakeWorld, World

pytestmark = pytest.mark.live

INSIDE = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))


async def inside(world: World, name: str, flags: CreateFlag = CreateFlag(0)) -> SnapshotRecord:  # noqa: B008
    """Take a point of both disks inside their images."""
    return await world.create(name, flags=flags, disks=INSIDE)


async def tags(world: World) -> list[tuple[str, ...]]:
    """Return the names of what is inside the images that the disks are on."""
    info = await world.orch.domain_info(NAME)
    return [await LocalStorage().inside(disk.active) for disk in info.disks]


async def test_checkpoint(world: World) -> None:
    """A checkpoint inside the images: the guest goes back to it in the same process, again and again."""
    pid, images = await world.pid(), world.images()
    record = await inside(world, "one")
    assert (record.strategy, record.memory, list(record.inside)) == (Strategy.INTERNAL, None, ["vda", "vdb"])
    assert record.timings.pause is not None
    await world.check_runs()
    await inside(world, "2")  # QEMU takes a name of digits only for a number of its own
    assert await tags(world) == [("one", "snapshot-2")] * 2
    for name in ("one", "2"):
        await world.revert(name)
        await world.check_consistent()
        assert (await world.orch.domain_info(NAME)).current == name
        assert await tags(world) == [("one", "snapshot-2")] * 2, "what was kept is given up"
    await world.revert("2", RevertFlag.PAUSED)
    await world.check_still()
    await world.orch.resume(NAME)
    await world.check_consistent()
    assert (await world.pid(), world.images()) == (pid, images)
    for name in ("one", "2"):
        assert (await world.orch.verify(NAME, name)).ok
    await world.orch.delete(NAME, "one")
    assert await tags(world) == [("snapshot-2",)] * 2
    await world.check_runs()
    await world.orch.destroy(NAME)
    await world.revert("2")  # launches
    await world.check_consistent()
    assert (await world.orch.verify(NAME, "2")).ok
    await world.orch.delete(NAME, "2")
    assert await tags(world) == [()] * 2
    await world.orch.destroy(NAME)
    world.check_images()


async def test_tree(world: World) -> None:
    """Inside an image, in an overlay over that, inside this: whatever goes, the others stay what they are."""
    await inside(world, "inner")
    await world.create("outer")
    await inside(world, "upper")
    await world.check_runs()
    async with world.unchanged():
        with pytest.raises(Unsupported, match="shut it down first"):
            await world.orch.delete(NAME, "inner")
    await world.orch.delete(NAME, "outer")
    await world.check_runs()
    assert [record.name for record in await world.orch.list(NAME)] == ["inner", "upper"]
    assert (await world.orch.verify(NAME, "upper")).ok
    await world.revert("upper")
    await world.check_consistent()
    await world.orch.destroy(NAME)
    async with world.unchanged():
        with pytest.raises(Unsupported, match="upper"):
            await world.revert("inner")
    await world.orch.delete(NAME, "upper")
    await world.revert("inner")
    await world.check_consistent()
    await world.check_no_orphans()
    assert not world.images(), "the overlay is held by nothing"
    await world.orch.delete(NAME, "inner")
    await world.check_runs()
    assert not await world.orch.fsck(NAME)


async def test_disks(world: World) -> None:
    """Of an inactive domain each disk has its own way; what is inside goes back in place, and not under a guest."""
    await world.orch.destroy(NAME)
    record = await world.create("point", flags=CreateFlag.DISK_ONLY, disks=INSIDE[:1])
    assert (list(record.inside), len(world.images())) == (["vda"], 1)
    newest = [await world.newest(target) for target in ("vda", "vdb")]
    await world.start()
    async with world.unchanged():
        with pytest.raises(Unsupported, match="--force"):
            await world.revert("point")
    await world.revert("point", RevertFlag.FORCE)
    assert await world.state() is DomainState.INACTIVE
    assert [await world.newest(target) for target in ("vda", "vdb")] == newest
    assert await tags(world) == [("point",), ()]
    await world.check_no_orphans()
    await world.start()
    await world.orch.destroy(NAME)
    await world.orch.delete(NAME, "point")
    assert (await tags(world), world.images()) == ([(), ()], set())
    await world.check_nothing_lost()


async def test_damage(world: World) -> None:
    """One bit of a point inside an image is changed, of its memory or its disk: found, and not gone back to."""
    record = await inside(world, "point")
    path = record.inside["vda"].path
    with qcow2.opened(path) as image:
        words = [word & qcow2._OFFSET for table in image._tables(image.find("point")) for word in table]
    used = [word for word in words if word]
    for offset in (used[0], used[-1]):
        flip(path, offset + 7)
        assert not (await world.orch.verify(NAME, "point")).ok
        async with world.unchanged():
            with pytest.raises(DamagedSnapshot, match="damaged"):
                await world.revert("point")
        flip(path, offset + 7)
    await world.revert("point")
    await world.check_consistent()


def flip(path: str, offset: int) -> None:
    """Change a bit of a file."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


async def saving(world: World, then: Callable[[], object]) -> None:
    """Do something while QEMU saves the guest's memory: the guest itself writes far less."""
    counts = Path(f"/proc/{await world.pid()}/io")
    before = written(counts)
    with trio.fail_after(SECONDS):
        while written(counts) < before + 4 * MIB:  # noqa: ASYNC110 - nothing tells us
            await trio.sleep(0.001)
    then()


def written(counts: Path) -> int:
    """Return the bytes that a process has written."""
    return next(int(line.split()[1]) for line in counts.read_text().splitlines() if line.startswith("wchar"))


async def test_killed_in_mid_save(make_world: MakeWorld) -> None:
    """Killed while memory is saved: us, then the guest runs on and all is undone; QEMU, then nothing is lost."""
    world = await make_world(append="ram=64 dirty=1")
    before = await world.everything()
    words = [sys.executable, "-m", "snaporch.testing.dying", str(world.root), NAME, "never", "us"]
    process = await trio.lowlevel.open_process([*words, "create", "point", "internal"])
    await saving(world, process.kill)
    await process.wait()
    await world.check_runs()
    (ended,) = await world.orch.recover()
    assert ended.state == State.ROLLED_BACK
    await world.check_same(before)
    assert await tags(world) == [()] * 2
    await world.check_runs()
    pid = await world.pid()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(saving, world, lambda: os.kill(pid, signal.SIGKILL))
        with pytest.raises(OperationFailed):
            await inside(world, "point")
    assert await tags(world) == [()] * 2
    await world.check_nothing_lost()


async def test_recovery_in_mid_save(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that saves is silent for longer than recovery waits for an answer otherwise, and is waited for."""
    world = await make_world(memory=224 * MIB, append="ram=160 dirty=1")
    words = [sys.executable, "-m", "snaporch.testing.dying", str(world.root), NAME, "never", "us"]
    monkeypatch.setattr(driver, "CONNECT_SECONDS", 0.1)
    silent = 0
    for _ in range(5):  # on a busy host we may come too late to find it silent
        process = await trio.lowlevel.open_process([*words, "create", "point", "internal"])
        await saving(world, process.kill)
        await process.wait()
        silent += await is_silent(world)
        (ended,) = await world.orch.recover()
        assert ended.state == State.ROLLED_BACK
        assert await tags(world) == [()] * 2
        await world.check_runs()
        if silent:
            return
    raise AssertionError("it never was silent")


async def is_silent(world: World) -> bool:
    """Return whether QEMU does not answer for as long as a connect waits."""
    try:
        async with open_qmp(await world.socket(), label=NAME, timeout=0.1):
            return False
    except ConnectionGone as error:
        return re.search("silent|no greeting", str(error)) is not None


# Where a revert is killed, or one that fails when all is done and is rolled back, and what becomes of it.
KILLS = {
    "revert": {
        "after:stand_still#1": State.ROLLED_BACK,
        "after:keep_present#1": State.ROLLED_BACK,
        State.LOADING: State.ROLLED_BACK,  # the load has not begun, and the guard decides
        "after:load_inside#1": State.COMPLETE,
        "after:take_over#1": State.COMPLETE,
    },
    "failing-revert": {
        "before:load_present#1": State.COMPLETE,
        "before:delete_inside#1": State.ROLLED_BACK,  # what it held is put back
        "after:delete_inside#1": State.ROLLED_BACK,
        "after:run_old#1": State.ROLLED_BACK,
        "after:forget_kept#1": State.ROLLED_BACK,
    },
}


@pytest.mark.parametrize("verb", KILLS)
async def test_killed_in_revert(world: World, verb: str) -> None:
    """Killed before the point is loaded, or when it was loaded back, the guest runs on; in between the point does.

    Nobody helps. Recovery then undoes the revert, or takes it for complete, and does not throw the guest back.
    """
    await inside(world, "point")
    for where, state in KILLS[verb].items():
        await world.check_runs()
        before = (await world.reports(1))[-1].seq
        await killed(world, where, verb, "point")
        alone = await world.check_consistent()
        assert (alone.seq >= before) == (state is State.ROLLED_BACK), where
        (ended,) = await world.orch.recover()
        assert ended.state == state, where
        assert (await world.check_consistent()).seq >= alone.seq, where
        assert await tags(world) == [("point",)] * 2


async def test_guard_cannot_load(world: World, tmp_path: Path) -> None:
    """A guard that cannot load the point puts back what the guest held before, and lets that run."""
    await inside(world, "kept")
    before = (await world.reports(5))[-1].seq
    async with open_qmp(Path(await world.socket()).with_name("query.sock"), label=NAME, timeout=SECONDS) as qmp:
        await qmp.execute("stop")
        blocks = await qmp.execute("query-block")
    nodes = [block["inserted"]["node-name"] for block in blocks if block.get("inserted", {}).get("drv") == "qcow2"]
    verdict = tmp_path / "verdict"
    guard.decide(str(verdict), "load")
    (kept,) = {tag for image in await tags(world) for tag in image}
    what = ["load", await world.socket(), "-", "-", str(verdict), "run", "there is none", kept, *nodes]
    await trio.run_process([sys.executable, guard.__file__, action.__file__, *what], capture_stdout=True)
    assert (await world.check_consistent()).seq < before
    assert await tags(world) == [()] * 2


async def test_failed_revert(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revert that fails once the point is loaded puts back what the guest held, and lets it run on."""
    await inside(world, "point")
    last = (await world.reports(3))[-1]

    async def fails(_self: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OperationFailed("no")

    monkeypatch.setattr("snaporch.operations.revert.Reverter.take_over", fails)
    async with world.unchanged():
        with pytest.raises(OperationFailed):
            await world.revert("point")
    assert (await world.check_consistent()).seq >= last.seq
    assert await tags(world) == [("point",)] * 2


def test_reader(tmp_path: Path) -> None:
    """What is no qcow2 image has nothing inside and says so."""
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    with pytest.raises(DamagedSnapshot), qcow2.opened(str(raw)):
        raise AssertionError
