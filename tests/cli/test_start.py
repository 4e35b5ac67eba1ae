"""A verb imports what it needs: most of the time of one that only reads would be that of imports."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.catalog import golden_root

# What talks to hypervisors, decides about images, serves; and, of others, what is slow to import.
UNUSED = [
    "snaporch.batch",
    "snaporch.client",
    "snaporch.drivers.base",
    "snaporch.drivers.qmp",
    "snaporch.drivers.registry",
    "snaporch.engine.run",
    "snaporch.images",
    "snaporch.facade",
    "snaporch.operations",
    "snaporch.orchestrator",
    "asyncio",
    "httpx2",
    "hypercorn",
    "pygments",
    "starlette",
    "structlog",
    "xxhash",
]


@pytest.mark.parametrize("verb", [("list", "web"), ("show", "web", "live"), ("--json", "operations")], ids=" ".join)
def test_a_verb_that_reads_the_catalog_imports_no_more(verb: tuple[str, ...], tmp_path: Path) -> None:
    """No hypervisor's module, no operation, nothing of the service."""
    with closing(sqlite3.connect(golden_root(tmp_path))) as catalog, catalog:
        catalog.execute("DELETE FROM operation WHERE ended IS NULL")  # what was cut short would be mended first
    code = (
        "import json, sys; from snaporch.cli import execute; status = execute(sys.argv[1:]);"
        f"print(json.dumps([status, [name for name in {UNUSED} if name in sys.modules]]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--root", str(tmp_path), *verb]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(ran.stderr) == [0, []]
    assert ran.stdout
