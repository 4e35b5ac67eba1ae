"""A verb imports what it needs: most of the time of one that only reads would be that of imports."""

from __future__ import annotations

import json
import os
import signal
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


def test_an_interrupt_while_it_is_imported(tmp_path: Path) -> None:
    """One line, and no traceback: here of an import that never ends."""
    (tmp_path / "cyclopts.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(600)\n")
    command, path = [sys.executable, "-m", "snaporch", "list", "web"], {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | path, text=True, **pipes) as program:  # type: ignore[call-overload]
        assert program.stdout.readline() == "importing\n"
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    assert (program.returncode, said) == (130, "snaporch: interrupted; nothing was touched\n")
