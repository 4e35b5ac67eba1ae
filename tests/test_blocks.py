"""Disks of a command line in all spellings, put on other images; what cannot be followed is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from snaporch.drivers.qemu.blocks import Blocks
from snaporch.drivers.qemu.options import parse
from snaporch.errors import Unsupported
from snaporch.model.rfc import DeviceDisk

OLD, NEW = DeviceDisk("vda", "/d/a.qcow2"), DeviceDisk("vda", "/new,1.qcow2")
RAW = DeviceDisk("vda", "/d/a.raw", "raw")


def words(*argv: str, old: DeviceDisk = OLD, disks: Sequence[DeviceDisk] = (NEW,)) -> list[str]:
    """Return a command line with its disk on another image."""
    blocks = Blocks(list(parse(("qemu", *argv))), "/d")
    blocks.put_on([old], disks)
    return [word for options in blocks.rewritten() for option in options for word in option.words()]


def blockdev(**options: object) -> str:
    return json.dumps({key.replace("_", "-"): value for key, value in options.items()})


FILE = {"driver": "file", "filename": "/d/a.qcow2"}
NEW_FILE = {"driver": "file", "filename": "/new,1.qcow2"}

JSON: dict[str, tuple[list[str], list[dict[str, object]]]] = {
    "nested": ([blockdev(driver="qcow2", node_name="n", file=FILE)], [{"node-name": "n", "driver": "qcow2"}]),
    "backing null": (
        [blockdev(node_name="n", driver="qcow2", file=FILE, backing=None)],
        [{"node-name": "n", "driver": "qcow2"}],
    ),
    "nested backing": (
        [blockdev(node_name="n", driver="qcow2", file=FILE, backing={"driver": "raw", "file": FILE})],
        [{"node-name": "n", "driver": "qcow2"}],
    ),
    "a chain of nodes": (
        [
            blockdev(driver="file", node_name="s2", filename="/d/base"),
            blockdev(driver="qcow2", node_name="f2", file="s2", read_only=True, backing=None),
            blockdev(driver="file", node_name="s1", filename="/d/a.qcow2"),
            blockdev(driver="qcow2", node_name="n", file="s1", backing="f2", read_only=False),
        ],
        [{"node-name": "n", "read-only": False, "driver": "qcow2"}],
    ),
    "options of qcow2": (
        [blockdev(driver="qcow2", node_name="n", file=FILE, l2_cache_size=1048576)],
        [{"driver": "qcow2", "node-name": "n", "l2-cache-size": 1048576}],
    ),
}


@pytest.mark.parametrize("style", JSON)
def test_blockdev_in_json(style: str) -> None:
    """The layer is on the new image and nothing says what backs it; what only the old one used is gone."""
    given, expected = JSON[style]
    found = words(*(word for text in given for word in ("-blockdev", text)), "-device", "virtio-blk-pci,drive=n")
    assert found[-2:] == ["-device", "virtio-blk-pci,drive=n"]
    made = [json.loads(text) for text in found[1:-2:2]]
    assert made == [options | {"file": NEW_FILE} for options in expected]


def test_options_of_the_file_are_kept() -> None:
    """Also where the layer becomes one of another format."""
    file = {"driver": "host_device", "filename": "/d/a.raw", "aio": "native", "cache": {"direct": True}}
    text = blockdev(driver="raw", node_name="n", discard="unmap", file=file)
    (_, made) = words("-blockdev", text, old=RAW)
    assert json.loads(made) == {
        "driver": "qcow2",
        "node-name": "n",
        "discard": "unmap",
        "file": {"driver": "file", "filename": "/new,1.qcow2", "aio": "native", "cache": {"direct": True}},
    }


def test_a_file_without_a_format_layer() -> None:
    """It gets one, and the node keeps its name."""
    (_, made) = words("-blockdev", "driver=file,node-name=n,filename=/d/a.raw,locking=off", old=RAW)
    assert made == "node-name=n,driver=qcow2,file.locking=off,file.driver=file,file.filename=/new,,1.qcow2"


def test_keys_stay_strings() -> None:
    """As JSON they would need types that nobody has named."""
    (_, made) = words(
        "-blockdev", "driver=qcow2,node-name=n,detect-zeroes=on,file.driver=file,file.filename=a.qcow2"
    )
    assert made == "driver=qcow2,node-name=n,detect-zeroes=on,file.driver=file,file.filename=/new,,1.qcow2"


@pytest.mark.parametrize("filter_", ["throttle", "copy-on-read"])
def test_below_a_filter(filter_: str) -> None:
    """The filter stays where it is, above the new image."""
    layer = {"driver": "qcow2", "node-name": "f", "file": FILE}
    text = blockdev(driver=filter_, node_name="n", throttle_group="g", file=layer)
    (_, made) = words("-blockdev", text)
    assert json.loads(made) == json.loads(text) | {"file": layer | {"file": NEW_FILE}}
    found = words("-blockdev", blockdev(**layer), "-blockdev", blockdev(driver=filter_, node_name="n", file="f"))
    assert json.loads(found[1])["file"] == NEW_FILE


DRIVES = {
    "if=virtio,file=a.qcow2": "if=virtio,file=/new,,1.qcow2,format=qcow2",
    "a.qcow2,if=virtio": "if=virtio,file=/new,,1.qcow2,format=qcow2",
    "driver=qcow2,file=/d/a.qcow2,if=none,id=x": "if=none,id=x,file=/new,,1.qcow2,format=qcow2",
    "file=file:/d/a.qcow2,cache=none": "cache=none,file=/new,,1.qcow2,format=qcow2",
    "driver=qcow2,file.driver=file,file.filename=/d/a.qcow2,file.aio=native": (
        "file.aio=native,file=/new,,1.qcow2,format=qcow2"
    ),
    'file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"/d/a.qcow2"}},if=virtio': (
        "if=virtio,file=/new,,1.qcow2,format=qcow2"
    ),
    "file=a.qcow2,backing.file.filename=/b,throttling.bps-total=1": (
        "throttling.bps-total=1,file=/new,,1.qcow2,format=qcow2"
    ),
}


@pytest.mark.parametrize("text", DRIVES)
def test_drive(text: str) -> None:
    assert words("-drive", text) == ["-drive", DRIVES[text]]


@pytest.mark.parametrize(
    ("option", "keys"),
    [
        (("-hdb", "a.qcow2"), "index=1,media=disk"),
        (("a.qcow2",), "index=0,media=disk"),
        (("-cdrom", "/d/a.qcow2"), "index=2,media=cdrom"),
        (("-fda", "/d/a.qcow2"), "if=floppy,index=0"),
        (("-pflash", "/d/a.qcow2"), "if=pflash"),
    ],
)
def test_short_forms(option: tuple[str, ...], keys: str) -> None:
    assert words(*option) == ["-drive", f"{keys},file=/new,,1.qcow2,format=qcow2"]
    again = [word for given in parse(("qemu", *option)) for word in given.words()]
    assert words(*option, disks=[OLD]) == again, "what need not be changed is not"


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (("-drive", "file=a.qcow2,snapshot=on"), "temporary"),
        (("-drive", "file=a.qcow2,copy-on-read=on"), "copied to its image"),
        (("-drive", "file=a.qcow2,encrypt.format=luks"), "encrypted"),
        (("-drive", "file=nbd:unix:/s,format=raw"), "its image is no file: nbd:unix:/s"),
        (("-drive", "file=a.qcow2,format=vmdk"), "vmdk"),
        (("-blockdev", blockdev(driver="raw", node_name="n", offset=1024, file=FILE)), "part of its file"),
        (("-blockdev", blockdev(driver="qcow2", node_name="n", data_file="d", file=FILE)), "another file"),
        (("-blockdev", blockdev(driver="vmdk", node_name="n", file=FILE)), "vmdk"),
        (("-blockdev", blockdev(driver="blkdebug", node_name="n", image=FILE)), "blkdebug"),
        (("-blockdev", blockdev(driver="qcow2", node_name="n", file="nowhere")), "a node that is not there"),
        (("-device", "virtio-blk-pci"), "is opened on /d/a.qcow2"),
    ],
)
def test_what_cannot_be_followed(option: tuple[str, str], problem: str) -> None:
    with pytest.raises(Unsupported, match=f"vda.*{problem}"):
        words(*option)


CD = DeviceDisk("sda", "/d/x.iso", "raw", readonly=True)


def test_media() -> None:
    """One that was taken out since is out; one that was put in since is in, where there is one empty drive."""
    drive = ("-drive", "if=none,id=cd,media=cdrom,file=/d/x.iso")
    assert words(*drive, old=CD, disks=[]) == ["-drive", "if=none,id=cd,media=cdrom"]
    assert words("-cdrom", "/d/x.iso", old=CD, disks=[]) == ["-drive", "index=2,media=cdrom"]
    empty = ("-drive", "if=none,id=cd,media=cdrom")
    assert words(*empty, old=CD, disks=[CD]) == ["-drive", f"{empty[1]},file=/d/x.iso,format=raw"]
    two = (*empty, "-drive", "if=none,id=other,media=cdrom")
    assert words(*two, old=CD, disks=[CD]) == list(two), "nobody knows in which"
    with pytest.raises(Unsupported, match="cannot be taken out"):
        words("-hda", "/d/x.iso", old=CD, disks=[])


def test_a_spare_node_is_left_alone() -> None:
    spare = ("-blockdev", blockdev(driver="file", node_name="spare", filename="/d/other"))
    assert words(*spare, "-drive", "file=a.qcow2")[:2] == list(spare)
