"""What cannot be done is refused with the reason, and nothing is touched: not the guest, not a file, not a row."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from snaporch.errors import InvalidInput, NotEnoughSpace, NotFound, Refused, TargetExists, Unsupported
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot
from tests.live.world import MIB, NAME, World

pytestmark = pytest.mark.live


def internal(target: str) -> DiskSnapshot:
    """Return a wish for a disk's point to be kept inside its image."""
    return DiskSnapshot(DeviceDisk(target), external=False)


def at(target: str, path: Path | str) -> DiskSnapshot:
    """Return a wish for an overlay at a path."""
    return DiskSnapshot(DeviceDisk(target), external_sn=DeviceDisk(target, str(path)))


LIVE, DISK_ONLY, PLAIN = CreateFlag.LIVE, CreateFlag.DISK_ONLY, CreateFlag(0)

# What is asked for, the flags, the error and some of its words.
REQUESTS: Mapping[str, tuple[dict[str, Any], CreateFlag, type[Refused], str]] = {
    "unknown disk": ({"disks": (at("vdz", ""),)}, LIVE, InvalidInput, "no disk 'vdz'; it has vda, vdb"),
    "disk twice": ({"disks": (at("vda", ""), at("vda", ""))}, LIVE, InvalidInput, "twice"),
    "slash in name": ({"name": "a/b"}, LIVE, InvalidInput, "'a/b' is not a snapshot name"),
    "dots": ({"name": ".."}, LIVE, InvalidInput, "is not a snapshot name"),
    "long name": ({"name": "x" * 65}, LIVE, InvalidInput, "1 to 64"),
    "newline in name": ({"name": "a\n"}, LIVE, InvalidInput, "is not a snapshot name"),
    "mixed": ({"disks": (internal("vda"), at("vdb", ""))}, PLAIN, InvalidInput, "one point cannot be kept"),
    "implicitly mixed": ({"disks": (internal("vda"),)}, PLAIN, InvalidInput, "one point cannot be kept"),
    "LIVE internal": ({"disks": (internal("vda"), internal("vdb"))}, LIVE, InvalidInput, "--live is for external"),
    "LIVE disk-only": ({}, LIVE | DISK_ONLY, InvalidInput, "--live is for external"),
    "LIVE without memory": ({"memory": False}, LIVE, InvalidInput, "--live is for external"),
    "disk-only of a running guest": ({}, DISK_ONLY, Unsupported, "running"),
    "quiesce": ({}, DISK_ONLY | CreateFlag.QUIESCE, Refused, "no channel to a guest agent"),
}


async def test_requests(world: World) -> None:
    """Requests that make no sense, or cannot be: each refused in its own words."""
    async with world.unchanged():
        for what, (fields, flags, error, words) in REQUESTS.items():
            with pytest.raises(error, match=words):
                await world.orch.create(NAME, DomainSnapshot(**{"name": "a", **fields}), flags)
            assert not await world.orch.list(NAME), what
        for exclude in (["vdz"], ["vda", "vdz"]):
            with pytest.raises(InvalidInput, match="no disk 'vdz'"):
                await world.create("a", exclude=exclude)
        with pytest.raises(InvalidInput, match="left out"):
            await world.create("a", disks=[at("vda", "")], exclude=["vda"])
        with pytest.raises(NotFound, match="no domain 'other'"):
            await world.orch.create("other", DomainSnapshot("a"), LIVE)
        for name in ("../other", "", "/tmp/other"):  # noqa: S108 - names are parts of paths
            with pytest.raises((NotFound, InvalidInput)):
                await world.orch.create(name, DomainSnapshot("a"), LIVE)
        with pytest.raises(NotFound, match="no snapshot 'b'"):
            await world.revert("b")
        await world.check_runs()
        assert not await world.orch.operations(NAME)


async def test_targets(world: World, tmp_path: Path) -> None:
    """A file at a target, a link to nowhere too, is never overwritten; nor is a domain's own image or a name."""
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("precious")
    link.symlink_to(tmp_path / "nowhere")
    base = world.definition.disks[0].path
    await world.create("taken")
    async with world.unchanged():
        for path in (there, link, base):
            with pytest.raises(TargetExists, match=re.escape(f"{path} exists already")):
                await world.create("a", memory_file=str(path))
            with pytest.raises(TargetExists, match=re.escape(f"{path} exists already")):
                await world.create("a", disks=[at("vdb", path)])
        with pytest.raises(TargetExists, match="'taken' already"):
            await world.create("taken")
        new = tmp_path / "new"
        with pytest.raises(InvalidInput, match="same"):
            await world.create("a", disks=[at("vda", new), at("vdb", new)])
        with pytest.raises(InvalidInput, match="same"):
            await world.create("a", memory_file=str(new), disks=[at("vdb", new)])
        await world.check_runs()
    assert there.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def readonly(tmp_path: Path) -> Iterator[Path]:
    """A directory that not even root can write to."""
    place = tmp_path / "readonly"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_readonly_directory(world: World, readonly: Path) -> None:
    """A directory that cannot be written to, or one below it that is not there: snaporch makes none."""
    deep = readonly / "deep/er"
    async with world.unchanged():
        for place, words in ((readonly, f"cannot write to {readonly}"), (deep, f"there is no directory {deep}: ")):
            with pytest.raises(Refused, match=words):
                await world.create("a", memory_file=str(place / "m"))
            with pytest.raises(Refused, match=words):
                await world.create("a", disks=[at("vdb", place / "o")])
        await world.check_runs()


@asynccontextmanager
async def small(place: Path, size: int) -> AsyncIterator[Path]:
    """Mount a small file system."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED])
async def test_space(world: World, tmp_path: Path, strategy: Strategy) -> None:
    """Less room than memory and overlays may need: both figures are in the error."""
    ram = world.definition.memory
    async with small(tmp_path / "small", ram) as place, world.unchanged():
        with pytest.raises(NotEnoughSpace, match=f"{ram:,} are free") as caught:
            await world.create("a", strategy, memory_file=str(place / "m"))
        assert caught.value.free == ram
        assert caught.value.needed > ram
        assert f"{caught.value.needed:,}" in str(caught.value)
        assert caught.value.where == str(place)
        await world.check_runs()


async def test_space_together(world: World, tmp_path: Path) -> None:
    """Memory and overlays that each find room, and together do not."""
    room = world.definition.memory + 40 * MIB
    async with small(tmp_path / "small", room) as place, world.unchanged():
        with pytest.raises(NotEnoughSpace):
            await world.create("a", memory_file=str(place / "m"), disks=[at(t, place / t) for t in ("vda", "vdb")])
    async with small(tmp_path / "other", room) as place:
        await world.create("a", memory_file=str(place / "m"))
        await world.revert("a")  # which leaves no descriptor behind that would keep the file system busy
        await world.check_consistent()


async def test_inactive(world: World) -> None:
    """Memory of an inactive domain: there is none."""
    await world.orch.destroy(NAME)
    async with world.unchanged():
        for flags in (PLAIN, LIVE):
            with pytest.raises(InvalidInput, match=r"inactive|LIVE"):
                await world.orch.create(NAME, DomainSnapshot("a"), flags, CreateOptions())
