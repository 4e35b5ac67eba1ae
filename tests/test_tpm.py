"""TPMs: what a definition says, the command line, and the directory that a TPM's state is in."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio

from snaporch import DomainDefinition, InvalidInput, open_orchestrator
from snaporch.drivers.qemu import tpm
from snaporch.drivers.qemu.command import command_line
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.simulated import SimulatedDriver, SimulatedHost
from snaporch.errors import Refused, Unsupported
from snaporch.model.archive import Manifest, Member
from snaporch.model.convert import definition_from
from snaporch.model.domain import TpmOptions

WEB = DomainDefinition("web", tpm=TpmOptions())


def test_what_a_definition_says(tmp_path: Path) -> None:
    """An empty table is enough; no other version, no other key, and no other type."""
    for text in ({}, {"version": "2.0"}):
        assert definition_from({"name": "web", "tpm": text}, tmp_path) == WEB
    for wrong in ({"version": "1.2"}, {"version": 2.0}, {"path": "x"}, "2.0", True):
        with pytest.raises(InvalidInput, match="tpm"):
            definition_from({"name": "web", "tpm": wrong}, tmp_path)


def test_the_command_line() -> None:
    """QEMU finds its swtpm at a descriptor; a machine without a TPM has none."""
    line = command_line(WEB, (), accel="tcg", fds=(), pidfile="", incoming=False, tpm=7)
    assert "socket,id=snaporch-tpm-socket,fd=7" in line
    assert [word for word in line if word.startswith("tpm-crb")] == [
        "tpm-crb,id=snaporch-tpm,tpmdev=snaporch-tpm-backend"
    ]
    assert "tpm" not in " ".join(command_line(WEB, (), accel="tcg", fds=(), pidfile="", incoming=False))


async def test_it_is_refused_where_there_can_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By other drivers; and where swtpm is not installed, with the command that helps."""
    drivers = {"qemu": QemuDriver(), "simulated": SimulatedDriver(SimulatedHost())}
    async with open_orchestrator(tmp_path / "root", drivers=drivers) as orch:
        with pytest.raises(Unsupported, match="starts no machine with a TPM"):
            await orch.define(attrs.evolve(WEB, driver="simulated"))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(Unsupported, match=r"web: swtpm is not installed .*apt install swtpm"):
            await orch.define(WEB)
        assert not (tmp_path / "root/web").exists()


async def test_a_state_is_copied(tmp_path: Path) -> None:
    """Durably made of a copy, told from any other, and gone; one that was never started is copied as nothing."""
    driver = QemuDriver()
    one, other, copy = (str(tmp_path / name) for name in ("dir/tpm.1", "dir/tpm.2", "copy"))
    await driver.make_tpm(one)
    assert Path(one).stat().st_mode & 0o777 == 0o700
    await driver.check_tpm(one)
    assert not await driver.copy_tpm(one, copy, runs=False)
    await driver.make_tpm(other, copy)
    assert tpm.is_new(other)
    Path(one, tpm.STATE).write_bytes(b"keys")
    Path(copy).unlink()
    assert await driver.copy_tpm(one, copy, runs=False) == await driver.tpm_identity(one)
    await driver.make_tpm(other, copy)
    assert Path(other, tpm.STATE).read_bytes() == b"keys"
    assert await driver.tpm_identity(one) != await driver.tpm_identity(other)
    Path(other, tpm.STATE).unlink()
    Path(other, ".lock").touch()
    with pytest.raises(Refused, match="the state of its TPM is not there"):
        await driver.check_tpm(other)
    for _ in range(2):
        await driver.remove_tpm(other)
    assert not Path(other).exists()
    await trio.lowlevel.checkpoint()


def test_an_archive_has_no_state_without_a_tpm() -> None:
    """Nor under another name."""
    state = Member("tpm", 1, "x")
    manifest = Manifest("1", "s", attrs.evolve(WEB, tpm=None), 0.0, (), tpm=state)
    assert [*manifest.faults()] == ["the state of a TPM, and no TPM"]
    assert not [*attrs.evolve(manifest, definition=WEB).faults()]
    assert [*attrs.evolve(manifest, definition=WEB, tpm=attrs.evolve(state, name="x")).faults()]
