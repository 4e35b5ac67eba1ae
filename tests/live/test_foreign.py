"""Other hands between two commands: what can be prevented is, the rest is found, and refused in clear words."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from snaporch.drivers.base import Launch
from snaporch.engine.states import State
from snaporch.errors import DamagedSnapshot, OperationFailed, Refused
from snaporch.model.domain import DomainState
from snaporch.model.finding import Trouble
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag
from snaporch.operations.create import Participant
from snaporch.orchestrator import catalog_of
from tests.live.test_crash import killed
from tests.live.world import NAME, SECONDS, SLOW, MakeWorld, World

pytestmark = pytest.mark.live


async def troubles(world: World, *, repair: bool = False) -> set[tuple[Trouble, bool]]:
    """Return what fsck finds, each kind with whether it was repaired."""
    return {(found.trouble, found.repaired) for found in await world.orch.fsck(NAME, repair=repair)}


async def test_nothing_is_wrong(world: World) -> None:
    """Fsck finds nothing in a running domain with snapshots, and touches nothing."""
    await world.create("one")
    await world.create("two")
    async with world.unchanged():
        assert not await world.orch.fsck()
        assert not await world.orch.fsck(repair=True)


async def test_started_by_its_old_command_line(world: World) -> None:
    """A frozen image that somebody boots from: prevented, seen while it is open, nothing runs on it afterwards."""
    await world.create("point")
    base = world.definition.disks[0].path
    drive = ["-drive", f"file={base},format=qcow2"]
    command = [world.qemu.emulator, "-accel", "tcg", "-display", "none", "-S", *drive]
    done = await trio.run_process(command, check=False, capture_stderr=True)
    assert b'Failed to get "write" lock' in done.stderr  # while our guest runs, its QEMU sees to that
    await world.orch.destroy(NAME)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, check=False))
        with trio.fail_after(SECONDS):
            while (Trouble.FROZEN_WRITTEN, False) not in await troubles(world):  # noqa: ASYNC110 - it starts
                await trio.sleep(0.02)
        async with world.unchanged():
            for call in (
                world.orch.start(NAME),
                world.revert("point"),
                world.create("disks", flags=CreateFlag.DISK_ONLY),
                world.orch.delete(NAME, "point"),
            ):
                with pytest.raises(Refused, match=f"another process using the image.*{base}.*fsck"):
                    await call
        process.kill()
    assert not await troubles(world)  # it has not written yet
    with open(base, "r+b") as image:
        image.seek(-512, os.SEEK_END)
        image.write(b"x" * 512)
    assert await troubles(world) == {(Trouble.DAMAGED_SNAPSHOT, False)}
    for refused in (world.orch.start(NAME), world.revert("point")):
        with pytest.raises(DamagedSnapshot, match=os.path.basename(base)):
            await refused
    assert await world.state() is DomainState.INACTIVE


async def test_a_file_deleted(world: World) -> None:
    """A deleted memory file: found, and the revert refused before anything is touched."""
    record = await world.create("point")
    Path(record.snapshot.memory_file).unlink()
    assert await troubles(world, repair=True) == {(Trouble.DAMAGED_SNAPSHOT, False)}
    async with world.unchanged():
        with pytest.raises(DamagedSnapshot):
            await world.revert("point")
    await world.check_runs(3)


@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PAUSED])
async def test_resumed_inside_the_pause(
    make_world: MakeWorld, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody lets the guest run while it stands for the point: no snapshot is made of two instants."""
    world = await make_world(append=SLOW)
    switch = Participant.switch

    async def and_resumed(participant: Participant) -> None:
        await switch(participant)
        await world.qmp("cont")

    async with world.unchanged():
        with monkeypatch.context() as patch:
            patch.setattr(Participant, "switch", and_resumed)
            with pytest.raises(OperationFailed):
                await world.create("point", strategy)
    await world.check_runs(3)
    await world.create("point", strategy)
    await world.revert("point")
    await world.check_consistent()


