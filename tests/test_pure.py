"""What decides does no I/O."""

from __future__ import annotations

import subprocess
import sys

import pytest

PURE = [
    "snaporch.engine.states",
    "snaporch.engine.steps",
    "snaporch.model.names",
    "snaporch.model.rfc",
    "snaporch.model.request",
    "snaporch.model.domain",
    "snaporch.model.record",
    "snaporch.errors",
    "snaporch.model.convert",
    "snaporch.operations.create_plan",
    "snaporch.operations.revert_plan",
    "snaporch.images.chain",
    "snaporch.images.merge",
    "snaporch.images.kinds",
    "snaporch.drivers.qemu.command",
    "snaporch.drivers.qemu.attach",
    "snaporch.drivers.qemu.blocks",
    "snaporch.drivers.qemu.options",
    "snaporch.drivers.qemu.hostside",
    "snaporch.operations.shape",
]


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_neither_trio_nor_sqlite(module: str) -> None:
    """Importing it alone loads no event loop and no database."""
    # The package's own __init__ is the façade, which has everything: it is left out here.
    code = (
        "import sys, types, pathlib, importlib.util as u;"
        "path = pathlib.Path(u.find_spec('snaporch').origin).parent;"
        "p = types.ModuleType('snaporch'); p.__path__ = [str(path)]; sys.modules['snaporch'] = p;"
        f"import {module}; sys.exit(bool({{'trio', 'sqlite3', 'socket'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
