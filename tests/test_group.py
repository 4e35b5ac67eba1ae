"""The engine with several participants: a consistency group is the very table of one domain, with more actors."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import fcntl
import gc
import math
import os
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from snaporch import (
    Busy,
    CreateFlag,
    CreateOptions,
    DeviceDisk,
    DiskSnapshot,
    DomainDefinition,
    DomainSnapshot,
    DomainState,
    InvalidInput,
    NotEnoughSpace,
    NotFound,
    OperationFailed,
    Refused,
    RevertFlag,
    SnaporchError,
    SnapshotRecord,
    Strategy,
    TargetExists,
    Unsupported,
    open_orchestrator,
)
from snaporch.catalog import Change
from snaporch.engine.states import State
from snaporch.model.domain import Handle
from snaporch.orchestrator import Orchestrator, catalog_of
from snaporch.testing import SimulatedDriver, SimulatedHost, ThreadsHoldTime
from tests.conformance.test_any_crash import Cut, perform_on, run
from tests.conformance.test_any_fault import CALLS, steps_of

GIB = 2**30


@attrs.define
class Group:
    """Running domains on one host, and what their hypervisors were told, in order."""

    host: SimulatedHost
    orch: Orchestrator
    names: list[str]
    log: list[tuple[str, str, str]] = attrs.field(factory=list)

    async def create(
        self, strategy: Strategy = Strategy.BACKGROUND, name: str = "g1"
    ) -> tuple[SnapshotRecord, ...]:
        """Take one point of all domains."""
        self.host.on_call = lambda at, domain: self.log.append(("call", at, domain))
        self.host.on_effect = lambda at, domain: self.log.append(("effect", at, domain))
        flags = CreateFlag(0) if strategy is Strategy.PAUSED else CreateFlag.LIVE
        asked = Strategy.AUTO if strategy is Strategy.PAUSED else strategy
        return await self.orch.create_group(self.names, DomainSnapshot(name), flags, CreateOptions(strategy=asked))

    async def last_state(self) -> str:
        """Return how the last operation on the group ended."""
        return (await self.orch.operations(self.names[-1]))[-1].state

    def when(self, kind: str, at: str) -> list[int]:
        """Return the places in the log of something that every domain has once; its disks' calls have no domain."""
        found = [(index, domain) for index, (k, a, domain) in enumerate(self.log) if (k, a) == (kind, at)]
        assert sorted(domain for _, domain in found) == self.names
        return [index for index, _ in found]

    def picture(self, names: Sequence[str]) -> list[object]:
        """Return all that a rollback has to leave as it was, of some domains."""
        processes = [process for name in names for process in self.host.processes(name)]
        nodes = [(self.host.nodes(process), self.host.settings(process)) for process in processes]
        return [processes, nodes, [self.host.guest(process).running for process in processes]]

    def check_consistent(self, names: Sequence[str]) -> None:
        """Assert that some domains' guests run, their memory and disks of one point."""
        for name in names:
            (process,) = self.host.processes(name)
            assert self.host.guest(process).running
            assert self.host.consistent(process), name

    async def check_undone(self, before: dict[str, list[object]], files: tuple[str, ...]) -> None:
        """Assert that everything is as before, but for members that have died, whose disks hold their last word."""
        assert self.host.files() == files
        for name in self.names:
            if self.host.processes(name):
                assert self.picture([name]) == before[name], name
            else:
                info = await self.orch.domain_info(name)
                assert len({self.host.number(disk.active) for disk in info.disks}) == 1
                await self.orch.start(name)


@asynccontextmanager
async def open_group(root: Path, count: int) -> AsyncIterator[Group]:
    host = SimulatedHost()
    names = [f"web{number}" for number in range(count)]
    async with open_orchestrator(root, drivers={"simulated": SimulatedDriver(host)}, realtime=True) as orch:
        for name in names:
            disks = [attrs.evolve(host.add_image(f"/images/{name}-{disk}"), target=disk) for disk in ("vda", "vdb")]
            await orch.define(DomainDefinition(name, memory=GIB, disks=tuple(disks), driver="simulated"))
            await orch.start(name)
        await trio.sleep(1)
        yield Group(host, orch, names)


