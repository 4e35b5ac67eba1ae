"""Names that are not UTF-8, that are too long, and those that only look odd, on real files."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snaporch import open_orchestrator
from snaporch.cli import execute
from snaporch.errors import InvalidInput
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot
from tests.image_place import Place, content, opened, tool, write

LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path) as made:
        yield made


async def test_names_that_are_not_utf8(place: Place) -> None:
    """They are refused at define, create and open, before anything is made."""
    odd = place.image(f"{LATIN}.qcow2")
    over = place.image("over.qcow2", backing=odd)
    with pytest.raises(InvalidInput, match=r"disk vda: .*caf.* is not UTF-8"):
        await place.define("one", odd)
    with pytest.raises(InvalidInput, match=r"what .*over\.qcow2 leads to: .* is not UTF-8"):
        await place.define("one", over)
    await place.define("one", place.image("good.qcow2"))
    before = sorted(place.directory.rglob("*"))
    overlay = DeviceDisk("vda", str(place.directory / LATIN))
    for snapshot in (
        DomainSnapshot("s1", disks=(DiskSnapshot(DeviceDisk("vda"), external_sn=overlay),)),
        DomainSnapshot("s1", description=LATIN),
        DomainSnapshot(LATIN),
    ):
        with pytest.raises(InvalidInput, match="caf"):
            await place.orch.create("one", snapshot, CreateFlag.DISK_ONLY)
    with pytest.raises(InvalidInput, match=r"root: .* is not UTF-8"):
        async with open_orchestrator(place.directory / LATIN):
            pass
    assert sorted(place.directory.rglob("*")) == before


def test_arguments_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever they are for, the command line says so in one line."""
    for words in (["show", "vm", LATIN], ["create", "vm", "s1", "--memory-file", f"/x/{LATIN}"], [LATIN]):
        assert execute(["--root", str(tmp_path / "root"), *words]) == 2
        assert "is not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


async def test_all_that_is_missing_is_named(place: Place) -> None:
    """Each file of a definition that is not there is in one error."""
    disks = tuple(DeviceDisk(target, f"{place.directory}/{target}.qcow2") for target in ("vda", "vdb"))
    with pytest.raises(InvalidInput, match=r"disk vda: .*; disk vdb: .*; kernel: .*/vmlinuz"):
        await place.orch.define(DomainDefinition("one", kernel=f"{place.directory}/vmlinuz", disks=disks))


async def test_paths_that_are_too_long(place: Place) -> None:
    """A disk that no overlay could name is refused at define, a root in which no catalog could be when opened."""
    deep = place.directory.joinpath(*["d" * 200] * 6)
    deep.mkdir(parents=True)
    tool("qemu-img", "create", "-q", "-f", "raw", deep / "a.raw", "1M")
    with pytest.raises(InvalidInput, match=r"one: disk vda: a path of 1,\d\d\d bytes"):
        await place.define("one", DeviceDisk("vda", str(deep / "a.raw"), "raw"))
    with pytest.raises(InvalidInput, match="is too long: SQLite opens"):
        async with open_orchestrator(deep / "root"):
            pass
    assert os.listdir(deep) == ["a.raw"]


@pytest.mark.parametrize("name", ['new\nline"', "com,,ma", "nbd:x", "json:{}", "\u202eRTL", "x" * 180])
async def test_names_that_look_odd(place: Place, name: str) -> None:
    """Whatever programs might take them for, images keep what they hold."""
    directory = place.directory / name
    directory.mkdir()
    async with opened(directory) as odd:
        await odd.define("one", odd.image("a.qcow2"))
        write(await odd.snapshot("one", "s1"), 0x66)
        before = content(await odd.snapshot("one", "s2"))
        await odd.orch.delete("one", "s1")
        await odd.orch.revert("one", "s2")
        await odd.orch.flatten("one", depth=1)
        await odd.orch.delete("one", "s2")
        assert content(await odd.active("one")) == before
        assert await odd.orch.fsck() == ()
