"""Reverts of a real guest: to any point, any number of times; one that fails leaves the old guest undisturbed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

import snaporch.drivers.qemu.driver
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qmp import open_qmp
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.engine.states import State
from snaporch.errors import (
    ConnectionGone,
    DamagedSnapshot,
    HypervisorError,
    InvalidInput,
    OperationFailed,
    TargetExists,
    Unsupported,
)
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainState
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import CreateFlag, RevertFlag
from tests.live.world import NAME, MakeWorld, World, descriptors, port_for_itself

pytestmark = pytest.mark.live


@asynccontextmanager
async def undisturbed(world: World) -> AsyncIterator[None]:
    """Assert that the guest was never stopped, is in the same process, and that all is as it was."""
    path = Path(await world.socket()).with_name("query.sock")
    async with world.unchanged():
        pid = await world.pid()
        async with open_qmp(path, label=NAME) as client:
            with client.subscribe("STOP") as stops:
                yield
                await client.execute("query-status")
                with pytest.raises(trio.WouldBlock):
                    stops.receive_nowait()
        assert await world.pid() == pid
        await world.check_runs()


def flip(path: str) -> None:
    """Damage one byte in the middle of a file, and leave its times as they were."""
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(status.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


async def test_branches(world: World) -> None:
    """A, B on it, back to A, C: two branches, each still there; the old branch's unheld overlays are gone."""
    original = [disk.path for disk in world.definition.disks]
    await world.create("a")
    await world.check_runs()
    await world.create("b")
    await world.check_runs()
    before = world.images()
    await world.revert("a")
    first = await world.check_consistent()
    assert len(before - world.images()) == 2, "the overlays that the guest ran on are held by nothing"
    await world.check_no_orphans()
    await world.create("c")
    assert await world.orch.tree(NAME) == {None: ("a",), "a": ("b", "c")}
    for name in ("b", "c", "a", "b"):
        await world.revert(name)
        again = await world.check_consistent()
        assert (await world.orch.domain_info(NAME)).current == name
        assert again.up_ms >= first.up_ms - 500 if name != "a" else again.up_ms <= first.up_ms + 1000
        await world.check_no_orphans()
    assert all(os.path.exists(path) for path in original)
    for name in "abc":
        for file in await files_of(world, name):
            assert os.path.exists(file)


async def files_of(world: World, name: str) -> list[str]:
    """Return all files of a snapshot."""
    record = await world.orch.show(NAME, name)
    memory = [record.memory.path] if record.memory else []
    return memory + [file.path for chain in record.images.values() for file in chain]


async def test_states(world: World) -> None:
    """Running stays running and paused stays paused, unless RUNNING or PAUSED says otherwise."""
    await world.create("running")
    await world.orch.pause(NAME)
    await world.create("paused", flags=CreateFlag(0))
    assert (await world.orch.show(NAME, "paused")).domain_state is DomainState.PAUSED
    await world.check_still()
    await world.revert("running", RevertFlag.PAUSED)
    await world.check_still()
    await world.orch.resume(NAME)
    await world.check_consistent()
    await world.revert("paused")
    await world.check_still()
    await world.revert("paused", RevertFlag.RUNNING)
    await world.check_consistent()
    await world.revert("running")
    await world.check_consistent()
    with pytest.raises(InvalidInput, match="exclude each other"):
        await world.revert("running", RevertFlag.RUNNING | RevertFlag.PAUSED)


async def test_damage(world: World, tmp_path: Path) -> None:
    """A file that is not what was saved is found before anything is touched, with FORCE too."""
    record = await world.create("a")
    assert record.memory is not None
    memory, image = record.memory.path, record.images["vdb"][0].path
    kept = tmp_path / "kept"
    for path, damage in (
        (memory, flip),
        (image, flip),
        (memory, lambda path: os.truncate(path, os.path.getsize(path) - 1)),
        (memory, os.unlink),
    ):
        shutil.copy2(path, kept)
        damage(path)
        for flags in (RevertFlag(0), RevertFlag.FORCE):
            async with undisturbed(world):
                with pytest.raises(DamagedSnapshot) as caught:
                    await world.revert("a", flags)
                assert caught.value.path == path
                assert path in str(caught.value)
        shutil.copy2(kept, path)
    await world.revert("a")
    await world.check_consistent()


