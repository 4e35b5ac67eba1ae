"""The engine with several participants: a consistency group is the very table of one domain, with more actors."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    CreateOptions,
    DomainDefinition,
    DomainSnapshot,
    OperationFailed,
    Strategy,
    open_orchestrator,
)
from snaporch.catalog.store import Change, merged
from snaporch.context import Context
from snaporch.convert import dumps
from snaporch.create import Participant
from snaporch.engine import Operation
from snaporch.orchestrator import Orchestrator
from snaporch.planning import Scene, plan_create
from snaporch.states import State
from snaporch.steps import CREATE, ROLLBACK_CREATE
from snaporch.testing import SimulatedDriver, SimulatedHost, ThreadsHoldTime

GIB = 2**30
LIVE = (Strategy.BACKGROUND, Strategy.PRECOPY)


@pytest.fixture
def threads_hold_time(autojump_clock: MockClock) -> ThreadsHoldTime:
    return ThreadsHoldTime(autojump_clock)


@attrs.define
class Group:
    """Running domains on one host, and what their hypervisors were told, in order."""

    host: SimulatedHost
    orch: Orchestrator
    names: list[str]
    operation: Operation = attrs.field(factory=lambda: Operation("create", "group", "g1"))
    log: list[tuple[str, str, str]] = attrs.field(factory=list)

    async def participant(self, name: str, strategy: Strategy, stack: AsyncExitStack) -> Participant:
        """Plan a create of one domain, as `snaporch.create.create` does."""
        context: Context = self.orch._context
        record, machine = await stack.enter_async_context(context.machine_of(name))
        assert machine is not None
        scene = Scene(
            domain=record,
            state=await machine.state(),
            disks=await machine.disks(),
            capabilities=machine.capabilities,
            settings=await machine.settings(),
            directory=context.directory(name),
            operation=self.operation.id,
            now=time.time(),
        )
        flags = CreateFlag(0) if strategy is Strategy.PAUSED else CreateFlag.LIVE
        asked = Strategy.AUTO if strategy is Strategy.PAUSED else strategy
        plan = plan_create(scene, DomainSnapshot("g1"), flags, CreateOptions(strategy=asked))
        machine.forget_pauses()
        return Participant(plan, self.operation, context, context.driver(record), machine, known={})

    async def create(self, strategy: Strategy = Strategy.BACKGROUND) -> None:
        """Take one point of all domains: one operation, one run of the engine."""
        async with AsyncExitStack() as stack:
            actors = [await self.participant(name, strategy, stack) for name in self.names]

            async def commit() -> Change:
                return merged([await actor.commit() for actor in actors])

            self.host.on_call = lambda at, domain: self.log.append(("call", at, domain))
            self.host.on_effect = lambda at, domain: self.log.append(("effect", at, domain))
            await self.orch._context.engine.run(
                self.operation,
                CREATE[strategy],
                ROLLBACK_CREATE,
                actors,
                plan=dumps([actor.plan for actor in actors]),
                commit=commit,
            )

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


@asynccontextmanager
async def open_group(root: Path, count: int) -> AsyncIterator[Group]:
    host = SimulatedHost()
    names = [f"web{number}" for number in range(count)]
    async with open_orchestrator(root, drivers={"simulated": SimulatedDriver(host)}) as orch:
        for name in names:
            disks = [attrs.evolve(host.add_image(f"/images/{name}-{disk}"), target=disk) for disk in ("vda", "vdb")]
            await orch.define(DomainDefinition(name, memory=GIB, disks=tuple(disks), driver="simulated"))
            await orch.start(name)
        await trio.sleep(1)
        yield Group(host, orch, names)


@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PAUSED])
@pytest.mark.parametrize("count", [2, 4])
async def test_one_point(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, count: int, strategy: Strategy
) -> None:
    """All stand before any switches, all have switched and are armed before any runs on: one point."""
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


async def test_one_point_precopy(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A group whose memories are not done at once: who is first waits, and all stand when the first switches."""
    async with open_group(tmp_path, 2) as group:
        group.host.models["web1"] = attrs.evolve(group.host.model, dirty_rate=400e6)
        for name in group.names:  # a model is looked up when a process starts
            await group.orch.destroy(name)
            await group.orch.start(name)
        await group.create(Strategy.PRECOPY)
        assert max(group.when("effect", "stream.finished")) < min(group.when("call", "machine.switch"))
        assert max(group.when("effect", "machine.switch")) < min(group.when("call", "machine.resume"))
        guests = [group.host.guest(process) for process in group.host.processes()]
        assert max(guest.stopped[1] for guest in guests) < min(guest.started[1] for guest in guests)
        group.check_consistent(group.names)


async def test_one_change(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """What is committed is every member's snapshot, overlays and files; each can be reverted to by itself."""
    async with open_group(tmp_path, 3) as group:
        await group.create()
        catalog = group.orch._context.catalog
        numbers = {}
        for name in group.names:
            (record,) = await group.orch.list(name)
            assert record.memory is not None
            numbers[name] = group.host.number(record.memory.path)
            assert {group.host.number(chain[0].path) for chain in record.images.values()} == {numbers[name]}
            active = (await catalog.domain(name)).active
            assert (await group.orch.domain_info(name)).current == "g1"
            assert {disk.path for disk in active.values()} < set(group.host.files())
        files = await catalog.own_files("group")
        assert len(files) == 3 * len(group.names)
        (operation,) = await group.orch.operations("web0") or await catalog.operations("group")
        assert (operation.state, operation.ended is None) == (State.COMPLETE, False)
        await trio.sleep(1)
        await group.orch.revert("web1", "g1")
        group.check_consistent(group.names)
        (process,) = group.host.processes("web1")
        assert numbers["web1"] <= group.host.guest(process).ticks < numbers["web1"] + 100_000


FAILURES = ["machine.add_node", "machine.pause", "machine.switch", "stream.armed", "machine.resume", "stream.half"]


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
        assert group.operation.machine.state is State.ROLLED_BACK
        assert group.host.files() == files
        assert group.picture(group.names) == before
        await trio.sleep(1)
        group.check_consistent(group.names)
        for name in group.names:
            assert not await group.orch.list(name)
        group.operation = Operation("create", "group", "g2")
        await group.create()
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
        assert group.operation.machine.state is State.ROLLED_BACK
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
                assert group.operation.machine.state is State.SWITCHING
                scope.cancel()
        assert group.operation.machine.state is State.ROLLED_BACK
        assert group.host.files() == files
        assert group.picture(group.names) == before
        group.check_consistent(group.names)
