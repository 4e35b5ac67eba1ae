"""The help, the reference and the manual pages are those of the program; each example is a command line of it."""

from __future__ import annotations

import shlex
from inspect import iscoroutinefunction
from pathlib import Path

import jsonschema
import pytest

from snaporch.cli import answers, application
from snaporch.cli.examples import EXAMPLES, GROUPS
from snaporch.cli.manual import man_pages, markdown, verbs

PAGE = Path(__file__).parents[2] / "docs/reference/cli.md"
LINES = [(verb, line) for verb, lines in EXAMPLES.items() for line, _ in lines]


def test_the_reference_is_current() -> None:
    """`python -m snaporch.cli.manual > docs/reference/cli.md` writes it."""
    assert PAGE.read_text() == markdown(application())


@pytest.mark.parametrize(("verb", "line"), LINES, ids=[line for _, line in LINES])
def test_examples(verb: str, line: str) -> None:
    """Each is read as its verb, with options and arguments that there are."""
    words = shlex.split(line.partition(" > ")[0].partition(" | ")[0])
    command, _, _ = application().parse_args(words, exit_on_error=False, print_error=False)
    assert iscoroutinefunction(command)
    assert words[: len(verb.split())] == verb.split()


def test_the_schemas_of_answers_are_current() -> None:
    """`python -m snaporch.cli.answers > docs/reference/answers.schema.json` writes them; each verb has one."""
    assert (PAGE.parent / "answers.schema.json").read_text() == answers.text()
    jsonschema.Draft202012Validator.check_schema(answers.document())
    assert {verb.name for verb in verbs(application())} == answers.ANSWERS.keys()


def test_every_verb_has_a_heading_and_is_described() -> None:
    app = application()
    shown = {name for name in app if not name.startswith("-")}
    assert shown == {verb for members in GROUPS.values() for verb in members}
    described = list(verbs(app))
    assert all(verb.short.endswith(".") for verb in described)
    assert [f"{v.name} {w.written}" for v in described for w in v.options if not w.text] == []


def test_manual_pages() -> None:
    """One for each verb, in which no line of text is taken for a command of roff."""
    pages = man_pages(application(), "1.2")
    assert {"snaporch.1", "snaporch-create.1", "snaporch-domain-start.1"} <= pages.keys()
    for page in pages.values():
        commands = {line.split()[0] for line in page.splitlines() if line.startswith((".", "'"))}
        assert commands <= {".TH", ".SH", ".TP", ".B", ".BR"}
        assert "\\- " in page
