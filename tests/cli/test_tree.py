"""The tree: a flat list for scripts, a graph of lines for people, however many snapshots and however deep."""

from __future__ import annotations

import io
import json

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from snaporch.cli import human
from snaporch.cli.tree import rows
from snaporch.model import documents
from snaporch.model.convert import converter
from snaporch.model.record import SnapshotRecord
from tests.cli.test_verbs import RECORDS

MANY = 10_000


def records(parents: dict[str, str | None]) -> list[SnapshotRecord]:
    """Return snapshots of these names, oldest first, each with its parent."""
    first = RECORDS[0]
    return [
        attrs.evolve(first, snapshot=attrs.evolve(first.snapshot, name=name), parent=parent, id=f"id-{name}")
        for name, parent in parents.items()
    ]


def printed(found: list[SnapshotRecord], *, width: int = 80, encoding: str = "utf-8") -> list[str]:
    """Return the lines that people see."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, legacy_windows=False).print(human.tree("web", found, None))
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


LINE = {f"s{number}": f"s{number - 1}" if number else None for number in range(MANY)}
COMB = {name: (None if not n else f"s{n - 2 + n % 2}") for n, name in enumerate(LINE)}


@pytest.mark.parametrize("parents", [LINE, COMB], ids=["line", "comb"])
def test_ten_thousand_snapshots(parents: dict[str, str | None]) -> None:
    """In one line, or each with a branch: documents and text have them all."""
    found = records(parents)
    document = json.loads(json.dumps(converter.unstructure(documents.tree(found, "s7"))))
    assert [(each["name"], each["parent"]) for each in document] == list(parents.items())
    assert document[9]["parent_id"] == f"id-{parents['s9']}"
    assert [each["name"] for each in document if each["current"]] == ["s7"]
    lines = printed(found)
    assert sorted(line.partition("● ")[2].split()[0] for line in lines[1:]) == sorted(parents)
    assert len(lines) == MANY + 1


def test_how_it_looks() -> None:
    """The longest branch goes on in its column, the others bend out of it."""
    found = records({"a": None, "b": "a", "c": "a", "d": "b", "e": "b", "f": "e", "x": None})
    assert [line.split("  ")[0].rstrip() for line in printed(found)] == [
        "web",
        "├─● x",
        "● a",
        "├─● c",
        "● b",
        "├─● d",
        "● e",
        "● f",
    ]
    assert printed(found, encoding="ascii")[1].startswith("|-* x")


@pytest.mark.parametrize("width", [1, 10, 24, 80])
def test_every_snapshot_is_named_at_any_width(width: int) -> None:
    """Where a name is wider than the screen it goes on in the next line."""
    found = records({"before-the-upgrade": None, "after": "before-the-upgrade", "other": "before-the-upgrade"})
    text = "".join("".join(printed(found, width=width)).split())
    assert all(record.name in text for record in found)


@given(st.lists(st.integers(min_value=-1), max_size=40))
def test_each_is_there_once_below_its_parent(numbers: list[int]) -> None:
    """Whatever the tree is like: and no further to the right than its logarithm."""
    parents = {f"s{i}": None if not i or n < 0 else f"s{n % i}" for i, n in enumerate(numbers)}
    found = list(rows(records(parents)))
    place = {row.record.name: index for index, row in enumerate(found)}
    assert sorted(place) == sorted(parents)
    assert all(parent is None or place[parent] < place[name] for name, parent in parents.items())
    assert all(2 ** len(row.columns) <= len(parents) + 1 for row in found)


def test_a_snapshot_whose_parent_is_not_there_is_shown() -> None:
    """Its parent's record may be one that cannot be read."""
    assert [row.record.name for row in rows(records({"a": "gone", "b": "a"}))] == ["a", "b"]
