"""Domains as libxl's JSON has them."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from snaporch.drivers.xen.config import blocker, changed, disks_of, from_definition, interfaces
from snaporch.errors import InvalidInput, Unsupported
from snaporch.model.convert import load_definition
from snaporch.model.domain import DomainDefinition, XenKind, XenOptions
from snaporch.model.rfc import DeviceDisk

DISKS = (DeviceDisk("xvda", "/i/a.qcow2"), DeviceDisk("xvdb", "/i/b.raw", "raw", readonly=True))
WEB = DomainDefinition(
    "web", memory=2**28, vcpus=2, kernel="/k", initrd="/i", append="x", disks=DISKS, driver="xen"
)


def test_a_definition_becomes_a_pv_guest_with_qdisks() -> None:
    config = from_definition(WEB, DISKS)
    assert config["c_info"]["type"] == "pv"
    assert config["b_info"] | {"max_memkb": 0} == {
        "max_vcpus": 2,
        "avail_vcpus": [0, 1],
        "max_memkb": 0,
        "target_memkb": 2**18,
        "kernel": "/k",
        "ramdisk": "/i",
        "cmdline": "x",
        "type.pv": {},
    }
    assert [disk["backend"] for disk in config["disks"]] == ["qdisk", "qdisk"]
    assert disks_of(config) == DISKS
    assert not blocker(config)


def test_pvh_is_understood_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    path.write_text('name = "web"\ndriver = "xen"\nkernel = "vmlinuz"\n[xen]\nkind = "pvh"\n')
    definition = load_definition(path)
    assert definition.xen == XenOptions(XenKind.PVH)
    with pytest.raises(Unsupported, match="pvh guest"):
        from_definition(definition, ())


def test_another_kind_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    path.write_text('name = "web"\n[xen]\nkind = "hvm"\n')
    with pytest.raises(InvalidInput, match=r"hvm.*kind"):
        load_definition(path)


@pytest.mark.parametrize(
    "wrong", [{"extra_args": ("-x",)}, {"guest_agent": True}, {"serial": "/s"}, {"kernel": ""}]
)
def test_what_xen_has_not_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Unsupported, match=next(iter(wrong))):
        from_definition(attrs.evolve(WEB, **wrong), DISKS)  # type: ignore[arg-type]  # any field


def test_a_second_start_has_another_name_and_other_images() -> None:
    first = from_definition(WEB, DISKS) | {"nics": [{"mac": "00:16:3e:00:00:01", "ifname": "web0"}]}
    second = changed(first, name="web--b", uuid="u2", disks=[DeviceDisk("xvdb", "/o/b.qcow2")])
    assert second["c_info"] == first["c_info"] | {"name": "web--b", "uuid": "u2"}
    assert disks_of(second) == (DISKS[0], attrs.evolve(DISKS[1], path="/o/b.qcow2", format="qcow2"))
    assert second["nics"] == first["nics"]
    assert changed(first, name="x", uuid="u", disks=(), beside=True)["nics"] == [{"mac": "00:16:3e:00:00:01"}]
    assert interfaces(first) == {"0": "web0"}
    assert "nics" not in changed(first, name="x", uuid="u", disks=(), isolated=True)
    assert disks_of(first) == DISKS, "the first is as it was"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"c_info": {"type": "hvm"}}, "HVM"),
        ({"c_info": {}}, "HVM"),
        ({"disks": []}, "no disk"),
        ({"disks": [{"vdev": "xvda", "backend": "phy", "format": "raw"}]}, "xvda is served by phy"),
        ({"disks": [{"vdev": "xvda", "backend": "qdisk", "format": "vhd"}]}, "vhd"),
        ({"pcidevs": [{"dev": 1}]}, "pcidevs"),
    ],
)
def test_what_cannot_be_snapshotted_says_why(change: dict[str, object], word: str) -> None:
    assert word in blocker(from_definition(WEB, DISKS) | change)
