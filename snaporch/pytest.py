"""A plugin for pytest: a machine for tests, which goes back to a snapshot after each of them.

In ``conftest.py``::

    pytest_plugins = ["snaporch.pytest"]

In ``pytest.ini``, or as options (``--snaporch-domain web1 --snaporch-snapshot clean``)::

    snaporch_domain = web1
    snaporch_snapshot = clean

A test gets the machine as it was at the snapshot, running, and may do to it what it likes::

    def test_the_upgrade(snaporch_machine):
        run_over_ssh(snaporch_machine.domain, "apt-get -y upgrade")

The marker ``snaporch(domain=…, snapshot=…)`` names others for one test. The root is ``snaporch_root``, or that of
the command line; where a service owns it, the service does it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import attrs
import pytest
import trio

from snaporch.client import open_client
from snaporch.model.domain import DomainInfo
from snaporch.model.record import RevertRecord
from snaporch.model.rfc import RevertFlag
from snaporch.orchestrator import default_root, open_orchestrator
from snaporch.protocol import AnyOrchestrator
from snaporch.service.owner import owner

T = TypeVar("T")

_OPTIONS = {
    "root": "the root directory of snaporch; by default that of the command line",
    "domain": "the domain that `snaporch_machine` is",
    "snapshot": "the snapshot that it goes back to",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, for the command line and the file."""
    group = parser.getgroup("snaporch")
    for name, words in _OPTIONS.items():
        group.addoption(f"--snaporch-{name}", default="", help=words)
        parser.addini(f"snaporch_{name}", words, default="")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "snaporch(domain, snapshot): which machine `snaporch_machine` is")


@attrs.frozen
class Machine:
    """A machine for one test.

    Attributes:
        root: of snaporch.
        domain: its name.
        snapshot: the point that it is at when a test begins.
    """

    root: Path
    domain: str
    snapshot: str

    def info(self) -> DomainInfo:
        """Return it as it is this moment."""
        return self.call(lambda orch: orch.domain_info(self.domain))

    def go_back(self) -> RevertRecord:
        """Take it back to the snapshot; it runs then."""
        return self.call(lambda orch: orch.revert(self.domain, self.snapshot, RevertFlag.RUNNING))

    def call(self, work: Callable[[AnyOrchestrator], Awaitable[T]]) -> T:
        """Return what a coroutine does with the orchestrator; not from within an event loop of Trio's."""

        async def called() -> T:
            if owner(self.root) is not None:
                async with open_client(self.root) as client:
                    return await work(client)
            async with open_orchestrator(self.root) as orch:
                return await work(orch)

        return trio.run(called)


def _setting(request: pytest.FixtureRequest, name: str) -> str:
    marker = request.node.get_closest_marker("snaporch")
    given = marker.kwargs.get(name, "") if marker else ""
    return str(given or request.config.getoption(f"--snaporch-{name}") or request.config.getini(f"snaporch_{name}"))


@pytest.fixture
def snaporch_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine that is at its snapshot, and goes back there when the test has ended."""
    domain, snapshot = _setting(request, "domain"), _setting(request, "snapshot")
    if not domain or not snapshot:
        raise pytest.UsageError("snaporch_machine: say which, by snaporch_domain and snaporch_snapshot")
    machine = Machine(Path(_setting(request, "root") or default_root()), domain, snapshot)
    points = request.config.stash.setdefault(_AT_THEIR_POINT, set())
    if machine not in points:
        machine.go_back()
    points.discard(machine)
    try:
        yield machine
    finally:
        machine.go_back()
        points.add(machine)


_AT_THEIR_POINT = pytest.StashKey[set[Machine]]()
