"""snaporch as root, and a QEMU that somebody started as another user: whose rights which work is done with."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.catalog import Change
from snaporch.drivers.qmp import open_qmp
from snaporch.errors import Refused, SnaporchError
from snaporch.model.record import Boot
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag, DeleteFlag
from snaporch.orchestrator import catalog_of
from tests.live.test_crash import killed
from tests.live.world import NAME, RAM_MIB, SECONDS, MakeWorld, World, make_image

NOBODY = 65534

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can work as another user"),
    pytest.mark.parametrize("qemu", ["10.0"], indirect=True),
]


def ids(pid: int) -> tuple[str, str, str]:
    """Return a process's users, groups and further groups."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.partition(":")[0]: " ".join(line.partition(":")[2].split()) for line in status}
    return found["Uid"], found["Gid"], found["Groups"]


def whose(path: str | Path) -> tuple[int, int, int]:
    """Return a file's user, group and permissions."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of nobody's, where root's own tests' directories cannot be reached from."""
    path = Path(tempfile.mkdtemp(prefix="snaporch-nobody-"))
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def theirs(make_world: MakeWorld, kernel: Path, place: Path) -> AsyncIterator[World]:
    """A world whose guest is in a QEMU of nobody's, attached to."""
    world = await make_world(start=False)
    shutil.copy(kernel, place / "kernel")
    words = [world.qemu.emulator, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "96", "-M", "q35"]
    words += ["-kernel", f"{place}/kernel", "-append", f"rate=200 dirty=20 ram={RAM_MIB}"]
    words += ["-serial", f"file:{place}/serial.log", "-qmp", f"unix:{place}/qmp.sock,server=on,wait=off"]
    words += ["-pidfile", f"{place}/pid"]
    for node in ("vda", "vdb"):
        image = place / f"{node}.qcow2"
        make_image(world.qemu, image)
        os.chown(image, NOBODY, NOBODY)
        words += ["-blockdev", f"driver=qcow2,node-name={node}-n,file.driver=file,file.filename={image}"]
        words += ["-device", f"virtio-blk-pci,id={node},drive={node}-n"]
    process = subprocess.Popen(
        words, cwd=place, stdin=subprocess.DEVNULL, user=NOBODY, group=NOBODY, extra_groups=[], umask=0o027
    )
    world.log = place / "serial.log"
    await world.wait_report(lambda report: report.seq > 2, since=0)
    await world.orch.attach(NAME, str(place / "qmp.sock"))
    try:
        yield world
    finally:
        with trio.move_on_after(SECONDS, shield=True):
            await world.orch.destroy(NAME)
        process.kill()
        process.wait()


async def check_owners(world: World, place: Path) -> None:
    """Assert that images are nobody's, memory is root's, and neither is where the other is."""
    records = await world.orch.list(NAME)
    images = {path for disk in (await world.orch.domain_info(NAME)).disks for path in disk.chain}
    images |= {file.path for record in records for chain in record.images.values() for file in chain}
    assert {os.path.dirname(path) for path in images} == {str(place)}
    made = images - {f"{place}/vda.qcow2", f"{place}/vdb.qcow2"}
    assert {whose(path) for path in made} <= {(NOBODY, NOBODY, 0o600)}
    assert {str(path) for path in place.glob("*.qcow2")} == images
    for record in records:
        if record.memory is not None:
            assert os.path.dirname(record.memory.path) == str(world.root / NAME)
            assert whose(record.memory.path) == (0, 0, 0o600)
    for directory in (world.root, world.root / NAME):
        assert whose(directory) == (0, 0, 0o700)


def contents(directory: Path) -> dict[Path, object]:
    """Return what is in a directory, and what changes with it."""
    return {path: (path.read_bytes(), whose(path), path.stat().st_ctime_ns) for path in directory.iterdir()}


async def attack(world: World, place: Path, secret: Path) -> AsyncGenerator[str, None]:
    """What the owner of the directory may do between two commands, one after the other."""
    frozen = next(disk.chain[-1] for disk in (await world.orch.domain_info(NAME)).disks if disk.target == "vda")
    for path, instead in ((frozen, secret), (str(place), secret.parent)):
        os.rename(path, f"{path}.kept")
        os.symlink(instead, path)
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        yield path
        os.unlink(path)
        os.rename(f"{path}.kept", path)


