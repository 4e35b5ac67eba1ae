"""libvirt's domains are listed with what stands in the way of attaching to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import _qemus
from tests.libvirt.lab import Libvirt
from tests.libvirt.world import open_libvirt_world
from tests.live.world import NAME

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]


@pytest.mark.parametrize("daemon", ["11.3"], indirect=True)
async def test_discover(tmp_path: Path, daemon: Libvirt, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs can be attached to, and is then the domain here; one that does not run is to be started."""
    qemu = _qemus()["7.2" if daemon.qemu == "-" else "10.0"]
    monkeypatch.setattr("snaporch.drivers.libvirt.driver.default_uri", lambda: daemon.uri)
    async with open_libvirt_world(tmp_path / "w", daemon, qemu, kernel, attach=False) as world:
        (found,) = [each for each in await world.orch.discover("libvirt") if each.name == world.theirs]
        assert (found.uri, found.domain, found.blocker) == (daemon.uri, "", "")
        await world.orch.attach(NAME, driver="libvirt", uri=found.uri, of=found.name)
        (found,) = [each for each in await world.orch.discover("libvirt") if each.name == world.theirs]
        assert (found.domain, found.blocker) == (NAME, "")
        await world.orch.destroy(NAME)
        await world.orch.undefine(NAME)
        (found,) = [each for each in await world.orch.discover() if each.name == world.theirs]
        assert (found.domain, found.blocker) == ("", "it does not run: `virsh start` starts it")
