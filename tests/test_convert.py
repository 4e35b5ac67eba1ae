"""Values to JSON and back, and domain definitions from TOML."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from snaporch import errors
from snaporch.drivers.base import Overlay
from snaporch.drivers.local.process import LocalProcess
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.errors import InvalidInput, SnaporchError
from snaporch.model.convert import converter, definition_from, dumps, load_definition, loads
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainRecord, Handle
from snaporch.model.rfc import CreateFlag, DeleteFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.model.units import parse_size


def test_the_flags_have_the_rfcs_numbers() -> None:
    """DISK_ONLY=1, LIVE=2; CHILDREN=1; RUNNING=1, PAUSED=2, FORCE=4; what is not the RFC's comes after these."""
    assert {flag.name: flag.value for flag in CreateFlag} == {"DISK_ONLY": 1, "LIVE": 2, "QUIESCE": 4}
    assert {flag.name: flag.value for flag in DeleteFlag} == {"CHILDREN": 1, "CHILDREN_ONLY": 2, "ALONE": 4}
    assert {flag.name: flag.value for flag in RevertFlag} == {
        "RUNNING": 1,
        "PAUSED": 2,
        "FORCE": 4,
        "ALONE": 8,
        "KEEP_CLOCK": 16,
        "LAZY": 32,
    }


def test_external_sn_is_none_exactly_when_internal() -> None:
    """As in the RFC."""
    assert DiskSnapshot(DeviceDisk("vda"), external=False).external_sn is None
    assert DiskSnapshot(DeviceDisk("vda")).external_sn is not None
    with pytest.raises(InvalidInput, match="external_sn"):
        DiskSnapshot(DeviceDisk("vda"), external=False, external_sn=DeviceDisk("vda"))


def test_a_snapshot_survives_json() -> None:
    """Nothing is lost on the way into the catalog and back."""
    snapshot = DomainSnapshot("s", "text", 1, memory_file="/m", disks=(DiskSnapshot(DeviceDisk("vda", "/a")),))
    assert loads(dumps(snapshot), DomainSnapshot) == snapshot


def test_a_definitions_paths_are_relative_to_its_file(tmp_path: Path) -> None:
    """And sizes may have units."""
    file = tmp_path / "web1.toml"
    file.write_text(
        'name = "web1"\nmemory = "1GiB"\nserial = "s.log"\n[[disks]]\ntarget = "vda"\npath = "a.qcow2"\n'
    )
    definition = load_definition(file)
    assert definition.memory == 2**30
    assert definition.disks == (DeviceDisk("vda", str(tmp_path / "a.qcow2")),)
    assert definition.serial == str(tmp_path / "s.log")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "web1"\nmemry = "1GiB"', "memry"),
        ('name = "web1"\nmemory = "1 sheep"', "not a size"),
        ('name = "../x"', "not a domain name"),
        ('name = "web1"\nvcpus = "many"', "vcpus"),
        ('name = "web1"\n[[disks]]\npath = "a"', "target"),
        ('name = "web1"\n[[disks]]\ntarget = "vda"\nformat = "vmdk"', "neither qcow2 nor raw"),
        ("name = ", "web1.toml"),
    ],
)
def test_a_bad_definition_says_where(tmp_path: Path, text: str, words: str) -> None:
    """Nothing is silently ignored."""
    file = tmp_path / "web1.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=words):
        load_definition(file)


# A key, a wrong value of it, and what is said of that; no value is turned into something that it is not.
WRONG: list[tuple[str, object, str]] = [
    ("name", 3, "3 is not a string @ d.name"),
    ("memory", 1.5, "1.5 is not a whole number @ d.memory"),
    ("vcpus", 2.9, "2.9 is not a whole number @ d.vcpus"),
    ("accel", "kwm", "accel 'kwm' is none of auto, kvm, tcg @ d.accel"),
    ("machine", ["q35"], "['q35'] is not a string @ d.machine"),
    ("kernel", 1, "1 is not a string @ d.kernel"),
    ("extra_args", "-foo", "'-foo' is not a list of strings @ d.extra_args"),
    ("guest_agent", "yes", "'yes' is not true or false @ d.guest_agent"),
    ("clock", "sett", "clock 'sett' is none of set, keep @ d.clock"),
    ("genid", "sometimes", "genid 'sometimes' is none of auto, none, or a UUID @ d.genid"),
    ("firmware", "efi", "firmware 'efi' is none of bios, uefi @ d.firmware"),
    ("machin", "q35", "unknown key 'machin'; did you mean 'machine'?"),
]
WRONG_OF_A_DISK: list[tuple[str, object, str]] = [
    ("path", 3, "3 is not a string @ d.disks[1].path"),
    ("readonly", "no", "'no' is not true or false @ d.disks[1].readonly"),
    ("readonly", 1, "1 is not true or false @ d.disks[1].readonly"),
    ("formt", "raw", "unknown key 'formt'; did you mean 'format'? @ d.disks[1]"),
]


