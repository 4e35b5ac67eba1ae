"""Groups of domains go back, and lose their snapshots, together or alone."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    CreateOptions,
    DeviceDisk,
    DiskSnapshot,
    DomainSnapshot,
    InvalidInput,
    NotFound,
    OperationFailed,
    Refused,
    RevertFlag,
    Unsupported,
)
from snaporch.catalog import Change
from snaporch.engine.states import State
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime
from tests.group_world import NO_ROOM, REVERT_FAILURES, open_group

# --- revert and delete ----------------------------------------------------------------------------------------


async def test_revert(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """All go back as one operation, found by any of them, and no new guest runs before every old one is paused."""
    async with open_group(tmp_path, 3) as group:
        await group.create()
        old = group.host.processes()
        numbers = {name: (await group.orch.show(name, "g1")).memory for name in group.names}
        group.log.clear()
        records = await group.orch.revert_group(group.names, "g1")
        assert [record.domain for record in records] == group.names
        assert max(group.when("effect", "machine.pause")) < min(group.when("call", "machine.resume"))
        assert not set(group.host.processes()) & set(old)
        group.check_consistent(group.names)
        for name, memory in numbers.items():
            assert memory is not None
            (process,) = group.host.processes(name)
            assert group.host.guest(process).ticks - group.host.number(memory.path) < 100_000
            assert (await group.orch.operations(name))[-1].domains == ("web0", "web1", "web2")
        await group.create(name="g2")
        await group.orch.revert_group(group.names, "g1", RevertFlag.PAUSED)
        assert [(await group.orch.domain_info(name)).state for name in group.names] == ["paused"] * 3


async def test_revert_saving(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """What all hold now can be kept first, as a group of its own."""
    async with open_group(tmp_path, 2) as group:
        await group.create()
        await group.orch.revert_group(group.names, "g1", save_current="before")
        records = [await group.orch.show(name, "before") for name in group.names]
        assert len({record.group for record in records}) == 1
        assert records[0].group is not None
        assert [(await group.orch.domain_info(name)).current for name in group.names] == ["g1", "g1"]


async def test_alone(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """One member goes back, or is deleted, alone only when that is said; and a group that is not whole is none."""
    async with open_group(tmp_path, 3) as group:
        await group.create()
        with pytest.raises(Unsupported, match="one point with that of web0, web2: revert the group"):
            await group.orch.revert("web1", "g1")
        with pytest.raises(Unsupported, match="one point with that of web1, web2: delete the group"):
            await group.orch.delete("web0", "g1")
        with pytest.raises(Unsupported, match="g1 of web1 is one point with that of web0"):
            await group.orch.revert_group(["web1", "web2"], "g1")
        with pytest.raises(Unsupported, match="g1 of web0 is one point with that of web1"):
            await group.orch.delete_group(["web0", "web2"], "g1")
        assert {record.deleting for name in group.names for record in await group.orch.list(name)} == {False}
        await group.orch.revert("web1", "g1", RevertFlag.ALONE)
        assert [name for name in group.names if (await group.orch.operations(name))[-1].kind == "revert"] == [
            "web1"
        ]
        await catalog_of(group.orch).write(Change(dropped=(("web1", "g1"),)))
        await group.orch.revert_group(["web0", "web2"], "g1")  # all that is left of it
        with pytest.raises(NotFound):
            await group.orch.revert_group(group.names, "g1")
        with pytest.raises(NotFound, match="web7"):
            await group.orch.delete_group(["web0", "web2", "web7"], "g1")


async def test_no_group(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Snapshots of one name that were taken one after the other are of no one point."""
    async with open_group(tmp_path, 2) as group:
        for name in group.names:
            await group.orch.create(name, DomainSnapshot("s1"), CreateFlag.LIVE)
        with pytest.raises(Unsupported, match="s1 of web0, web1 was not taken at one point"):
            await group.orch.revert_group(group.names, "s1")
        with pytest.raises(Unsupported, match="not taken at one point"):
            await group.orch.delete_group(group.names, "s1")
        with pytest.raises(InvalidInput, match="once"):
            await group.orch.delete_group(["web0", "web0"], "s1")
        await group.orch.revert("web0", "s1")


