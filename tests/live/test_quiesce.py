"""QUIESCE of a real guest with a real file system and the QEMU guest agent; of one whose agent is silent."""

from __future__ import annotations

import re
import shutil
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.local.process import LocalProcess
from snaporch.drivers.qemu.attach import agent_socket
from snaporch.drivers.qemu.driver import AGENT, QemuDriver
from snaporch.drivers.qmp import agent
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.engine.states import State
from snaporch.errors import OperationFailed, Unsupported
from snaporch.guest.build import build_linux
from snaporch.model.domain import DomainDefinition, TpmOptions
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.orchestrator import Orchestrator, open_orchestrator
from tests.conftest import ROOT
from tests.live.world import MIB, NAME, MakeWorld, Qemu, assert_nothing_runs

pytestmark = pytest.mark.live

SECONDS = 120.0  # a Linux boots, emulated, on a busy host
COUNT = re.compile(r"snaporch-guest count=(\d+)\r?\n")
RECOVER = 4  # of the features in an ext4's superblock: its journal is to be replayed
DISKS = CreateFlag.DISK_ONLY | CreateFlag.QUIESCE


@attrs.frozen
class Linux:
    """A guest that counts in a file on an ext4."""

    orch: Orchestrator
    qemu: Qemu
    root: Path
    log: Path

    async def goes_on(self) -> int:
        """Wait until the guest has counted on, and return how far."""
        since = self.log.stat().st_size if self.log.exists() else 0
        with trio.fail_after(SECONDS):
            while len(found := COUNT.findall(self.log.read_text(errors="replace")[since:])) < 4:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert "ERROR" not in self.log.read_text(errors="replace")
        return int(found[-1])

    async def check_clock(self) -> None:
        """Go back, and ask the guest what time it is: the host's, or with KEEP_CLOCK that of the point."""
        record = await self.orch.show(NAME, "live")
        for flags in (RevertFlag.KEEP_CLOCK, RevertFlag(0)):
            back = await self.orch.revert(NAME, "live", flags)
            (path,) = self.root.glob(f"**/run-*/{AGENT}")
            async with agent.open_agent(str(path), NAME) as asked:
                now, guests = time.time(), await asked.execute("guest-get-time") / 1e9
            told, age = back.clock_behind_seconds, now - record.point
            assert told is not None
            assert abs(now - guests - told) < 2
            assert (0 < age - told < 60 and told > 2) if flags else told < 2
            assert (await self.orch.domain_info(NAME)).clock_behind_seconds == told

    async def check_clean(self, name: str) -> None:
        """Assert that the file system in a snapshot's image needs no repair and no replay of its journal."""
        record, raw = await self.orch.show(NAME, name), self.root / "raw"
        image = (
            ["-U", "-l", f"snapshot.name={name}", record.inside["vda"].path]
            if record.inside
            else [record.images["vda"][0].path]
        )
        await trio.run_process([self.qemu.img, "convert", "-O", "raw", *image, str(raw)])
        assert not needs_recovery(raw)
        await trio.run_process(["/sbin/fsck.ext4", "-f", "-n", str(raw)], capture_stdout=True, capture_stderr=True)
        raw.unlink()

    async def die(self, where: str) -> None:
        """Have another snaporch create a snapshot and be killed."""
        words = [sys.executable, "-m", "snaporch.testing.dying", str(self.root), NAME, where, "us"]
        done = await trio.run_process([*words, "create", "dead", "quiesced"], capture_stdout=True, check=False)
        assert done.returncode < 0, f"it was never {where}"


def needs_recovery(raw: Path) -> bool:
    """Return whether the journal of an ext4 is to be replayed."""
    with raw.open("rb") as file:
        file.seek(1024 + 0x60)
        return bool(struct.unpack("<I", file.read(4))[0] & RECOVER)