@pytest.mark.parametrize(("key", "value", "words"), WRONG)
def test_values_are_strict(key: str, value: object, words: str) -> None:
    """A wrong value is named with its place, and nothing is made of it."""
    with pytest.raises(InvalidInput) as caught:
        definition_from({"name": "vm", key: value}, Path("/"), "d")
    assert words in str(caught.value)


@pytest.mark.parametrize(("key", "value", "words"), WRONG_OF_A_DISK)
def test_values_of_a_disk_are_strict(key: str, value: object, words: str) -> None:
    disks = [{"target": "vda", "path": "a"}, {"target": "vdb", "path": "b", key: value}]
    with pytest.raises(InvalidInput) as caught:
        definition_from({"name": "vm", "disks": disks}, Path("/"), "d")
    assert words in str(caught.value)


def test_all_that_is_wrong_is_named_at_once() -> None:
    """A file is not mended one error at a time."""
    data = {key: value for key, value, _ in WRONG}
    data["disks"] = [{"target": "vda", "path": "a"}, {"target": "vdb"} | {k: v for k, v, _ in WRONG_OF_A_DISK}]
    with pytest.raises(InvalidInput) as caught:
        definition_from(data, Path("/"), "d")
    said = [words for _, _, words in (*WRONG, *WRONG_OF_A_DISK) if "'no' is not" not in words]
    assert [words for words in said if str(caught.value).count(words) != 1] == []


@pytest.mark.parametrize(("text", "size"), [("1GiB", 2**30), ("512 MiB", 2**29), ("10k", 10240), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    """Units are binary."""
    assert parse_size(text) == size


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    """Names, exit codes and HTTP statuses."""
    rows = [line.replace("│", " ").split("─ ")[-1].split() for line in (errors.__doc__ or "").splitlines()]
    drawn = {row[0]: tuple(map(int, row[1:3])) for row in rows if len(row) >= 3 and row[1].isdecimal()}
    real = {
        name: (getattr(errors, name).exit_code, getattr(errors, name).http_status)
        for name in errors.__all__
        if getattr(errors, name) is not SnaporchError
    }
    assert drawn == real


def test_the_documented_definition(tmp_path: Path) -> None:
    """The example in the documentation is one, and its tables have every key."""
    page = (Path(__file__).parents[1] / "docs/reference/domains.md").read_text()
    (tmp_path / "web1.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    definition = load_definition(tmp_path / "web1.toml")
    assert [(disk.target, disk.readonly) for disk in definition.disks] == [("vda", False), ("vdb", True)]
    rows = {row.split("|")[1] for row in page.splitlines() if row.startswith("|")}
    documented = {word.strip(" `") for row in rows for word in row.split(",")}
    assert {field.name for class_ in (DomainDefinition, DeviceDisk) for field in attrs.fields(class_)} <= documented


def test_a_process_of_version_0_1_is_a_handle() -> None:
    """What the core read of a QEMU process its driver reads now; rows that were written before are understood."""
    process = {"pid": 7, "started": 70, "socket": "/s/qmp.sock", "attached": True, "argv": ["q"], "cwd": "/s"}
    process["boot"] = "b"
    old = {"definition": {"name": "web1"}, "process": process, "template": process}
    record = converter.structure(old, DomainRecord)
    assert record.handle == record.template == Handle("qemu", "7:70")
    assert record.handle is not None
    found = QemuProcess.of(record.handle)
    assert found == QemuProcess(LocalProcess(7, 70, "b"), "/s/qmp.sock", attached=True, argv=("q",), cwd="/s")
    assert QemuProcess.of(found.handle("qemu")) == found
    again = loads(dumps(record), DomainRecord)
    assert again.handle is not None
    assert again.handle.data == record.handle.data
    base = DiskStatus("vda", "/a", "raw", readonly=False, virtual_size=1, chain=("/a",))
    planned = Overlay(base, "/b")
    assert (
        converter.structure(converter.unstructure(planned) | {"node": "sp-1-vda", "format": 1}, Overlay) == planned
    )
