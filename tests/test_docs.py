"""The documentation leads nowhere that is not there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the names of the headings of a page, as links name them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Each link to a file of the project finds it, and the heading in it."""
    lost = []
    for link in LINK.findall(prose(page)):
        if ":" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


def test_pages_that_the_code_names() -> None:
    """What a comment, a text or a script calls ``docs/…`` is there."""
    listed = subprocess.run(
        [
            "git",
            "grep",
            "-ohE",
            r"\bdocs/[a-z][a-z/-]*\.(md|json|png)",
            "--",
            "snaporch",
            "scripts",
            "tests",
            "contrib",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    named = {name for name in listed.stdout.split() if "interop" not in name}  # those are QEMU's own
    assert {name for name in named if not (ROOT / name).exists()} == set()
