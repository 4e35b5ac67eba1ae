"""What a create makes of different domains and wishes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
import xxhash

from snaporch.errors import DeadlineExceeded, Unsupported
from snaporch.model.domain import DomainState
from snaporch.model.request import OnTimeout, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from tests.live.world import MIB, NAME, NEVER_CONVERGES, SLOW, SLOW_BANDWIDTH, MakeWorld, World

pytestmark = pytest.mark.live


def backend(kind: str, options: str) -> dict[str, Any]:
    """Return the fields of a definition whose RAM is in a memory backend."""
    return {
        "machine": "q35,memory-backend=ram0",
        "extra_args": ("-object", f"memory-backend-{kind},id=ram0,size=96M,{options}"),
    }


async def test_paused_guest(world: World) -> None:
    """A guest that was paused stays paused; where this QEMU cannot do that twice it says so and touches nothing."""
    await world.orch.pause(NAME)
    first = await world.create("first", flags=CreateFlag(0))
    assert first.domain_state is DomainState.PAUSED
    await world.check_still()
    if world.qemu.old:
        async with world.unchanged():
            with pytest.raises(Unsupported, match="resume"):
                await world.create("second", flags=CreateFlag(0))
    else:
        await world.create("second", flags=CreateFlag(0))
    await world.check_still()
    await world.orch.resume(NAME)
    await world.check_runs()
    await world.create("third")
    for record in await world.orch.list(NAME):
        await world.revert(record.name, RevertFlag.RUNNING)
        await world.check_consistent()


@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED])
async def test_kinds_of_disks(make_world: MakeWorld, strategy: Strategy) -> None:
    """A raw base becomes an overlay's backing; read-only disks are left alone and excluded ones where they are."""
    kinds = {"vda": "qcow2", "vdb": "raw", "vdc": "qcow2", "vdd": "raw"}
    world = await make_world(disks=kinds, readonly=["vdr"])  # the guest uses the first four
    bases = {disk.target: disk.path for disk in world.definition.disks}
    record = await world.create("a", strategy, exclude=["vdc", "vdd"])
    now = {disk.target: disk for disk in (await world.orch.domain_info(NAME)).disks}
    assert list(record.images) == ["vda", "vdb"]
    for target in ("vdc", "vdd", "vdr"):
        assert now[target].active == bases[target]
        assert now[target].chain == (bases[target],)
    for target in ("vda", "vdb"):
        assert now[target].active != bases[target]
        assert now[target].format == "qcow2"
        assert now[target].chain == (now[target].active, bases[target])
    assert now["vdr"].readonly
    formats = {disk.disk.target: disk.disk.format for disk in record.snapshot.disks}
    assert formats == {"vda": "qcow2", "vdb": "raw"}
    await world.check_runs()
    await world.create("all", strategy)
    if strategy is not Strategy.PRECOPY or not world.qemu.old:
        await world.revert("all")
        await world.check_consistent()


async def test_explicit_paths(world: World, tmp_path: Path) -> None:
    """Files go where the request says, 0600, and the record says the truth about each of them."""
    place = tmp_path / "elsewhere, with spaces"
    place.mkdir()
    overlay, memory = place / "over,lay.qcow2", place / "memory file"
    disk = DiskSnapshot(DeviceDisk("vdb"), external_sn=DeviceDisk("vdb", str(overlay)))
    record = await world.create("a", disks=[disk], memory_file=str(memory))
    active = {disk.target: disk.active for disk in (await world.orch.domain_info(NAME)).disks}
    assert active["vdb"] == str(overlay)
    assert record.snapshot.memory_file == str(memory)
    assert record.memory is not None
    for file in [record.memory, *(file for chain in record.images.values() for file in chain)]:
        data = Path(file.path).read_bytes()
        assert file.size == len(data)
        assert file.checksum == f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"
    assert all(os.stat(path).st_mode & 0o777 == 0o600 for path in (overlay, memory))
    assert os.stat(world.root / NAME).st_mode & 0o777 == 0o700
    assert record.timings.pause
    assert 0 < record.timings.total < 60
    assert record.parent is None
    assert record == await world.orch.show(NAME, "a")
    await world.revert("a")
    await world.check_consistent()


async def test_name_from_time(world: World) -> None:
    """A name that is not given is made from the UTC time; descriptions are kept."""
    record = await world.orch.create(NAME, DomainSnapshot(description="for a test"), CreateFlag.LIVE)
    assert record.name.endswith("Z")
    assert record.snapshot.description == "for a test"
    assert (await world.orch.domain_info(NAME)).current == record.name


