"""Who may be connected, and for how long: connections over real sockets, in this process."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import attrs
import httpx2
import pytest
import trio

from snaporch.drivers.simulated.machine import SimulatedMachine
from snaporch.service import http1
from snaporch.service.config import Config
from snaporch.service.doors import doors, listening
from snaporch.service.places import Pool, tcp_peer
from snaporch.service.roles import Role
from snaporch.service.server import run_http
from snaporch.service.service import Service, open_service
from snaporch.testing import open_simulated_world

PLACES, EACH = 20, 12
ENOUGH = 10.0  # for what is done at once, on a busy host


@attrs.frozen
class House:
    """A service with both doors."""

    service: Service
    port: int
    path: Path
    secrets: dict[Role, str]

    def knock(self, data: bytes = b"") -> socket.socket:
        """Connect over TCP and send something."""
        made = socket.create_connection(("127.0.0.1", self.port))
        made.sendall(data)
        return made

    def request(self, url: str, role: Role = Role.VIEWER) -> bytes:
        """Return a request."""
        return f"GET {url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.secrets[role]}\r\n\r\n".encode()

    async def roots(self) -> float:
        """Ask as root, by the unix socket, and return the seconds until the answer."""
        began = time.monotonic()
        transport = httpx2.AsyncHTTPTransport(uds=str(self.path))
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
            assert (await http.get("/v1/domains")).status_code == 200
        return time.monotonic() - began

    async def tcps(self) -> int:
        """Ask as a viewer, over TCP."""
        headers = {"authorization": f"Bearer {self.secrets[Role.VIEWER]}"}
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", headers=headers) as http:
            return (await http.get("/v1/whoami")).status_code


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = Config(listen=f"127.0.0.1:{port}", connections=PLACES, per_peer=EACH, per_user=8)
    path = tmp_path / "s"
    with listening(config, str(path)) as sockets:
        async with (
            open_simulated_world(tmp_path / "root") as world,
            open_service(world.orchestrator, config) as service,
            trio.open_nursery() as nursery,
        ):
            stopping = trio.Event()
            nursery.start_soon(partial(run_http, service, doors(sockets, config, None), stopping))
            secrets = {role: service.tokens.make(role.name.lower(), role) for role in Role}
            yield House(service, port, path, secrets)
            stopping.set()


@contextlib.contextmanager
def all_closed(sockets: list[socket.socket]) -> Iterator[None]:
    """Close sockets in the end."""
    try:
        yield
    finally:
        for each in sockets:
            each.close()


async def closed_by_the_service(sock: socket.socket) -> None:
    """Return when the other side has closed a connection."""
    sock.setblocking(False)
    with trio.fail_after(ENOUGH):
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                if not sock.recv(65536):
                    return
            except ConnectionResetError:
                return


async def still_takes(sock: socket.socket, data: bytes) -> bool:
    """Send something, and return whether the other side is still there."""
    await trio.lowlevel.wait_writable(sock)
    try:
        sock.send(data)
    except OSError:
        return False
    return True


async def test_those_who_only_connect(house: House) -> None:
    """Whoever connects and goes, or connects and is silent, takes no place from others, at any door."""
    for _ in range(PLACES * 5):
        house.knock().close()
    assert await house.tcps() == 200
    with all_closed([house.knock() for _ in range(PLACES * 5)]):
        assert await house.roots() < ENOUGH
        assert await house.tcps() == 200
    with all_closed([house.knock(b"GET / HT") for _ in range(PLACES * 2)]):
        assert await house.roots() < ENOUGH
        assert await house.tcps() == 200


async def test_one_who_is_silent_is_let_go(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that has not asked for anything within seconds is closed, however slowly it speaks."""
    monkeypatch.setattr(http1, "HEAD_SECONDS", 0.3)
    for sent in (b"", b"GET /v1/health HTTP/1.1\r\nHost: "):
        with all_closed([sock := house.knock(sent)]):
            await closed_by_the_service(sock)


