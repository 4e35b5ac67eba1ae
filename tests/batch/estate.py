"""Many simulated domains, and plans for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch import DeviceDisk, DomainDefinition, Orchestrator, open_orchestrator
from snaporch.batch import store
from snaporch.batch.plan import Plan, plan_from
from snaporch.batch.runner import run_batch
from snaporch.batch.store import BatchRecord, ItemRecord
from snaporch.catalog import Change
from snaporch.model.domain import DomainRecord
from snaporch.orchestrator import catalog_of
from snaporch.testing import SimulatedDriver, SimulatedHost

GIB = 2**30
EPOCH = 1_750_000_000.0


def now() -> float:
    """Return the time by Trio's clock."""
    return EPOCH + trio.current_time()


def booted(
    host: SimulatedHost,
    name: str,
    *,
    directory: str = "/images",
    tags: tuple[str, ...] = (),
    memory: int = GIB,
) -> DomainRecord:
    """Make a domain that runs."""
    host.add_image(f"{directory}/{name}.qcow2")
    disks = (DeviceDisk("vda", f"{directory}/{name}.qcow2"),)
    definition = DomainDefinition(name, memory=memory, disks=disks, driver="simulated")
    return DomainRecord(definition, handle=host.boot(definition), tags=tags)


@attrs.define
class Estate:
    """Domains vm0, vm1, … on one simulated host."""

    host: SimulatedHost
    orch: Orchestrator

    async def boot(self, count: int) -> None:
        """Make domains."""
        domains = tuple(booted(self.host, f"vm{number}") for number in range(count))
        await catalog_of(self.orch).write(Change(domains=domains))

    async def run(self, plan: Plan, **options: Any) -> BatchRecord:
        """Run a plan on Trio's clock."""
        return await run_batch(self.orch, plan, now=now, **options)

    async def items(self, batch: BatchRecord) -> dict[str, ItemRecord]:
        """Return a batch's items by name."""
        return {record.item.name: record async for record in store.items(catalog_of(self.orch), batch.id)}

    async def snapshots(self) -> dict[str, list[str]]:
        """Return the names of all snapshots, by domain."""
        domains = await catalog_of(self.orch).domains()
        return {d.name: [s.name for s in await self.orch.list(d.name)] for d in domains}


@asynccontextmanager
async def open_estate(root: Path, count: int, host: SimulatedHost | None = None) -> AsyncIterator[Estate]:
    """Make domains; those that a host has already are as they are."""
    known, host = host is not None, host or SimulatedHost()
    async with open_orchestrator(root, drivers={"simulated": SimulatedDriver(host)}) as orch:
        estate = Estate(host, orch)
        if not known:
            await estate.boot(count)
        yield estate


def plan(**data: Any) -> Plan:
    """Return a plan for all domains."""
    return plan_from({"name": "nightly", "select": {"globs": ["*"]}, "snapshot": {"name": "s"}} | data)