async def test_chain_changed(world: World) -> None:
    """A frozen image whose backing file is another one now is damage."""
    record = await world.create("a")
    second = await world.create("b")
    image = second.images["vda"][0].path
    other = record.images["vdb"][0].path
    data = Path(image).read_bytes()
    # The header holds the backing file's name; the two have the same length.
    old, new = record.images["vda"][0].path.encode(), other.encode()
    assert data.count(old) == 1
    assert len(old) == len(new)
    Path(image).write_bytes(data.replace(old, new))
    async with undisturbed(world):
        with pytest.raises(DamagedSnapshot):
            await world.revert("b")


async def forge(world: World, record: SnapshotRecord) -> None:
    """Make the catalog's record of a snapshot's files true for what they are now."""
    assert record.memory is not None
    memory = await LocalStorage().seal(record.memory.path)
    changed = attrs.evolve(record, memory=memory)
    with sqlite3.connect(world.root / "catalog.sqlite3") as connection:
        connection.execute("UPDATE snapshot SET record = ? WHERE name = ?", (dumps(changed), record.name))
    connection.close()


@pytest.mark.parametrize("flags", [RevertFlag(0), RevertFlag.FORCE])
async def test_unloadable(world: World, flags: RevertFlag) -> None:
    """Memory that has the right checksum and does not load: the old guest runs on, with QEMU's words said."""
    record = await world.create("a")
    assert record.memory is not None
    with open(record.memory.path, "r+b") as file:
        file.seek(8)
        file.write(os.urandom(4096))
    await forge(world, record)
    async with undisturbed(world):
        with pytest.raises(OperationFailed, match=r"could not load the memory|connection"):
            await world.revert("a", flags)
    await world.create("b")
    await world.revert("b")
    await world.check_consistent()


async def test_other_machine(world: World) -> None:
    """Memory of another machine type is refused, and the old guest runs on."""
    record = await world.create("a")
    changed = attrs.evolve(record, hypervisor={**record.hypervisor, "machine": "pc-i440fx-2.0"})
    with sqlite3.connect(world.root / "catalog.sqlite3") as connection:
        connection.execute("UPDATE snapshot SET record = ?", (dumps(changed),))
    connection.close()
    async with undisturbed(world):
        with pytest.raises(Unsupported, match="pc-i440fx-2"):
            await world.revert("a")


async def test_port(make_world: MakeWorld) -> None:
    """A port that both want: one goes after the other, once a copy has shown that the point loads."""
    world = await make_world(extra_args=port_for_itself())
    await world.create("a")
    await world.check_runs()
    pid = await world.pid()
    back = await world.revert("a")
    assert (back.way, await world.pid() != pid) == ("proven", True)
    assert 0 < (back.outage_seconds or 0) < back.total_seconds
    await world.check_consistent()
    back = await world.revert("a", RevertFlag.FORCE)
    assert back.way == "displace"
    await world.check_consistent()
    await world.check_no_orphans()


