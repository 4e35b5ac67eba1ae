"""A revert, and a create that takes long, ask whoever sits at a terminal, and nobody else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snaporch.drivers.local.files import LocalStorage
from tests.cli.conftest import Program, _environment

BIG = """
name = "big"
memory = "2GiB"
accel = "tcg"
kernel = "{kernel}"
append = "dirty=0 ram=1"
disks = [{{target = "vda", path = "vda.qcow2"}}]
"""


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A program on a root with an inactive domain that is past its first snapshot."""
    image = tmp_path / "vda.qcow2"
    subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    (tmp_path / "web.toml").write_text(f'name = "web"\ndisks = [{{target = "vda", path = "{image}"}}]\n')
    program = Program(tmp_path)
    program.look("domain", "define", str(tmp_path / "web.toml"))
    for name in ("one", "two"):
        program.look("create", "web", name, "--disk-only")
    return program


def at_a_terminal(program: Program, answer: str, *words: str) -> tuple[int, str]:
    """Return the exit status and what the terminal shows, where `answer` is typed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "snaporch", "--root", str(program.directory / "root"), *words]
    os.write(ours, answer.encode())
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=_environment())
    os.close(theirs)
    out, _ = process.communicate(timeout=30)
    shown = b""
    try:
        while more := os.read(ours, 4096):
            shown += more
    except OSError:  # nobody has the other end any more
        pass
    finally:
        os.close(ours)
    return process.returncode, (shown + out).decode()


def test_no(program: Program) -> None:
    """Then nothing is touched, and what keeps the present state is named."""
    status, said = at_a_terminal(program, "n\n", "revert", "web", "one")
    assert status == 2
    assert "web is inactive, and what it has become since two is in no snapshot" in said
    assert "nothing was touched; --save-current NAME keeps" in said
    assert program.look("domain", "show", "web")["current"] == "two"


@pytest.mark.parametrize(
    ("answer", "words"), [("y\n", ()), ("", ("--yes",)), ("", ("--save-current", "kept")), ("", ("--json",))]
)
def test_yes(answer: str, words: tuple[str, ...], program: Program) -> None:
    """Said, or by an option that leaves nothing to ask; and what is not there is no question."""
    status, said = at_a_terminal(program, answer, "revert", "web", "one", *words)
    assert status == 0, said
    assert ("Lose it" in said) == bool(answer)
    assert program.look("domain", "show", "web")["current"] == "one"


def test_what_is_not_there_is_no_question(program: Program) -> None:
    status, said = at_a_terminal(program, "", "revert", "web", "three")
    assert status == 3
    assert "Lose it" not in said


@pytest.fixture
def big(tmp_path: Path, kernel: Path) -> Iterator[Program]:
    """A program on a root with a guest that has much memory, and uses little of it."""
    program = Program(tmp_path)
    subprocess.run(
        [LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", tmp_path / "vda.qcow2", "8M"], check=True
    )
    (tmp_path / "big.toml").write_text(BIG.format(kernel=kernel))
    program.look("domain", "define", str(tmp_path / "big.toml"))
    program.look("domain", "start", "big")
    try:
        yield program
    finally:
        program.run("domain", "destroy", "big")


@pytest.mark.live
def test_a_long_pause(big: Program) -> None:
    """It is asked about, by what is expected; what is answered counts, and so does an option that asks nothing."""
    status, said = at_a_terminal(big, "n\n", "create", "big", "one")
    assert status == 2
    assert "big would be paused for about 11 s, until its memory (2.0 GiB) is saved; with --live" in said
    assert "nothing was touched; with --live" in said
    assert big.look("list", "big") == []
    for answer, words in (("y\n", ("two",)), ("", ("three", "--live")), ("", ("four", "--yes"))):
        status, said = at_a_terminal(big, answer, "create", "big", *words)
        assert status == 0, said
        assert ("Pause it?" in said) == bool(answer)
    at_a_terminal(big, "", "create", "big", "five")  # by what those before took: no time to speak of
    assert [each["name"] for each in big.look("list", "big")] == ["two", "three", "four", "five"]
