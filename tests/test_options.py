"""QEMU's options: the table is that of the QEMUs here, and values are read as QEMU reads them."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from snaporch.drivers.qemu.options import FLAGS, VALUED, Keys, Option, Tree, expand, parse
from snaporch.errors import Unsupported
from tests.live.world import Qemu


def says(qemu: Qemu, *words: str) -> str:
    done = subprocess.run([qemu.emulator, "-version", *words], capture_output=True, text=True, check=False)
    return done.stderr


@pytest.mark.live
def test_the_table_is_that_of_this_qemu(qemu: Qemu) -> None:
    """All options that QEMU tells of are in it, and each either needs a value there or does not."""
    told = subprocess.run([qemu.emulator, "-help"], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r"^--?([A-Za-z][\w-]*)", told, re.MULTILINE)) | {"fdb", "hdb", "hdd"}
    assert names <= FLAGS | VALUED
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(names, pool.map(lambda name: says(qemu, f"-{name}"), names), strict=True))
    assert {name for name, words in answers.items() if "requires an argument" in words} == names & VALUED
    assert "invalid option" in says(qemu, "-no-such-option"), "or this test could not fail"


def test_words() -> None:
    argv = ("qemu", "-S", "--m", "1G", "-drive", "file=a,,b,if=virtio", "disk.qcow2")
    assert list(parse(argv)) == [
        Option("S"),
        Option("m", "1G"),
        Option("drive", "file=a,,b,if=virtio"),
        Option("hda", "disk.qcow2"),
    ]


@pytest.mark.parametrize("argv", [("qemu", "-from-the-future", "x"), ("qemu", "-drive")])
def test_what_is_not_known_is_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(Unsupported, match=argv[1]):
        list(parse(argv))


@pytest.mark.parametrize(
    ("text", "implied", "pairs"),
    [
        ("unix:/s,server,nowait", "path", [("path", "unix:/s"), ("server", "on"), ("wait", "off")]),
        ("file=a,,b=c,if=none", "", [("file", "a,b=c"), ("if", "none")]),
        ("user,hostfwd=1,hostfwd=2", "type", [("type", "user"), ("hostfwd", "1"), ("hostfwd", "2")]),
        ("a=,,,b=1", "", [("a", ","), ("b", "1")]),
    ],
)
def test_keys(text: str, implied: str, pairs: list[tuple[str, str]]) -> None:
    assert list(Keys.parse(text, implied).pairs) == pairs
    again = Keys.parse(Keys.parse(text, implied).text())
    assert list(again.pairs) == pairs, "it is written as it is read"


def test_keys_that_are_changed() -> None:
    keys = Keys.parse("socket,path=/s,server=yes", "backend")
    assert keys.is_on("server")
    assert not keys.is_on("wait")
    assert keys.having(path="/t,u").text() == "backend=socket,server=yes,path=/t,,u"


def test_trees() -> None:
    """Both forms; the second keeps its strings, which QEMU takes for numbers and truths by itself."""
    text = "qcow2,file.driver=file,file.filename=/a,,b,detect-zeroes=on,l2-cache-size=1048576"
    tree = Tree.parse(text, "driver")
    assert tree.options["file"] == {"driver": "file", "filename": "/a,b"}
    assert tree.text() == text.replace("qcow2,", "driver=qcow2,", 1)
    assert Tree.parse('{"driver": "raw", "size": 5}', "driver").text() == '{"driver": "raw", "size": 5}'
    for wrong in ("{", "a=1,a.b=2"):
        with pytest.raises(Unsupported):
            Tree.parse(wrong, "driver")


CONFIG = """
# a comment
[drive "d0"]
  if = "none"
  file = "/a,b.qcow2"
[device "vda"]
  bus = "b"
  driver = "virtio-blk-pci"
[memory]
  size = "1024"
[mon]
  chardev = "m"
"""


def test_a_configuration_file() -> None:
    """Its sections are options; one that is not understood is refused."""
    found = list(expand([Option("S"), Option("readconfig", "x.cfg")], {"x.cfg": CONFIG}.__getitem__))
    assert found == [
        Option("S"),
        Option("drive", "id=d0,if=none,file=/a,,b.qcow2"),
        Option("device", "driver=virtio-blk-pci,id=vda,bus=b"),
        Option("m", "size=1024"),
        Option("mon", "chardev=m"),
    ]
    for text in ('[no-such "x"]\n a = "b"', "[drive]\n nonsense"):
        with pytest.raises(Unsupported, match=r"x\.cfg"):
            list(expand([Option("readconfig", "x.cfg")], {"x.cfg": text}.__getitem__))
