"""Output that cannot be written, or cannot show what is to be said: what was done is done."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from snaporch.drivers.local.files import LocalStorage

PROGRAM = f"{shlex.quote(sys.executable)} -m snaporch"
ESCAPES = "\x1b[2J\u202e größer"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one inactive domain."""
    subprocess.run(
        [LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", str(tmp_path / "a.qcow2"), "16M"], check=True
    )
    (tmp_path / "vm.toml").write_text('name = "vm"\n[[disks]]\ntarget = "vda"\npath = "a.qcow2"\n')
    assert shell(tmp_path, "domain define vm.toml")[0] == 0
    return tmp_path


def shell(directory: Path, words: str, **environment: str) -> tuple[int, str, str]:
    """Run a verb, with the shell's redirections; return its status, output and errors."""
    done = subprocess.run(
        ["bash", "-c", f"{PROGRAM} --root root {words}"],
        cwd=directory,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd()), "SNAPORCH_QEMU": "", **environment},
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def test_output_that_cannot_be_written(root: Path) -> None:
    """What changes something has done so, says it on standard error and exits 0; what only reads exits 1."""
    for number, where in enumerate(("> /dev/full", ">&-")):
        for json in ("", "--json "):
            status, _, errors = shell(root, f"{json}create vm s{number}{len(json)} --disk-only {where}")
            assert (status, errors.count("\n")) == (0, 1), errors
            assert "standard output cannot be written to" in errors
            assert "rolled back" not in errors
            status, _, errors = shell(root, f"{json}list vm {where}")
            assert (status, errors.count("\n")) == (1, 1), errors
    assert shell(root, "create vm noerr --disk-only 2>&-")[0] == 0
    assert shell(root, "create vm nothing --disk-only <&- >&- 2>&-")[0] == 0
    assert shell(root, "nonsense > /dev/full 2> /dev/full")[0] == 2
    status, said, _ = shell(root, "--json list vm")
    assert status == 0
    assert said.count('"created"') or said.count('"name"') >= 6
    assert shell(root, "list vm | true")[2] == ""


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}]
)
def test_what_a_terminal_cannot_show(root: Path, environment: dict[str, str]) -> None:
    """It is escaped: no character is an error, and none of somebody else's moves the cursor."""
    words = f"create vm odd --disk-only --description {shlex.quote(ESCAPES)}"
    assert shell(root, words)[0] == 0
    for verb in ("list vm", "tree vm", "show vm odd"):
        status, said, errors = shell(root, verb, **environment)
        assert (status, errors) == (0, "")
        assert "\x1b" not in said
        assert "\u202e" not in said


def test_no_root_is_made_by_a_look(tmp_path: Path) -> None:
    """A typing error in the root makes no directory, and neither does a domain that is not there."""
    for verb, status in (("domain list", 0), ("list vm", 3), ("operations", 0), ("create vm", 3), ("fsck", 0)):
        found, _, errors = shell(tmp_path, verb)
        assert found == status, errors
        assert re.search("no root .*`import`", errors)
    assert not list(tmp_path.iterdir())
    (tmp_path / "vm.toml").write_text('name = "vm"\n')
    assert shell(tmp_path, "domain define vm.toml", SNAPORCH_ROOT="nowhere/deep")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "vm.toml"]
    assert shell(tmp_path, "list nosuch")[0] == 3
    assert shell(tmp_path, "create nosuch x")[0] == 3
    assert [path.name for path in (tmp_path / "root/locks").iterdir()] == ["vm.lock"]
    assert shell(tmp_path, "domain undefine vm")[0] == 0
    assert not list((tmp_path / "root/locks").iterdir())


def test_a_file_goes_into_no_directory_that_is_made_up(root: Path) -> None:
    """A path with a typing error in it is refused before anything is touched."""
    status, _, errors = shell(root, "create vm x --disk-only --disk vda=/no/such/place/x.qcow2")
    assert status == 2
    assert "no directory /no/such/place" in errors
    assert not Path("/no").exists()
