"""What takes long, or much room, for one caller takes neither from the others."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from structlog.testing import capture_logs

from snaporch import CreateFlag, DomainSnapshot
from snaporch.drivers.local.sockets import Peer
from snaporch.engine.states import State
from snaporch.errors import SnaporchError, Unavailable
from snaporch.model import convert
from snaporch.model.record import OperationKind, OperationRecord
from snaporch.orchestrator import Orchestrator, catalog_of
from snaporch.service.adopt import adopt
from snaporch.service.api import ROUTES
from snaporch.service.app import make_app
from snaporch.service.config import Config
from snaporch.service.feed import Feed
from snaporch.service.jobs import Job
from snaporch.service.roles import Role
from snaporch.service.service import TURNS, open_service
from snaporch.testing import open_simulated_world
from tests.service.conftest import ROOT_PEER, Lab, peer

WEB = "/v1/domains/web1"


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Lab]:
    """Give a service with place for very little of everything."""
    config = Config(directories=("/images",), streams=1, running=1, queued=0)
    async with (
        open_simulated_world(tmp_path / "root") as world,
        open_service(world.orchestrator, config) as service,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=make_app(service)), base_url="http://x") as http,
    ):
        with peer(ROOT_PEER):
            yield Lab(world, service, http)


async def forever() -> None:
    await trio.sleep_forever()


def job(domain: str) -> Job:
    return Job(OperationKind.VERIFY, (domain,), "s", "token:x", forever)


async def test_others_are_no_reason_to_refuse_root(narrow: Lab) -> None:
    """Where others follow all events and fill the queue, root follows events and begins operations."""
    service = narrow.service
    service.streams = 1
    assert (await narrow.http.get("/v1/events", headers=narrow.secret(Role.ADMIN))).status_code == 503
    with trio.move_on_after(1) as scope:  # it is let in, and so has no end
        await narrow.http.get("/v1/events")
    assert scope.cancelled_caught
    service.jobs.submit(job("a"))
    with pytest.raises(Unavailable):
        service.jobs.submit(job("b"))
    service.jobs.submit(job("b"), own=True)


async def test_any_number_of_operations_is_adopted(narrow: Lab) -> None:
    """A service starts however many operations its predecessor has left."""
    for number in range(3):
        id_, who = str(number) * 32, (f"gone{number}",)
        record = OperationRecord(id_, OperationKind.CREATE, who, "s", State.STREAMING, 1.0)
        query = "INSERT INTO operation (id, begun, ended, record) VALUES (?, 1, NULL, ?)"
        row = (record.id, convert.dumps(record))
        await catalog_of(narrow.world.orchestrator).transact(partial(_execute, query, row))
    await adopt(narrow.service)
    assert len(list(narrow.service.jobs.active())) == 3


def _execute(query: str, row: tuple[Any, ...], connection: Any) -> None:
    connection.execute(query, row)


async def test_long_requests_wait_for_their_own_caller_only(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one caller few of those that take long work at once; another's, and root's, begin at once."""
    begun, go_on = 0, trio.Event()

    async def hangs(*_: Any, **__: Any) -> dict[str, Any]:
        nonlocal begun
        begun += 1
        await go_on.wait()
        return {}

    monkeypatch.setattr(Orchestrator, "doctor", hangs)
    viewer, operator = lab.secret(Role.VIEWER), lab.secret(Role.OPERATOR)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(partial(lab.http.get, "/v1/doctor", headers=viewer))
        await trio.testing.wait_all_tasks_blocked()
        assert begun == TURNS
        for headers in (operator, {}):
            nursery.start_soon(partial(lab.http.get, "/v1/doctor", headers=headers))
        await trio.testing.wait_all_tasks_blocked()
        assert begun == TURNS + 2
        assert (await lab.http.get("/v1/whoami", headers=viewer)).status_code == 200
        go_on.set()
    assert begun == 22


def test_what_reads_all_takes_turns() -> None:
    """A viewer's requests that look at images, or at all records, are among those that take long."""
    short = {route.path for route in ROUTES if route.role is Role.VIEWER and not route.long}
    assert {path.rpartition("/")[2] for path in short} == {"{id}", "schedules", "changes", "whoami"}


