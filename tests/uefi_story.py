"""The story of a domain with UEFI firmware, without an operating system: firmware keeps variables by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trio

from snaporch.drivers.base import Progress
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp import open_qmp
from snaporch.drivers.qmp.stream import QemuStream
from snaporch.errors import OperationFailed
from snaporch.model.domain import DomainDefinition, DomainState, TpmOptions
from snaporch.model.request import CloneOptions
from snaporch.model.rfc import CreateFlag, DeviceDisk, RevertFlag
from snaporch.orchestrator import catalog_of, open_orchestrator
from tests.live.world import MIB, NAME, Qemu, World, make_image

RAM = 128 * MIB
CODE_SIZE, STORE_SIZE = 3_653_632, 540_672  # Debian's OVMF of 4 MiB
STORE = 2**32 - CODE_SIZE - STORE_SIZE  # where the guest finds the store: below the program
BOOT_SECONDS = 120.0  # a few, when nobody else works on the host


async def ask(world: World, name: str, command: str, **arguments: Any) -> Any:
    """Have the QEMU of a domain carry out a command."""
    handle = (await catalog_of(world.orch).domain(name)).handle
    assert handle is not None
    path = Path(handle.data["socket"]).with_name("query.sock")
    async with open_qmp(path, label=name, timeout=BOOT_SECONDS) as client:
        return await client.execute(command, arguments)


async def variables(world: World, name: str = NAME) -> bytes:
    """Return the variable store as the guest has it."""
    file = world.directory / "variables"
    await ask(world, name, "pmemsave", val=STORE, size=STORE_SIZE, filename=str(file))
    found = file.read_bytes()
    file.unlink()
    return found


async def settled(world: World, before: bytes, name: str = NAME) -> bytes:
    """Return the variables once firmware, which boots, has changed them and then leaves them alone."""
    last, since = before, trio.current_time()
    with trio.fail_after(BOOT_SECONDS):
        while last == before or trio.current_time() - since < 2:
            await trio.sleep(0.1)
            if (now := await variables(world, name)) != last:
                last, since = now, trio.current_time()
    return last


async def generations(world: World, *names: str) -> list[str]:
    """Return the generation ids that machines have, which are those that the catalog knows."""
    found = [str((await ask(world, name, "query-vm-generation-id"))["guid"]) for name in names]
    assert found == [(await world.orch.domain_info(name)).generation for name in names]
    return found


async def image(world: World) -> bytes:
    """Return the variable store as its image has it; the domain is inactive."""
    (disk,) = (disk for disk in (await world.orch.domain_info(NAME)).disks if disk.target == "nvram")
    raw = world.directory / "raw"
    await trio.run_process([world.qemu.img, "convert", "-f", disk.format, "-O", "raw", disk.active, str(raw)])
    return raw.read_bytes()


@asynccontextmanager
async def uefi(directory: Path, qemu: Qemu, tpm: TpmOptions | None) -> AsyncIterator[World]:
    """Define a domain with UEFI firmware and an empty disk, which nobody starts."""
    make_image(qemu, directory / "vda.qcow2")
    definition = DomainDefinition(
        NAME,
        memory=RAM,
        accel="tcg",
        machine="pc",
        firmware="uefi",
        genid="auto",
        tpm=tpm,
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


async def check_copies(world: World, first: bytes) -> None:
    """A clone, and an import elsewhere, begin with the variables of the point, and have an id of their own."""
    orch, archive = world.orch, world.directory / "point.snaporch"
    await orch.clone(NAME, "point", "copy", CloneOptions(count=2, state=DomainState.PAUSED))
    assert [await variables(world, f"copy-{number}") for number in (1, 2)] == [first, first]
    assert len({*await generations(world, NAME, "copy-1", "copy-2")}) == 3
    await orch.resume("copy-1")
    await ask(world, "copy-1", "system_reset")
    assert await settled(world, first, "copy-1") != first == await variables(world)
    assert await variables(world, "copy-2") == first
    for name in ("copy-1", "copy-2"):
        await orch.destroy(name)
        await orch.undefine(name, discard=True)
    await orch.export(NAME, "point", archive)
    await orch.import_archive(archive, name="moved", trust=True)
    await orch.revert("moved", "point", RevertFlag.PAUSED)
    assert await variables(world, "moved") == first
    assert len({*await generations(world, NAME, "moved")}) == 2
    await orch.destroy("moved")


async def tell(directory: Path, qemu: Qemu, tpm: TpmOptions | None = None) -> None:
    """Variables are in the point and come back with it; a copy has its own; merges keep them."""
    finished = QemuStream.finished
    async with uefi(directory, qemu, tpm) as world:
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
        await check_copies(world, first)
        await orch.create(NAME, flags=CreateFlag.LIVE)
        await orch.delete(NAME, "point")
        assert await variables(world) == first
        await orch.destroy(NAME)
        assert await image(world) == first
