"""Kinds of images: the table, and each kind on a real image."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from snaporch.drivers.qmp.oddities import oddity
from snaporch.errors import DamagedSnapshot, InvalidInput, Unsupported
from snaporch.images.kinds import TABLE, Kind, Traced, Verb, refusal, table
from snaporch.model.record import Boot
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot
from tests.image_place import MIB, SIZE, Place, content, opened, tool, write

DOCUMENT = Path(__file__).parent.parent / "docs/reference/images.md"


def test_the_reference_has_the_table() -> None:
    """What is read there is what decides."""
    assert table() in DOCUMENT.read_text()


def test_every_kind_has_a_row() -> None:
    """No kind is decided by accident."""
    assert TABLE.keys() == set(Kind)


def test_what_is_below_is_not_written_to() -> None:
    """Bitmaps matter in the image that is written to, encryption in the whole chain."""
    bitmaps = Traced("/base", "1", {Kind.BITMAPS: "b0"})
    secret = Traced("/base", "1", {Kind.ENCRYPTED: "LUKS"})
    top = Traced("/top", "2", {Kind.QCOW2: ""})
    assert not refusal(Verb.CREATE, [top, bitmaps])
    assert "it has dirty bitmaps (b0)" in refusal(Verb.CREATE, [bitmaps])
    assert "it is encrypted (LUKS)" in refusal(Verb.CREATE, [top, secret])


# --- on real images -------------------------------------------------------------------------------------------


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path) as made:
        yield made


def odd_image(place: Place, kind: Kind) -> Path:
    """Return an image of a kind that is not taken."""
    path = place.directory / "odd.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if kind is Kind.ENCRYPTED:
        tool(*create, path, str(SIZE))
        whole = bytearray(path.read_bytes())
        whole[32:36] = (2).to_bytes(4, "big")  # by the header, LUKS: to make such an image takes time of the CPU
        path.write_bytes(whole)
    elif kind is Kind.SPLIT:
        tool(*create, "-o", f"data_file={place.directory}/odd.data", path, str(SIZE))
    elif kind is Kind.BITMAPS:
        tool(*create, path, str(SIZE))
        tool("qemu-img", "bitmap", "--add", path, "backup0")
    elif kind is Kind.UNTYPED:
        base = place.image("base.qcow2")
        tool(*create, "-b", base, "-F", "qcow2", path)
        content = path.read_bytes()
        at = content.index(b"\xe2\x79\x2a\xca")  # the extension that says the format: another, which nobody knows
        path.write_bytes(content[:at] + b"\x12\x34\x56\x78" + content[at + 4 :])
    return path


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", [Kind.ENCRYPTED, Kind.SPLIT, Kind.BITMAPS, Kind.UNTYPED])
async def test_what_is_not_taken(place: Place, kind: Kind, *, inside: bool) -> None:
    """Each kind is refused in the words of the table when the create is planned, and nothing is touched."""
    disk = odd_image(place, kind)
    await place.define("one", disk)
    before = sorted(os.listdir(place.directory)), disk.read_bytes()
    disks = (DiskSnapshot(DeviceDisk("vda"), external=False),) if inside else ()
    with pytest.raises(Unsupported) as caught:
        await place.orch.create("one", DomainSnapshot("s1", disks=disks), CreateFlag.DISK_ONLY)
    words = TABLE[kind][Verb.INTERNAL if inside else Verb.CREATE].partition("{detail}")[0]
    assert f"{disk}: {words}" in str(caught.value)
    assert (sorted(os.listdir(place.directory)), disk.read_bytes()) == before
    assert await place.orch.list("one") == ()


async def test_bitmaps_that_came_later(place: Place) -> None:
    """An overlay that a backup has put a bitmap into is not merged away: the delete says why it stays."""
    await place.define("one", place.image("disk.qcow2"))
    overlay = await place.snapshot("one", "s1")
    write(overlay, 0x66)
    tool("qemu-img", "bitmap", "--add", overlay, "backup0")
    plan = await place.orch.delete("one", "s1")
    assert not plan.steps
    assert "it has dirty bitmaps (backup0)" in dict(plan.kept)[str(place.directory / "disk.qcow2")]
    assert await place.active("one") == overlay


async def test_start_needs_a_format(place: Place) -> None:
    """A guest is not started on an image below which QEMU would guess what it reads."""
    await place.define("one", odd_image(place, Kind.UNTYPED))
    with pytest.raises(
        Unsupported, match=r"one cannot be started: .* it does not say what format .* `qemu-img rebase"
    ):
        await place.orch.start("one")


async def test_what_an_earlier_version_has_taken(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of an encrypted disk is not gone back to, nor booted: the fresh overlay would be in clear text."""
    secret = ("--object", "secret,id=s0,data=passphrase", "-o", "encrypt.format=aes,encrypt.key-secret=s0")
    disk = place.directory / "odd.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", *secret, disk, str(SIZE))
    await place.define("one", disk)
    with monkeypatch.context() as earlier:
        earlier.setitem(cast("dict[Kind, dict[Verb, str]]", TABLE), Kind.ENCRYPTED, {})
        await place.snapshot("one", "s1")
    files = sorted(os.listdir(place.directory / "root" / "one"))
    with pytest.raises(Unsupported, match=r"\(vda\), snapshot s1: .*odd\.qcow2: it is encrypted"):
        await place.orch.revert("one", "s1")
    report = await place.orch.verify("one", "s1", boot=True)
    assert (report.files, report.boot, report.ok) == ("good", Boot.NOT_POSSIBLE, True)
    assert "it is encrypted" in report.reason
    assert sorted(os.listdir(place.directory / "root" / "one")) == files