async def test_a_head_request_ends_with_its_client(lab: Lab) -> None:
    """As a GET does: nobody can leave any number of them behind."""
    await lab.world.orchestrator.create("web1", DomainSnapshot("s"), CreateFlag.LIVE)
    newest = (await lab.http.get("/v1/changes?limit=1000")).json()["revision"]
    app, sent = make_app(lab.service), list[dict[str, Any]]()
    headers = [(b"authorization", lab.secret(Role.VIEWER)["authorization"].encode())]
    for method in ("GET", "HEAD"):
        scope = {
            "type": "http", "method": method, "path": "/v1/changes", "raw_path": b"/v1/changes",
            "query_string": f"after={newest}&wait=3600".encode(), "headers": headers, "http_version": "1.1",
        }  # fmt: skip
        waiting = trio.Event()

        async def receive(waiting: trio.Event = waiting) -> dict[str, Any]:
            waiting.set()
            await trio.sleep(0.3)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(message)

        with trio.fail_after(30):
            await app(scope, receive, send)
        assert waiting.is_set()


async def test_many_mistakes(lab: Lab) -> None:
    """However many keys are unknown, and values wrong, a few are named; no list is longer than there is use for."""
    viewer = lab.secret(Role.VIEWER)
    named: list[int] = []
    bodies: tuple[dict[str, Any], ...] = (
        {"names": ["s"]} | {f"unknown{number}": 1 for number in range(2_000)},
        {"names": ["s"], "x" * 100_000: 1},
        {"names": ["s"], "ids": ["a"] * 10_001},
        {"names": ["s"], "ids": [1] * 10_001},
        {"names": [[]] * 9_999},
    )
    for body in bodies:
        answer = await lab.http.post(f"{WEB}/delete/plan", json=body, headers=viewer)
        assert answer.status_code == 422
        assert len(answer.json()["detail"]) < 5_000
        named.append(answer.json()["detail"].count("unknown key"))
    assert named == [convert.MOST_NAMED, 1, 0, 0, 0]
    answer = await lab.http.post("/v1/fsck", headers={"idempotency-key": "k" * 256})
    assert answer.status_code == 422
    for number in ("9" * 5_000, "9" * 20, "-1", "٣"):
        feed: Feed = lab.service.feed
        assert feed.follow(f"{feed.boot}-{number}").position == 1


async def test_the_audit_log_is_short(lab: Lab) -> None:
    """A line of the audit log has no more than a part of what somebody without a token has sent."""
    with peer(Peer(1, 65534, 65534)), capture_logs() as lines:
        assert (await lab.http.get(f"/v1/domains/{'x' * 30_000}")).status_code == 401
        assert (await lab.http.post("/v1/fsck", json={"y" * 30_000: 1})).status_code == 401
    assert len(lines) == 2
    assert all(len(json.dumps(line)) < 2_000 for line in lines)


async def test_large_records_make_short_pages(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page ends where its records have become many bytes, and the next one goes on; nothing is left out."""
    for number in range(4):
        await lab.world.orchestrator.create("web1", DomainSnapshot(f"s{number}"), CreateFlag.LIVE)
    monkeypatch.setattr("snaporch.catalog.store.PAGE_BYTES", 1)
    monkeypatch.setattr("snaporch.catalog.changes.PAGE_BYTES", 1)
    monkeypatch.setattr("snaporch.service.api.SHORT", 1)
    names, pages = list[str](), 0
    after: str | None = ""
    while after is not None:
        page = (await lab.http.get(f"{WEB}/snapshots" + (f"?after={after}" if after else ""))).json()
        names += [each["snapshot"]["name"] for each in page["items"]]
        after, pages = page["next"], pages + 1
    assert (names, pages) == ([f"s{number}" for number in range(4)], 4)
    seen, page = set(), {"revision": 0, "more": True}
    while page["more"]:
        page = (await lab.http.get(f"/v1/changes?after={page['revision']}")).json()
        seen |= {each["name"] for each in page["items"]}
    assert seen >= set(names)


async def test_a_catalog_that_cannot_be_read(lab: Lab) -> None:
    """What SQLite says is an error of the catalog's, with its path, and no defect."""
    with pytest.raises(SnaporchError, match=r"catalog\.sqlite3"):
        await catalog_of(lab.world.orchestrator).read(partial(_execute, "SELECT * FROM nothing", ()))