async def test_what_is_asked_for_keeps_its_place(house: House) -> None:
    """Requests that run are never put out; one address has no more of them than it may, and the others get in."""
    waits = house.request("/v1/events", Role.ADMIN)
    followers = [house.knock(waits) for _ in range(8)]  # as many as one user may have
    with all_closed(followers):
        with trio.fail_after(ENOUGH):
            while house.service.streams < len(followers):  # noqa: ASYNC110 - it is another task's
                await trio.sleep(0.01)
        for _ in range(PLACES):
            house.knock().close()
        with all_closed([refused := house.knock(waits)]):
            refused.setblocking(False)
            await trio.lowlevel.wait_readable(refused)
            assert b"503" in refused.recv(99)
        assert await house.tcps() == 200
        assert house.service.streams == len(followers)
    with trio.fail_after(ENOUGH):  # they went, and so did what they followed
        while house.service.streams:  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.mark.parametrize("second", [b"", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_one_who_waits_and_goes(house: House, second: bytes) -> None:
    """A request that waits for an operation ends with its client, also where that has asked for more behind it."""
    http = httpx2.AsyncHTTPTransport(uds=str(house.path))
    async with httpx2.AsyncClient(transport=http, base_url="http://x") as root:
        begun = await root.post("/v1/domains/web1/snapshots", json={"flags": ["live"], "options": {"bandwidth": 1}})
        assert begun.status_code == 202, begun.text
        url = f"/v1/operations/{begun.json()['id']}?wait=3600"
        for _ in range(30):  # more than one user may have, and than there are places
            asked = house.knock(house.request(url) + second)
            with trio.fail_after(ENOUGH):
                while not house.service._asking["token:viewer"]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                asked.close()
                while house.service._asking["token:viewer"]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
        assert (await root.post(f"/v1/operations/{begun.json()['id']}/cancel?wait=60")).json()["ended"]
    assert await house.tcps() == 200


@pytest.mark.parametrize(
    "first",
    [
        ["PRI * HTTP/2.0", "", "SM", "", ""],
        ["GET / HTTP/1.1", "Host: x", "Connection: upgrade, http2-settings", "Upgrade: h2c", "HTTP2-Settings: AA"],
        [
            "GET / HTTP/1.1",
            "Host: x",
            "Connection: upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ],
    ],
)
async def test_no_other_protocol(house: House, first: list[str]) -> None:
    """A connection stays one of HTTP/1.1: with one request at a time."""
    with all_closed([sock := house.knock("\r\n".join([*first, "", ""]).encode())]):
        sock.setblocking(False)
        await trio.lowlevel.wait_readable(sock)
        assert sock.recv(12) in {b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 405", b"HTTP/1.1 404"}
    assert await house.tcps() == 200


async def test_a_flood_behind_a_request(house: House) -> None:
    """Who sends without end while a request is worked on is let go: it is not all kept."""
    with all_closed([sock := house.knock(house.request("/v1/events"))]):
        sock.setblocking(False)
        with trio.fail_after(ENOUGH):
            while await still_takes(sock, b"x" * 65536):
                pass
    assert await house.tcps() == 200


async def test_viewers_keep_no_domain_busy(house: House) -> None:
    """What a viewer may ask takes no domain's lock: while it is asked again and again, nothing is refused."""
    headers = {"authorization": f"Bearer {house.secrets[Role.VIEWER]}"}
    uds = httpx2.AsyncHTTPTransport(uds=str(house.path))
    async with (
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{house.port}", headers=headers) as viewer,
        httpx2.AsyncClient(transport=uds, base_url="http://x") as root,
        trio.open_nursery() as nursery,
    ):
        first = await root.post("/v1/domains/web1/snapshots?wait=60", json={"flags": ["live"]})
        name, answers = first.json()["result"]["snapshot"]["name"], []

        async def ask(method: str, url: str, body: object) -> None:
            while True:
                answers.append((await viewer.request(method, url, json=body)).status_code)

        plan = {"names": [name]}
        nursery.start_soon(ask, "POST", "/v1/domains/web1/delete/plan", plan)
        nursery.start_soon(ask, "POST", "/v1/groups/delete/plan", plan | {"domains": ["web1"]})
        nursery.start_soon(ask, "POST", "/v1/domains/web1/flatten/plan", {})
        nursery.start_soon(ask, "GET", "/v1/doctor?domain=web1", None)
        for number in range(2):
            body = {"snapshot": {"name": f"n{number}"}, "flags": ["live"]}
            assert (await root.post("/v1/domains/web1/snapshots?wait=60", json=body)).status_code == 200
            assert (await root.post("/v1/domains/web1/pause")).status_code == 200
            assert (await root.post("/v1/domains/web1/resume")).status_code == 200
        nursery.cancel_scope.cancel()
    assert answers
    assert set(answers) <= {200, 409}


def test_pool() -> None:
    """The idle make room, the longest idle first; a peer has its part, and nobody is counted twice."""
    left: list[str] = []
    pool = Pool(3, 2)
    first = pool.take("a", lambda: left.append("first"))
    second = pool.take("a", lambda: left.append("second"))
    assert first is not None
    assert second is not None
    pool.set_idle(first, idle=False)
    third = pool.take("a", lambda: left.append("third"))  # of its own part
    assert left == ["second"]
    assert third is not None
    pool.set_idle(third, idle=False)
    assert pool.take("a", lambda: None) is None
    other = pool.take("b", lambda: None)
    assert other is not None
    pool.set_idle(other, idle=False)
    assert pool.take("c", lambda: None) is None
    for place in (first, first, second, third, other):
        pool.give_back(place)
    assert len(pool) == 0
    assert tcp_peer("10.0.0.1") != tcp_peer("10.0.0.2")
    assert tcp_peer("fe80::1%eth0") == tcp_peer("fe80::2")


async def test_a_guest_that_does_not_power_off(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shutdown waits, a destroy ends the guest; it can be cancelled, and ends with its client if told."""
    send, asked_to = trio.open_memory_channel[None](9)

    async def deaf(_: object) -> None:
        await send.send(None)

    monkeypatch.setattr(SimulatedMachine, "shutdown", deaf)
    uds = httpx2.AsyncHTTPTransport(uds=str(house.path))
    url, answers = "/v1/domains/web1", []
    async with (
        httpx2.AsyncClient(transport=uds, base_url="http://x", timeout=ENOUGH) as root,
        trio.open_nursery() as nursery,
    ):

        async def shut_down(**more: object) -> None:
            answers.append(await root.post(f"{url}/shutdown", json={"timeout": 3600} | more, timeout=60))

        async def busy() -> str:
            await asked_to.receive()
            answer = await root.post(f"{url}/pause")
            assert answer.status_code == 409
            return str(answer.json()["operation"])

        nursery.start_soon(shut_down)
        identifier = await busy()
        assert (await root.post(f"/v1/operations/{identifier}/cancel")).json()["state"] == "cancelled"
        with trio.fail_after(ENOUGH):
            while not answers:  # noqa: ASYNC110 - it is another task's
                await trio.sleep(0.01)
        assert "asked to" in answers.pop().json()["detail"]

        body = b'{"timeout":3600,"ends_with_client":true}'
        head = house.request(f"{url}/shutdown", Role.OPERATOR).replace(b"GET", b"POST").strip()
        asked = house.knock(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await busy()
        asked.close()
        with trio.fail_after(ENOUGH):
            while (await root.post(f"{url}/resume")).status_code == 409:  # noqa: ASYNC110
                await trio.sleep(0.01)

        nursery.start_soon(shut_down)
        await busy()
        destroyed = await root.post(f"{url}/destroy")
        assert (destroyed.status_code, destroyed.json()["state"]) == (200, "inactive")
        with trio.fail_after(ENOUGH):
            while not answers:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert answers[0].json()["state"] == "inactive"