@contextmanager
def domain_busy(root: Path, domain: str) -> Iterator[None]:
    """Hold a domain's lock, as another process would."""
    with (root / "locks" / f"{domain}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write('{"operation": "0", "running": "something"}')
        file.flush()
        yield


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


REVERT_FAILURES = ["storage.make_overlay", "machine.load", "guard.post"]
# What a hypervisor that has no room for two guests answers.
NO_ROOM = ["driver.launch", "machine.resume"]


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


# --- anything -------------------------------------------------------------------------------------------------


@attrs.frozen
class Failure:
    """Something that goes wrong with one member in one of the driver's calls."""

    at: str
    kind: str
    after: bool
    member: str


CREATE_CALLS = sorted({CALLS[step] for step in steps_of(Strategy.BACKGROUND, quiesce=False)})
REVERT_CALLS = [*REVERT_FAILURES, *NO_ROOM, "machine.pause", "guard.dismiss"]


@st.composite
def stories(draw: st.DrawFn) -> tuple[str, list[Failure]]:
    verb = draw(st.sampled_from(["create", "revert"]))
    failures = st.builds(
        Failure,
        st.sampled_from(CREATE_CALLS if verb == "create" else REVERT_CALLS),
        st.sampled_from(["error", "crash", "cancel"]),
        st.booleans(),
        st.sampled_from(["web0", "web1"]),
    )
    return verb, draw(st.lists(failures, min_size=1, max_size=2))


async def tell(verb: str, failures: list[Failure], root: Path) -> None:
    """Create or revert a group, and check what has become of everything."""
    async with open_group(root, 2) as group:
        await group.create(name="g0")
        before = {name: group.picture([name]) for name in group.names}
        files, scope = group.host.files(), trio.CancelScope()
        for failure in failures:
            plan_failure(group, failure, scope)
        with suppress(SnaporchError), scope:
            if verb == "create":
                await group.orch.create_group(group.names, DomainSnapshot("g1"), CreateFlag.LIVE)
            else:
                await group.orch.revert_group(group.names, "g0")
        group.host.faults.clear()
        group.host.on_call = group.host.on_effect = lambda _at, _domain: None
        await group.orch.recover()  # what is stranded, or complete and not tidied up
        done = (await group.orch.operations("web0"))[-1]
        assert done.state in {State.COMPLETE, State.ROLLED_BACK}
        if done.state == State.ROLLED_BACK:
            await group.check_undone(before, files)
            assert {len(await group.orch.list(name)) for name in group.names} == {1}
        for name in group.names:
            if not group.host.processes(name):  # it died when all was done
                await group.orch.start(name)
        await trio.sleep(0.1)
        group.check_consistent(group.names)
        assert not await group.orch.recover()


def plan_failure(group: Group, failure: Failure, scope: trio.CancelScope) -> None:
    if failure.kind != "cancel":
        crash = failure.kind == "crash" and not failure.at.startswith("driver")
        group.host.faults.add(failure.at, domain=failure.member, after=failure.after, crash=crash)
        return

    def hook(at: str, domain: str) -> None:
        if at == failure.at and domain in {failure.member, ""}:
            scope.cancel()

    setattr(group.host, "on_effect" if failure.after else "on_call", hook)


@settings(max_examples=60, deadline=None)
@given(stories())
def test_any_fault(story: tuple[str, list[Failure]]) -> None:
    """One or two failures of any members in any steps: all of the group is done, or none of it."""
    clock = MockClock(autojump_threshold=0)
    with tempfile.TemporaryDirectory() as root:
        trio.run(tell, *story, Path(root), clock=clock, instruments=[ThreadsHoldTime(clock)])


# --- cut anywhere ---------------------------------------------------------------------------------------------


async def create_g1(orch: Orchestrator) -> None:
    await orch.create_group(NAMES, DomainSnapshot("g1"), CreateFlag.LIVE)


async def revert_to_g0(orch: Orchestrator) -> None:
    await orch.revert_group(NAMES, "g0")


async def mend(orch: Orchestrator) -> None:
    await orch.recover()


NAMES = ("web0", "web1")
CUT = {"create": create_g1, "revert": revert_to_g0, "create, failing": create_g1, "revert, failing": revert_to_g0}
FAULTS = {"create, failing": "stream.forget", "revert, failing": "machine.load"}
CUTS = st.builds(Cut, st.floats(0, 1), st.sampled_from(["us", "both", "cancel"]))


async def steps_in(verb: str, root: Path) -> int:
    async with open_group(root, len(NAMES)) as group:
        await group.create(name="g0")
        plan_fault(group, verb)
        return await perform_on(group.host, root, CUT[verb], "us", strands=True)


def plan_fault(group: Group, verb: str) -> None:
    if verb in FAULTS:
        group.host.faults.add(FAULTS[verb], domain="web1")


@cache
def counted(verb: str) -> int:
    """Return how many steps of tasks an operation has."""
    with tempfile.TemporaryDirectory() as root:
        return run(steps_in, verb, Path(root))


async def check_all_old_or_new(group: Group, old: Mapping[str, Collection[Handle]]) -> None:
    """Check that of each member that is there a guest runs, with nobody's help: all the old or all the new."""
    await trio.sleep(1)
    there = [(name, process) for name in NAMES for process in group.host.processes(name)]
    running = [(name, process) for name, process in there if group.host.guest(process).runs]
    assert {name for name, _ in running} == {name for name, _ in there}
    assert len({process in old[name] for name, process in running}) <= 1


async def tell_cut(verb: str, cuts: Sequence[Cut], root: Path) -> None:
    """Cut an operation on a group, and its recovery, and check that it is one of all members or of none."""
    steps = counted(verb)
    async with open_group(root, len(NAMES)) as group:
        await group.create(name="g0")
        before, files = {name: group.picture([name]) for name in NAMES}, group.host.files()
        old = {name: group.host.processes(name) for name in NAMES}
        plan_fault(group, verb)
        for number, cut in enumerate(cuts):
            call = mend if number else CUT[verb]
            await perform_on(group.host, root, call, cut.how, 1 + int(cut.share * steps), strands=verb in FAULTS)
            group.host.faults.clear()
            await check_all_old_or_new(group, old)
        assert {record.state for record in await group.orch.recover()} <= {State.COMPLETE, State.ROLLED_BACK}
        assert not await group.orch.recover()
        last = (await group.orch.operations("web0"))[-1]
        done = last.state == State.COMPLETE and (last.kind, last.subject) != ("create", "g0")
        names = [[record.name for record in await group.orch.list(name)] for name in NAMES]
        assert names == [["g0", "g1"] if done and verb.startswith("create") else ["g0"]] * len(NAMES)
        if not done:
            await group.check_undone(before, files)
        elif verb.startswith("revert"):
            assert not any(set(old[name]) & set(group.host.processes(name)) for name in NAMES)
        for name in NAMES:
            if not group.host.processes(name):  # it was killed, too
                await group.orch.start(name)
        await trio.sleep(0.1)
        group.check_consistent(NAMES)
        for name in NAMES:
            assert (await group.orch.verify(name, "g0")).ok


async def die_between_members(root: Path, place: str) -> None:
    """Tell the story of the test below."""
    async with open_group(root, len(NAMES)) as group:
        await group.create(name="g0")
        old = {name: group.host.processes(name) for name in NAMES}
        await perform_on(group.host, root, revert_to_g0, "us", place=place)
        await check_all_old_or_new(group, old)


@pytest.mark.parametrize("place", ["machine.pause", "machine.resume", "guard.dismiss"])
def test_die_between_members(place: str, tmp_path: Path) -> None:
    """Killed when the first member of a group stands, is taken over or has no guard any more, and the other not."""
    run(die_between_members, tmp_path, place)


@settings(max_examples=int(os.environ.get("SNAPORCH_CRASHES", "60")), deadline=None)
@given(st.sampled_from(sorted(CUT)), st.lists(CUTS, min_size=1, max_size=2))
def test_any_cut(verb: str, cuts: list[Cut]) -> None:
    """Cut at any step of any task, by any death or a cancellation, and so is recovery: all or none."""
    counted(verb)
    with tempfile.TemporaryDirectory() as root:
        run(tell_cut, verb, cuts, Path(root))
