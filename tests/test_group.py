"""The engine with several participants: a consistency group is the very table of one domain, with more actors."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import gc
import math
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    Busy,
    CreateFlag,
    CreateOptions,
    DomainSnapshot,
    DomainState,
    InvalidInput,
    NotEnoughSpace,
    NotFound,
    OperationFailed,
    Refused,
    RevertFlag,
    Strategy,
    TargetExists,
    Unsupported,
)
from snaporch.engine.states import State
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime
from tests.group_world import GIB, domain_busy, open_group


@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PAUSED])
@pytest.mark.parametrize("count", [2, 4])
async def test_one_point(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, count: int, strategy: Strategy
) -> None:
    """All are paused before any switches, all have switched and are armed before any runs on: one point."""
    async with open_group(tmp_path, count) as group:
        await group.create(strategy)
        assert max(group.when("effect", "machine.pause")) < min(group.when("call", "machine.switch"))
        assert max(group.when("effect", "machine.switch")) < min(group.when("call", "stream.start"))
        assert max(group.when("effect", "machine.switch")) < min(group.when("call", "machine.resume"))
        end = "stream.armed" if strategy is Strategy.BACKGROUND else "stream.seal"
        assert max(group.when("effect", end)) < min(group.when("call", "machine.resume"))
        guests = [group.host.guest(process) for process in group.host.processes()]
        assert max(guest.stopped[1] for guest in guests) < min(guest.started[1] for guest in guests)
        group.check_consistent(group.names)


async def test_nothing_is_collected_while_they_stand(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Python's garbage collector would lengthen a pause by up to 100 ms: it is off for as long, and no longer."""
    async with open_group(tmp_path, 2) as group:
        seen: dict[str, set[bool]] = {}
        for hook in ("on_call", "on_effect"):
            setattr(group.host, hook, lambda at, _: seen.setdefault(at, set()).add(gc.isenabled()))
        await group.orch.create_group(group.names, DomainSnapshot("g1"), CreateFlag.LIVE)
        standing = {"machine.pause", "machine.switch", "stream.start", "stream.armed", "machine.resume"}
        assert {at for at in seen if False in seen[at]} == standing
        assert all(seen[at] == {False} for at in standing)
        seen.clear()
        group.host.faults.add("machine.switch", domain="web1")
        with pytest.raises(OperationFailed):
            await group.orch.create_group(group.names, DomainSnapshot("g2"), CreateFlag.LIVE)
        assert gc.isenabled()
        gc.disable()
        try:
            await group.orch.create_group(group.names, DomainSnapshot("g3"), CreateFlag.LIVE)
            assert not gc.isenabled()  # as its owner wants it
        finally:
            gc.enable()


