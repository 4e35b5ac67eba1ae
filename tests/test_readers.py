"""Whose file is this? Several domains on one root, on real qcow2 files: nobody's content changes under him."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.catalog import Change
from snaporch.drivers.local.process import boot, started
from snaporch.drivers.local.trace import trace
from snaporch.engine.run import Operation
from snaporch.errors import Busy, Refused, Stranded
from snaporch.model.domain import DomainDefinition
from snaporch.model.merge import MergePlan
from snaporch.model.record import OperationKind
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.claims import claim
from snaporch.orchestrator import catalog_of
from tests.image_place import MIB, Place, content, opened, tool, write


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path) as made:
        yield made


async def clone_of_a_point(place: Place, name: str) -> tuple[Path, Path, str]:
    """Return a frozen image, a clone that another domain has over it by `name`, and the first domain's overlay."""
    disk = place.image("disk.qcow2")
    write(disk, 0x55, 2 * MIB, 4 * MIB)  # the larger: a commit down would move the fewest bytes
    await place.define("one", disk)
    overlay = await place.snapshot("one", "s1")
    if name == "symbolic link":
        (place.directory / "link").symlink_to(place.directory)
        backing = str(place.directory / "link" / "disk.qcow2")
    elif name == "hard link":
        os.link(disk, place.directory / "template.qcow2")
        backing = str(place.directory / "template.qcow2")
    else:
        backing = "disk.qcow2"
    clone = place.image("clone.qcow2", backing=backing)
    await place.define("two", clone)
    write(overlay, 0x66)
    return disk, clone, overlay


@pytest.mark.parametrize("name", ["symbolic link", "hard link", "relative"])
async def test_a_clone_keeps_what_it_reads(place: Place, name: str) -> None:
    """A delete merges nothing into an image that another domain's disk is backed by, under whatever name."""
    disk, clone, overlay = await clone_of_a_point(place, name)
    before, mine = content(clone), content(overlay)
    plan = await place.orch.delete("one", "s1")
    assert not plan.steps
    assert plan.kept == ((str(disk), "domain two needs it"),)
    assert content(clone) == before
    assert content(await place.active("one")) == mine


async def test_a_read_only_disk_is_a_reader(place: Place) -> None:
    """What another domain has as a read-only disk is not merged into either."""
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    overlay = await place.snapshot("one", "s1")
    await place.define("two", DeviceDisk("vda", str(disk), readonly=True))
    write(overlay, 0x66)
    before = content(disk)
    assert not (await place.orch.delete("one", "s1")).steps
    assert content(disk) == before


async def test_a_frozen_image_is_nobody_elses_disk(place: Place) -> None:
    """A domain on an image that another domain's snapshot holds is refused, with who holds it."""
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    await place.snapshot("one", "s1")
    with pytest.raises(Refused, match=r"two would write to .*disk\.qcow2 \(vda\), which domain one reads"):
        await place.define("two", disk)


async def test_one_image_twice(place: Place) -> None:
    """Two disks of a domain on one image, by two names of it, are refused."""
    disk = place.image("disk.qcow2")
    os.link(disk, place.directory / "same.qcow2")
    with pytest.raises(Refused, match="its own disk vda"):
        await place.define("one", disk, place.directory / "same.qcow2")


async def test_an_overlay_that_a_clone_needs_stays(place: Place) -> None:
    """Neither a delete, a revert nor fsck removes a domain's own overlay while another domain is backed by it."""
    await place.define("one", place.image("disk.qcow2"))
    overlay = await place.snapshot("one", "s1")
    write(overlay, 0x66)
    await place.snapshot("one", "s2")
    clone = place.image("clone.qcow2", backing=overlay)
    await place.define("two", clone)
    before = content(clone)
    await place.orch.revert("one", "s1")
    await place.orch.delete("one", "s2")
    assert not [found for found in await place.orch.fsck(repair=True) if found.subject == overlay]
    assert content(clone) == before


async def test_a_reader_that_cannot_be_looked_at_blocks(place: Place) -> None:
    """While it cannot be seen what another domain reads nothing is merged; then it is. Looking goes on."""
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    write(await place.snapshot("one", "s1"), 0x66)
    hidden = place.image("hidden.qcow2")
    await place.define("two", hidden)
    hidden.rename(place.directory / "elsewhere.qcow2")
    with pytest.raises(
        Refused, match=r"delete s1 of one: .*disk vda of domain two: cannot look at .*hidden\.qcow2"
    ):
        await place.orch.delete("one", "s1")
    assert [record.deleting for record in await place.orch.list("one")] == [False]
    assert (await place.orch.verify("one", "s1")).ok
    (place.directory / "elsewhere.qcow2").rename(hidden)
    assert (await place.orch.delete("one", "s1")).steps


