"""Snaporch itself, and what its tests and proofs run in dom0, put there: compiled, since dom0 is emulated."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from scripts.xen_lab.image import ROOT, compile_all
from scripts.xen_lab.machine import Lab

CODE = "lab/code"  # in dom0
PYTHON = f"PYTHONPATH=/lab/site:/{CODE} python3 -B"
_PARTS = ("snaporch", "tests/xen/in_dom0")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "static", "*.c", "*.S")


def put_project(lab: Lab) -> None:
    """Put this checkout's snaporch, and the tests that are for dom0, into a lab that runs."""
    with tempfile.TemporaryDirectory(prefix="xen-code-") as place:
        code = Path(place, CODE)
        for part in _PARTS:
            shutil.copytree(ROOT / part, code / part, ignore=_LEFT_OUT)
        shutil.copy(ROOT / "pyproject.toml", code)
        compile_all(lab.home / "root", code, strip=Path(place))
        lab.put(*code.iterdir(), to=f"/{CODE}")
