"""A full file system: what makes room there works, and what needs some is refused with what makes it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
import trio

from snaporch import CreateFlag, DeviceDisk, DomainDefinition, DomainSnapshot, open_orchestrator
from snaporch.catalog.reserve import NAME
from snaporch.cli import execute
from snaporch.errors import NotEnoughSpace


@pytest.fixture(params=["tmpfs", "ext4", "xfs"])
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give a small file system of each kind, with some 200 MiB free."""
    place, image = tmp_path / "small", tmp_path / "image"
    place.mkdir(mode=0o700)
    if request.param == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m,mode=700", "tmpfs", str(place)], check=True)
    else:
        image.touch()
        os.truncate(image, 320 << 20)
        subprocess.run([f"mkfs.{request.param}", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
        place.chmod(0o700)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> Path:
    """Let nothing more fit, not even a byte."""
    path = place / "fill"
    with open(path, "ab", buffering=0) as file:
        for step in (1 << 26, 1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)
        with suppress(OSError):
            while True:
                file.write(bytes(512))
    return path


def write(path: str, size: str) -> None:
    """Write to an image, as a guest does."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {size}", path], check=True, capture_output=True)


async def test_a_full_file_system(small: Path) -> None:
    """Looking works; a delete that moves nothing works, also first of all; another says what makes room for it."""
    disk = str(small / "d.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    async with open_orchestrator(small / "root", realtime=False) as orch:
        await orch.define(DomainDefinition("d", disks=(DeviceDisk("vda", disk),)))
        for number, size in enumerate(("64k", "12M", "12M", "8M", "64k")):
            await orch.create("d", DomainSnapshot(f"s{number}"), CreateFlag.DISK_ONLY)
            (status,) = (await orch.domain_info("d")).disks
            write(status.active, size)
        await orch.revert("d", "s0")  # a branch: what was written after the last one is lost, and s4 is a leaf
        assert (small / "root" / NAME).exists()
    fill(small)
    async with open_orchestrator(small / "root", realtime=False, read_only=True) as look:
        assert [record.name for record in await look.list("d")] == [f"s{number}" for number in range(5)]
        assert [domain.name for domain in await look.domains()] == ["d"]
        assert (await look.show("d", "s1")).domain == "d"
        assert "qemu" in await look.doctor()
    async with open_orchestrator(small / "root", realtime=False) as orch:
        words = "deleting s4, then s3 needs no space and frees enough$"
        with pytest.raises(NotEnoughSpace, match=words) as refused:
            await orch.delete("d", "s2")
        assert refused.value.needed > refused.value.free
        assert refused.value.makes_room == (("s4", "s3"),)
        assert all(not record.deleting for record in await orch.list("d"))
        assert await orch.fsck() == ()
        for name in (*refused.value.makes_room[0], "s2"):
            await orch.delete("d", name)
        assert [record.name for record in await orch.list("d")] == ["s0", "s1"]
        (small / "fill").unlink()
        await orch.create("d", DomainSnapshot("s5"), CreateFlag.DISK_ONLY)
        assert (small / "root" / NAME).exists()  # there is room again
        assert await orch.fsck() == ()


def test_a_log_left_by_a_kill(small: Path) -> None:
    """What a process that was killed has committed is seen on a full file system and on one that is read-only."""
    root = small / "root"

    async def define_and_die() -> None:
        async with open_orchestrator(root, realtime=False) as orch:
            for name in ("a", "b"):
                await orch.define(DomainDefinition(name))
            await orch.undefine("a")
            os.kill(os.getpid(), signal.SIGKILL)

    async def look() -> list[str]:
        async with open_orchestrator(root, realtime=False, read_only=True) as orch:
            return [domain.name for domain in await orch.domains()]

    if (child := os.fork()) == 0:
        trio.run(define_and_die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (root / "catalog.sqlite3-wal").stat().st_size
    fill(small)
    assert trio.run(look) == ["b"]
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    assert trio.run(look) == ["b"]
    for verb in (["domain", "list"], ["domain", "show", "b"], ["list", "b"], ["tree", "b"], ["fsck"], ["doctor"]):
        with redirect_stdout(io.StringIO()) as out:
            status = execute(["--root", str(root), "--json", *verb])
        assert (status, type(json.loads(out.getvalue())).__name__ in {"list", "dict"}) == (0, True), verb
