"""A few command lines made at random; `scripts/proof command-lines` tries hundreds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scripts.benchlib.command_lines import Maker, is_wrong, tried
from tests.live.world import Qemu

pytestmark = pytest.mark.live

LINES = 6


async def test_the_machine_that_comes_back_is_the_same_or_all_was_refused(tmp_path: Path, qemu: Qemu) -> None:
    """What the new QEMU reports is what the first one did; a refusal leaves that one as it was."""
    for seed in range(LINES):
        place = tmp_path / str(seed)
        place.mkdir()
        words = Maker(place, qemu, random.Random(seed)).line()  # noqa: S311 - no secret
        outcome = await tried(place, qemu, words)
        assert not is_wrong(outcome), f"seed {seed}: {outcome}: {words}"
