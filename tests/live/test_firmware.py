"""What firmware tells the guest, the generation id, what it keeps, the variables of UEFI, and the TPM."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from snaporch.errors import Unsupported
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot
from tests import tpm_story, uefi_story
from tests.live.world import MEMORY, NAME, MakeWorld, Qemu, World, assert_nothing_runs

pytestmark = pytest.mark.live

FIRST = "11111111-2222-3333-4444-555555555555"
INSIDE = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
LOW = 640 * 1024  # below it is nothing that firmware has told the guest


async def told(world: World) -> tuple[str, bytes]:
    """Return the generation id that the machine has, and the guest's memory."""
    file = world.directory / "ram"
    await world.qmp("pmemsave", val=0, size=MEMORY, filename=str(file))
    memory = file.read_bytes()
    file.unlink()
    return str((await world.qmp("query-vm-generation-id"))["guid"]), memory


async def test_generation(make_world: MakeWorld) -> None:
    """After a revert the guest finds another one at the same place, and none can be inside an image."""
    world = await make_world(genid=FIRST)
    guid, memory = await told(world)
    place = memory.index(uuid.UUID(FIRST).bytes_le, LOW)
    assert guid == FIRST == (await world.orch.domain_info(NAME)).generation
    with pytest.raises(Unsupported, match="generation id"):
        await world.create("in", flags=CreateFlag(0), disks=INSIDE)
    await world.create("one")
    seen = {FIRST}
    for _ in range(2):
        await world.revert("one")
        await world.check_consistent()
        guid, memory = await told(world)
        assert memory[place : place + 16] == uuid.UUID(guid).bytes_le
        assert guid == (await world.orch.domain_info(NAME)).generation
        assert guid not in seen
        seen.add(guid)
    assert (await world.orch.verify(NAME, "one", boot=True)).booted
    assert guid == (await world.orch.domain_info(NAME)).generation


@pytest.mark.parametrize("qemu", ["10.0"], indirect=True)
async def test_uefi(tmp_path: Path, qemu: Qemu) -> None:
    """As the story says; `scripts/proof uefi` tells it in each of the QEMUs."""
    await uefi_story.tell(tmp_path, qemu)
    await assert_nothing_runs(tmp_path)


@pytest.mark.parametrize("qemu", ["10.0"], indirect=True)
async def test_tpm(tmp_path: Path, qemu: Qemu) -> None:
    """As the story says; `scripts/proof uefi` tells it in each of the QEMUs."""
    await tpm_story.tell(tmp_path, qemu)
    await assert_nothing_runs(tmp_path)
