"""The RFC's names over the orchestrator: numbers, structures, answers."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import pytest

from snaporch import libxl
from snaporch.errors import InvalidInput, NotFound
from snaporch.libxl import (
    LIBXL_DISK_FORMAT_QCOW2,
    LIBXL_DOMAIN_SNAPSHOT_CREATE_LIVE,
    LIBXL_DOMAIN_SNAPSHOT_DELETE_CHILDREN,
    LIBXL_DOMAIN_SNAPSHOT_REVERT_PAUSED,
    libxl_ctx,
    libxl_device_disk,
    libxl_disk_snapshot,
    libxl_disk_snapshot_revert,
    libxl_domain_snapshot,
    libxl_domain_snapshot_create,
    libxl_domain_snapshot_delete,
    libxl_domain_snapshot_revert,
)
from snaporch.model.domain import DomainState
from snaporch.testing import ThreadsHoldTime, open_simulated_world
from tests.live.world import NAME, World


def test_the_numbers_are_the_rfcs() -> None:
    numbers = {
        name.removeprefix("LIBXL_DOMAIN_SNAPSHOT_"): getattr(libxl, name)
        for name in libxl.__all__
        if name.startswith("LIBXL_DOMAIN_SNAPSHOT_")
    }
    assert numbers == {
        "CREATE_DISK_ONLY": 1,
        "CREATE_LIVE": 2,
        "DELETE_CHILDREN": 1,
        "REVERT_RUNNING": 1,
        "REVERT_PAUSED": 2,
        "REVERT_FORCE": 4,
    }


async def test_a_snapshot_is_created_gone_back_to_and_deleted(
    tmp_path: Path, threads_hold_time: ThreadsHoldTime
) -> None:
    """The structure then holds what was made; the domain is as the flags say."""
    async with open_simulated_world(tmp_path) as world:
        ctx = libxl_ctx(world.orchestrator)
        snapshot = libxl_domain_snapshot(description="first")
        assert await libxl_domain_snapshot_create(ctx, "web1", snapshot, LIBXL_DOMAIN_SNAPSHOT_CREATE_LIVE) == 0
        assert ctx.error is None
        assert snapshot.name
        assert snapshot.memory_file
        assert snapshot.creation_time
        assert [each.disk.vdev for each in snapshot.disks] == ["vda", "vdb"]
        (record,) = await world.orchestrator.list("web1")
        for ours, theirs in zip(snapshot.disks, record.snapshot.disks, strict=True):
            assert ours.external_sn is not None
            assert theirs.external_sn is not None
            assert ours.external_sn.pdev_path == theirs.external_sn.path
            assert ours.external_sn.format == LIBXL_DISK_FORMAT_QCOW2
        flags = LIBXL_DOMAIN_SNAPSHOT_REVERT_PAUSED
        assert await libxl_domain_snapshot_revert(ctx, "web1", snapshot.name, flags) == 0
        assert (await world.orchestrator.domain_info("web1")).state is DomainState.PAUSED
        assert await libxl_disk_snapshot_revert(ctx, "web1", snapshot.name, 0) == 0
        assert (await world.orchestrator.domain_info("web1")).state is DomainState.RUNNING
        flags = LIBXL_DOMAIN_SNAPSHOT_DELETE_CHILDREN
        assert await libxl_domain_snapshot_delete(ctx, "web1", snapshot.name, flags) == 0
        assert await world.orchestrator.list("web1") == ()


async def test_what_fails_is_minus_one_and_the_error_is_in_the_context(
    tmp_path: Path, threads_hold_time: ThreadsHoldTime
) -> None:
    """The structure is untouched, and the next success clears the error."""
    async with open_simulated_world(tmp_path) as world:
        ctx, snapshot = libxl_ctx(world.orchestrator), libxl_domain_snapshot("one")
        assert await libxl_domain_snapshot_create(ctx, "nobody", snapshot, 0) == -1
        error = ctx.error
        assert isinstance(error, NotFound)
        assert snapshot == libxl_domain_snapshot("one")
        assert await libxl_domain_snapshot_create(ctx, "web1", snapshot, 0) == 0
        error = ctx.error
        assert error is None


@pytest.mark.parametrize("flags", [64, -1])
async def test_unknown_flags_are_refused(tmp_path: Path, threads_hold_time: ThreadsHoldTime, flags: int) -> None:
    async with open_simulated_world(tmp_path) as world:
        ctx = libxl_ctx(world.orchestrator)
        assert await libxl_domain_snapshot_create(ctx, "web1", libxl_domain_snapshot(), flags) == -1
        assert isinstance(ctx.error, InvalidInput)


async def test_an_internal_disk_has_no_external_snapshot(
    tmp_path: Path, threads_hold_time: ThreadsHoldTime
) -> None:
    """Both ways: a contradiction is refused, and what was made says so."""
    async with open_simulated_world(tmp_path) as world:
        ctx = libxl_ctx(world.orchestrator)
        disks = [libxl_disk_snapshot(libxl_device_disk(vdev), external=False) for vdev in ("vda", "vdb")]
        wrong = libxl_disk_snapshot(libxl_device_disk("vda"), external=False, external_sn=libxl_device_disk("vda"))
        assert await libxl_domain_snapshot_create(ctx, "web1", libxl_domain_snapshot(disks=[wrong]), 0) == -1
        assert isinstance(ctx.error, InvalidInput)
        snapshot = libxl_domain_snapshot("inside", disks=disks)
        assert snapshot.num_disks == 2
        assert await libxl_domain_snapshot_create(ctx, "web1", snapshot, 0) == 0
        assert all(each.external_sn is None and not each.external for each in snapshot.disks)


@pytest.mark.live
@pytest.mark.parametrize("qemu", ["10.0"], indirect=True)
async def test_a_real_guest_goes_back(world: World) -> None:
    """As the simulated one: memory and disks are of one point."""
    ctx, snapshot = libxl_ctx(world.orch), libxl_domain_snapshot("point")
    assert await libxl_domain_snapshot_create(ctx, NAME, snapshot, LIBXL_DOMAIN_SNAPSHOT_CREATE_LIVE) == 0
    assert Path(snapshot.memory_file).stat().st_size > 0
    assert await libxl_domain_snapshot_revert(ctx, NAME, "point", 0) == 0
    await world.check_consistent()
    assert await libxl_domain_snapshot_delete(ctx, NAME, "point", 0) == 0
