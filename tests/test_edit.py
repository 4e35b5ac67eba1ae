"""Snapshots get other names and descriptions: wherever the old name was is the new one, and no file has changed."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    Busy,
    CreateFlag,
    DeleteFlag,
    DeviceDisk,
    DiskSnapshot,
    DomainSnapshot,
    InvalidInput,
    NotFound,
    Orchestrator,
    SnaporchError,
    TargetExists,
    Unsupported,
)
from snaporch.batch.plan import Plan
from snaporch.batch.store import taken_by
from snaporch.catalog.changes import changes, newest
from snaporch.errors import OtherSnapshot
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime, open_simulated_world
from tests.batch.estate import open_estate, plan

INSIDE = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))


async def test_a_name_is_changed_wherever_it_is(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """In the children, and where it is current; id and files stay, and all that can be done with it can be done."""
    async with open_simulated_world(tmp_path) as world:
        orch = world.orchestrator
        before = await orch.create("web1", DomainSnapshot("one", "said"))
        await orch.create("web1", DomainSnapshot("two"))
        await orch.revert("web1", "one")
        await orch.create("web1", DomainSnapshot("three"))
        await orch.revert("web1", "one")
        seen = await newest(catalog_of(orch))
        after = await orch.edit("web1", "one", new_name="first")
        assert after == await orch.show("web1", "first")
        assert (after.id, after.files, after.snapshot.description) == (before.id, before.files, "said")
        assert await orch.tree("web1") == {None: ("first",), "first": ("two", "three")}
        assert await orch.current("web1") == "first"
        with pytest.raises(NotFound):
            await orch.show("web1", "one")
        told = {(each.name, each.gone) for each in (await changes(catalog_of(orch), seen, 100)).items if each.name}
        assert told == {("one", True), ("first", False), ("two", False), ("three", False)}
        assert (await orch.verify("web1", "first")).ok
        assert not await orch.fsck()
        await orch.create("web1", DomainSnapshot("one"))
        assert (await orch.show("web1", "one")).parent == "first"
        await orch.delete("web1", "first")
        assert await orch.tree("web1") == {None: ("two", "three", "one")}
        assert (await orch.edit("web1", "one", description="")).snapshot.description == ""


async def test_a_point_inside_keeps_its_name_there(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """It is reverted to and deleted by the name that the image has."""
    async with open_simulated_world(tmp_path) as world:
        orch = world.orchestrator
        await orch.create("web1", DomainSnapshot("one", disks=INSIDE))
        await orch.edit("web1", "one", new_name="two")
        with pytest.raises(TargetExists, match="inside"):
            await orch.create("web1", DomainSnapshot("one", disks=INSIDE))
        assert (await orch.revert("web1", "two")).way == "inside"
        assert (await orch.verify("web1", "two")).ok
        await orch.delete("web1", "two")
        await orch.create("web1", DomainSnapshot("one", disks=INSIDE))


REFUSALS: dict[str, tuple[type[SnaporchError], str, Callable[[Orchestrator], Awaitable[Any]]]] = {
    "nothing": (InvalidInput, "nothing is to change", lambda o: o.edit("vm0", "one")),
    "no name": (InvalidInput, "is not a snapshot name", lambda o: o.edit("vm0", "one", new_name="a/b")),
    "too long": (InvalidInput, "", lambda o: o.edit("vm0", "one", description="x" * 2**20)),
    "taken": (TargetExists, "has a snapshot 'two' already", lambda o: o.edit("vm0", "one", new_name="two")),
    "no such snapshot": (NotFound, "", lambda o: o.edit("vm0", "none", new_name="x")),
    "no such domain": (NotFound, "", lambda o: o.edit("nobody", "one", new_name="x")),
    "another one": (OtherSnapshot, "", lambda o: o.edit("vm0", "one", new_name="x", ids=["0"])),
    "of a group": (Unsupported, "one point with that of vm1", lambda o: o.edit("vm0", "both", new_name="x")),
}


async def test_what_is_refused(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """With words, and nothing has changed; a group's description can be changed, one domain's at a time."""
    async with open_estate(tmp_path, 2) as estate:
        orch = estate.orch
        await orch.create("vm0", DomainSnapshot("one"))
        await orch.create("vm0", DomainSnapshot("two"))
        await orch.create_group(["vm0", "vm1"], DomainSnapshot("both"), CreateFlag.LIVE)
        before = await orch.list("vm0")
        for kind, words, act in REFUSALS.values():
            with pytest.raises(kind, match=words or None):
                await act(orch)
        assert await orch.list("vm0") == before
        assert (await orch.edit("vm0", "both", description="x")).snapshot.description == "x"
        await orch.delete("vm1", "both", DeleteFlag.ALONE)
        assert (await orch.edit("vm0", "both", new_name="x")).name == "x"  # it is alone by now


async def test_it_waits_for_nobody(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """While an operation runs on the domain it is refused."""
    async with open_simulated_world(tmp_path) as world, trio.open_nursery() as nursery:
        orch = world.orchestrator
        await orch.create("web1", DomainSnapshot("one"))
        async with orch.events() as events:
            nursery.start_soon(orch.create, "web1", DomainSnapshot("two"), CreateFlag.LIVE)
            await events.receive()
            with pytest.raises(Busy):
                await orch.edit("web1", "one", new_name="x")


async def test_what_a_batch_has_taken_is_still_its_own(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Retention finds it under its new name."""
    one: Plan = plan(snapshot={"name": "a"})
    async with open_estate(tmp_path, 2) as estate:
        await estate.run(one)
        await estate.orch.edit("vm0", "a", new_name="b")
        mine = await taken_by(catalog_of(estate.orch), one.name, "vm0")
        others = await taken_by(catalog_of(estate.orch), one.name, "vm1")
        assert ([*mine], [*others]) == (["b"], ["a"])