async def test_inside(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Inactive domains go back to points inside their images, all; one that would have to be ended keeps all."""
    async with open_group(tmp_path, 2) as group:
        for name in group.names:
            await group.orch.destroy(name)
        inside = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
        asked = DomainSnapshot("g1", memory=False, disks=inside)
        await group.orch.create_group(group.names, asked, CreateFlag.DISK_ONLY)
        images = [f"/images/{name}-{disk}" for name in group.names for disk in ("vda", "vdb")]
        numbers = [group.host.number(image) for image in images]
        for name in group.names:
            await group.orch.start(name)
        await trio.sleep(1)
        with pytest.raises(Unsupported, match="web0 is running: g1 is inside images"):
            await group.orch.revert_group(group.names, "g1")
        await group.orch.destroy("web0")
        with pytest.raises(Unsupported, match="ways differ"):
            await group.orch.revert_group(group.names, "g1", RevertFlag.FORCE)
        await group.orch.destroy("web1")
        assert all(group.host.number(image) > number for image, number in zip(images, numbers, strict=True))
        fault = group.host.faults.add("storage.restore_inside", after=True, nth=3)
        with pytest.raises(OperationFailed):
            await group.orch.revert_group(group.names, "g1")
        assert fault.fired == 1
        assert all(group.host.number(image) > number for image, number in zip(images, numbers, strict=True))
        await group.orch.revert_group(group.names, "g1")
        assert [group.host.number(image) for image in images] == numbers


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", NO_ROOM)
async def test_one_has_no_room_beside(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, at: str, *, after: bool
) -> None:
    """Where one member's new guest cannot be there beside the old one, all go back one after the other."""
    async with open_group(tmp_path, 3) as group:
        await group.create()
        fault = group.host.faults.add(at, domain="web1", after=after, nth=1)
        back = await group.orch.revert_group(group.names, "g1")
        assert fault.fired == 1
        assert [each.way for each in back] == ["proven"] * 3
        await trio.sleep(1)
        group.check_consistent(group.names)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", REVERT_FAILURES)
async def test_one_fails_to_revert(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, at: str, *, after: bool
) -> None:
    """Where one member cannot go back none does: the old guests run on, those whose new ones had taken over too."""
    async with open_group(tmp_path, 3) as group:
        await group.create()
        before, files = group.picture(group.names), group.host.files()
        fault = group.host.faults.add(at, domain="web1", after=after, nth=1)
        with pytest.raises((OperationFailed, Refused)):
            await group.orch.revert_group(group.names, "g1")
        assert fault.fired == 1
        assert await group.last_state() == State.ROLLED_BACK
        assert (group.picture(group.names), group.host.files()) == (before, files)
        await trio.sleep(1)
        group.check_consistent(group.names)
        await group.orch.revert_group(group.names, "g1")
        group.check_consistent(group.names)


async def test_one_has_changed(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """What stands in the way of one keeps all; with FORCE, where one has to displace its old guest, all do."""
    async with open_group(tmp_path, 2) as group:
        options = CreateOptions(exclude=frozenset({"vdb"}))
        await group.orch.create_group(group.names, DomainSnapshot("g1"), CreateFlag.LIVE, options)
        before = group.picture(group.names)
        with pytest.raises(Unsupported, match="does not hold vdb"):
            await group.orch.revert_group(group.names, "g1")
        assert group.picture(group.names) == before
        await group.orch.destroy("web1")
        await group.orch.revert_group(group.names, "g1", RevertFlag.FORCE)
        assert [(await group.orch.domain_info(name)).state for name in group.names] == ["running", "running"]
