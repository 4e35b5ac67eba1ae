"""Schemathesis makes up requests from the served description: whatever it asks, no answer is a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import schemathesis
import trio
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from snaporch.service.api import ROUTES
from snaporch.service.config import Config
from snaporch.service.doors import doors, listening
from snaporch.service.roles import Role
from snaporch.service.server import run_http
from snaporch.service.service import open_service
from snaporch.testing import open_simulated_world

SECONDS = 30.0


class Serving(Thread):
    """A service on a simulated domain, over TCP, in a thread of its own.

    Attributes:
        url: where it is.
        secret: an admin's token.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.url = self.secret = ""
        self.ready, self._root = Event(), root
        self._token: trio.lowlevel.TrioToken
        self._stopping: trio.Event

    def run(self) -> None:
        """Serve until `stop`."""
        trio.run(self._serve)

    async def _serve(self) -> None:
        config = Config(listen="127.0.0.1:0", directories=("/images",))
        self._token, self._stopping = trio.lowlevel.current_trio_token(), trio.Event()
        async with open_simulated_world(self._root) as world, open_service(world.orchestrator, config) as service:
            with listening(config, str(self._root / "s")) as sockets:
                self.url = f"http://127.0.0.1:{sockets[-1].getsockname()[1]}"
                self.secret = service.tokens.make("fuzz", Role.ADMIN)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run_http, service, doors(sockets, config, None), self._stopping)
                    self.ready.set()

    def stop(self) -> None:
        """End it."""
        self._token.run_sync_soon(self._stopping.set)
        self.join(SECONDS)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    thread = Serving(tmp_path_factory.mktemp("fuzz"))
    thread.start()
    assert thread.ready.wait(SECONDS)
    yield thread
    thread.stop()


def test_no_request_is_a_defect(serving: Serving) -> None:
    """Each row of the table, with what fits the description and what does not."""
    headers = {"authorization": f"Bearer {serving.secret}"}
    schema = schemathesis.openapi.from_url(f"{serving.url}/v1/openapi.json", headers=headers)
    quick = settings(
        max_examples=5,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    asked = 0

    def ask(case: schemathesis.Case[Any]) -> None:
        nonlocal asked
        asked += 1
        response = case.call(base_url=serving.url, headers=headers, timeout=SECONDS)
        case.validate_response(response, checks=[not_a_server_error])

    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == len(ROUTES)
    for operation in operations:
        quick(given(operation.as_strategy())(ask))()
    assert asked >= len(operations)