async def test_size(make_world: MakeWorld) -> None:
    """The memory file of a background checkpoint is no larger than RAM and 2 %, however fast RAM is dirtied."""
    world = await make_world(append="ram=88 dirty=400")
    record = await world.create("a", Strategy.BACKGROUND)
    assert record.memory is not None
    assert 64 * MIB < record.memory.size <= world.definition.memory * 1.02


@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED])
async def test_settings(world: World, strategy: Strategy) -> None:
    """Migration capabilities and parameters that someone has set spoil nothing and are the same afterwards."""
    names = {c["capability"] for c in await world.qmp("query-migrate-capabilities")}
    # One that spoils a background stream without a word, and some that make QEMU refuse it.
    chosen = {"auto-converge", "mapped-ram" if "mapped-ram" in names else "xbzrle"}
    wanted = [{"capability": name, "state": True} for name in sorted(chosen)]
    await world.qmp("migrate-set-capabilities", capabilities=wanted)
    await world.qmp("migrate-set-parameters", **{"max-bandwidth": 12_345_678, "downtime-limit": 777})
    before = await world.everything()
    await world.create("a", strategy)
    after = await world.everything()
    for key in ("capabilities", "parameters", "jobs", "pipes", "descriptors"):
        assert after[key] == before[key], key
    if strategy is not Strategy.PRECOPY or not world.qemu.old:
        await world.revert("a")
        await world.check_consistent()


async def test_shared_memory(make_world: MakeWorld) -> None:
    """RAM in a shared memfd: whatever auto chooses there is consistent."""
    world = await make_world(**backend("memfd", "share=on"))
    await world.create("a")
    await world.check_runs()
    await world.revert("a")
    await world.check_consistent()


async def test_background_not_possible(make_world: MakeWorld, tmp_path: Path) -> None:
    """RAM that cannot be write-protected: auto falls back and says why, background is refused.

    To precopy, but not where QEMU may lose pages in one: there the guest is paused.
    """
    (tmp_path / "ram").mkdir()
    world = await make_world(**backend("file", f"share=on,mem-path={tmp_path}/ram"))
    async with world.unchanged():
        with pytest.raises(Unsupported, match=r"(?i)background"):
            await world.create("a", Strategy.BACKGROUND)
    record = await world.create("a")
    assert record.strategy is (Strategy.PAUSED if world.qemu.old else Strategy.PRECOPY)
    assert "background" in record.reason
    assert ("can miss pages" in record.reason) is world.qemu.old
    await world.revert("a")
    await world.check_consistent()


@pytest.mark.window("precopy that never converges")
async def test_time_limit_fails(make_world: MakeWorld) -> None:
    """A precopy that does not converge, told to fail at its limit: rolled back, and the guest runs."""
    world = await make_world(append=NEVER_CONVERGES)
    async with world.unchanged():
        with trio.fail_after(20), pytest.raises(DeadlineExceeded, match=r"guest.* within 1 s"):
            await world.create("a", Strategy.PRECOPY, max_seconds=1.0, bandwidth=SLOW_BANDWIDTH)
        await world.check_runs()


@pytest.mark.window("precopy that never converges")
async def test_time_limit_pauses(make_world: MakeWorld) -> None:
    """A precopy that does not converge, told to pause the guest at its limit: complete."""
    world = await make_world(append=NEVER_CONVERGES)
    with trio.fail_after(40):
        await world.create(
            "a", Strategy.PRECOPY, max_seconds=1.0, on_timeout=OnTimeout.PAUSE, bandwidth=SLOW_BANDWIDTH
        )
    await world.check_runs()
    assert (await world.orch.show(NAME, "a")).domain_state is DomainState.RUNNING
    if not world.qemu.old:
        await world.revert("a")
        await world.check_consistent()


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED])
async def test_bandwidth(make_world: MakeWorld, strategy: Strategy) -> None:
    """A limit on bandwidth is kept, roughly; without it the same stream takes far less time."""
    world = await make_world(append=SLOW)
    slow = await world.create("slow", strategy, bandwidth=SLOW_BANDWIDTH)
    fast = await world.create("fast", strategy)
    assert slow.memory is not None
    least = slow.memory.size / SLOW_BANDWIDTH
    assert slow.timings.total > max(0.7 * least, fast.timings.total)
