"""A simulated host with a domain's images."""

from __future__ import annotations

import pytest

from snaporch.drivers.simulated import (
    SimulatedDriver,
    SimulatedHost,
)
from tests.simulated.world import DISKS


@pytest.fixture
def host() -> SimulatedHost:
    """Give a host with the images of a domain of two disks."""
    host = SimulatedHost()
    for disk in DISKS:
        host.add_image(disk.path, number=7)
    return host


@pytest.fixture
def driver(host: SimulatedHost) -> SimulatedDriver:
    return SimulatedDriver(host)