async def test_attacked(theirs: World, place: Path) -> None:
    """What its owner exchanges leads nowhere; another program is run, with its owner's rights."""
    world, home = theirs, Path(tempfile.mkdtemp(prefix="snaporch-secrets-"))
    home.chmod(0o755)
    for name in ("secret", "vda.qcow2", "vdb.qcow2"):
        (home / name).write_text("root's own")
        (home / name).chmod(0o600)
    await world.create("point")
    before = contents(home)
    calls = (
        partial(world.create, "other", Strategy.PAUSED),
        partial(world.revert, "point"),
        partial(world.orch.delete, NAME, "point"),
    )
    async with aclosing(attack(world, place, home / "secret")) as attacks:
        async for what in attacks:
            for call in calls:
                with pytest.raises(SnaporchError):
                    await call()
            assert (await world.orch.verify(NAME, "point")).files == "damaged", what
            await world.orch.fsck(NAME, repair=True)
            assert contents(home) == before, what
    await world.check_runs()
    await world.revert("point")
    await world.check_consistent()
    shutil.rmtree(home)


async def test_another_program(theirs: World, place: Path) -> None:
    """Its owner puts another program in the place of QEMU, and ends the guest: what starts is not root's."""
    world = theirs
    record = await catalog_of(world.orch).domain(NAME)
    assert record.template is not None
    program = place / "qemu-mine"
    program.write_text(f"#!/bin/sh\nid -u > {place}/who\n")
    program.chmod(0o755)
    os.chown(program, NOBODY, NOBODY)
    record.template.data["surroundings"]["program"] = str(program)
    await world.orch.destroy(NAME)
    record = attrs.evolve(await catalog_of(world.orch).domain(NAME), template=record.template)
    await catalog_of(world.orch).write(Change(domains=(record,)))
    with pytest.raises(Refused, match="QEMU does not start"):
        await world.orch.start(NAME)
    assert (place / "who").read_text() == "65534\n"
    assert whose(place / "who")[:2] == (NOBODY, NOBODY)


KILLED = {
    "after:make_overlay#1": ("create", "other", Strategy.PAUSED),
    "after:switch#1": ("create", "other", Strategy.PAUSED),
    "after:launch#1": ("revert", "point"),
    "after:take_over#1": ("revert", "point"),
}


async def test_killed(theirs: World, place: Path) -> None:
    """SIGKILL of snaporch: what it has made there is undone with their rights, or gone on with."""
    world = theirs
    await world.create("point", Strategy.PAUSED)
    for where, words in KILLED.items():
        await killed(world, where, *words)
        await world.check_runs(2)
        await world.orch.recover()
        await world.check_runs(2)
        await check_owners(world, place)
        assert not [path for path in place.iterdir() if ".run-" in path.name], where
        assert not await world.orch.fsck(NAME), where
    await world.revert("point")
    await world.check_consistent()


async def test_story(theirs: World, place: Path) -> None:
    """Saved, reverted, verified, deleted, stopped and started: all with the rights of who owns what."""
    world = theirs
    first, before = await world.pid(), Path(f"/proc/{await world.pid()}/environ").read_bytes()
    await world.create("live")
    await world.check_runs()
    await world.create("paused", Strategy.PAUSED)
    await check_owners(world, place)
    for name in ("live", "paused"):
        await world.revert(name)
        await world.check_consistent()
        pid = await world.pid()
        assert ids(pid) == (" ".join(["65534"] * 4), " ".join(["65534"] * 4), "")
        assert Path(f"/proc/{pid}/environ").read_bytes() == before
        async with open_qmp(place / "qmp.sock", label="the owner's own") as client:
            assert (await client.execute("query-status"))["running"]
        assert int((place / "pid").read_text()) == pid != first
        await check_owners(world, place)
    assert not [path for path in place.iterdir() if ".run-" in path.name]
    report = await world.orch.verify(NAME, "live", boot=True)
    assert report.boot is Boot.RAN, report
    await world.orch.delete(NAME, "live")
    await world.check_runs()
    await check_owners(world, place)
    await world.orch.destroy(NAME)
    assert not await world.orch.fsck(NAME)
    await world.create("disks", flags=CreateFlag.DISK_ONLY)
    await world.orch.delete(NAME, "paused", DeleteFlag.CHILDREN)
    await check_owners(world, place)
    since = world.position()
    await world.orch.start(NAME)
    await world.wait_report(lambda report: report.checked > 0, since=since)
    assert ids(await world.pid())[0].split() == ["65534"] * 4
    await world.check_runs()
    assert not await world.orch.fsck(NAME)
