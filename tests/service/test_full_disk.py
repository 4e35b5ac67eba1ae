"""A full file system: what makes room there works, and what needs some is refused with what makes it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snaporch import CreateFlag, DeviceDisk, DomainDefinition, DomainSnapshot, open_orchestrator
from snaporch.catalog.reserve import NAME
from snaporch.errors import NotEnoughSpace


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 64 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> Path:
    """Let nothing more fit."""
    path = place / "fill"
    with open(path, "ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with open(path, "ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    return path


def write(path: str, size: str) -> None:
    """Write to an image, as a guest does."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {size}", path], check=True, capture_output=True)


async def test_a_full_file_system(small: Path) -> None:
    """Looking works; a delete that moves nothing works, also first of all; another says what makes room for it."""
    disk = str(small / "d.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "32M"], check=True)
    async with open_orchestrator(small / "root", realtime=False) as orch:
        await orch.define(DomainDefinition("d", disks=(DeviceDisk("vda", disk),)))
        for number in range(5):
            await orch.create("d", DomainSnapshot(f"s{number}"), CreateFlag.DISK_ONLY)
            (status,) = (await orch.domain_info("d")).disks
            write(status.active, "8M" if number in {1, 2} else "64k")
        assert (small / "root" / NAME).exists()
    fill(small)
    async with open_orchestrator(small / "root", realtime=False) as orch:
        assert [record.name for record in await orch.list("d")] == [f"s{number}" for number in range(5)]
        assert [domain.name for domain in await orch.domains()] == ["d"]
        with pytest.raises(
            NotEnoughSpace, match="no snapshot of the domain can be deleted to free enough"
        ) as refused:
            await orch.delete("d", "s2")
        assert refused.value.needed > refused.value.free
        assert all(not record.deleting for record in await orch.list("d"))
        await orch.delete("d", "s4")  # 64 KiB move, and the journal is written by the reserve
        await orch.recover()
        assert "s4" not in [record.name for record in await orch.list("d")]
        (small / "fill").unlink()
        await orch.delete("d", "s2")
        assert await orch.fsck() == ()
    async with open_orchestrator(small / "root", realtime=False):
        assert (small / "root" / NAME).exists()  # there is room again
