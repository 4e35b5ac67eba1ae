"""Fixtures: virtual time, and for tests with a real QEMU both versions, the tiny guest, worlds to run it in."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import structlog
from trio.testing import MockClock

from snaporch.guest.build import build_tiny
from snaporch.testing import ThreadsHoldTime

pytest.register_assert_rewrite(
    "tests.conformance.cutting", "tests.live.lab", "tests.live.world"
)  # before they are imported

from tests.live.world import MakeWorld, Qemu, World, assert_nothing_runs, open_world  # noqa: E402

ROOT = Path(__file__).parent.parent
VERSIONS = ROOT / ".cache/qemu-versions"


def _qemus() -> dict[str, Qemu]:
    if not VERSIONS.exists():
        pytest.fail(f"{VERSIONS} is not there, which says where the QEMUs are: run scripts/setup", pytrace=False)
    return {line.split()[0]: Qemu(*line.split()) for line in VERSIONS.read_text().splitlines()}


def _is_heavy(item: pytest.Item) -> bool:
    return item.get_closest_marker("heavy") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put heavy tests last, where hardly any worker has to wait for their end."""
    items.sort(key=_is_heavy)


@pytest.fixture(autouse=True)
def turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a heavy test run alone, whatever the other workers have: it takes a lock that all others share."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with (tmp_path_factory.getbasetemp().parent / "turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if _is_heavy(request.node) else fcntl.LOCK_SH)
        yield


@pytest.fixture(params=["7.2", "10.0"])
def qemu(request: pytest.FixtureRequest) -> Qemu:
    """Each of the QEMUs that snaporch is for."""
    found = _qemus()
    if request.param not in found:
        pytest.fail(f"{VERSIONS} has no QEMU {request.param}: run scripts/setup", pytrace=False)
    return found[request.param]


@pytest.fixture
def threads_hold_time(autojump_clock: MockClock) -> ThreadsHoldTime:
    """Keep virtual time from jumping while the catalog writes."""
    return ThreadsHoldTime(autojump_clock)


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The tiny guest."""
    return build_tiny(ROOT / ".cache/guest")


@pytest.fixture
async def make_world(tmp_path: Path, qemu: Qemu, kernel: Path) -> AsyncIterator[MakeWorld]:
    """A function that makes a world with a running guest, see `open_world`; nothing of it is left afterwards."""
    async with AsyncExitStack() as stack:

        async def make(**options: object) -> World:
            opened = partial(open_world, tmp_path, qemu, kernel)
            return await stack.enter_async_context(opened(**options))  # type: ignore[arg-type]

        yield make
    await assert_nothing_runs(tmp_path)


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A world with a running guest of two qcow2 disks, under moderate writes."""
    return await make_world()


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Undo what a run of the program in this process says of its log: other tests look at theirs."""
    yield
    structlog.reset_defaults()
