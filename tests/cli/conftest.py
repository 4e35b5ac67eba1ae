"""The program as a process of its own, and one guest for all the tests that need a real QEMU."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import jsonschema
import pytest

from snaporch.cli import answers, execute
from snaporch.drivers.local.files import LocalStorage
from snaporch.guest.report import Report, parse

NAME = "guest"
SECONDS = 60.0  # for anything that is to happen; far more than it ever needs
DEFINITION = """
name = "{name}"
memory = "64MiB"
accel = "tcg"
kernel = "{kernel}"
append = "dirty=5 ram=16"
serial = "serial.log"
disks = [{{target = "vda", path = "vda.qcow2"}}, {{target = "vdb", path = "vdb.qcow2"}}]
"""


def _closed(schema: Any) -> Any:
    """Return a schema in which no table has keys that it does not name."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return closed | {"additionalProperties": False} if named else closed


@cache
def _validator(verb: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_closed(answers.document()) | {"$ref": f"#/$defs/{quote(verb)}"})


def check_answer(words: Sequence[str], document: Any) -> None:
    """See that an answer is as its verb's schema says, and has no key that the schema does not name."""
    two = " ".join(words[:2])
    _validator(two if two in answers.ANSWERS else words[0]).validate(document)


@attrs.frozen
class Ran:
    """What a run of the program left."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.out)


@attrs.frozen
class Program:
    """``snaporch`` on a root of its own, with `directory` as the working directory."""

    directory: Path

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a run."""
        command = [sys.executable, "-m", "snaporch", "--root", str(self.directory / "root"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.directory, env=_environment(), stdout=pipe, stderr=pipe, text=True
        )

    def end(self, process: subprocess.Popen[str]) -> Ran:
        """Wait for a run; whatever it was, there is no traceback."""
        out, err = process.communicate(timeout=SECONDS)
        assert "Traceback" not in out + err, err
        return Ran(process.returncode, out, err)

    def run(self, *arguments: str) -> Ran:
        """Run it to its end."""
        return self.end(self.begin(*arguments))

    def answer(self, *arguments: str) -> Any:
        """Run it with --json, and return its answer; it must succeed, and say nothing else."""
        ran = self.run("--json", *arguments)
        assert (ran.status, ran.err) == (0, "")
        check_answer(arguments, ran.document)
        return ran.document

    def look(self, *arguments: str) -> Any:
        """As `answer`, but in this process, which is quicker: for what is not itself the test."""
        with redirect_stdout(io.StringIO()) as out:
            assert execute(["--root", str(self.directory / "root"), "--json", *arguments]) == 0
        document = json.loads(out.getvalue())
        check_answer(arguments, document)
        return document

    def reports(self, start: int = 0) -> list[Report]:
        """Return what the guest has reported since its log had `start` bytes."""
        log = self.directory / "serial.log"
        return parse(log.read_bytes()[start:].decode(errors="replace")) if log.exists() else []

    def said(self) -> int:
        """Return the size of the guest's log."""
        return (self.directory / "serial.log").stat().st_size


def until(holds: Callable[[], bool]) -> None:
    """Wait for something in another process, which has no way to tell us."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _environment() -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SNAPORCH_")}
    return ours | {"PYTHONPATH": package}


@contextmanager
def running_guest(directory: Path, kernel: Path) -> Iterator[Program]:
    """Give a program whose root has a domain with a running guest that counts."""
    program = Program(directory)
    for target in ("vda", "vdb"):
        image = str(program.directory / f"{target}.qcow2")
        subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    definition = DEFINITION.format(name=NAME, kernel=kernel)
    file = program.directory / "guest.toml"
    file.write_text(definition)
    program.look("domain", "define", str(file))
    try:
        program.answer("domain", "start", NAME)
        until(lambda: len(program.reports()) > 1)
        yield program
    finally:
        program.look("domain", "destroy", NAME)


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory, kernel: Path) -> Iterator[Program]:
    """A program and a guest for all tests of the command line."""
    with running_guest(tmp_path_factory.mktemp("cli"), kernel) as program:
        yield program


@pytest.fixture(autouse=True)
def _as_in_a_shell() -> Iterator[None]:
    """Let Ctrl-C reach it, also where pytest is in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
