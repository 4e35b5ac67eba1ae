"""The story of a domain with a TPM: its guest says itself whether what the TPM holds is of the instant of RAM."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.local.process import find_processes
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.errors import InvalidInput, Refused, Unsupported
from snaporch.guest import build
from snaporch.model.domain import DomainDefinition, TpmOptions
from snaporch.model.request import CloneOptions
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.orchestrator import Orchestrator, catalog_of, open_orchestrator
from tests.live.world import MIB, NAME, Qemu, make_image

SECONDS = 60.0  # for anything; a second or two, when nobody else works on the host
INSIDE = (DiskSnapshot(DeviceDisk("vda"), external=False),)


def build_guest(directory: Path) -> Path:
    """Return the guest, built."""
    made = directory / "tpm.elf"
    script = f"-Wl,-T,{build._SOURCES / 'tiny.ld'}"
    sources = [str(build._SOURCES / "tiny_start.S"), str(Path(__file__).with_name("tpm_guest.c"))]
    subprocess.run(["gcc", *build._TINY_FLAGS, *build._WARNINGS, script, "-o", str(made), *sources], check=True)
    return made


@attrs.frozen
class Said:
    """What a guest has said: of its boot, what its counter was; since, how often it went round, and its counter."""

    boot: bool
    number: int
    counter: int


@attrs.define
class Guest:
    """One guest, by its log."""

    log: Path
    at: int = 0

    def skip(self) -> None:
        """Pass over what it has said so far."""
        self.at = self.log.stat().st_size if self.log.exists() else 0

    def lines(self) -> list[Said]:
        """Return what it has said since then; nothing in it tells of an error."""
        text = self.log.read_bytes()[self.at :].decode() if self.log.exists() else ""
        assert "ERROR" not in text, text[-2000:]
        found = re.findall(r"^tpm (boot|number)=(\d+) counter=(\d+) sum=(\d+)$", text, re.MULTILINE)
        return [Said(b == "boot", int(n), int(c)) for b, n, c, s in found if int(n) + int(c) == int(s)]

    async def says(self, count: int = 1, *, boot: bool = False) -> Said:
        """Return the line of so many from then on, of its boot or after."""
        with trio.fail_after(SECONDS):
            while len(found := [line for line in self.lines() if line.boot is boot]) < count:  # noqa: ASYNC110
                await trio.sleep(0.02)
        return found[count - 1]

    async def goes_on(self) -> Said:
        """Return what it says, newly and without an error, after a few rounds."""
        self.skip()
        return await self.says(4)

    async def goes_back(self) -> None:
        """Return when, since then, it went on from an earlier count, for a few rounds and without an error."""
        with trio.fail_after(SECONDS):
            while True:
                lines = self.lines()
                back = [n for n, (was, now) in enumerate(pairwise(lines)) if now.counter < was.counter]
                if back and len(lines) > back[0] + 4:
                    return
                await trio.sleep(0.02)


@asynccontextmanager
async def with_tpm(directory: Path, qemu: Qemu) -> AsyncIterator[Orchestrator]:
    """Define a domain with a TPM, which nobody starts; in the end no swtpm is left."""
    make_image(qemu, directory / "vda.qcow2")
    definition = DomainDefinition(
        NAME,
        memory=64 * MIB,
        accel="tcg",
        machine="q35",
        kernel=str(build_guest(directory)),
        serial=str(directory / "log"),
        emulator=qemu.emulator,
        disks=(DeviceDisk("vda", str(directory / "vda.qcow2")),),
        tpm=TpmOptions(),
    )
    driver = QemuDriver(storage=LocalStorage(qemu.img))
    async with open_orchestrator(directory / "root", drivers={"qemu": driver}) as orch:
        try:
            await orch.define(definition)
            yield orch
        finally:
            with trio.CancelScope(shield=True):
                for info in await orch.domains():
                    await orch.destroy(info.name)
    with trio.fail_after(SECONDS):
        while swtpms(directory):  # noqa: ASYNC110 - nothing tells us
            await trio.sleep(0.02)


def swtpms(directory: Path) -> list[int]:
    """Return the TPMs that have their state below a directory."""
    found = []
    for pid in find_processes("swtpm", "--tpm2"):
        with suppress(OSError):
            links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            found += [pid] if any(link.startswith(str(directory)) for link in links) else []
    return found


def states(orch: Orchestrator, name: str) -> list[Path]:
    """Return the states of TPMs that lie there for a domain."""
    return sorted(Path(orch.root, name).glob("tpm-*/tpm2-00.permall"))


async def tell(directory: Path, qemu: Qemu) -> None:
    """What the TPM holds is in the point and comes back with it; a copy has its own."""
    async with with_tpm(directory, qemu) as orch:
        guest = Guest(directory / "log")
        await orch.start(NAME)
        await guest.says(4)
        await running(orch, guest)
        off = await inactive(orch, guest)
        await copies(orch, directory, off)
        await refused(orch)
        await gone(orch)


async def running(orch: Orchestrator, guest: Guest) -> None:
    """A checkpoint has the TPM in its memory."""
    point = await orch.create(NAME, DomainSnapshot("run"), CreateFlag.LIVE)
    assert point.tpm is None
    await guest.goes_on()
    (before,) = states(orch, NAME)
    assert (before.stat().st_mode & 0o777, before.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert (await orch.verify(NAME, "run", boot=True)).booted
    assert states(orch, NAME) == [before]
    for flags in (RevertFlag(0), RevertFlag.PAUSED, RevertFlag.LAZY):
        await guest.goes_on()
        assert not (await orch.revert(NAME, "run", flags)).lazy
        assert len(states(orch, NAME)) == 1
        assert before not in states(orch, NAME)
        await orch.resume(NAME)
        await guest.goes_back()
    for name, disks in (("paused", ()), ("inside", INSIDE)):
        await orch.create(NAME, DomainSnapshot(name, disks=disks), CreateFlag(0))
        await guest.goes_on()
        await orch.revert(NAME, name)
        await guest.goes_back()
    assert (await orch.verify(NAME, "inside", boot=True)).booted
    await orch.delete(NAME, "inside")


async def inactive(orch: Orchestrator, guest: Guest) -> int:
    """A point without memory has a copy; return what the counter is there."""
    await orch.destroy(NAME)
    point = await orch.create(NAME, DomainSnapshot("off"), CreateFlag.DISK_ONLY)
    assert point.tpm is not None
    assert Path(point.tpm.path).stat().st_mode & 0o777 == 0o600
    guest.skip()
    await orch.start(NAME)
    off = (await guest.says(boot=True)).counter
    assert off
    await guest.says(4)
    guest.skip()
    await orch.revert(NAME, "off", RevertFlag.RUNNING)
    assert (await guest.says(boot=True)).counter == off
    await guest.says(4)
    await orch.revert(NAME, "off")
    guest.skip()
    await orch.start(NAME)
    assert (await guest.says(boot=True)).counter == off
    await guest.says(4)
    return off


async def copies(orch: Orchestrator, directory: Path, off: int) -> None:
    """Clones, running and not, and imports: none changes what another one has."""
    guest = Guest(directory / "log")
    await orch.clone(NAME, "run", "warm", CloneOptions(count=2))
    first = [await Guest(directory / f"root/{name}/serial.log").says() for name in ("warm-1", "warm-2")]
    assert first[0] == first[1]
    await orch.clone(NAME, "off", "cold")
    await orch.export(NAME, "run", directory / "run.archive")
    await orch.export(NAME, "off", directory / "off.archive")
    await orch.import_archive(directory / "off.archive", name="moved-off", trust=True)
    for name in ("cold", "moved-off"):
        await orch.start(name)
        there = Guest(directory / f"root/{name}/serial.log")
        assert (await there.says(boot=True)).counter == off
        await there.says(4)
        await orch.destroy(name)
    for name in ("warm-1", "warm-2"):
        await Guest(directory / f"root/{name}/serial.log").goes_on()
    await guest.goes_on()
    for name in ("warm-1", "warm-2", "cold"):
        await orch.destroy(name)
        await orch.undefine(name, discard=True)
        assert not Path(orch.root, name).exists()
    with pytest.raises(InvalidInput, match="is in the memory: leave out --disks-only"):
        await orch.import_archive(directory / "run.archive", name="moved", trust=True, disks_only=True)
    await orch.import_archive(directory / "run.archive", name="moved", trust=True)
    with pytest.raises(Refused, match="its guest would find another TPM; `snaporch revert moved"):
        await orch.start("moved")
    await orch.revert("moved", "run")
    await Guest(directory / "root/moved/serial.log").says(4)
    await orch.destroy("moved")


async def refused(orch: Orchestrator) -> None:
    """To start with a state that is damaged, or gone; no swtpm stays that has no QEMU."""
    await orch.destroy(NAME)
    definition = (await catalog_of(orch).domain(NAME)).definition
    await orch.define(attrs.evolve(definition, extra_args=("-nonsense",)))
    with pytest.raises(Unsupported, match="nonsense"):
        await orch.start(NAME)
    assert not swtpms(orch.root / NAME)
    await orch.define(definition)
    (state,) = states(orch, NAME)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Unsupported, match=r"swtpm: .*Could not initialize libtpms"):
        await orch.start(NAME)
    state.unlink()
    with pytest.raises(Refused, match="its guest would find another TPM"):
        await orch.start(NAME)
    (found,) = await orch.fsck(NAME)
    assert "the state of its TPM is not there" in found.text
    state.write_bytes(whole)
    orphan = state.parent.with_name("tpm-orphan")
    orphan.mkdir()
    (found,) = await orch.fsck(NAME, repair=True)
    assert (found.subject, found.repaired, orphan.exists()) == (str(orphan), True, False)


async def gone(orch: Orchestrator) -> None:
    """Nothing is left of a domain that is forgotten."""
    for snapshot in ("run", "paused", "off"):
        await orch.delete(NAME, snapshot)
    assert {path.name for path in Path(orch.root, NAME).glob("*.state")} == set()
    record = (await catalog_of(orch).domain(NAME)).disks[0]
    await orch.define(attrs.evolve((await catalog_of(orch).domain(NAME)).definition, disks=(record,)))
    await orch.undefine(NAME)
    assert not list(Path(orch.root, NAME).glob("tpm*"))
