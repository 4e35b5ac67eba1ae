"""Groups of domains on a simulated host."""

from __future__ import annotations

import fcntl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio

from snaporch import (
    CreateFlag,
    CreateOptions,
    DomainDefinition,
    DomainSnapshot,
    SnapshotRecord,
    Strategy,
    open_orchestrator,
)
from snaporch.orchestrator import Orchestrator
from snaporch.testing import SimulatedDriver, SimulatedHost

GIB = 2**30
REVERT_FAILURES = ["storage.make_overlay", "machine.load", "guard.post"]
# What a hypervisor that has no room for two guests answers.
NO_ROOM = ["driver.launch", "machine.resume"]


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

    async def check_undone(
        self, before: dict[str, list[object]], files: tuple[str, ...], *, reverted: bool
    ) -> None:
        """Assert that everything is as before, but for members that have died.

        The disks of such a one hold its last word, or what a revert had kept of it was put back, in a new process.
        """
        assert self.host.files() == files
        for name in self.names:
            processes, *states = before[name]
            if (there := self.host.processes(name)) and reverted and there != processes:
                assert [self.host.guest(process).running for process in there] == states[-1], name
                self.check_consistent([name])
            elif there:
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
