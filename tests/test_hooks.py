"""Hooks after a revert: run when it is complete, for whom they are, and never its undoing."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from snaporch import CreateFlag, DomainSnapshot, InvalidInput
from snaporch.drivers.simulated import SimulatedHost, SimulatedSpeed
from snaporch.model import documents
from snaporch.operations.hooks import load_hooks
from snaporch.testing import open_simulated_world

HOOKS = """
[[after_revert]]
command = ["{program}", "all"]

[[after_revert]]
command = ["{program}", "db"]
domains = ["db*"]

[[after_revert]]
command = ["sh", "-c", "echo it is wrong >&2; exit 7"]
domains = ["x", "web*"]

[[after_revert]]
command = ["sleep", "1000"]
deadline = 0.2

[[after_revert]]
command = ["{program}", "last"]
"""
PROGRAM = """#!/bin/sh
where="$SNAPORCH_DOMAIN $SNAPORCH_SNAPSHOT $SNAPORCH_STAGE $SNAPORCH_ROOT"
echo "$1 $where ${SNAPORCH_CLOCK_BEHIND:+behind}" >>"$0.said"
"""


async def test_they_run(tmp_path: Path) -> None:
    """In order, all of them, whatever becomes of one; the answer says what went wrong."""
    program, root = tmp_path / "told", tmp_path / "root"
    program.write_text(PROGRAM)
    program.chmod(stat.S_IRWXU)
    host = SimulatedHost(speed=SimulatedSpeed(bandwidth=1e12, load_bandwidth=1e12))
    async with open_simulated_world(root, host=host) as world:
        orch = world.orchestrator
        await orch.create("web1", DomainSnapshot("one"), CreateFlag.LIVE)
        (orch.root / "hooks.toml").write_text(HOOKS.format(program=program))
        back = await orch.revert("web1", "one")
        said = f"web1 one after_revert {orch.root} behind\n"
        assert Path(f"{program}.said").read_text() == f"all {said}last {said}"
        wrong, late = back.problems
        assert wrong.endswith("ended with status 7: it is wrong")
        assert late == "hook 'sleep 1000' took longer than 0.2 s and was ended"
        assert documents.reverted(back, await orch.domain_info("web1"), "")["problems"] == back.problems
        assert await orch.current("web1") == "one"
        (orch.root / "hooks.toml").write_text("[[after_revert]]\ncommand = []")
        with pytest.raises(InvalidInput, match=r"hooks.toml.after_revert"):
            await orch.revert("web1", "one")
        await world.check_consistent()


@pytest.mark.parametrize("text", ["[[before_revert]]", "junk", '[[after_revert]]\ncommand = "ls"'])
def test_a_file_that_is_not_understood(tmp_path: Path, text: str) -> None:
    """It is named; without a file there are none."""
    assert not load_hooks(tmp_path).after_revert
    (tmp_path / "hooks.toml").write_text(text)
    with pytest.raises(InvalidInput, match=r"hooks\.toml"):
        load_hooks(tmp_path)
