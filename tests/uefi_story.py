"""The story of a domain with UEFI firmware, without an operating system: firmware keeps variables by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import trio

from snaporch.drivers.base import Progress
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp.stream import QemuStream
from snaporch.errors import OperationFailed
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import CreateFlag, DeviceDisk
from snaporch.orchestrator import open_orchestrator
from tests.live.world import MIB, NAME, Qemu, World, make_image

RAM = 128 * MIB
CODE_SIZE, STORE_SIZE = 3_653_632, 540_672  # Debian's OVMF of 4 MiB
STORE = 2**32 - CODE_SIZE - STORE_SIZE  # where the guest finds the store: below the program
BOOT_SECONDS = 120.0  # a few, when nobody else works on the host


async def variables(world: World) -> bytes:
    """Return the variable store as the guest has it."""
    file = world.directory / "variables"
    await world.qmp("pmemsave", val=STORE, size=STORE_SIZE, filename=str(file))
    found = file.read_bytes()
    file.unlink()
    return found


async def settled(world: World, before: bytes) -> bytes:
    """Return the variables once firmware, which boots, has changed them and then leaves them alone."""
    last, since = before, trio.current_time()
    with trio.fail_after(BOOT_SECONDS):
        while last == before or trio.current_time() - since < 2:
            await trio.sleep(0.1)
            if (now := await variables(world)) != last:
                last, since = now, trio.current_time()
    return last


async def image(world: World) -> bytes:
    """Return the variable store as its image has it; the domain is inactive."""
    (disk,) = (disk for disk in (await world.orch.domain_info(NAME)).disks if disk.target == "nvram")
    raw = world.directory / "raw"
    await trio.run_process([world.qemu.img, "convert", "-f", disk.format, "-O", "raw", disk.active, str(raw)])
    return raw.read_bytes()


@asynccontextmanager
async def uefi(directory: Path, qemu: Qemu) -> AsyncIterator[World]:
    """Define a domain with UEFI firmware and an empty disk, which nobody starts."""
    make_image(qemu, directory / "vda.qcow2")
    definition = DomainDefinition(
        NAME,
        memory=RAM,
        accel="tcg",
        machine="pc",
        firmware="uefi",
        genid="auto",
        emulator=qemu.emulator,
        disks=(DeviceDisk("vda", str(directory / "vda.qcow2")),),
    )
    driver = QemuDriver(storage=LocalStorage(qemu.img))
    async with open_orchestrator(directory / "root", drivers={"qemu": driver}) as orch:
        try:
            yield World(directory, qemu, orch, (await orch.define(definition)).definition, directory / "log")
        finally:
            with trio.CancelScope(shield=True):
                await orch.destroy(NAME)


async def tell(directory: Path, qemu: Qemu) -> None:
    """Variables are in the point and come back with it; a copy has its own; merges keep them."""
    finished = QemuStream.finished
    async with uefi(directory, qemu) as world:
        orch = world.orch
        (_, store) = (await orch.domain_info(NAME)).disks
        fresh = Path(store.active).read_bytes()
        assert (store.target, len(fresh), Path(store.active).stat().st_mode & 0o777) == ("nvram", STORE_SIZE, 0o600)
        await orch.start(NAME)

        async def when_written(stream: QemuStream, progress: Progress) -> None:
            await settled(world, fresh)
            await finished(stream, progress)

        with (
            patch.object(QemuStream, "finished", when_written),
            pytest.raises(OperationFailed, match="wrote to its firmware's variables while its memory was saved"),
        ):
            await world.create("torn")
        first = await variables(world)
        assert first != fresh == Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes()
        assert Path(store.active).read_bytes() == first  # all was merged back
        record = await world.create("point")
        assert {*record.images} == {"vda", "nvram"}
        await world.qmp("system_reset")
        second = await settled(world, first)
        assert (await orch.verify(NAME, "point", boot=True)).booted
        assert await variables(world) == second
        await world.revert("point")
        assert await variables(world) == first
        await orch.create(NAME, flags=CreateFlag.LIVE)
        await orch.delete(NAME, "point")
        assert await variables(world) == first
        await orch.destroy(NAME)
        assert await image(world) == first
