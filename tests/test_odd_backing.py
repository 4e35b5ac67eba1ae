"""Images that lead to others in odd words: what is read is known, or the image is refused untouched."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snaporch.drivers.local.lineage import lineage
from snaporch.drivers.local.trace import trace
from snaporch.errors import DamagedSnapshot, InvalidInput, Refused
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DeviceDisk
from tests.image_place import Place, content, opened, tool, write


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path) as made:
        yield made


def over(place: Place, name: str, backing: str, format_: str = "qcow2") -> Path:
    """Make an image that says that it is backed by something, whatever that is."""
    path = place.directory / name
    tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format_, path, "8M")
    return path


async def goes_on(place: Place, name: str, disk: Path) -> None:
    """See that a domain is snapshotted, goes back, and is merged again as any other."""
    before = content(disk)
    write(await place.snapshot(name, "s1"), 0x77)
    await place.orch.revert(name, "s1")
    await place.orch.delete(name, "s1")
    assert await place.active(name) == str(disk)
    assert content(disk) == before
    assert await place.orch.fsck(name) == ()


def json_of(**options: object) -> str:
    return "json:" + json.dumps({key.replace("__", "."): value for key, value in options.items()})


async def test_dots_behind_a_link(place: Place) -> None:
    """`link/..` is where the link leads to: not the image that lies beside the link, of the same name, is meant."""
    elsewhere = place.directory / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    (place.directory / "link").symlink_to(elsewhere / "sub")
    place.image("base.qcow2")
    base = place.image("elsewhere/base.qcow2")
    write(base, 0x55)
    disk = over(place, "disk.qcow2", "link/../base.qcow2")
    before = content(disk)
    assert os.path.samefile(trace(str(disk), "qcow2")[1].path, base)
    assert os.path.samefile(lineage(str(disk), "qcow2")[1].path, base)
    await place.define("one", base)
    write(await place.snapshot("one", "s1"), 0x66)
    await place.define("two", disk)
    plan = await place.orch.delete("one", "s1")
    assert plan.kept == ((str(base), "domain two needs it"),)
    assert content(disk) == before
    await goes_on(place, "two", disk)


@pytest.mark.parametrize("how", ["nested", "dotted", "no driver"])
async def test_json_that_is_a_plain_image(place: Place, how: str) -> None:
    """It is followed: nothing is merged into what it leads to."""
    base = place.image("base.qcow2")
    await place.define("one", base)
    write(await place.snapshot("one", "s1"), 0x66)
    name = {
        "nested": json_of(driver="qcow2", file={"driver": "file", "filename": str(base)}),
        "dotted": json_of(driver="qcow2", file__driver="file", file__filename=str(base)),
        "no driver": json_of(driver="qcow2", file__filename=str(base)),
    }[how]
    await place.define("two", over(place, "disk.qcow2", name))
    assert (await place.orch.delete("one", "s1")).kept == ((str(base), "domain two needs it"),)
    await goes_on(place, "two", place.directory / "disk.qcow2")


@pytest.mark.parametrize("how", ["part", "relative", "other backing", "filter", "children", "blkdebug", "no JSON"])
async def test_what_is_not_followed(place: Place, how: str) -> None:
    """An image whose words lead to files in a way that is not followed is refused, with those words."""
    base = place.image("base.qcow2")
    file = {"driver": "file", "filename": str(base)}
    name = {
        "part": json_of(driver="raw", offset=65536, file=file),
        "relative": json_of(driver="qcow2", file__filename="base.qcow2"),
        "other backing": json_of(driver="qcow2", file=file, backing={"driver": "qcow2", "file": file}),
        "filter": json_of(driver="throttle", file={"driver": "qcow2", "file": file}),
        "children": json_of(driver="quorum", children=[file, file]),
        "blkdebug": f"blkdebug::{base}",
        "no JSON": "json:{",
    }[how]
    disk = over(place, "disk.qcow2", name, "raw" if how == "part" else "qcow2")
    with pytest.raises(Refused, match=r"cannot look at what .*/disk\.qcow2 is backed by: .*name the image itself"):
        await place.define("one", disk)


@pytest.mark.parametrize("name", ["/proc/self/fd/0", "/dev/stdin", "/dev/fd/3", "/dev/fdset/1", "link"])
async def test_what_each_process_sees_for_itself(place: Place, name: str) -> None:
    """A path that is another file for QEMU than for snaporch is no image, and nothing is backed by it."""
    (place.directory / "link").symlink_to("/dev/stdin")
    with pytest.raises(Refused, match=r"one process; name|each process finds another|No such file|no file"):
        await place.define("one", DeviceDisk("vda", os.path.join(place.directory, name), "raw"))
    with pytest.raises(Refused, match=r"one process; name|each process finds another"):
        await place.define("one", over(place, "disk.qcow2", name, "raw"))


async def test_a_file_of_another_format(place: Place) -> None:
    """An image of another program is no raw disk."""
    wrong = []
    for format_ in ("vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"):
        path = place.directory / f"a.{format_}"
        tool("qemu-img", "create", "-q", "-f", format_, path, "4M")
        wrong.append(DeviceDisk(f"v{format_}", str(path), "raw"))
    with pytest.raises(InvalidInput) as caught:
        await place.orch.define(DomainDefinition("one", disks=tuple(wrong)))
    assert str(caught.value).count("the guest would see its header: make a qcow2 image of it") == len(wrong)


def test_headers_that_promise_too_much(tmp_path: Path) -> None:
    """Sizes in a header are no reason to read gigabytes."""
    path = tmp_path / "a.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    head = bytearray(path.read_bytes())
    head[8:20] = (104).to_bytes(8, "big") + (2**31).to_bytes(4, "big")  # where its backing file's name is
    path.write_bytes(head)
    with pytest.raises(DamagedSnapshot, match="the name of its backing file has 2,147,483,648 bytes"):
        trace(str(path), "qcow2")


async def test_what_is_read_by_way_of_extra_args(place: Place) -> None:
    """A drive in the arguments that is only read has a reader, too: nothing is merged into what is below it."""
    base = place.image("base.qcow2")
    await place.define("one", base)
    write(await place.snapshot("one", "s1"), 0x66)
    over(place, "data,x.qcow2", str(base))
    words = ("-drive", f"if=virtio,readonly=on,format=qcow2,file={place.directory}/data,,x.qcow2")
    await place.orch.define(DomainDefinition("two", disks=(), extra_args=words))
    before = content(place.directory / "data,x.qcow2")
    plan = await place.orch.delete("one", "s1")
    assert plan.kept == ((str(base), "domain two needs it"),)
    assert content(place.directory / "data,x.qcow2") == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_an_image_on_a_read_only_file_system(place: Place) -> None:
    """Nothing is merged into it: the snapshot goes, and the answer says why the image stays."""
    templates = place.directory / "templates"
    templates.mkdir()
    base = place.image("templates/base.qcow2")
    await place.define("one", base)
    overlay = await place.snapshot("one", "s1")
    write(overlay, 0x66)
    before = content(overlay)
    tool("mount", "--bind", templates, templates)
    try:
        tool("mount", "-o", "remount,bind,ro", templates)
        plan = await place.orch.delete("one", "s1")
        assert plan.kept == ((str(base), "its file system is read-only"),)
        assert await place.active("one") == overlay
        assert content(overlay) == before
    finally:
        tool("umount", "--lazy", templates)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set up a block device")
@pytest.mark.parametrize("first", ["file", "device"])
async def test_a_loop_device_and_its_file(place: Place, first: str) -> None:
    """They are one image: what one domain has frozen is written to by no other one, under either name."""
    file = place.directory / "disk.raw"
    tool("qemu-img", "create", "-q", "-f", "raw", file, "8M")
    loop = tool("losetup", "-f", "--show", file).strip()
    try:
        names = {"file": str(file), "device": loop}
        mine = names.pop(first)
        (other,) = names.values()
        await place.define("one", DeviceDisk("vda", mine, "raw"))
        write(await place.snapshot("one", "s1"), 0x66)
        with pytest.raises(
            Refused, match=r"two would write to .* \(vda\), which (domain|snapshot s1 of domain) one"
        ):
            await place.define("two", DeviceDisk("vda", other, "raw"))
        await place.define("two", DeviceDisk("vda", other, "raw", readonly=True))
        assert (await place.orch.delete("one", "s1")).kept == ((mine, "domain two needs it"),)
    finally:
        tool("losetup", "-d", loop)


NODE = '{"driver": "qcow2", "node-name": "n0", "file": {"driver": "file", "filename": "/x.qcow2"}}'
ON_IT = ("-device", "virtio-blk-pci,drive=n0")


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("-drive", "if=virtio,file=/x.qcow2"), True),
        (("-drive", "if=none,id=d,format=raw,file.driver=file,file.filename=/x.qcow2"), True),
        (("-hda", "/x.qcow2"), True),
        (("-pflash", "/x.qcow2"), True),
        (("-drive", "if=pflash,format=raw,file=/x.qcow2"), True),
        (("-blockdev", NODE, *ON_IT), True),
        (("-blockdev", "qcow2,node-name=n0,file.driver=file,file.filename=/x.qcow2", *ON_IT), True),
        (("-blockdev", NODE.replace('"n0"', '"n1"'), "-blockdev", "throttle,node-name=n0,file=n1", *ON_IT), True),
        (("-blockdev", NODE), False),
        (("-blockdev", NODE.replace("{", '{"read-only": true, ', 1), *ON_IT), False),
        (("-drive", "if=virtio,file=/x.qcow2,readonly=on"), False),
        (("-cdrom", "/x.qcow2"), False),
        (("-drive", "if=none,id=d"), False),
    ],
)
async def test_a_drive_in_extra_args(place: Place, words: tuple[str, ...], *, refused: bool) -> None:
    """One that the guest would write to is refused when it is defined, in every spelling; nothing is left of it."""
    definition = DomainDefinition("one", disks=(), extra_args=words)
    if not refused:
        await place.orch.define(definition)
        return
    with pytest.raises(InvalidInput, match=r"extra_args: .* write to /x.qcow2 .*: name it under \[\[disks\]\]"):
        await place.orch.define(definition)
    assert not await place.orch.domains()