@pytest.mark.parametrize(("bits", "most"), [(1, 0), (2, 2)])
async def test_no_room_for_one_more(place: Place, bits: int, most: int) -> None:
    """One that counts the users of a cluster in few bits takes as many snapshots as it can; one more is refused."""
    disk = place.directory / "narrow.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"refcount_bits={bits}", disk, str(SIZE))
    write(disk, 0x11)
    await place.define("one", disk)
    inside = (DiskSnapshot(DeviceDisk("vda"), external=False),)
    for number in range(most):
        await place.orch.create("one", DomainSnapshot(f"s{number}", disks=inside), CreateFlag.DISK_ONLY)
    with pytest.raises(Unsupported, match=rf"counted in too few bits \(refcount_bits={bits}\)"):
        await place.orch.create("one", DomainSnapshot("more", disks=inside), CreateFlag.DISK_ONLY)
    tool("qemu-img", "check", "-q", "-f", "qcow2", disk)
    await place.snapshot("one", "beside")


async def test_what_others_keep_inside(place: Place) -> None:
    """A user's image with a snapshot of his own inside stays as it is: that reads through what is below."""
    base = place.image("base.qcow2")
    write(base, 0x11)
    disk = place.image("disk.qcow2", backing=base)
    tool("qemu-img", "snapshot", "-c", "old", disk)
    await place.define("one", disk)
    write(await place.snapshot("one", "s1"), 0x22)
    before, now = disk.read_bytes(), content(await place.active("one"))
    with pytest.raises(Unsupported, match="must stay as it is: it has old inside"):
        await place.orch.flatten("one", "s1", depth=1)
    plan = await place.orch.delete("one", "s1")
    assert "it has old inside, which is not snaporch's" in dict(plan.kept)[str(disk)]
    assert (disk.read_bytes(), content(await place.active("one"))) == (before, now)


JSON = 'json:{"driver": "%s", "file": {"driver": "%s", "filename": "/a"}}'


