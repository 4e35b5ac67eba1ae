"""Drivers by name: what there is, what is imported and when, and what an unknown name is told."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from snaporch.drivers import registry
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.registry import Registry
from snaporch.drivers.simulated import SimulatedDriver
from snaporch.errors import InvalidInput, Unsupported
from snaporch.model.domain import DomainDefinition
from snaporch.orchestrator import open_orchestrator

LAZY = """
import sys, trio
from snaporch import open_orchestrator
async def main():
    async with open_orchestrator(sys.argv[1]) as orchestrator:
        await orchestrator.domains()
trio.run(main)
print([name for name in sys.modules if name.startswith("snaporch.drivers.") and name.count(".") == 2])
"""


def test_a_driver_is_made_once_and_when_it_is_asked_for() -> None:
    """And what is to be done with all drivers is done with it then."""
    drivers, seen = Registry(), list[str]()
    drivers.set_up(lambda driver: seen.append(driver.name))
    assert not seen
    assert isinstance(drivers["qemu"], QemuDriver)
    assert drivers["qemu"] is drivers["qemu"]
    assert seen == ["qemu"]


def test_what_is_not_used_is_not_imported(tmp_path: Path) -> None:
    """A root that has no domains needs no driver."""
    command = [sys.executable, "-c", LAZY, str(tmp_path / "root")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "snaporch.drivers.base" in said
    assert "snaporch.drivers.qemu" not in said
    assert "snaporch.drivers.simulated" not in said


def test_other_packages_may_bring_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point; never in the place of one that is built in, nor where the drivers were given."""
    points = [
        EntryPoint(name, "snaporch.drivers.simulated:SimulatedDriver", registry.GROUP) for name in ("x", "qemu")
    ]
    looks: list[str] = []

    def look(group: str) -> list[EntryPoint]:
        looks.append(group)
        return points

    monkeypatch.setattr(registry, "entry_points", look)
    drivers = Registry()
    assert {"qemu", "x"} <= set(drivers)
    assert "x" in drivers
    assert "y" not in drivers
    assert looks == [registry.GROUP]  # all installed packages are looked through: once is enough
    assert isinstance(drivers["x"], SimulatedDriver)
    assert isinstance(drivers["qemu"], QemuDriver)
    given = Registry({"simulated": SimulatedDriver()})
    assert list(given) == ["simulated"]
    with pytest.raises(InvalidInput, match="there is no driver 'x'; there are simulated"):
        given["x"]


async def test_one_that_cannot_be_imported_is_refused_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others work; `doctor` says what is missing."""
    monkeypatch.setattr(registry, "BUILT_IN", {**registry.BUILT_IN, "other": "no_such_module:Driver"})
    with pytest.raises(Unsupported, match="no_such_module"):
        Registry()["other"]
    async with open_orchestrator(tmp_path / "root") as orchestrator:
        findings = await orchestrator.doctor()
    assert "no_such_module" in findings["other"]["driver"]
    assert "starts-beside" in findings["qemu"]["traits"]


async def test_an_unknown_name_is_told_which_there_are(tmp_path: Path) -> None:
    """By whatever it comes in: a definition, or `attach`."""
    async with open_orchestrator(tmp_path / "root") as orchestrator:
        with pytest.raises(InvalidInput, match=r"no driver 'qmeu'; there are qemu"):
            await orchestrator.attach("web1", "/run/q", driver="qmeu")
        with pytest.raises(InvalidInput, match=r"no driver 'qmeu'; there are qemu"):
            await orchestrator.define(DomainDefinition("web1", driver="qmeu"))
        for socket, uri, of in (("", "", ""), ("/run/q", "qemu:///system", ""), ("", "", "theirs")):
            with pytest.raises(InvalidInput, match="--qmp SOCKET"):
                await orchestrator.attach("web1", socket, uri=uri, of=of)
        assert not await orchestrator.domains()
