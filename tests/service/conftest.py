"""A service on a simulated domain, asked without a socket; what needs one opens it itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import httpx2
import pytest

from snaporch.drivers.local.sockets import Peer
from snaporch.service.app import make_app
from snaporch.service.config import Config
from snaporch.service.roles import Role, connected_peer
from snaporch.service.service import Service, open_service
from snaporch.testing import SimulatedWorld, open_simulated_world

ROOT_PEER = Peer(1, 0, 0)


@attrs.frozen
class Lab:
    """A service, its world, and an HTTP client that is an admin."""

    world: SimulatedWorld
    service: Service
    http: httpx2.AsyncClient

    def secret(self, role: Role) -> dict[str, str]:
        """Return the headers of a new token's holder."""
        return {"authorization": f"Bearer {self.service.tokens.make(f'a-{role.name.lower()}', role)}"}


@contextmanager
def peer(who: Peer | None) -> Iterator[None]:
    """Ask as another."""
    token = connected_peer.set(who)
    try:
        yield
    finally:
        connected_peer.reset(token)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    """Give a service; a test that takes the clock, too, lets it jump."""
    async with (
        open_simulated_world(tmp_path / "root") as world,
        open_service(world.orchestrator, Config(directories=("/images",))) as service,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=make_app(service)), base_url="http://x") as http,
    ):
        with peer(ROOT_PEER):
            yield Lab(world, service, http)