async def test_paused_and_killed_between(world: World) -> None:
    """Paused or killed by somebody else between two commands: what is there is asked for, not remembered."""
    await world.create("one")
    await world.qmp("stop")
    await world.create("two", Strategy.PAUSED)
    assert (await world.orch.list(NAME))[-1].domain_state is DomainState.PAUSED
    subprocess.run(["kill", "-KILL", str(await world.pid())], check=True)
    with trio.fail_after(10):
        while await world.state() is not DomainState.INACTIVE:  # noqa: ASYNC110 - it dies
            await trio.sleep(0.01)
    assert await troubles(world) <= {(Trouble.GONE_PROCESS, True)}
    assert not await troubles(world)
    await world.revert("two")
    await world.check_still()
    await world.revert("one")
    await world.check_consistent()


async def test_resized_between(world: World) -> None:
    """A disk made larger after a point: the point has the old size, and the next has the new one."""
    await world.create("small")
    node = (await world.orch.domain_info(NAME)).disks[0].node
    await world.qmp("block_resize", **{"node-name": node, "size": 32 * 2**20})
    await world.create("large")
    sizes = {}
    for name in ("small", "large"):
        await world.revert(name)
        await world.check_consistent()
        sizes[name] = (await world.orch.domain_info(NAME)).disks[0].virtual_size
    assert sizes == {"small": 16 * 2**20, "large": 32 * 2**20}


async def test_switched_by_somebody_else(world: World) -> None:
    """A snapshot by other means is seen; ours are not harmed by it, nor is the next."""
    await world.create("one")
    info = (await world.orch.domain_info(NAME)).disks[0]
    theirs = {"snapshot-file": f"{world.directory}/theirs.qcow2", "snapshot-node-name": "theirs"}
    await world.qmp("blockdev-snapshot-sync", **{"node-name": info.node, **theirs})
    assert await troubles(world) == {(Trouble.OTHER_IMAGE, False)}
    await world.create("two")
    assert not await troubles(world)
    for name in ("one", "two"):
        await world.revert(name)
        await world.check_consistent()


async def test_orphans(world: World) -> None:
    """What we have left is mended; what is not known to be ours is only told of."""
    theirs = world.root / NAME / "notes.txt"
    theirs.write_text("mine")
    # A start that was killed when nobody knew its process yet.
    driver, record = world.orch._context.drivers["qemu"], await catalog_of(world.orch).domain(NAME)
    launched = await driver.launch(Launch(record.definition, (), world.root / NAME / "run-00000000"))
    found = await world.orch.fsck(NAME, repair=True)
    assert {(f.trouble, f.repaired) for f in found} == {
        (Trouble.ORPHAN_PROCESS, True),
        (Trouble.ORPHAN_FILE, False),
    }
    assert theirs.read_text() == "mine"
    assert not await driver.alive(launched)
    assert not (world.root / NAME / "run-00000000").exists()
    theirs.unlink()
    assert not await troubles(world)
    await world.check_runs(3)


async def test_no_qemu_to_start(world: World) -> None:
    """A frozen image that is gone: the start is refused, and says which."""
    await world.create("point")
    await world.orch.destroy(NAME)
    Path(world.definition.disks[0].path).unlink()
    with pytest.raises(Refused, match=r"vda\.qcow2"):
        await world.orch.start(NAME)
    assert {trouble for trouble, _ in await troubles(world)} == {Trouble.DAMAGED_SNAPSHOT, Trouble.BROKEN_DISK}


async def test_unfinished(make_world: MakeWorld) -> None:
    """An operation that was cut short is found, and mended when that is asked for."""
    world = await make_world()
    before = await world.everything()
    await killed(world, State.PREPARING, "create", "point")
    assert (Trouble.UNFINISHED, False) in await troubles(world)
    assert await troubles(world, repair=True) == {(Trouble.UNFINISHED, True)}
    await world.check_same(before)
