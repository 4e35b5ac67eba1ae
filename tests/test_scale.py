"""What one operation costs does not depend on what else the catalog holds."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import attrs
from trio.testing import MockClock

from snaporch import CreateFlag, DeviceDisk, DomainDefinition, DomainSnapshot, Orchestrator, open_orchestrator
from snaporch.catalog import Catalog, Change
from snaporch.model.domain import DomainRecord
from snaporch.orchestrator import catalog_of
from snaporch.testing import SimulatedDriver, SimulatedHost, ThreadsHoldTime

MORE = 40


def booted(host: SimulatedHost, name: str) -> DomainRecord:
    host.add_image(f"/images/{name}.qcow2")
    disks = (DeviceDisk("vda", f"/images/{name}.qcow2"),)
    definition = DomainDefinition(name, memory=2**30, disks=disks, driver="simulated")
    return DomainRecord(definition, handle=host.boot(definition))


@attrs.define
class Counter:
    """Counts the instructions that SQLite carries out."""

    count: int = 0

    def watch(self, catalog: Catalog) -> None:
        """Count those of a catalog."""
        for connection in filter(None, (catalog._connection, catalog._reader)):
            connection.set_progress_handler(self._one, 1)

    def _one(self) -> int:
        self.count += 1
        return 0


async def cost(orch: Orchestrator, counter: Counter, name: str) -> int:
    """Return the instructions of one create."""
    before = counter.count
    await orch.create(name, DomainSnapshot("a"), CreateFlag.LIVE)
    return counter.count - before


async def test_the_catalog_is_asked_for_no_more_than_it_takes(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A create among forty domains with their snapshots costs SQLite what it costs the second of two."""
    host, counter = SimulatedHost(), Counter()
    async with open_orchestrator(tmp_path, drivers={"simulated": SimulatedDriver(host)}) as orch:
        catalog = catalog_of(orch)
        await catalog.write(Change(domains=tuple(booted(host, f"vm{i}") for i in range(MORE))))
        counter.watch(catalog)
        await cost(orch, counter, "vm0")
        early = await cost(orch, counter, "vm1")
        for number in range(2, MORE - 1):
            await cost(orch, counter, f"vm{number}")
        late = await cost(orch, counter, f"vm{MORE - 1}")
    assert late < 1.1 * early