@asynccontextmanager
async def linux(directory: Path, qemu: Qemu) -> AsyncIterator[Linux]:
    """Boot a guest with an ext4 and an agent."""
    guest, raw, disk = build_linux(ROOT / ".cache/guest"), directory / "raw", directory / "vda.qcow2"
    with raw.open("wb") as file:
        file.truncate(32 * MIB)
    await trio.run_process(["/sbin/mkfs.ext4", "-q", str(raw)])
    await trio.run_process([qemu.img, "convert", "-O", "qcow2", str(raw), str(disk)])
    root, log = directory / "root", directory / "serial.log"
    definition = DomainDefinition(
        NAME,
        memory=192 * MIB,
        accel="tcg",
        machine="q35",
        kernel=str(guest.kernel),
        initrd=str(guest.quiesce),
        append="console=ttyS0 quiet",
        serial=str(log),
        emulator=qemu.emulator,
        guest_agent=True,
        disks=(DeviceDisk("vda", str(disk)),),
        tpm=TpmOptions(),
    )
    async with open_orchestrator(root, drivers={"qemu": QemuDriver(storage=LocalStorage(qemu.img))}) as orch:
        await orch.define(definition)
        try:
            await orch.start(NAME)
            yield Linux(orch, qemu, root, log)
        finally:
            with trio.CancelScope(shield=True):
                await orch.destroy(NAME)
    await assert_nothing_runs(directory)
    shutil.rmtree(root)


async def test_linux(tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen at the point, thawed after it: by snaporch, by the guard if snaporch dies, and after a revert."""
    async with linux(tmp_path, qemu) as guest:
        orch = guest.orch
        await guest.goes_on()
        record = await orch.create(NAME, DomainSnapshot("disks"), DISKS)
        assert (record.strategy, record.quiesced, record.memory) == (Strategy.NONE, True, None)
        await guest.goes_on()
        await guest.check_clean("disks")
        assert record.tpm is not None
        with monkeypatch.context() as patched:
            patched.setattr("snaporch.drivers.qemu.tpm.identity", lambda _: ())
            with pytest.raises(OperationFailed, match="wrote to its TPM"):
                await orch.create(NAME, DomainSnapshot("torn"), DISKS)
        await orch.create(NAME, DomainSnapshot("live"), CreateFlag.LIVE | CreateFlag.QUIESCE)
        far = await guest.goes_on()
        await guest.check_clean("live")
        for where in ("after:freeze#1", "after:switch#1"):
            await guest.die(where)
            await guest.goes_on()  # nobody has recovered anything
            (ended,) = await orch.recover()
            assert ended.state == State.ROLLED_BACK
            await guest.goes_on()
        await guest.check_clock()
        assert await guest.goes_on() < far + 100
        await orch.revert(NAME, "live", RevertFlag.PAUSED)
        await orch.resume(NAME)
        await guest.goes_on()
        inside = (DiskSnapshot(DeviceDisk("vda"), external=False),)
        record = await orch.create(NAME, DomainSnapshot("inside", disks=inside), CreateFlag.QUIESCE)
        assert (record.strategy, record.quiesced) == (Strategy.INTERNAL, True)
        far = await guest.goes_on()
        await guest.check_clean("inside")
        assert (await orch.verify(NAME, "inside", boot=True)).booted
        await orch.revert(NAME, "inside")
        assert await guest.goes_on() < far + 100
        assert [each.name for each in await orch.list(NAME)] == ["disks", "live", "inside"]


async def test_silent(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest in which no agent runs is left as it is, whatever was asked for."""
    monkeypatch.setattr(agent, "SYNC_SECONDS", 0.3)  # nothing is there that could be late
    world = await make_world(guest_agent=True)
    for flags in (DISKS, CreateFlag.LIVE | CreateFlag.QUIESCE):
        async with world.unchanged():
            with pytest.raises(Unsupported, match="no guest agent answers"):
                await world.create("never", flags=flags)
    await world.check_runs()


@pytest.mark.parametrize(
    "channel",
    [
        ["-chardev", "socket,path=ga.sock,server=on,wait=off,id=qga0"],
        ["-chardev", "socket,id=qga0,path=/run/vm/ga.sock,server,nowait"],
    ],
)
@pytest.mark.parametrize(
    "port",
    [
        "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        '{"driver":"virtserialport","chardev":"qga0","name":"org.qemu.guest_agent.0"}',
    ],
)
def test_the_channel_of_an_attached_domain(channel: list[str], port: str) -> None:
    """It is found in the command line, however that says it."""
    argv = ("qemu-system-x86_64", "-device", "virtio-serial-pci", *channel, "-device", port)
    found = QemuProcess(LocalProcess(1, 1), "/run/vm/qmp.sock", attached=True, argv=argv, cwd="/run/vm")
    assert agent_socket(found) == "/run/vm/ga.sock"
    assert not agent_socket(attrs.evolve(found, argv=argv[:-2]))