@pytest.mark.parametrize(
    ("driver", "name", "kind", "detail"),
    [
        ("qcow2", "/a.qcow2", None, ""),
        ("raw", "/dev/sda", None, ""),
        ("file", "/col:on", None, ""),
        ("qcow2", JSON % ("qcow2", "file"), None, ""),
        ("throttle", JSON % ("throttle", "file"), Kind.FILTERED, "throttle"),
        ("qcow2", "blkdebug::/a", Kind.FILTERED, "blkdebug"),
        ("raw", 'json:{"driver": "raw", "offset": "4", "file": {"driver": "file", "filename": "/a"}}', Kind.SLICED,
         "offset=4, size=all"),
        ("raw", 'json:{"driver": "raw", "file": {"driver": "vvfat", "dir": "/d"}}', Kind.REMOTE, "vvfat"),
        ("raw", "nbd://host/disk", Kind.REMOTE, "nbd"),
        ("qcow2", 'json:{"driver": "qcow2", "file": {"driver": "ssh"}}', Kind.REMOTE, "ssh"),
        ("luks", JSON % ("luks", "file"), Kind.FOREIGN, "luks"),
        ("qcow2", 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/var/tmp/vl.HO3LZ3"}}',
         Kind.TEMPORARY, ""),
    ],
)  # fmt: skip
def test_names_of_nodes(driver: str, name: str, kind: Kind | None, detail: str) -> None:
    """What QEMU 7.2 and 10.0 call nodes says what stands between a disk and its image."""
    found = oddity("/a", driver, {"filename": name})
    assert (found.kinds if found else None) == ({kind: detail} if kind else None)
    backed = oddity("/top", "qcow2", {"filename": "/top", "backing-image": {"filename": name}})
    assert (backed is not None) == (kind is not None)


# --- block devices --------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 8 MiB, and the file that it is on, named `back.raw`."""
    back = tmp_path / "back.raw"
    back.write_bytes(bytes(SIZE))
    loop = tool("losetup", "-f", "--show", back).strip()
    yield Path(loop)
    tool("losetup", "-d", loop)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set up a block device")
async def test_a_block_device(place: Place, device: Path) -> None:
    """Its overlay is in the root's directory; what is frozen is known by content, however it is written to."""
    await place.define("one", DeviceDisk("vda", str(device), "raw"))
    disks = (DiskSnapshot(DeviceDisk("vda"), external=False),)
    with pytest.raises(InvalidInput, match="only inside a qcow2 image is there room"):
        await place.orch.create("one", DomainSnapshot("s1", disks=disks), CreateFlag.DISK_ONLY)
    overlay = await place.snapshot("one", "s1")
    assert overlay.startswith(f"{place.directory}/root/one/")
    write(overlay, 0x66)
    (record,) = (await place.orch.show("one", "s1")).images["vda"]
    assert (record.path, record.size, record.identity) == (str(device), SIZE, ())
    assert await place.orch.fsck() == ()
    with (place.directory / "back.raw").open("r+b") as file:  # below the device, which shows nothing of it
        file.seek(3 * MIB)
        file.write(b"y" * 4096)
        file.flush()
        os.fsync(file.fileno())
    with device.open("rb") as file:  # what it has cached is its own
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with pytest.raises(DamagedSnapshot, match="its checksum is not what was saved"):
        await place.orch.revert("one", "s1")
    assert [found.trouble for found in await place.orch.fsck()] == ["damaged-snapshot"]
    before = content(overlay)
    await place.orch.delete("one", "s1")
    assert await place.active("one") == str(device)
    assert content(device, "raw") == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set up a block device")
async def test_qcow2_on_a_block_device(place: Place, device: Path) -> None:
    """The image is one as any other, with room inside it."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", device, str(SIZE // 2))
    await place.define("one", str(device))
    write(device, 0x66)
    before = content(device)
    disks = (DiskSnapshot(DeviceDisk("vda"), external=False),)
    await place.orch.create("one", DomainSnapshot("s1", disks=disks), CreateFlag.DISK_ONLY)
    overlay = await place.snapshot("one", "s2")
    write(overlay, 0x77)
    await place.orch.delete("one", "s2")
    await place.orch.revert("one", "s1")
    assert content(await place.active("one")) == before
