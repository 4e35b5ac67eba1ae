"""Makes the golden files of a version: run it with that version's package, from the root of this repository.

git worktree add /tmp/old COMMIT
PYTHONPATH=/tmp/old python tests/golden/make.py tests/golden/VERSION

`root.sql` is a catalog with everything in it: domains, snapshots of each kind, a group, operations that ended each
way, one that was cut short, two batches. `CLASS.json` has a few documents of each stored or served class. They say
what that version writes, whatever the present one does: the files are not changed afterwards.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import trio
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    CreateOptions,
    DeleteFlag,
    DeviceDisk,
    DiskSnapshot,
    DomainDefinition,
    DomainSnapshot,
    Orchestrator,
    RevertFlag,
    SnaporchError,
    Strategy,
    open_orchestrator,
)
from snaporch.batch.plan import plan_from
from snaporch.batch.runner import run_batch
from snaporch.service.jobs import past
from snaporch.testing import GuestModel, SimulatedDriver, SimulatedHost, ThreadsHoldTime

MOST = 4  # documents of a class that are kept
GIB = 2**30
PARTS = {
    "CreateOptions", "DeviceDisk", "DiskSnapshot", "DiskStatus", "DomainSnapshot", "Group", "Inside", "Item",
    "MergeOptions", "MergeStep", "Overlay", "Process", "StreamPlan", "Timings",
}  # fmt: skip
HERE = "/srv/vm"  # what the root is called in the files
NIGHTLY = {
    "name": "nightly",
    "select": {"names": ["web", "db"], "groups": {"shop": ["app", "cache"]}},
    "snapshot": {"verify": "files"},
    "retention": {"last": 1},
}


def _module(*names: str) -> Any:
    """Return the first of the modules that there is: what a module is called depends on the version."""
    for name in names:
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise ModuleNotFoundError(names[0])


Change = _module("snaporch.catalog.writing", "snaporch.catalog.store").Change
converter = _module("snaporch.model.convert", "snaporch.convert").converter
DomainRecord = _module("snaporch.model.domain", "snaporch.models").DomainRecord

_found: dict[str, list[Any]] = {}


def _note(value: Any) -> None:
    """Keep a document of every class that has records in it, as it is written."""
    if isinstance(value, list | tuple):
        for each in value:
            _note(each)
    elif attrs.has(type(value)):
        documents = _found.setdefault(type(value).__name__, [])
        document = _write(value)
        if document not in documents and len(documents) < MOST:
            documents.append(document)
        for field in attrs.fields(type(value)):
            _note(getattr(value, field.name))
    elif isinstance(value, dict):
        for each in value.values():
            _note(each)


_write = converter.unstructure


def _writing(value: Any, *rest: Any) -> Any:
    _note(value)
    return _write(value, *rest)


def _domain(host: SimulatedHost, name: str, *, runs: bool = True, **more: Any) -> Any:
    disks = (DeviceDisk("vda", f"/images/{name}.qcow2"), DeviceDisk("vdb", f"/images/{name}-data.qcow2"))
    for disk in disks:
        host.add_image(disk.path)
    definition = DomainDefinition(name, memory=GIB, disks=disks, driver="simulated", guest_agent=True)
    field = "handle" if hasattr(attrs.fields(DomainRecord), "handle") else "process"
    return DomainRecord(definition, **{field: host.boot(definition) if runs else None}, **more)


async def _story(orch: Orchestrator, host: SimulatedHost) -> None:
    names = ("web", "db", "app", "cache")
    records = [_domain(host, name, tags=("prod",)) for name in names]
    catalog = orch._context.catalog  # what gives it is called otherwise in other versions
    await catalog.write(Change(domains=(*records, _domain(host, "still", runs=False))))
    inside = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
    await orch.create("web", DomainSnapshot("live", "before the upgrade"), CreateFlag.LIVE)
    await orch.create("web", DomainSnapshot("paused"))
    await orch.create("web", DomainSnapshot("precopy"), options=CreateOptions(Strategy.PRECOPY))
    await orch.create("web", DomainSnapshot("quiesced"), CreateFlag.DISK_ONLY | CreateFlag.QUIESCE)
    await orch.create("db", DomainSnapshot("inside", disks=inside))
    await orch.create("still", DomainSnapshot("disks", memory=False))
    await orch.create_group(("app", "cache"), DomainSnapshot("both"), CreateFlag.LIVE)
    _note(await orch.estimate("web"))
    await orch.revert("web", "paused")
    await orch.revert("db", "inside", RevertFlag.PAUSED)
    await orch.revert("still", "disks")
    await orch.revert_group(("app", "cache"), "both", save_current="kept")
    await orch.create("web", DomainSnapshot("branch"), CreateFlag.LIVE)
    _note(await orch.verify("web", "live", boot=True))
    await orch.pin("web", "branch")
    _note(await orch.delete("web", "precopy", dry_run=True))
    _note(await orch.delete("web", "precopy"))
    _note(await orch.delete_group(("app", "cache"), "kept", DeleteFlag(0)))
    await orch.flatten("web")
    for plan in (NIGHTLY, NIGHTLY | {"on_failure": "undo_all"}):
        await run_batch(orch, plan_from(plan))
    with suppress(SnaporchError):
        await orch.create("web", DomainSnapshot("no"), CreateFlag.LIVE, CreateOptions(max_seconds=0.001))


async def _cut_short(orch: Orchestrator, copy: Path) -> None:
    """Copy the catalog while a checkpoint of two domains streams."""

    async def watch(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        async with orch.events() as events:
            task_status.started()
            async for event in events:
                if event.state == "streaming":
                    with closing(sqlite3.connect(orch.root / "catalog.sqlite3")) as connection:
                        connection.execute("VACUUM INTO ?", (str(copy),))
                    scope.cancel()
                    return

    async with trio.open_nursery() as nursery:
        await nursery.start(watch, nursery.cancel_scope)
        await orch.create_group(("app", "cache"), DomainSnapshot("cut"), CreateFlag.LIVE)


async def _make(root: Path, copy: Path) -> None:
    host = SimulatedHost(model=GuestModel(agent=True))
    async with open_orchestrator(root, drivers={"simulated": SimulatedDriver(host)}) as orch:
        await _story(orch, host)
        _note(await orch.fsck())
        _note(await orch.domains())
        _note([past(record) for record in await orch.operations()])
        async with orch.events() as events:
            await orch.create("still", DomainSnapshot("told", memory=False))
            _note(events.receive_nowait())
        await _cut_short(orch, copy)


_clock = MockClock(autojump_threshold=0)


def main() -> None:
    """Make the files."""
    target = Path(sys.argv[1])
    converter.unstructure = _writing  # it writes everything
    with TemporaryDirectory() as scratch:
        root, copy = Path(scratch) / "root", Path(scratch) / "copy"
        trio.run(_make, root, copy, clock=_clock, instruments=[ThreadsHoldTime(_clock)])
        with closing(sqlite3.connect(copy)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            dump = "\n".join([*connection.iterdump(), f"PRAGMA user_version = {version};"])
    target.mkdir(parents=True, exist_ok=True)
    (target / "root.sql").write_text(dump.replace(str(root), HERE) + "\n")
    for name, documents in _found.items():
        if name in PARTS:  # never a document by itself
            continue
        text = json.dumps(documents, indent=1).replace(str(root), HERE)
        (target / f"{name}.json").write_text(text + "\n")
    os.sync()


if __name__ == "__main__":
    main()
