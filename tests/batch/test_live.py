"""Batches on real guests: what only they can show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from snaporch import DeviceDisk, DomainDefinition
from snaporch.batch import store
from snaporch.batch.plan import Plan, plan_from
from snaporch.batch.prune import prune
from snaporch.batch.runner import run_batch
from snaporch.batch.store import End, Stage
from snaporch.model.record import OperationKind
from snaporch.orchestrator import catalog_of
from tests.live.world import NAME, MakeWorld, Qemu, World, make_image

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]


def plan(name: str, **data: Any) -> Plan:
    return plan_from({"name": "live", "select": {"names": [NAME]}, "snapshot": {"name": name}} | data)


async def snapshots(world: World) -> list[str]:
    return [record.name for record in await world.orch.list(NAME)]


async def test_retention(make_world: MakeWorld) -> None:
    """What no rule keeps goes in one operation, from between what stays; a pin holds; what is left is whole."""
    world = await make_world()
    for name in "abcde":
        await run_batch(world.orch, plan(name))
    await world.orch.pin(NAME, "a")
    policy = plan("f", retention={"last": 2})
    assert policy.retention is not None
    verdicts = await prune(world.orch, policy.retention, [NAME], now=1e12, dry_run=True)
    assert list(verdicts[NAME].delete) == ["b", "c"]
    assert await snapshots(world) == list("abcde")
    batch = await run_batch(world.orch, policy)
    assert (batch.stage, batch.deleted) == (Stage.COMPLETE, 3)
    assert await snapshots(world) == ["a", "e", "f"]
    assert [each.kind for each in await world.orch.operations(NAME)].count(OperationKind.DELETE) == 1
    await world.check_runs()
    for name in ("a", "e"):
        await world.revert(name)
        await world.check_consistent()
    await world.check_no_orphans()


async def test_undo_all(make_world: MakeWorld) -> None:
    """One that cannot be taken, the last, undoes those that were: the guest runs as if nothing had been."""
    world = await make_world()
    disk = DeviceDisk("vda", str(world.directory / "later.qcow2"))
    make_image(world.qemu, Path(disk.path))
    await world.orch.define(DomainDefinition("later", memory=2**26, disks=(disk,)))
    (world.root / "later").write_text("where the domain's files would go")
    both = plan("x", select={"globs": ["*"]}, limits={"per_host": 1}, on_failure="undo_all")
    before = await world.everything()
    batch = await run_batch(world.orch, both)
    ends = {record.item.name: record.end async for record in store.items(catalog_of(world.orch), batch.id)}
    assert (batch.stage, ends) == (Stage.UNDONE, {NAME: End.UNDONE, "later": End.FAILED})
    after = await world.everything()
    assert attrs.evolve(after["info"], disks=()) == attrs.evolve(before["info"], disks=())
    assert not await snapshots(world)
    await world.check_runs()
    await world.check_no_orphans()


@pytest.mark.parametrize("qemu", ["10.0"], indirect=True)
def test_killed(qemu: Qemu) -> None:
    """A short run of scripts/proof batch-kill: killed and gone on with, each domain has exactly what it should."""
    script = [sys.executable, "-m", "proofs.batch_kill", "--kills", "2", "--guests", "2", "--seed", "7"]
    command = [*script, "--qemu", qemu.version]
    done = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