async def test_put_back(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new guest does not load in the place of the old one: what was kept of that is put back, and runs on."""
    world = await make_world(extra_args=port_for_itself())
    await world.create("a")
    await world.check_runs()
    load, calls = QemuMachine.load, 0

    async def fails_once(machine: QemuMachine, path: str, offset: int = 0) -> None:
        nonlocal calls
        calls += path.endswith("a.mem")
        if path.endswith("a.mem") and calls == 2:  # the first is the copy's
            raise HypervisorError("the memory does not load here")
        await load(machine, path, offset)

    monkeypatch.setattr(QemuMachine, "load", fails_once)
    newest, files = (await world.reports(1))[0].seq, world.files()
    with pytest.raises(OperationFailed, match="does not load here"):
        await world.revert("a")
    assert calls == 2
    assert (await world.reports(2))[-1].seq > newest
    await world.check_consistent()
    assert world.files() == files
    await world.check_no_orphans()


async def test_hung(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that hangs: refused within the deadline; FORCE replaces it."""
    monkeypatch.setattr(snaporch.drivers.qemu.driver, "CONNECT_SECONDS", 2.0)
    await world.create("a")
    await world.check_runs()
    pid = await world.pid()
    os.kill(pid, signal.SIGSTOP)
    before = world.files()
    with trio.fail_after(5), pytest.raises(ConnectionGone, match=r"^guest: .*2 s"):
        await world.revert("a")
    assert world.files() == before
    assert await world.pid() == pid
    with trio.fail_after(30):
        await world.revert("a", RevertFlag.FORCE)
    assert await world.pid() != pid
    await world.check_consistent()
    await world.check_no_orphans()


async def test_changed_definition(world: World) -> None:
    """A domain that is defined differently now goes back only with FORCE, and then to the old definition."""
    await world.create("a")
    await world.orch.destroy(NAME)
    changed = attrs.evolve(world.definition, memory=world.definition.memory * 2)
    await world.orch.define(changed)
    await world.start()
    async with undisturbed(world):
        with pytest.raises(Unsupported, match="defined differently"):
            await world.revert("a")
    await world.revert("a", RevertFlag.FORCE)
    await world.check_consistent()


async def test_inactive(make_world: MakeWorld) -> None:
    """Disk-only snapshots of an inactive domain: inactive by default, booted with RUNNING, standing with PAUSED."""
    world = await make_world()
    await world.create("checkpoint")
    await world.check_runs()
    await world.orch.destroy(NAME)
    newest = await world.newest("vda")
    await world.create("disks", flags=CreateFlag.DISK_ONLY)
    assert await world.state() is DomainState.INACTIVE
    await world.start()

    await world.revert("disks")
    assert await world.state() is DomainState.INACTIVE
    assert await world.newest("vda") == newest
    await world.check_no_orphans()

    await world.revert("disks", RevertFlag.PAUSED)
    await world.check_still()
    since = world.position()
    await world.orch.resume(NAME)
    await world.wait_report(lambda report: report.seq == newest and report.checked == 0, since=since)

    since = world.position()
    await world.revert("disks", RevertFlag.RUNNING)
    await world.wait_report(lambda report: report.seq == newest and report.checked == 0, since=since)
    await world.check_runs()

    await world.orch.destroy(NAME)
    await world.revert("checkpoint")  # from an inactive domain
    await world.check_consistent()
    await world.check_no_orphans()


async def test_save_current(world: World) -> None:
    """What the domain holds now is kept, when asked; a name that is taken is refused before anything is done."""
    await world.create("a")
    await world.check_runs()
    with pytest.raises(TargetExists):
        await world.revert("a", save_current="a")
    before = (await world.reports(1))[0]
    await world.revert("a", save_current="now")
    await world.check_consistent()
    assert [record.name for record in await world.orch.list(NAME)] == ["a", "now"]
    await world.revert("now")
    assert (await world.check_consistent()).seq >= before.seq


async def test_excluded_disk(world: World) -> None:
    """A snapshot without a disk: the old guest and the new one cannot both have it, so only FORCE goes back."""
    await world.create("a", exclude=["vdb"])
    async with undisturbed(world):
        with pytest.raises(Unsupported, match="does not hold vdb"):
            await world.revert("a")
    await world.revert("a", RevertFlag.FORCE)
    assert await world.state() is DomainState.RUNNING


async def test_any_number_of_times(world: World) -> None:
    """The snapshot stays what it was however often it is gone back to."""
    record = await world.create("a")
    for _ in range(4):
        await world.revert("a")
        await world.check_consistent()
        assert not [link for link in descriptors(await world.pid()) if link.endswith(".mem")]
    assert await world.orch.show(NAME, "a") == record
    for path in await files_of(world, "a"):
        files = [record.memory, *(file for chain in record.images.values() for file in chain)]
        known = next(file for file in files if file is not None and file.path == path)
        assert (await LocalStorage().seal(path)).checksum == known.checksum
    assert [record.state for record in await world.orch.operations(NAME)] == [State.COMPLETE] * 5
