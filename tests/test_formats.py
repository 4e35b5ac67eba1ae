"""Formats: what an earlier version has written is read, and what a newer one has written is refused with words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from snaporch.batch.plan import plan_from
from snaporch.batch.store import BatchRecord
from snaporch.errors import InvalidInput, UnreadableRecord
from snaporch.model.convert import converter, definition_from, dumps, lenient, loads
from snaporch.model.domain import DomainRecord
from snaporch.model.formats import FORMATS, KEY, Format, NewerFormat, versioned
from snaporch.model.record import SnapshotRecord
from snaporch.service import api  # noqa: F401 - all versioned classes are imported by it

GOLDEN = Path(__file__).parent / "golden"
CLASSES: dict[str, Any] = {class_.__name__: class_ for class_ in FORMATS}
FILES = sorted(GOLDEN.glob("*/*.json"))
STORED = {
    "domain", "snapshot", "operation", "file", "create-plan", "revert-plan", "merge-journal", "create-note",
    "batch", "batch-item",
}  # fmt: skip


def _documents(path: Path) -> list[Any]:
    found: list[Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_an_earlier_version_wrote_is_read(path: Path) -> None:
    """And is then written in the present format, which is read as the same."""
    class_ = CLASSES[path.stem]
    for document in _documents(path):
        value = loads(json.dumps(document), class_)
        again = json.loads(dumps(value))
        assert again[KEY] == FORMATS[class_].number
        assert converter.structure(again, class_) == value


def test_everything_that_is_stored_has_golden_files() -> None:
    """Of format 1: nothing can be changed without a look at what is out there."""
    first = {FORMATS[CLASSES[path.stem]].name for path in FILES if path.parent.name == "0.1"}
    assert first >= STORED


def test_a_batchs_plan_is_read() -> None:
    """It is within the batch's record."""
    for document in _documents(GOLDEN / "0.1/BatchRecord.json"):
        assert plan_from(loads(json.dumps(document), BatchRecord).plan).name == "nightly"


def test_a_newer_format_is_refused_with_words() -> None:
    """At the top of a document, within another, and from a service."""
    (document, *_) = _documents(GOLDEN / "0.1/SnapshotRecord.json")
    for newer in (document | {KEY: 99}, document | {"definition": document["definition"] | {KEY: 99}}):
        with pytest.raises(UnreadableRecord, match="of format 99 was written by a newer snaporch"):
            loads(json.dumps(newer), SnapshotRecord)
    with pytest.raises(NewerFormat):
        lenient.structure(document | {KEY: 99}, SnapshotRecord)
    with pytest.raises(InvalidInput, match="a definition of format 7 was written by a newer snaporch"):
        definition_from({"name": "web", KEY: 7}, Path("/"))


@pytest.mark.parametrize("number", [0, -1, 1.0, "1", True, None])
def test_a_number_that_is_none_is_refused(number: object) -> None:
    """A format is a whole number from one on."""
    with pytest.raises(UnreadableRecord):
        loads(json.dumps({"definition": {"name": "web"}, KEY: number}), DomainRecord)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"definition": {}}', '{"new": 1, "definition": {"name": "a"}}']
)
def test_what_cannot_be_read_is_one_kind_of_error(text: str) -> None:
    """Whatever is wrong with it."""
    with pytest.raises(UnreadableRecord):
        loads(text, DomainRecord)


def test_a_service_may_say_more() -> None:
    """A client passes over keys that it does not know; a stored record with one is refused."""
    (document, *_) = _documents(GOLDEN / "0.1/DomainRecord.json")
    more = document | {"later": 1}
    assert lenient.structure(more, DomainRecord) == converter.structure(document, DomainRecord)
    with pytest.raises(UnreadableRecord, match="unknown key 'later'"):
        loads(json.dumps(more), DomainRecord)


def test_upcasters_run_one_after_the_other() -> None:
    """From the document's format on, and each sees what the one before it made."""
    steps = Format("thing", (lambda d: d | {"b": d["a"] + 1}, lambda d: d | {"c": d["b"] + 1}))
    assert steps.number == 3
    assert steps.current({"a": 1}) == {"a": 1, "b": 2, "c": 3}
    assert steps.current({"b": 7, KEY: 2}) == {"b": 7, "c": 8}
    assert steps.current({"c": 7, KEY: 3}) == {"c": 7}


def test_the_key_of_the_number_is_nobody_elses() -> None:
    """A class with such a field cannot be versioned."""

    @attrs.frozen
    class Odd:
        format: str

    with pytest.raises(TypeError, match="has a field of the name format"):
        versioned("odd")(Odd)
