"""What the how-to guides tell a reader to type, typed in that order, with guests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import pytest

from snaporch.drivers.local.files import LocalStorage
from tests.cli.conftest import Program, until
from tests.test_guides import ROOT, tables, typed

pytestmark = pytest.mark.live

DEFINITION = """
name = "{name}"
memory = "64MiB"
accel = "tcg"
kernel = "{kernel}"
append = "dirty=5 ram=4"
serial = "{name}.log"
disks = [{{target = "vda", path = "{name}.qcow2"}}]
"""


@attrs.frozen
class Guide:
    """What there is before a reader begins with a guide, and what is done between its commands.

    Attributes:
        domains: that run.
        before: commands.
        between: commands, by that of the guide before which they come.
        refused: those of the guide that it shows with a refusal.
        instead: commands for those that the guest here does not understand: it has no power button.
        moves: from which command of the guide on another root is worked on.
    """

    domains: Sequence[str] = ("web",)
    before: Sequence[str] = ("create web before-upgrade --live",)
    between: Mapping[str, str] = attrs.field(factory=dict)
    instead: Mapping[str, str] = attrs.field(factory=dict)
    refused: str = ""
    moves: str = ""


GUIDES = {
    "archives": Guide(),
    "attach": Guide(
        ("another's",),
        (),
        between={"domain start web": "domain destroy web"},
        instead={"domain shutdown web": "domain destroy web"},
    ),
    "before-an-upgrade": Guide(before=()),
    "clones": Guide(("web1",), ("create web1 before-upgrade --live",)),
    "disk-full": Guide(
        before=("create web old --live", "create web new --live"), between={"domain resume web": "domain pause web"}
    ),
    "fuzzing": Guide(("target",), ()),
    "groups": Guide(
        ("web", "db"),
        (),
        between={"revert web before-upgrade": "create --group web,db --live before-upgrade"},
        refused="revert web before-upgrade",
    ),
    "monitoring": Guide(),
    "moving-a-root": Guide(before=("create web golden --live",), moves="import web.tar --same-identity"),
    "nightly": Guide(before=("create web golden --live",)),
    "power-cycle": Guide(before=("create web before-upgrade --live", "domain destroy web")),
    "reading-files": Guide(),
    "short-pauses": Guide(before=()),
    "tls-and-tokens": Guide(before=()),
}


def begin(program: Program, kernel: Path, name: str) -> None:
    """Define a domain, and start its guest, which counts; or have somebody else start one."""
    image, log = program.directory / f"{name}.qcow2", program.directory / f"{name}.log"
    subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    if name == "another's":
        words = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64", "-daemonize"]
        words += ["-kernel", str(kernel), "-append", "dirty=5 ram=4", "-serial", f"file:{log}"]
        words += ["-drive", f"file={image},if=virtio,format=qcow2"]
        subprocess.run([*words, "-qmp", f"unix:{program.directory}/web.qmp,server=on,wait=off"], check=True)
    else:
        (program.directory / f"{name}.toml").write_text(DEFINITION.format(name=name, kernel=kernel))
        program.look("domain", "define", str(program.directory / f"{name}.toml"))
        program.look("domain", "start", name)
    until(lambda: log.exists() and log.read_bytes().count(b"\n") > 2)


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[list[Program]]:
    """The program, on one root, and on another one; no guest is left."""
    made = [Program(tmp_path), Program(tmp_path / "there")]
    made[1].directory.mkdir()
    yield made
    for program in made:
        for domain in program.look("domain", "list") if (program.directory / "root").exists() else ():
            if domain["state"] != "inactive":
                program.look("domain", "destroy", domain["name"])


def typing(program: Program, words: Sequence[str]) -> tuple[int, str]:
    """Do what is typed; return the exit status and the errors. What a pipe would take is not looked at."""
    if words[-1] == "-":
        command = [sys.executable, "-m", "snaporch", "--root", str(program.directory / "root"), *words]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        ran = subprocess.run(command, cwd=ROOT, text=True, check=False, **pipes)  # type: ignore[call-overload]
        return ran.returncode, ran.stderr
    said = program.run(*words)
    return said.status, said.err or (said.out if said.status else "")


@pytest.mark.parametrize("page", GUIDES)
def test_guide(page: str, programs: list[Program], kernel: Path, tmp_path: Path) -> None:
    """Every command does what it should, and nothing is wrong in the end."""
    guide, place, program = GUIDES[page], ROOT / f"docs/how-to/{page}.md", programs[0]
    for name in guide.domains:
        begin(program, kernel, name)
    for number, text in enumerate(tables(place)):
        (tmp_path / ("service.toml" if number else f"{page}.toml")).write_text(text)
    for command in guide.before:
        program.look(*command.split())
    for words in typed(place):
        line = " ".join(words)
        if line == guide.moves:
            program = programs[1]
            (tmp_path / "web.tar").rename(program.directory / "web.tar")
        if line in guide.between:
            program.look(*guide.between[line].split())
        there = guide.instead[line].split() if line in guide.instead else words
        status, said = typing(program, [re.sub("^/(tmp|run)/", f"{tmp_path}/", word) for word in there])
        assert status == (2 if line == guide.refused else 0), (line, said)
    if guide.domains:
        assert typing(program, ["fsck", "--repair"]) == (0, "")
