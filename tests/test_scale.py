"""What one operation costs does not depend on what else the catalog holds."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import attrs
from trio.testing import MockClock

from snaporch import CreateFlag, DeviceDisk, DomainDefinition, DomainSnapshot, Orchestrator, open_orchestrator
from snaporch.catalog.store import Catalog, Change, open_catalog
from snaporch.model.domain import DomainRecord
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
        for connection in (catalog._connection, catalog._reader):
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
        catalog = orch._context.catalog
        await catalog.write(Change(domains=tuple(booted(host, f"vm{i}") for i in range(MORE))))
        counter.watch(catalog)
        await cost(orch, counter, "vm0")
        early = await cost(orch, counter, "vm1")
        for number in range(2, MORE - 1):
            await cost(orch, counter, f"vm{number}")
        late = await cost(orch, counter, f"vm{MORE - 1}")
    assert late < 1.1 * early


async def test_an_old_catalog_knows_what_was_sealed(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """The table of sealed images is filled from the snapshots of a catalog that has none yet."""
    host = SimulatedHost()
    async with open_orchestrator(tmp_path, drivers={"simulated": SimulatedDriver(host)}) as orch:
        catalog = orch._context.catalog
        await catalog.write(Change(domains=(booted(host, "vm"),)))
        records = [await orch.create("vm", DomainSnapshot(name), CreateFlag.LIVE) for name in "ab"]
        for statement in (
            "DROP INDEX operation_unfinished", "DROP INDEX snapshot_name", "DROP INDEX operation_group",
            "DROP TABLE sealed", "DROP TABLE batch_item", "DROP TABLE batch",
            "DROP INDEX operation_begun", "DROP TABLE idempotency", "DROP TABLE claim", "PRAGMA user_version = 1",
        ):  # fmt: skip
            catalog._connection.execute(statement)
    paths = {file.path: file for record in records for file in record.images["vda"]}
    async with open_catalog(tmp_path / "catalog.sqlite3") as reopened:
        assert await reopened.sealed([*paths, "/nowhere"]) == paths
