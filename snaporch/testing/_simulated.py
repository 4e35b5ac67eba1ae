"""A world of the simulated driver: the example of one, and for tests of one's own."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

from snaporch.drivers.base import Driver
from snaporch.drivers.simulated import SimulatedDriver, SimulatedHost, SimulatedKill
from snaporch.engine.states import State
from snaporch.model.domain import DomainDefinition, Handle
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DomainSnapshot
from snaporch.orchestrator import Orchestrator, open_orchestrator
from snaporch.testing._support import expect, in_state

GIB = 2**30
SECOND = 1.0

_TROUBLES = (
    "storage.make_overlay",
    "machine.open_overlay",
    "storage.make_file",
    "stream.open",
    "machine.switch",
    "machine.switch.vdb",
    "stream.start",
    "stream.half",
    "stream.finished",
    "machine.resume",
    "stream.seal",
    "storage.seal",
)
_MORE_TROUBLES = {
    Strategy.BACKGROUND: ("machine.pause", "stream.armed"),
    Strategy.PAUSED: ("machine.pause",),
}


@attrs.define
class SimulatedWorld:
    """See `World` and `CrashWorld`; `open_simulated_world` makes one.

    Attributes:
        root: the orchestrator's.
        host: the host that the domain is on.
        orchestrator: see World.
        domain: see World.
        slow: see World.
    """

    root: Path
    host: SimulatedHost
    orchestrator: Orchestrator
    domain: str = "web1"
    slow: int = GIB // 8

    def of(self, domain: str) -> SimulatedWorld:
        """See World."""
        return attrs.evolve(self, domain=domain)

    def process(self) -> Handle:
        """Return the domain's process, of which there is exactly one."""
        found = self.host.processes(self.domain)
        expect(len(found) == 1, f"{self.domain} has {len(found)} processes")
        return found[0]

    async def number(self) -> int:
        """See World; also of a paused guest."""
        await trio.lowlevel.checkpoint()
        return self.host.guest(self.process()).ticks

    async def go_on(self) -> None:
        """See World."""
        await trio.sleep(SECOND)

    async def check_consistent(self) -> None:
        """See World."""
        process = self.process()
        before = self.host.guest(process).ticks
        await trio.sleep(SECOND)
        expect(self.host.guest(process).ticks > before, "the guest does not run")
        expect(self.host.consistent(process), "memory and disks are not of one point")

    async def check_still(self) -> None:
        """See World."""
        before = await self.number()
        await trio.sleep(SECOND)
        expect(await self.number() == before, "the guest runs")

    async def start(self) -> None:
        """See World."""
        await self.orchestrator.start(self.domain)

    async def everything(self) -> Mapping[str, object]:
        """See World."""
        await trio.lowlevel.checkpoint()
        processes = self.host.processes()
        return {
            "files": self.host.files(),
            "processes": processes,
            "running": [self.host.guest(process).running for process in processes],
            "nodes": [self.host.nodes(process) for process in processes],
            "settings": [self.host.settings(process) for process in processes],
        }

    async def damage(self, path: str) -> None:
        """See World."""
        await trio.lowlevel.checkpoint()
        self.host.damage(path)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """See World."""
        self.host.alone = True
        try:
            yield
        finally:
            self.host.alone = False

    def troubles(self, strategy: Strategy) -> Sequence[str]:
        """See World; places for faults, see `FaultPlan.add`."""
        return (*_TROUBLES, *_MORE_TROUBLES.get(strategy, ()))

    @asynccontextmanager
    async def break_next(self, trouble: str) -> AsyncIterator[DomainSnapshot]:
        """See World."""
        full = OSError(errno.ENOSPC, "No space left on device") if trouble == "stream.half" else None
        fault = self.host.faults.add(trouble, error=full)
        yield DomainSnapshot("broken")
        self.host.faults.faults.remove(fault)
        expect(fault.fired, f"nothing has called {trouble}")

    async def kill_in(self, strategy: Strategy, state: State, name: str) -> None:
        """See CrashWorld."""
        driver = SimulatedDriver(self.host)

        async def die() -> None:
            driver.die()
            await trio.lowlevel.checkpoint()

        flags = CreateFlag(0) if strategy is Strategy.PAUSED else CreateFlag.LIVE
        asked = Strategy.AUTO if strategy is Strategy.PAUSED else strategy
        try:
            async with open_orchestrator(self.root, drivers={driver.name: driver}) as other:
                create = partial(
                    other.create, self.domain, DomainSnapshot(name), flags, CreateOptions(strategy=asked)
                )
                async with other.events() as events, trio.open_nursery() as nursery:
                    nursery.start_soon(in_state, events, state, die)
                    await create()
                    nursery.cancel_scope.cancel()
        except* SimulatedKill:
            pass


@asynccontextmanager
async def open_simulated_world(
    root: Path, *, host: SimulatedHost | None = None, domain: str = "web1", driver: Driver | None = None
) -> AsyncIterator[SimulatedWorld]:
    """Make a world: a running guest of two disks and 1 GiB.

    The catalog is a real one, in `root`; on a clock that jumps it needs `ThreadsHoldTime`.
    """
    host = SimulatedHost() if host is None else host
    disks = tuple(
        attrs.evolve(host.add_image(f"/images/{domain}-{target}"), target=target) for target in ("vda", "vdb")
    )
    driver = driver or SimulatedDriver(host)
    async with open_orchestrator(root, drivers={driver.name: driver}) as orchestrator:
        definition = DomainDefinition(domain, memory=GIB, disks=disks, driver=driver.name)
        await orchestrator.define(definition)
        await orchestrator.start(domain)
        await trio.sleep(SECOND)
        yield SimulatedWorld(root, host, orchestrator, domain)
