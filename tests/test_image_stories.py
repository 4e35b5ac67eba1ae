"""Random stories of several domains on shared images; `scripts/proof stories` tells a hundred."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.image_place import tool
from tests.image_stories import SIZE, tell, telling


@pytest.mark.parametrize("seed", [1, 2])
async def test_nobodys_content_changes_under_him(tmp_path: Path, seed: int) -> None:
    """Whatever happens to images that several domains share, everybody reads what he did."""
    story = await tell(tmp_path, seed, 14)
    assert story.domains


async def test_the_oracle_sees_a_change(tmp_path: Path) -> None:
    """A byte that changes in an image which a snapshot reads is found: the stories can fail."""
    async with telling(tmp_path, 1) as story:
        await story.define()
        await story.create()
        ((domain, name),) = story.points
        frozen = (await story.place.orch.show(domain, name)).snapshot.disks[0].disk.path
        tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 170 0 {SIZE}", frozen)
        with pytest.raises(AssertionError, match="does not read what it did"):
            await story.check()
    assert os.path.exists(frozen)
