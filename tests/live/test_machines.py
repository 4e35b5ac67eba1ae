"""Machines as people start them, their CPUs stopped: what could not come back as it was is refused, untouched."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp import open_qmp
from snaporch.errors import Refused
from snaporch.model.domain import MachineShape
from snaporch.model.rfc import DomainSnapshot, RevertFlag
from snaporch.orchestrator import Orchestrator, open_orchestrator
from tests.live.world import Qemu, make_image

pytestmark = pytest.mark.live

NAME = "vm"
SECONDS = 30.0


@attrs.define
class Lab:
    """A directory with images and QEMUs that something else starts there.

    Attributes:
        place: the directory.
        qemu: which QEMU is started.
        orch: an orchestrator on a root of its own.
    """

    place: Path
    qemu: Qemu
    orch: Orchestrator
    _processes: list[subprocess.Popen[bytes]] = attrs.field(factory=list)

    @property
    def socket(self) -> Path:
        """QEMU's control socket."""
        return self.place / "qmp.sock"

    def image(self, name: str, format_: str = "qcow2", *, base: str = "") -> str:
        """Make an image of 16 MiB and return its path."""
        path = self.place / name
        if base:
            words = ["create", "-q", "-f", format_, "-b", base, "-F", "qcow2", str(path)]
            subprocess.run([self.qemu.img, *words], check=True, cwd=self.place)
        else:
            make_image(self.qemu, path, format_)
        return str(path)

    async def start(self, *words: str, machine: str = "q35", memory: str = "32", qmp: bool = True) -> None:
        """Start a QEMU whose CPUs stand."""
        command = [self.qemu.emulator, "-S", "-nodefaults", "-display", "none", "-accel", "tcg"]
        command += ["-M", machine, "-m", memory, *words]
        command += ["-qmp", f"unix:{self.socket},server=on,wait=off"] if qmp else []
        process = subprocess.Popen(command, cwd=self.place, stdin=subprocess.DEVNULL, start_new_session=True)
        self._processes.append(process)
        with trio.fail_after(SECONDS):
            while not self.socket.exists():
                assert process.poll() in {None, 0}, "QEMU does not start"
                await trio.sleep(0.02)

    async def attach(self) -> None:
        """Attach to it."""
        await self.orch.attach(NAME, str(self.socket))

    async def create(self, name: str = "c1") -> None:
        """Take a checkpoint."""
        await self.orch.create(NAME, DomainSnapshot(name))

    async def revert(self, name: str = "c1", flags: RevertFlag | None = None) -> None:
        """Go back to one."""
        await self.orch.revert(NAME, name, flags or RevertFlag(0))

    async def shape(self) -> MachineShape:
        """Return what the machine is made of."""
        record = await self.orch.catalog.domain(NAME)
        assert record.handle is not None
        driver = QemuDriver(storage=LocalStorage(self.qemu.img))
        async with driver.connect(record.handle, NAME) as machine:
            return await machine.shape()

    async def check_refused(self, words: str, name: str = "c1") -> None:
        """Assert that a revert is refused with these words, and that the machine is untouched."""
        before, record = await self.shape(), await self.orch.catalog.domain(NAME)
        with pytest.raises(Refused, match=words) as caught:
            await self.revert(name)
        assert "FORCE" not in str(caught.value)
        assert await self.shape() == before
        assert await self.orch.catalog.domain(NAME) == record

    async def end(self) -> None:
        """End what was started, and what has taken its place."""
        for process in self._processes:
            process.kill()
            process.wait()
        for domain in await self.orch.catalog.domains():
            await self.orch.destroy(domain.name)


@pytest.fixture
async def lab(tmp_path: Path, qemu: Qemu) -> AsyncIterator[Lab]:
    """A lab for each QEMU."""
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    async with open_orchestrator(root, drivers={"qemu": QemuDriver(storage=LocalStorage(qemu.img))}) as orch:
        lab = Lab(tmp_path, qemu, orch)
        try:
            yield lab
        finally:
            with trio.CancelScope(shield=True):
                await lab.end()


def blockdev(**options: object) -> tuple[str, str]:
    """Return a -blockdev in JSON; dashes are written as underscores."""
    return "-blockdev", json.dumps({key.replace("_", "-"): value for key, value in options.items()})


def file_node(path: str) -> dict[str, str]:
    return {"driver": "file", "filename": path}


async def test_backing_null(lab: Lab) -> None:
    """As libvirt writes the last layer of a chain: kept, it would cut the new overlay off from what it is over."""
    image = lab.image("a.qcow2")
    await lab.start(
        *blockdev(driver="file", filename=image, node_name="s1"),
        *blockdev(driver="qcow2", file="s1", node_name="f1", backing=None),
        *("-device", "virtio-blk-pci,drive=f1,id=vda"),
    )
    await lab.attach()
    await lab.create()
    await lab.check_refused(r"vda is to be on .* over .*a\.qcow2, and is on ")


async def test_file_without_format(lab: Lab) -> None:
    """A raw disk without a format layer: the new one would show the guest the overlay's own header."""
    image = lab.image("a.raw", "raw")
    await lab.start("-blockdev", f"driver=file,node-name=n0,filename={image}", "-device", "virtio-blk-pci,drive=n0")
    await lab.attach()
    await lab.create()
    await lab.check_refused("is to be read as qcow2, and is read as raw")


async def test_plugged_in(lab: Lab) -> None:
    """A device that was plugged in is not on the command line."""
    await lab.start(*("-drive", f"if=virtio,file={lab.image('a.qcow2')}"), memory="32,slots=2,maxmem=1G")
    async with open_qmp(lab.socket, label=NAME) as qmp:
        await qmp.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m1", "size": 2**27})
        await qmp.execute("device_add", {"driver": "pc-dimm", "id": "dimm1", "memdev": "m1"})
    await lab.attach()
    await lab.create()
    await lab.check_refused(r"167772160 bytes of memory, and has 33554432; device dimm1: pc-dimm is missing")
