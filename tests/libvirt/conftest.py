"""Fixtures: a libvirtd of each version, with the QEMU that its Debian has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.libvirt.lab import Libvirt, running_libvirt

VERSIONS = ROOT / ".cache/libvirt-versions"


@pytest.fixture(scope="session", params=["9.0", "11.3"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Libvirt]:
    """A libvirtd that runs."""
    if not VERSIONS.exists():
        pytest.fail(f"{VERSIONS} is not there, which says where libvirt is: run scripts/setup", pytrace=False)
    rows = {line.split()[0]: line.split() for line in VERSIONS.read_text().splitlines()}
    version, prefix, qemu = rows[request.param]
    unpacked = ROOT / f".cache/qemu-{qemu}"
    with running_libvirt(version, Path(prefix), str(unpacked) if unpacked.exists() else "-") as started:
        yield started
