"""What the guides tell a reader to type: every line is a command line, and the tutorial is what happens."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from inspect import iscoroutinefunction
from itertools import pairwise
from pathlib import Path

import pytest

from snaporch.batch.plan import plan_from
from snaporch.cli import application
from snaporch.drivers.local.files import LocalStorage
from snaporch.model.convert import load_definition
from snaporch.service.server import Settings
from tests.cli.conftest import Program, until

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial/first-checkpoint.md"
OF_ALL = {"--json", "--root", "-v"}  # options that may be anywhere
DEFINITION = """
name = "web"
memory = "64MiB"
accel = "tcg"
kernel = "{kernel}"
append = "dirty=5 ram=16"
serial = "serial.log"
disks = [{{target = "vda", path = "web.qcow2"}}]
"""


def typed(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of snaporch in the blocks of a page, without what a shell does with them."""
    block = None
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            block = line[3:] if block is None else None
        elif block in {"", "console"}:
            found = re.match(r"(?:[$#] )?snaporch ((?:[^|>#&…]|\S[#>])+)", line)
            if found:
                yield shlex.split(found[1].replace("[", "").replace("]", ""))


def tables(page: Path) -> list[str]:
    """Return the blocks of TOML of a page."""
    return re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


COMMANDS = [(page, words) for page in GUIDES for words in typed(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page.relative_to(ROOT)}: {' '.join(words)}" for page, words in COMMANDS]
)
def test_every_command_is_one(page: Path, words: list[str]) -> None:
    """Its verb, options and arguments are there."""
    del page
    words = [word for before, word in pairwise(["", *words]) if before != "--root" and word not in OF_ALL]
    command, _, _ = application().parse_args(words, exit_on_error=False, print_error=False)
    assert iscoroutinefunction(command)


@pytest.mark.parametrize("page", ["tutorial/first-checkpoint.md", "how-to/uefi.md"])
def test_definitions(page: str, tmp_path: Path) -> None:
    """Each is one."""
    for text in tables(ROOT / "docs" / page):
        (tmp_path / "web.toml").write_text(text)
        assert load_definition(tmp_path / "web.toml").name == "web"


def test_plans_and_settings(tmp_path: Path) -> None:
    """The plan is one, and the service's settings are some."""
    (plan,) = tables(ROOT / "docs/how-to/nightly.md")
    assert plan_from(tomllib.loads(plan)).name == "nightly"
    (settings,) = tables(ROOT / "docs/how-to/tls-and-tokens.md")
    (tmp_path / "service.toml").write_text(settings)
    assert Settings(tmp_path / "service.toml", must_exist=True, overrides={}).load().address == ("0.0.0.0", 8443)  # noqa: S104


@pytest.mark.live
def test_the_tutorial(tmp_path: Path, kernel: Path) -> None:
    """Every command of it, in its order, with a guest that is up at once in place of the reader's."""
    program = Program(tmp_path)
    image = [LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", str(tmp_path / "web.qcow2"), "8M"]
    subprocess.run(image, check=True)
    (tmp_path / "web.toml").write_text(DEFINITION.format(kernel=kernel))
    commands = list(typed(TUTORIAL))
    assert [words[:2] for words in commands[:2]] == [["domain", "define"], ["domain", "start"]]
    try:
        for words in commands:
            ran = program.run(*words)
            assert (ran.status, ran.err) == (0, ""), words
            if words[:2] == ["domain", "start"] or words[0] == "revert":
                reports = len(program.reports())
                until(lambda reports=reports: len(program.reports()) > reports + 1)  # type: ignore[misc]
            if words[0] == "tree":
                assert "good" in ran.out
                assert "broken" in ran.out
    finally:
        program.run("domain", "destroy", "web")
    assert program.look("domain", "list") == []
    info = subprocess.run(
        [LocalStorage().qemu_img, "info", str(tmp_path / "web.qcow2")], capture_output=True, check=True
    )
    assert b"backing file" not in info.stdout


def test_a_root_that_moves_to_another_disk(tmp_path: Path) -> None:
    """As the guide says: copied, and put back at its path, with other inodes."""
    program = Program(tmp_path)
    place = tmp_path / "root"
    image = tmp_path / "root.vda.qcow2"
    subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    (tmp_path / "web.toml").write_text(f'name = "web"\ndisks = [{{target = "vda", path = "{image}"}}]\n')
    program.look("domain", "define", str(tmp_path / "web.toml"))
    for name in ("one", "two"):
        program.look("create", "web", name, "--disk-only")
    shutil.copytree(place, tmp_path / "copy", copy_function=shutil.copy2)
    shutil.rmtree(place)
    (tmp_path / "copy").rename(place)
    assert program.look("fsck") == []
    assert all(report["ok"] for report in program.look("verify", "web", "--all"))
    program.look("revert", "web", "one")
    program.look("create", "web", "three", "--disk-only")
    program.look("delete", "web", "one")
    assert program.look("fsck") == []
