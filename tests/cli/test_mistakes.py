"""Of likely mistakes each is answered in one line, or a line for each thing that is wrong, with what helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.mistakes import MISTAKES, page, prepare, typed

PAGE = Path(__file__).parents[2] / "docs/evidence/mistakes.md"
ALL = [mistake for lines in MISTAKES.values() for mistake in lines]
SEVERAL = {"domain define three.toml": 3, "batch check plan.toml": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, and a root with two domains."""
    directory = tmp_path_factory.mktemp("mistakes")
    prepare(directory)
    return directory


@pytest.mark.parametrize(("line", "status", "words"), ALL, ids=[line for line, _, _ in ALL])
def test_a_mistake(line: str, status: int, words: str, place: Path) -> None:
    """Its exit status is right, nothing is on standard output, and what helps is said."""
    said = typed(place, line)
    assert (said.status, said.out) == (status, "")
    assert words in said.err
    assert said.err.count("\n") == SEVERAL.get(line, 1)
    assert all(each.startswith("snaporch: ") for each in said.err.splitlines())
    for defect in ("Errno", "Traceback", "a defect", "Unused", "requires an argument"):
        assert defect not in said.err


def test_the_page_is_current(place: Path) -> None:
    """`python -m tests.cli.mistakes > docs/evidence/mistakes.md` writes it."""
    assert len(ALL) >= 60
    assert PAGE.read_text() == "\n".join(page(place)) + "\n"