async def test_one_point_precopy(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A group by precopy is refused: whose memory is done first would stand until all are done."""
    async with open_group(tmp_path, 2) as group:
        before, files = group.picture(group.names), group.host.files()
        with pytest.raises(Unsupported, match=r"web0: precopy, asked for; web1: precopy"):
            await group.create(Strategy.PRECOPY)
        assert (group.picture(group.names), group.host.files()) == (before, files)
        assert not await group.orch.operations("web0")


async def test_one_cannot(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Where one cannot go by background LIVE is refused, with its reason; without it all pause until saved."""
    async with open_group(tmp_path, 2) as group:
        group.host.models["web1"] = attrs.evolve(group.host.model, background_blocker="VFIO")
        await group.orch.destroy("web1")
        await group.orch.start("web1")
        with pytest.raises(Unsupported, match="web1: precopy, background is not possible: VFIO"):
            await group.create(Strategy.AUTO)
        records = await group.create(Strategy.PAUSED)
        assert {record.strategy for record in records} == {Strategy.PAUSED}
        group.check_consistent(group.names)


async def test_one_paused(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """A guest that is paused already is taken with those that run, and is paused afterwards."""
    async with open_group(tmp_path, 2) as group:
        await group.orch.pause("web1")
        web0, web1 = await group.create(Strategy.AUTO)
        assert (web0.domain_state, web1.domain_state) == (DomainState.RUNNING, DomainState.PAUSED)
        assert web0.strategy is web1.strategy is Strategy.BACKGROUND
        assert [(await group.orch.domain_info(name)).state for name in group.names] == ["running", "paused"]


async def test_inactive(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Inactive domains stand still by themselves: their disks are a group; one that runs cannot be in it."""
    async with open_group(tmp_path, 2) as group:
        await group.orch.destroy("web1")
        with pytest.raises(Refused, match="web1 is inactive"):
            await group.create()
        with pytest.raises(Refused, match="web0 is running"):
            await group.orch.create_group(group.names, DomainSnapshot("g1"), CreateFlag.DISK_ONLY)
        await group.orch.destroy("web0")
        records = await group.orch.create_group(group.names, DomainSnapshot("g1"), CreateFlag.DISK_ONLY)
        assert [record.memory for record in records] == [None, None]


async def test_names(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """What cannot be one group is refused, and a name that one of them has; records are in the order asked for."""
    async with open_group(tmp_path, 2) as group:
        with pytest.raises(InvalidInput, match="once"):
            await group.orch.create_group(["web0", "web0"])
        with pytest.raises(NotFound, match="web7"):
            await group.orch.create_group(["web0", "web7"], flags=CreateFlag.LIVE)
        with pytest.raises(InvalidInput, match="same file"):
            await group.orch.create_group(group.names, DomainSnapshot(memory_file="/m"), CreateFlag.LIVE)
        await group.orch.create("web1", DomainSnapshot("g1"), CreateFlag.LIVE)
        with pytest.raises(TargetExists, match="web1 has a snapshot 'g1'"):
            await group.create()
        group.names.reverse()
        records = await group.create(name="")
        assert [record.domain for record in records] == ["web1", "web0"]
        assert len({record.name for record in records}) == 1
        assert len({record.group for record in records}) == 1


async def test_space(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Space is compared with what all members together may need, where they share a file system."""
    async with open_group(tmp_path, 2) as group:
        group.host.mount(str(tmp_path), int(1.5 * GIB))
        with pytest.raises(NotEnoughSpace) as refused:
            await group.create()
        assert refused.value.needed > 2 * GIB


async def test_busy(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """One operation a domain: a group is refused with the busy member's name, and keeps no other busy."""
    async with open_group(tmp_path, 3) as group:
        with domain_busy(tmp_path, "web1"):
            with pytest.raises(Busy) as refused:
                await group.create()
            assert (refused.value.domain, refused.value.running) == ("web1", "something")
            await group.orch.create("web0", DomainSnapshot("s1"), CreateFlag.LIVE)
        await group.create()


async def test_no_deadlock(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Groups that have members in common, in any order, wait for one another and all get there."""
    orders = [("web0", "web1", "web2"), ("web2", "web1"), ("web1", "web0"), ("web2", "web0")]
    async with open_group(tmp_path, 3) as group:
        async with trio.open_nursery() as nursery:
            for number, names in enumerate(orders):
                snapshot, options = DomainSnapshot(f"g{number}"), CreateOptions(wait=True)
                nursery.start_soon(group.orch.create_group, names, snapshot, CreateFlag.LIVE, options)
        for name in group.names:
            taken = {record.name for record in await group.orch.list(name)}
            assert taken == {f"g{number}" for number, names in enumerate(orders) if name in names}
        group.check_consistent(group.names)


async def test_one_change(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """What is committed is every member's snapshot, overlays and files; each can be reverted to by itself."""
    async with open_group(tmp_path, 3) as group:
        await group.create()
        catalog = catalog_of(group.orch)
        numbers = {}
        for name in group.names:
            (record,) = await group.orch.list(name)
            assert record.memory is not None
            assert record.group is not None
            assert record.group.members == tuple(group.names)
            numbers[name] = group.host.number(record.memory.path)
            assert {group.host.number(chain[0].path) for chain in record.images.values()} == {numbers[name]}
            active = (await catalog.domain(name)).active
            assert (await group.orch.domain_info(name)).current == "g1"
            assert {disk.path for disk in active.values()} < set(group.host.files())
            assert await catalog.own_files(name) == {disk.path for disk in active.values()} | {record.memory.path}
            (operation,) = await group.orch.operations(name)
            assert (operation.state, operation.ended is None) == (State.COMPLETE, False)
            assert operation.domains == tuple(group.names)
            assert not await catalog.unfinished(name)
        await trio.sleep(1)
        await group.orch.revert("web1", "g1", RevertFlag.ALONE)
        group.check_consistent(group.names)
        (process,) = group.host.processes("web1")
        assert numbers["web1"] <= group.host.guest(process).ticks < numbers["web1"] + 100_000


FAILURES = [
    "machine.open_overlay",
    "machine.pause",
    "machine.switch",
    "stream.armed",
    "machine.resume",
    "stream.half",
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", FAILURES)
async def test_one_fails(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, at: str, *, after: bool
) -> None:
    """Where one member fails all are as they were before."""
    async with open_group(tmp_path, 3) as group:
        before, files = group.picture(group.names), group.host.files()
        fault = group.host.faults.add(at, domain="web1", after=after and at != "stream.half")
        with pytest.raises(OperationFailed, match="web1"):
            await group.create()
        assert fault.fired == 1
        assert await group.last_state() == State.ROLLED_BACK
        assert group.host.files() == files
        assert group.picture(group.names) == before
        await trio.sleep(1)
        group.check_consistent(group.names)
        for name in group.names:
            assert not await group.orch.list(name)
        await group.create(name="g2")
        group.check_consistent(group.names)


@pytest.mark.parametrize("at", FAILURES)
async def test_one_dies(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, at: str
) -> None:
    """Where one member's hypervisor dies the others are as before, and its disks hold its last word."""
    others = ["web0", "web2"]
    async with open_group(tmp_path, 3) as group:
        before, files = group.picture(others), group.host.files()
        (process,) = group.host.processes("web1")
        guest = group.host.guest(process)
        fault = group.host.faults.add(at, domain="web1", crash=True)
        with pytest.raises(OperationFailed, match="web1"):
            await group.create()
        assert fault.fired == 1
        assert await group.last_state() == State.ROLLED_BACK
        assert group.host.files() == files
        assert group.picture(others) == before
        await trio.sleep(1)
        group.check_consistent(others)
        assert not group.host.processes("web1")
        assert {group.host.number(f"/images/web1-{disk}") for disk in ("vda", "vdb")} == {guest.ticks}
        await group.orch.start("web1")
        group.check_consistent(group.names)


async def test_cancelled(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Cancelled when the first of them has switched, all are as they were before."""
    async with open_group(tmp_path, 3) as group:
        before, files = group.picture(group.names), group.host.files()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                group.host.faults.add("machine.switch", domain="web2", hang=math.inf)
                nursery.start_soon(group.create)
                await trio.sleep(10)
                group.when("call", "machine.switch")
                assert await group.last_state() == State.PAUSING  # no row is written in the pause
                scope.cancel()
        assert await group.last_state() == State.ROLLED_BACK
        assert group.host.files() == files
        assert group.picture(group.names) == before
        group.check_consistent(group.names)
