"""QEMUs that something else starts, and domains that are attached to them."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp import open_qmp
from snaporch.errors import ConnectionGone, Refused
from snaporch.model.domain import MachineShape
from snaporch.model.rfc import DomainSnapshot, RevertFlag
from snaporch.orchestrator import Orchestrator, catalog_of, open_orchestrator
from tests.live.world import Qemu, make_image

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

    async def start(
        self,
        *words: str,
        machine: str = "q35",
        memory: str = "32",
        qmp: bool = True,
        prefix: Sequence[str] = (),
        fds: Sequence[int] = (),
    ) -> None:
        """Start a QEMU whose CPUs stand."""
        command = [*prefix, self.qemu.emulator, "-S", "-nodefaults", "-display", "none", "-accel", "tcg"]
        command += ["-M", machine, "-m", memory, *words]
        command += ["-qmp", f"unix:{self.socket},server=on,wait=off"] if qmp else []
        process = subprocess.Popen(
            command, cwd=self.place, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=fds
        )
        self._processes.append(process)
        with trio.fail_after(SECONDS):
            while not await self._answers():
                assert process.poll() in {None, 0}, "QEMU does not start"
                await trio.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            async with open_qmp(self.socket, label=NAME) as qmp:
                return bool(await qmp.execute("query-status"))
        except ConnectionGone:
            return False

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
        record = await catalog_of(self.orch).domain(NAME)
        assert record.handle is not None
        driver = QemuDriver(storage=LocalStorage(self.qemu.img))
        async with driver.connect(record.handle, NAME) as machine:
            return await machine.shape()

    async def check_refused(self, words: str, name: str = "c1", flags: RevertFlag | None = None) -> None:
        """Assert that a revert is refused with these words, and that the machine is untouched."""
        before, record = await self.shape(), await catalog_of(self.orch).domain(NAME)
        with pytest.raises(Refused, match=words) as caught:
            await self.revert(name, flags)
        assert "force" not in str(caught.value).lower()
        assert await self.shape() == before
        assert await catalog_of(self.orch).domain(NAME) == record

    async def check_goes_back(self) -> None:
        """Assert that a revert leads to the same machine, on fresh overlays where it writes."""
        await self.attach()
        before = await self.shape()
        await self.create()
        await self.revert()
        after = await self.shape()
        assert (after.memory, after.vcpus, after.devices) == (before.memory, before.vcpus, before.devices)
        for old, new in zip(before.disks, after.disks, strict=True):
            assert (new.target, new.readonly, new.virtual_size) == (old.target, old.readonly, old.virtual_size)
            assert new.chain[0 if old.readonly else 1 :] == old.chain, new
        async with open_qmp(self.socket, label=NAME) as qmp:
            await qmp.execute("query-status")  # in its old place

    async def end(self) -> None:
        """End what was started, and what has taken its place."""
        for process in self._processes:
            process.kill()
            process.wait()
        for domain in await catalog_of(self.orch).domains():
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
