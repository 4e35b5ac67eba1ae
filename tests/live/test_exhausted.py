"""What a process may not have any more: large files, descriptors. Each is an error of its kind; nothing is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from snaporch.orchestrator import catalog_of
from tests.live.world import NAME, MakeWorld

pytestmark = pytest.mark.live


@pytest.mark.parametrize("qemu", ["10.0"], indirect=True)
async def test_limits_of_the_process(make_world: MakeWorld) -> None:
    """A create that may not write its memory file, or has no descriptors left, is rolled back or refused."""
    world = await make_world()

    def run(*limits: str, status: set[int]) -> str:
        verb = ["create", NAME, "s", "--live"]
        command = ["prlimit", *limits, "--", sys.executable, "-m", "snaporch", "--root", str(world.root), *verb]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode in status, done.stderr
        assert "Traceback" not in done.stderr
        assert "a defect" not in done.stderr
        return done.stderr

    before = await catalog_of(world.orch).domain(NAME)
    for limits in (["--fsize=1048576"], *([f"--nofile={number}"] for number in (10, 14, 18, 24))):
        assert "\nsnaporch: " in f"\n{run(*limits, status={1, 2})}", limits
        assert (await catalog_of(world.orch).domain(NAME)).active == before.active
        assert await world.orch.list(NAME) == ()
        await world.check_runs()
    run("--nofile=1024", status={0})
