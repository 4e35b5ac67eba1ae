"""The started machine is compared with the one asked for: each difference is found, and names both sides."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from snaporch.errors import OtherMachine
from snaporch.model.domain import DiskStatus, MachineShape
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.shape import WantedDisk, check_shape, differences, wanted_disks

MIB = 2**20
FOUND = DiskStatus(
    "vda", "/new.qcow2", "qcow2", readonly=False, virtual_size=64 * MIB, chain=("/new.qcow2", "/base")
)
WANTED = WantedDisk(DeviceDisk("vda", "/new.qcow2"), ("/new.qcow2", "/base"), 64 * MIB)
SHAPE = MachineShape(512 * MIB, 2, (FOUND,), ("nic: e1000", "vda: virtio-blk-pci"))


def test_the_same_is_the_same() -> None:
    assert not differences([WANTED], SHAPE, SHAPE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"chain": ("/new.qcow2",)}, "vda is to be on /new.qcow2 over /base, and is on /new.qcow2"),
        ({"chain": ("/new.qcow2", "/middle", "/base")}, "is on /new.qcow2 over /middle over /base"),
        ({"chain": (), "active": "/other"}, "vda is to be on /new.qcow2 over /base, and is on "),
        ({"format": "raw"}, "vda is to be read as qcow2, and is read as raw"),
        ({"readonly": True}, "vda is to be writable, and is read-only"),
        ({"virtual_size": 1}, "vda is to have 67108864 bytes, and has 1"),
        (
            {"target": "sda"},
            "vda is to be on /new.qcow2, and is not there; sda was not there, and is on /new.qcow2",
        ),
    ],
)
def test_a_disk_that_is_different(fields: dict[str, Any], words: str) -> None:
    found = attrs.evolve(SHAPE, disks=(attrs.evolve(FOUND, **fields),))
    assert words in "; ".join(differences([WANTED], SHAPE, found))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"memory": 256 * MIB}, "it is to have 536870912 bytes of memory, and has 268435456"),
        ({"vcpus": 1}, "it is to have 2 CPUs, and has 1"),
        ({"devices": ("nic: e1000",)}, "device vda: virtio-blk-pci is missing"),
        ({"devices": (*SHAPE.devices, "dimm: pc-dimm")}, "device dimm: pc-dimm was not there"),
    ],
)
def test_a_machine_that_is_different(fields: dict[str, Any], words: str) -> None:
    assert differences([WANTED], SHAPE, attrs.evolve(SHAPE, **fields)) == (words,)
    with pytest.raises(OtherMachine, match=f"web1: the new machine differs from the domain's: {words}"):
        check_shape("web1", [WANTED], SHAPE, attrs.evolve(SHAPE, **fields))


def test_what_is_not_known_is_not_compared() -> None:
    """Of a snapshot without a shape only the disks that it names are known."""
    bare = WantedDisk(DeviceDisk("vda", "/new.qcow2"))
    assert not differences([bare], None, attrs.evolve(SHAPE, memory=1, vcpus=7, devices=()))


def test_a_disk_that_stays_on_its_image_keeps_its_chain() -> None:
    """So does one that the snapshot does not hold; one that has moved on since has a chain that nobody noted."""
    cdrom = DiskStatus("sda", "/x.iso", "raw", readonly=True, virtual_size=MIB, chain=("/x.iso", "/y"))
    shape = attrs.evolve(SHAPE, disks=(FOUND, cdrom))
    disks = (DeviceDisk("vda", "/fresh"), DeviceDisk("sda", "/x.iso", "raw", readonly=True))
    found = wanted_disks(disks, {"vda": ("/base",)}, shape)
    assert [disk.chain for disk in found] == [("/fresh", "/base"), ("/x.iso", "/y")]
    moved = wanted_disks([DeviceDisk("sda", "/z.iso", "raw")], {}, shape)
    assert moved[0].chain == ()
