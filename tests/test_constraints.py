"""That what the tests pass with is what scripts/setup installs, to the last version."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "scripts/constraints.txt"


def canonical(name: str) -> str:
    """Return a distribution's name as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_version_is_pinned() -> None:
    """A package that nobody pinned would be another one tomorrow."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    pinned = {canonical(name): version for name, version in (line.split("==") for line in lines)}
    of_the_venv = {"pip", "setuptools", "wheel", "snaporch"}
    installed = {canonical(each.name): each.version for each in distributions()}
    assert {name for name in installed.keys() - of_the_venv if installed[name] != pinned.get(name)} == set()
