"""Random stories of several domains on shared images; `scripts/proof stories` tells a hundred."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.image_place import tool
from tests.image_stories import SIZE, tell, telling

STORIES = int(os.environ.get("SNAPORCH_STORIES", "3"))


@settings(max_examples=STORIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(dice=st.randoms(use_true_random=False))
def test_nobodys_content_changes_under_him(dice: random.Random) -> None:
    """Whatever happens to images that several domains share, everybody reads what he did."""
    with tempfile.TemporaryDirectory() as directory:
        trio.run(tell, Path(directory).resolve(), dice, 12)


async def test_the_oracle_sees_a_change(tmp_path: Path) -> None:
    """A byte that changes in an image which a snapshot reads is found: the stories can fail."""
    async with telling(tmp_path, random.Random(1)) as story:  # noqa: S311 - a story, not a secret
        await story.define()
        await story.create()
        ((domain, name),) = story.points
        frozen = (await story.place.orch.show(domain, name)).snapshot.disks[0].disk.path
        tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 170 0 {SIZE}", frozen)
        with pytest.raises(AssertionError, match="does not read what it did"):
            await story.check()
    assert os.path.exists(frozen)
