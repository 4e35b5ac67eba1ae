"""Processes are known by more than their ids: on this host."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import attrs
import pytest

from snaporch.drivers.local.process import LocalProcess, alive, kill, process_of, wait_gone


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def of(sleeper: subprocess.Popen[bytes]) -> LocalProcess:
    """Return what the catalog would know of it."""
    found = process_of(sleeper.pid)
    assert found is not None
    return found


@pytest.mark.parametrize("other", ["later", "other boot"])
async def test_another_of_the_same_id(sleeper: subprocess.Popen[bytes], other: str) -> None:
    """One that has the id of a process that is gone is not taken for it, and not killed: also after a boot."""
    there = of(sleeper)
    gone = (
        attrs.evolve(there, started=there.started - 1) if other == "later" else attrs.evolve(there, boot="before")
    )
    assert alive(there)
    assert not alive(gone)
    await kill(gone)
    await wait_gone(gone)
    assert alive(there)


async def test_kill(sleeper: subprocess.Popen[bytes]) -> None:
    """Exactly the one that is meant is killed; one noted by an earlier version, which knew no boots, too."""
    old = attrs.evolve(of(sleeper), boot="")
    assert alive(old)
    await kill(old)
    assert not alive(old)
    assert process_of(sleeper.pid) is None
