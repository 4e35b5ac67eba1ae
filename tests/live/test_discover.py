"""A real QEMU is found by what /proc says of it, and attached to by what was found."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

from snaporch import open_orchestrator
from snaporch.drivers.qemu.driver import QemuDriver
from tests.live.world import Qemu

pytestmark = pytest.mark.live
SECRET = "tiger-1234"  # noqa: S105 - it is to be looked for


async def test_found_and_attached(tmp_path: Path, qemu: Qemu) -> None:
    """Its monitor is free: nothing has connected to it. Afterwards it is the domain that it has become."""
    socket = tmp_path / "qmp.sock"
    words = [qemu.emulator, *["-name", "guest=web", "-nodefaults", "-display", "none", "-S", "-m", "16"]]
    words += ["-object", f"secret,id=key,data={SECRET}", "-qmp", f"unix:{socket},server=on,wait=off"]
    with subprocess.Popen(words) as process:
        try:
            async with open_orchestrator(tmp_path / "root", drivers={"qemu": QemuDriver()}) as orch:
                with trio.fail_after(30):
                    while not socket.exists():  # noqa: ASYNC110 - QEMU tells nobody
                        await trio.sleep(0.01)
                (found,) = [each for each in await orch.discover() if each.pid == process.pid]
                assert (found.name, found.sockets, found.blocker, found.domain) == ("web", (str(socket),), "", "")
                assert SECRET not in repr(await orch.discover())
                await orch.attach("mine", found.sockets[0])
                (found,) = [each for each in await orch.discover() if each.pid == process.pid]
                assert (found.domain, found.blocker) == ("mine", "")
        finally:
            process.kill()
