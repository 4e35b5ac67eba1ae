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
    "snaporch.drivers.qemu.isolation",
    "snaporch.operations.shape",
]


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_neither_trio_nor_sqlite(module: str) -> None:
    """Importing it alone loads no event loop and no database."""
    code = f"import sys, {module}; sys.exit(bool({{'trio', 'sqlite3', 'socket'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
