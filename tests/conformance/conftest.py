"""Worlds of the conformance suite."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snaporch.testing import SimulatedWorld, open_simulated_world
from tests.conformance.worlds import QemuWorld
from tests.live.world import MIB, MakeWorld


@pytest.fixture
async def simulated(tmp_path: Path) -> AsyncIterator[SimulatedWorld]:
    """A simulated domain."""
    async with open_simulated_world(tmp_path) as world:
        yield world


@pytest.fixture
async def real(make_world: MakeWorld) -> QemuWorld:
    """A domain in each of the QEMUs; it leaves the host some time: tests/live is for heavy load."""
    return QemuWorld(await make_world(memory=64 * MIB, append="rate=500 dirty=20"))
