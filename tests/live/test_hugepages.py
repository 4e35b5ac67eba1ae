"""A guest has its huge pages again when a background checkpoint is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from snaporch.drivers.qmp import stream
from snaporch.model.request import Strategy
from tests.live.world import MIB, World

pytestmark = pytest.mark.live


def huge(pid: int) -> int:
    """Return the bytes of a process that are in huge pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("AnonHugePages:")).split()[1])


async def test_huge_pages_come_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream has split all that the guest has written to; it runs on with nothing wrong in its RAM."""
    monkeypatch.setattr(stream, "HUGE_PAGES_SECONDS", 60.0)
    pid = await world.pid()
    before = huge(pid)
    assert before > 8 * MIB
    await world.create("first", Strategy.BACKGROUND)
    assert huge(pid) > before * 3 // 4
    await world.check_runs()
    await world.create("second", Strategy.BACKGROUND)
    await world.revert("second")
    await world.check_consistent()