async def test_a_lost_image_may_have_another_name(place: Place) -> None:
    """An image that a snapshot holds and that is gone from its place is still known by its inode."""
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    await place.snapshot("one", "s1")
    os.link(disk, place.directory / "mine.qcow2")
    other = place.image("other.qcow2", backing=place.directory / "mine.qcow2")
    await place.define("two", other)
    write(await place.snapshot("two", "s1"), 0x66)
    disk.rename(place.directory / "gone.qcow2")
    graph = trace(str(place.directory / "mine.qcow2"), "qcow2")
    assert len(graph) == 1
    plan: MergePlan = await place.orch.delete("two", "s1", dry_run=True)
    assert str(place.directory / "mine.qcow2") not in {step.survivor for step in plan.steps}


async def test_a_process_that_has_it_open(place: Place) -> None:
    """Nothing is merged into an image that some process of this host has open, whatever it is."""
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    write(await place.snapshot("one", "s1"), 0x66)
    with disk.open("rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        with pytest.raises(Refused, match=rf"process {process.pid} has .*disk\.qcow2 open"):
            await place.orch.delete("one", "s1")
        process.kill()
    assert (await place.orch.delete("one", "s1")).steps


# --- claims ---------------------------------------------------------------------------------------------------


async def claimed(place: Place, path: str | Path, operation: Operation, *, write: bool) -> None:
    images = {link.identity: link.path for link in trace(str(path), "qcow2")}
    await claim(place.orch._context, operation, images, write=write)


async def test_claims(place: Place) -> None:
    """Who reads keeps out who writes, and who writes keeps out all; nobody else is in anybody's way."""
    disk, context = place.image("disk.qcow2"), place.orch._context
    await place.define("one", disk)
    first, second, third = (Operation(OperationKind.START, name, "") for name in ("a", "b", "c"))
    async with context.locked(first):
        await claimed(place, disk, first, write=False)
        async with context.locked(second):
            await claimed(place, disk, second, write=False)
            async with context.locked(third):
                with pytest.raises(Busy, match=r"[ab] is busy: start, which needs .*disk\.qcow2 as it is"):
                    await claimed(place, disk, third, write=True)
    async with context.locked(third):
        await claimed(place, disk, third, write=True)
        with pytest.raises(Busy, match="c is busy"):
            await place.define("two", place.image("clone.qcow2", backing=disk))
    await place.define("two", place.directory / "clone.qcow2")


@pytest.mark.parametrize("unfinished", [True, False])
async def test_claims_of_the_dead(place: Place, unfinished: bool) -> None:
    """The claims of a process that is gone are dropped, but not those of an operation that is to be recovered."""
    disk, catalog = place.image("disk.qcow2"), catalog_of(place.orch)
    (identity,) = (link.identity for link in trace(str(disk), "qcow2"))
    process = subprocess.Popen(["true"])
    gone = started(process.pid) or 0
    process.wait()
    operation = Operation(OperationKind.DELETE, "x", "s")
    row = (operation.id, identity, str(disk), True, "x", "delete s", process.pid, gone, boot())
    claims = "INSERT INTO claim VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    await catalog.transact(lambda connection: connection.execute(claims, row))
    if unfinished:
        await catalog.write(Change(operation=operation.record(), begins=True))
    if unfinished:
        with pytest.raises(Busy, match="delete s, which needs"):
            await place.define("one", disk)
    else:
        await place.define("one", disk)


async def test_a_delete_that_is_cut_short_keeps_its_claims(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is recovered no domain can be defined over what it was merging; then it can."""
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    write(await place.snapshot("one", "s1"), 0x66)
    storage = type(place.orch._context.drivers["qemu"].storage)

    async def fails(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(28, "No space left on device", str(disk))

    with monkeypatch.context() as patch:
        for name in ("commit_image", "rebase"):
            patch.setattr(storage, name, fails)
        with pytest.raises(Stranded):
            await place.orch.delete("one", "s1")
    clone = place.image("clone.qcow2", backing=disk)
    with pytest.raises(Busy, match="one is busy: delete s1, which needs"):
        await place.define("two", clone)
    await place.orch.recover()
    await place.define("two", clone)


# --- roots ----------------------------------------------------------------------------------------------------


async def test_a_second_root_respects_what_is_frozen(place: Place) -> None:
    """An image that is frozen for one root is no disk of a domain of another; it is when no snapshot needs it."""
    disk = place.image("disk.qcow2")
    try:
        os.setxattr(disk, "user.probe", b"")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    await place.define("one", disk)
    write(await place.snapshot("one", "s1"), 0x66)
    async with opened(place.directory, "other") as other:
        with pytest.raises(Refused, match=r"which the root directory .*/root reads: .*`setfattr -x NAME"):
            await other.define("one", disk)
        await place.orch.delete("one", "s1")
        await place.orch.undefine("one")
        await other.define("one", disk)


async def test_one_root_by_two_names(place: Place) -> None:
    """A root that is opened by a symbolic link is the same: the same locks, and files under one name."""
    await place.define("one", place.image("disk.qcow2"))
    (place.directory / "alias").symlink_to(place.directory / "root")
    async with opened(place.directory, "alias") as same:
        async with place.orch._context.locked(Operation(OperationKind.START, "one", "")):
            with pytest.raises(Busy):
                await same.snapshot("one", "s1")
        overlay = await same.snapshot("one", "s1")
    assert overlay.startswith(f"{place.directory}/root/")
    assert await place.orch.fsck() == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_one_root_mounted_at_two_places(place: Place) -> None:
    """Files that are made by way of the one are known by the other's name, and are there when that is gone."""
    await place.define("one", place.image("disk.qcow2"))
    await place.snapshot("one", "s1")
    (place.directory / "mounted").mkdir()
    tool("mount", "--bind", place.directory / "root", place.directory / "mounted")
    try:
        async with opened(place.directory, "mounted") as same:
            overlay = await same.snapshot("one", "s2")
    finally:
        tool("umount", "--lazy", place.directory / "mounted")
    assert overlay.startswith(f"{place.directory}/root/")
    assert await place.orch.fsck() == ()


# --- definitions ----------------------------------------------------------------------------------------------


async def on_an_overlay(place: Place) -> tuple[Path, str]:
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    overlay = await place.snapshot("one", "s1")
    write(overlay, 0x66)
    return disk, overlay


@pytest.mark.parametrize("change", ["path", "target", "format", "readonly", "fewer"])
async def test_a_definition_that_does_not_fit(place: Place, change: str) -> None:
    """A domain that is on an overlay is not taken off it by another definition; fsck leaves the overlay alone."""
    disk, overlay = await on_an_overlay(place)
    was = DeviceDisk("vda", str(disk))
    disks = {
        "path": (attrs.evolve(was, path=str(place.image("new.qcow2"))),),
        "target": (attrs.evolve(was, target="sda"),),
        "format": (attrs.evolve(was, format="raw"),),
        "readonly": (attrs.evolve(was, readonly=True),),
        "fewer": (),
    }[change]
    # A qcow2 image that is called raw is refused before it comes to that.
    why = "vda of one is on .*, which holds what the guest has written"
    why = "would see its header" if change == "format" else why
    with pytest.raises(Refused, match=why):
        await place.orch.define(DomainDefinition("one", disks=disks))
    assert await place.active("one") == overlay
    await place.orch.fsck(repair=True)
    assert Path(overlay).exists()


async def test_a_definition_that_fits(place: Place) -> None:
    """Other memory, or the same image by another name, changes nothing about the disks."""
    disk, overlay = await on_an_overlay(place)
    os.link(disk, place.directory / "same.qcow2")
    same = DeviceDisk("vda", str(place.directory / "same.qcow2"))
    await place.orch.define(DomainDefinition("one", memory=64 * MIB, disks=(same,)))
    assert await place.active("one") == overlay


async def test_undefine_loses_no_data(place: Place) -> None:
    """A domain on an overlay is not forgotten, unless the user takes that overlay for his own; then it stays."""
    disk, overlay = await on_an_overlay(place)
    await place.define("two", place.image("clone.qcow2", backing=disk))  # keeps the overlay from being merged
    await place.orch.delete("one", "s1")
    with pytest.raises(Refused, match=r"vda of one is on .*: its own image is older"):
        await place.orch.undefine("one")
    await place.define("one", overlay)
    await place.orch.undefine("one")
    with pytest.raises(Refused, match="domain two reads"):
        await place.define("one", disk)
    await place.define("one", overlay)
    await place.snapshot("one", "s1")
    await place.orch.fsck(repair=True)
    assert content(overlay)[:MIB] == b"\x66" * MIB


async def test_an_image_that_a_user_has_taken_is_never_removed(place: Place) -> None:
    """An overlay that a definition names belongs to the user, as any other image of his."""
    _, overlay = await on_an_overlay(place)
    await place.define("one", overlay)
    await place.snapshot("one", "s2")
    await place.orch.delete("one", "s1")
    await place.orch.delete("one", "s2")
    assert await place.active("one") == overlay
    await place.orch.undefine("one")
    assert content(overlay)[:MIB] == b"\x66" * MIB
