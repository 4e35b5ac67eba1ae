"""UEFI firmware: which is taken, and the variable store that a definition brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from snaporch import DeviceDisk, DomainDefinition, InvalidInput, Orchestrator, open_orchestrator
from snaporch.drivers.qemu.command import command_line
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qemu.firmware import Firmware, firmware_for, firmwares
from snaporch.drivers.simulated import SimulatedDriver, SimulatedHost
from snaporch.errors import Unsupported
from snaporch.model.convert import definition_from
from snaporch.model.domain import VariableStore

WEB = DomainDefinition("web", firmware="uefi")


def describe(directory: Path, name: str, size: int, **other: Any) -> Firmware:
    """Put a firmware into a directory, with a descriptor, and return it."""
    directory.mkdir(exist_ok=True)
    code, template = directory / f"{name}.code", directory / f"{name}.vars"
    code.write_bytes(b"code")
    template.write_bytes(bytes(size))
    mapping = {
        "device": "flash",
        "executable": {"filename": str(code), "format": "raw"},
        "nvram-template": {"filename": str(template), "format": "raw"},
    }
    described = {
        "interface-types": ["uefi"],
        "mapping": mapping,
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": [],
    } | other
    (directory / f"{name}.json").write_text(json.dumps(described))
    return Firmware(str(code), str(template), size)


def test_the_descriptors_say_which_there_is(tmp_path: Path) -> None:
    """In their order; what needs another machine, or is for another, is passed over."""
    etc, usr = tmp_path / "etc", tmp_path / "usr"
    own, first, last = describe(etc, "60-a", 8192), describe(usr, "50-b", 4096), describe(usr, "70-c", 4096)
    describe(usr, "60-a", 512)  # another one of its name comes before it
    describe(usr, "10-smm", 4096, features=["requires-smm"])
    describe(usr, "10-arm", 4096, targets=[{"architecture": "aarch64", "machines": ["virt"]}])
    describe(usr, "10-bios", 4096, **{"interface-types": ["bios"]})
    describe(usr, "10-memory", 4096, mapping={"device": "memory", "filename": "x"})
    (usr / "10-junk.json").write_text("junk")
    where = (etc, tmp_path / "none", usr)
    assert list(firmwares(where)) == [first, own, last]
    assert (firmware_for(None, where), firmware_for(8192, where)) == (first, own)
    with pytest.raises(
        Unsupported, match=r"no UEFI firmware here has variable stores of 7 bytes: .* have 4,096, 8,192"
    ):
        firmware_for(7, where)
    with pytest.raises(Unsupported, match="apt install ovmf"):
        firmware_for(None, (tmp_path / "none",))


async def defined(orch: Orchestrator, **other: Any) -> DeviceDisk:
    """Define a domain and return its variable store."""
    record = await orch.define(attrs.evolve(WEB, **other))
    (store,) = (disk for disk in record.definition.disks if disk.target == "nvram")
    assert record.definition.nvram is None
    return store


async def test_the_store_is_a_disk(tmp_path: Path) -> None:
    """Made where it is not there, in the domain's directory if need be, and gone with what was made only for it."""
    root, given = tmp_path / "root", tmp_path / "given.fd"
    async with open_orchestrator(root, drivers={"qemu": QemuDriver()}) as orch:
        store = await defined(orch)
        assert store == DeviceDisk("nvram", str(root / "web/nvram.fd"), "raw")
        Path(store.path).write_bytes(b"!" * Path(store.path).stat().st_size)
        assert await defined(orch) == store
        assert Path(store.path).read_bytes().startswith(b"!!!")
        await orch.undefine("web")
        assert not (root / "web").exists()
        store = await defined(orch, nvram=VariableStore(str(given)))
        assert store == DeviceDisk("nvram", str(given), "raw")
        assert given.stat().st_mode & 0o777 == 0o600
        await orch.undefine("web")
        assert given.exists()
        assert await defined(orch, disks=(store,)) == store
        await orch.undefine("web")


async def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """And nothing is made, or all that was made is gone."""
    odd, missing = tmp_path / "odd.fd", tmp_path / "none.fd"
    odd.write_bytes(bytes(4096))
    drivers = {"qemu": QemuDriver(), "simulated": SimulatedDriver(SimulatedHost())}
    async with open_orchestrator(tmp_path / "root", drivers=drivers) as orch:
        for other, words in (
            ({"nvram": VariableStore(str(odd))}, "no UEFI firmware here has variable stores of 4,096 bytes"),
            ({"nvram": VariableStore(str(missing), "qcow2")}, "only a raw variable store is made"),
            ({"nvram": VariableStore(str(tmp_path / "no/v.fd"))}, "there is no directory"),
            ({"nvram": VariableStore(str(odd)), "disks": (DeviceDisk("nvram", str(odd), "raw"),)}, "leave out one"),
            ({"driver": "simulated"}, "starts no machine with UEFI firmware"),
            ({"kernel": str(missing)}, "kernel"),
        ):
            with pytest.raises((InvalidInput, Unsupported), match=words):
                await orch.define(attrs.evolve(WEB, **other))
            assert {path.name for path in tmp_path.iterdir()} == {"odd.fd", "root"}
            assert not (tmp_path / "root/web").exists()
    for text in ({"nvram": {"path": "v.fd"}}, {"firmware": "efi"}, {"firmware": "uefi", "nvram": {}}):
        with pytest.raises(InvalidInput):
            definition_from({"name": "web"} | text, tmp_path)
    found = definition_from({"name": "web", "firmware": "uefi", "nvram": {"path": "v.fd"}}, tmp_path)
    assert found.nvram == VariableStore(f"{tmp_path}/v.fd")


def test_the_command_line() -> None:
    """The program is read-only, and the store is no disk that the guest could see."""
    disks = (DeviceDisk("vda", "/a"), DeviceDisk("nvram", "/v", "raw"))
    line = command_line(
        attrs.evolve(WEB, machine="q35"), disks, accel="tcg", fds=(), pidfile="", incoming=False, firmware="/code"
    )
    assert "q35,pflash0=snaporch-firmware,pflash1=nvram-image" in line
    nodes = {node["node-name"]: node for node in map(json.loads, (word for word in line if word.startswith("{")))}
    assert (nodes["snaporch-firmware"]["read-only"], nodes["nvram-image"]["read-only"]) == (True, False)
    assert [word for word in line if word.startswith("virtio-blk")] == ["virtio-blk-pci,id=vda,drive=vda-image"]
