"""What is answered to a word that is not known, and what lists look like where there is little room."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from rich.console import Console

from snaporch.cli import execute, human
from snaporch.cli.asked import columns, in_sequence
from snaporch.cli.inspect import SHOWN
from snaporch.errors import InvalidInput
from snaporch.model.record import OperationKind, OperationRecord
from tests.cli.test_verbs import RECORDS, info, record

MEANT = {
    "crate web": "create",
    "start web": "domain start",
    "stop web": "domain shutdown",
    "kill web": "domain destroy",
    "rollback web one": "revert",
    "restore web one": "revert",
    "rm web one": "delete",
    "delsnapshot web one": "delete",
    "snapshot web": "create",
    "snapshot restore web one": "revert",
    "snapshot list web": "list",
    "snapshot-create-as web one": "create",
    "listsnapshot web": "list",
    "rename web one two": "edit",
    "domain strat web": "domain start",
    "domain rm web": "domain undefine",
    "domain rollback web": "revert",
    "operation": "operations",
    "help": "--help",
    "version": "--version",
}


@pytest.mark.parametrize("said", MEANT)
def test_verbs(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says which verb there is for that."""
    assert execute(said.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert f"did you mean `snaporch {MEANT[said]}`? `snaporch --help` lists all" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("create web --liv", "Did you mean --live?"),
        ("--jsn list web", "there is no option --jsn; did you mean `--json`?"),
        ("xyzzy", "there is no verb 'xyzzy'; see `snaporch --help`"),
        ("domain xyzzy", "there is no verb 'domain xyzzy'; see `snaporch --help`"),
    ],
)
def test_options_and_nonsense(said: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option is known by its spelling; nothing is guessed of what is like nothing."""
    assert execute(said.split()) == 2
    assert words in capsys.readouterr().err


def test_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A domain that is not there, and one that is called nearly so."""
    (tmp_path / "web.toml").write_text('name = "webserver"\nmemory = "1GiB"\n')
    root = ["--root", str(tmp_path / "root")]
    assert execute([*root, "domain", "define", str(tmp_path / "web.toml")]) == 0
    capsys.readouterr()
    for said, words in (
        ("webserve", "no domain 'webserve'; did you mean 'webserver'? `snaporch domain list` lists"),
        ("mail", "no domain 'mail'; `snaporch domain list` lists"),
    ):
        assert execute([*root, "list", said]) == 3
        assert words in capsys.readouterr().err


def test_the_bare_program(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints its help; its version is a word of its own."""
    assert execute([]) == 0
    out, err = capsys.readouterr()
    assert "revert" in out
    assert not err
    assert execute(["--version"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_name_is_folded_or_cut(width: int) -> None:
    """Each row is one line, with the whole name at any width; what does not fit is left out as a column."""
    name = "a-name-of-thirty-nine-characters-1234567"
    records = [attrs.evolve(record(name, "one"), pinned=True), *RECORDS]
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(human.snapshots("web", records, "two"), crop=False)
        console.print(human.domains([attrs.evolve(info("vda", "vdb"), name=name)]), crop=False)
    lines = captured.get().splitlines()
    assert len(lines) == 1 + len(records) + 2
    assert sum(name in line for line in lines) == 2
    assert all(len(line) <= max(width, len(name) + 12) for line in lines)
    assert ("parent" in lines[0], "description" in lines[0]) == (width >= 80, width == 200)


def test_the_columns_that_were_asked_for() -> None:
    """These, in their order, whole at any width; and in the sequence that was asked for."""
    records = in_sequence([record("b", None), record("a", "b")], "name")
    console = Console(width=20, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(human.snapshots("web", records, "a", only=("parent", "name")), crop=False)
    assert [line.split() for line in captured.get().splitlines()] == [["parent", "name"], ["b", "a"], ["-", "b"]]
    assert columns("name,size") == ("name", "size")
    with pytest.raises(InvalidInput, match="no column 'bytes'; there are name,parent"):
        columns("name,bytes")


def test_the_last_operations() -> None:
    """It is said that there are more."""
    records = [
        OperationRecord(f"{number:032}", OperationKind.DELETE, ("web",), "one", "complete", 1000.0, 1001.0)
        for number in range(SHOWN)
    ]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(human.operations(records, more=True))
        console.print(human.operations(records))
    said = captured.get()
    assert said.startswith(f"the last {SHOWN}; --last N shows more")
    assert said.count("the last") == 1
