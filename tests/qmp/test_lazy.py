"""Lazy loads, where what matters is what the memory file is, or that QEMU says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import trio
import xxhash

from snaporch.drivers.base import LazyLoad, untold
from snaporch.drivers.qmp import index, lazy, pages
from snaporch.errors import DamagedSnapshot
from snaporch.model.record import FileRecord
from tests.qmp.conftest import Connect
from tests.qmp.test_index import WHOLE, stream


def saved(directory: Path, data: bytes) -> LazyLoad:
    """Make a memory file that has no index."""
    path = directory / "memory"
    path.write_bytes(data)
    record = FileRecord(str(path), len(data), f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}")
    return LazyLoad(record, f"{path}.index", str(directory / "loading"))


@pytest.mark.parametrize("at", [10, len(stream(*WHOLE)) // 2])
async def test_damage_is_no_reason_to_load_it_another_way(tmp_path: Path, at: int) -> None:
    """Whether the damaged file is still understood or not: who reads all of it for its index knows of it."""
    data = stream(*WHOLE)
    load = saved(tmp_path, data)
    Path(load.memory.path).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(DamagedSnapshot):
        await lazy._with_index(load)
    assert not Path(load.index).exists()


async def test_another_files_index_is_made_anew(tmp_path: Path) -> None:
    """One that is left of an earlier file says nothing of this one; one of this one is not made again."""
    data = stream(*WHOLE)
    load = saved(tmp_path, data)
    index.save(index.build(load.memory.path, load.memory.checksum), load.index)
    load = saved(tmp_path, stream(*WHOLE, devices=b"\x04others"))
    assert not await lazy._with_index(load)
    made = Path(load.index).stat()
    assert index.load(load.index).checksum == load.memory.checksum
    assert not await lazy._with_index(load)
    assert Path(load.index).stat().st_ino == made.st_ino
    assert "cannot be read by page" in await lazy._with_index(saved(tmp_path, b"another program's"))


async def test_an_index_is_given_up_at_once(tmp_path: Path) -> None:
    """However large its memory file is: this one takes minutes to be read."""
    load = saved(tmp_path, b"")
    with open(load.memory.path, "wb") as file:
        file.truncate(2**40)
    with trio.move_on_after(0.05) as scope:
        await lazy._with_index(attrs.evolve(load, memory=attrs.evolve(load.memory, size=2**40)))
    assert scope.cancelled_caught
    assert trio.current_time() < scope.deadline + 20
    assert not Path(load.index).exists()


async def test_a_qemu_that_waits_for_a_damaged_page(connect: Connect, tmp_path: Path) -> None:
    """It answers nothing, as its main loop needs that page itself: it is the damage that is told."""
    load = saved(tmp_path, stream(*WHOLE))
    Path(load.status).write_text(json.dumps({"state": pages.DAMAGED, "error": "memory is not what was saved"}))
    async with connect(timeout=0.1) as (client, _):
        with pytest.raises(DamagedSnapshot, match="not what was saved"):
            await lazy.finish(client, load, untold)
