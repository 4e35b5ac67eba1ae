"""What can be asked, and what is answered: on a simulated domain."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from trio.testing import MockClock

from snaporch import CreateFlag, DiskSnapshot, DomainSnapshot, SnaporchError
from snaporch.drivers.local.sockets import Peer
from snaporch.drivers.simulated import ThreadsHoldTime
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DeviceDisk
from snaporch.service.api import ROUTES
from snaporch.service.app import make_app
from snaporch.service.openapi import document
from snaporch.service.problems import error_of
from snaporch.service.roles import Role
from snaporch.service.service import open_service
from tests.service.conftest import Lab, peer

Ask = Callable[[Lab], Awaitable[Any]]
Refusal = tuple[str, str, dict[str, Any], Ask]

WEB = "/v1/domains/web1"
DOCS = Path(__file__).parents[2] / "docs"
LIVE = {"snapshot": {"name": "one"}, "flags": ["live"]}


async def test_the_whole_story(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Create, list, tree, revert, verify: each by its URL, each with what the library answers."""
    created = await lab.http.post(f"{WEB}/snapshots?wait", json=LIVE)
    assert created.status_code == 200
    assert created.json()["outcome"] == "complete"
    assert created.json()["result"]["snapshot"]["name"] == "one"
    second = await lab.http.post(f"{WEB}/snapshots", json={"snapshot": {"name": "two"}, "flags": ["live"]})
    assert second.status_code == 202
    ended = await lab.http.get(f"/v1/operations/{second.json()['id']}?wait=60")
    assert (ended.json()["state"], ended.json()["outcome"]) == ("complete", "complete")
    assert [r["snapshot"]["name"] for r in (await lab.http.get(f"{WEB}/snapshots")).json()["items"]] == [
        "one",
        "two",
    ]
    assert [(r["name"], r["parent"], r["current"]) for r in (await lab.http.get(f"{WEB}/tree")).json()] == [
        ("one", None, False),
        ("two", "one", True),
    ]
    for url, body in (("snapshots/one/revert", {}), ("snapshots/one/verify", {"boot": True})):
        answer = await lab.http.post(f"{WEB}/{url}?wait", json=body)
        assert (answer.status_code, answer.json()["outcome"]) == (200, "complete"), answer.text
    known = (await lab.http.get("/v1/operations?domain=web1")).json()["items"]
    assert [each["kind"] for each in known] == ["verify", "revert", "create", "create"]
    assert {each["by"] for each in known} == {"uid:0"}
    assert len({each["id"] for each in known}) == 4


def _other_disk() -> DomainSnapshot:
    return DomainSnapshot(disks=(DiskSnapshot(DeviceDisk("vdz")),))


def _attach(lab: Lab) -> Awaitable[Any]:
    return lab.world.orchestrator.attach("web1", "/images/no.sock", driver="simulated")


REFUSALS: list[Refusal] = [
    ("POST", "nobody/snapshots", {}, lambda lab: lab.world.orchestrator.create("nobody")),
    (
        "POST",
        "web1/snapshots",
        {"snapshot": {"name": "no/name"}},
        lambda lab: lab.world.orchestrator.create("web1", DomainSnapshot("no/name")),
    ),
    (
        "POST",
        "web1/snapshots",
        {"flags": ["disk-only"]},
        lambda lab: lab.world.orchestrator.create("web1", None, CreateFlag.DISK_ONLY),
    ),
    (
        "POST",
        "web1/snapshots",
        {"snapshot": {"disks": [{"disk": {"target": "vdz"}}]}},
        lambda lab: lab.world.orchestrator.create("web1", _other_disk()),
    ),
    ("POST", "web1/snapshots/none/revert", {}, lambda lab: lab.world.orchestrator.revert("web1", "none")),
    ("POST", "web1/delete", {"names": ["none"]}, lambda lab: lab.world.orchestrator.delete("web1", "none")),
    ("POST", "web1/delete/plan", {"names": ["none"]}, lambda lab: lab.world.orchestrator.delete("web1", "none")),
    ("POST", "web1/snapshots/none/verify", {}, lambda lab: lab.world.orchestrator.verify("web1", "none")),
    ("POST", "web1/start", {}, lambda lab: lab.world.orchestrator.start("web1")),
    ("PUT", "web1/tags", {"tags": ["no/tag"]}, lambda lab: lab.world.orchestrator.tag("web1", ["no/tag"])),
    ("DELETE", "web1", {}, lambda lab: lab.world.orchestrator.undefine("web1")),
    ("POST", "web1/attach", {"socket": "/images/no.sock", "driver": "simulated"}, _attach),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda row: f"{row[0]} {row[1]}")
async def test_a_refusal_is_the_same(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, refusal: Refusal
) -> None:
    """What the library refuses is refused with the same text, codes and knowledge; nothing was touched."""
    method, url, body, ask = refusal
    before = await lab.world.everything()
    with pytest.raises(SnaporchError) as refused:
        await ask(lab)
    answer = await lab.http.request(method, f"/v1/domains/{url}", json=body)
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    error = error_of(answer.json())
    assert (type(error), str(error), vars(error)) == (type(refused.value), str(refused.value), vars(refused.value))
    assert (answer.status_code, answer.json()["exit_code"]) == (refused.value.http_status, refused.value.exit_code)
    assert await lab.world.everything() == before


async def test_a_wrong_body_is_refused(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """What is no JSON, has unknown keys or wrong types, is a problem that names the place."""
    for body, place in (
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"snapshit": {}}', "snapshit"),
        (b'{"snapshot": {"memory": "false"}}', "body.snapshot.memory"),
        (b'{"options": {"bandwidth": "5"}}', "body.options.bandwidth"),
        (b'{"options": {"max_seconds": NaN}}', "body.options.max_seconds"),
        (b'{"flags": "live"}', "body.flags"),
        (b'{"options": {"strategy": "fast"}}', "body.options.strategy"),
        (b'{"options": {"on_timeout": 3}}', "body.options.on_timeout"),
        (b"[]", "body"),
        (b"3", "body"),
        (b'{"flags": ["fast"]}', "disk-only"),
    ):
        answer = await lab.http.post(f"{WEB}/snapshots", content=body)
        assert answer.status_code == 422, (body[:40], answer.text)
        assert place in answer.json()["detail"]


async def test_who_may_what(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Every row of the table asks for its role, and refuses one that is too low before it looks at anything."""
    before = await lab.world.everything()
    headers = {role: lab.secret(role) for role in Role}
    for row in ROUTES:
        url = row.path.format(domain="web1", name="none", id="0")
        below = [role for role in Role if row.role is not None and role < row.role]
        for role in below:
            answer = await lab.http.request(row.method, url, headers=headers[role], content=b"{")
            assert answer.status_code == 403, (row.path, role)
        with peer(None):
            for wrong in ({}, {"authorization": "Bearer sno_wrong"}):
                answer = await lab.http.request(row.method, url, headers=wrong, content=b"{")
                assert answer.status_code == 401, (row.path, wrong)
                assert answer.headers["www-authenticate"] == "Bearer"
        with peer(Peer(1, 65534, 65534)):
            assert (await lab.http.request(row.method, url)).status_code == 401
    assert await lab.world.everything() == before


async def test_tokens(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """A token is its hash at rest; one that is revoked lets nobody in."""
    headers = lab.secret(Role.VIEWER)
    secret = headers["authorization"].removeprefix("Bearer ")
    assert (await lab.http.get("/v1/whoami", headers=headers)).json() == {
        "name": "token:a-viewer",
        "role": "viewer",
    }
    assert secret not in lab.service.tokens.path.read_text()
    assert lab.service.tokens.path.stat().st_mode & 0o777 == 0o600
    lab.service.tokens.revoke("a-viewer")
    assert (await lab.http.get("/v1/whoami", headers=headers)).status_code == 401


async def test_paths_are_confined(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """No path in a request leads out of the configured directories: not by dots, not by links."""
    before = await lab.world.everything()
    (lab.service.orchestrator.root / "way-out").symlink_to("/etc")
    root = str(lab.service.orchestrator.root)
    for path in ("/etc/passwd", "/images/../etc/x", f"{root}/way-out/x", "/images", "relative", "/images/a\0b"):
        disk = {"disk": {"target": "vda"}, "external_sn": {"target": "vda", "path": path}}
        for asked in ({"memory_file": path}, {"disks": [disk]}):
            answer = await lab.http.post(f"{WEB}/snapshots", json={"snapshot": asked, "flags": ["live"]})
            assert answer.status_code in {403, 422}, (path, answer.text)
        for key in ("kernel", "initrd", "serial"):
            answer = await lab.http.post("/v1/domains", json={"name": "new", key: path})
            assert answer.status_code in {403, 422}, (path, answer.text)
        assert (await lab.http.post("/v1/domains/new/attach", json={"socket": path})).status_code in {403, 422}
    for name in ("..%2f..%2fetc", "..", "%00"):
        assert (await lab.http.get(f"/v1/domains/{name}")).status_code in {404, 422}
        assert (await lab.http.post(f"/v1/domains/{name}/start")).status_code in {404, 405, 422}
    assert await lab.world.everything() == before
    assert [info.name for info in await lab.world.orchestrator.domains()] == ["web1"]


async def test_an_unknown_driver_is_refused(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """It is a wrong request, which says which drivers there are; what a manager has is for local users."""
    answer = await lab.http.post("/v1/domains/new/attach", json={"socket": "/images/q", "driver": "qmeu"})
    assert (answer.status_code, "there are simulated" in answer.text) == (422, True)
    answer = await lab.http.post("/v1/domains", json={"name": "new", "driver": "qmeu"})
    assert (answer.status_code, "there are simulated" in answer.text) == (422, True)
    headers, uri = lab.secret(Role.ADMIN), {"uri": "qemu+ext:///system?command=/tmp/x"}
    for body in (uri, {"of": "theirs"}, {"driver": "libvirt"}, {"driver": "xen"}, {"socket": "/images/q"} | uri):
        assert (await lab.http.post("/v1/domains/new/attach", json=body, headers=headers)).status_code == 403


async def test_a_program_is_named_over_the_unix_socket_only(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Arguments for the hypervisor can have anything run: no token is enough for them."""
    definition = DomainDefinition("new", driver="simulated", extra_args=("-netdev", "tap,script=/tmp/x"))
    body = {"name": "new", "driver": "simulated", "extra_args": list(definition.extra_args)}
    headers = lab.secret(Role.ADMIN)
    with peer(None):
        assert (await lab.http.post("/v1/domains", json=body, headers=headers)).status_code == 403
    assert (await lab.http.post("/v1/domains", json=body)).status_code == 200


async def test_a_large_body_is_not_read(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """A body of more than is allowed is refused, whether it says so or not."""
    most = lab.service.config.body_bytes
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 65536
            await trio.lowlevel.checkpoint()
            yield b" " * 65536

    for content in (b" " * (most + 1), endless()):
        answer = await lab.http.post(f"{WEB}/snapshots", content=content)
        assert (answer.status_code, answer.json()["error"]) == (413, "TooLarge")
    assert sent <= 2 * most


async def test_idempotency(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """The same key is the same operation, for the same caller; for another request it is refused."""
    key = {"idempotency-key": "abc"}
    first = await lab.http.post(f"{WEB}/snapshots", json=LIVE, headers=key)
    again = await lab.http.post(f"{WEB}/snapshots", json=LIVE, headers=key)
    assert first.json()["id"] == again.json()["id"]
    other = await lab.http.post(f"{WEB}/snapshots", json={"flags": ["live"]}, headers=key)
    assert (other.status_code, other.json()["error"]) == (422, "InvalidInput")
    await lab.http.get(f"/v1/operations/{first.json()['id']}?wait")
    assert len((await lab.http.get(f"{WEB}/snapshots")).json()["items"]) == 1


async def test_busy_and_cancel(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """A second operation is told the first one's id; by that it can be cancelled, and all is as before."""
    before = await lab.world.everything()
    slow = LIVE | {"options": {"bandwidth": lab.world.slow}}
    first = (await lab.http.post(f"{WEB}/snapshots", json=slow)).json()
    second = await lab.http.post(f"{WEB}/snapshots", json={})
    assert (second.status_code, second.json()["exit_code"], second.json()["operation"]) == (409, 4, first["id"])
    cancelled = await lab.http.post(f"/v1/operations/{first['id']}/cancel?wait")
    assert cancelled.json()["outcome"] == "rolled-back"
    assert (await lab.world.everything())["files"] == before["files"]
    assert (await lab.http.post("/v1/operations/00000000/cancel")).status_code == 404


async def test_the_queue_is_short(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """More than may run wait their turn; more than may wait are refused."""
    lab.service.reload(lab.service.config.__class__(running=1, queued=0, directories=("/images",)))
    slow = LIVE | {"options": {"bandwidth": lab.world.slow}}
    first = (await lab.http.post(f"{WEB}/snapshots", json=slow)).json()
    answer = await lab.http.post("/v1/fsck", json={}, headers=lab.secret(Role.ADMIN))
    assert (answer.status_code, answer.json()["error"]) == (503, "Unavailable")
    lab.service.reload(lab.service.config.__class__(running=1, queued=1, directories=("/images",)))
    waiting = (await lab.http.post("/v1/fsck?wait=0", json={})).json()
    assert waiting["state"] == "queued"
    await lab.http.get(f"/v1/operations/{first['id']}?wait")
    assert (await lab.http.get(f"/v1/operations/{waiting['id']}?wait")).json()["outcome"] == "complete"


async def test_results_are_kept_for_a_while(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of operations long ago it is known how they ended, and no longer all that they came to."""
    monkeypatch.setattr("snaporch.service.jobs.RESULTS", 1)
    for name in ("one", "two", "three"):
        await lab.http.post(f"{WEB}/snapshots?wait", json={"snapshot": {"name": name}, "flags": ["live"]})
        items = (await lab.http.get("/v1/operations")).json()["items"]
    assert [each["outcome"] for each in items] == ["complete"] * 3
    assert [each["result"] is not None for each in items] == [True, True, False]


async def test_pages(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """A list comes in pages: all of it, once, in order."""
    for name in ("one", "two", "three"):
        await lab.http.post(f"{WEB}/snapshots?wait", json={"snapshot": {"name": name}, "flags": ["live"]})
    found, after = [], ""
    while True:
        page = (await lab.http.get(f"{WEB}/snapshots?limit=2{after}")).json()
        found.append([record["snapshot"]["name"] for record in page["items"]])
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert found == [["one", "two"], ["three"]]
    for wrong in ("limit=0.5&after=x", "limit=-1", "limit=x", "after=nothing", "limit=5000"):
        assert (await lab.http.get(f"{WEB}/snapshots?{wrong}")).status_code == 422, wrong


async def test_operations_come_in_pages(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Those of this service, in the journal or not, and those of others beside it: all, once, newest first."""
    names = ["a", "b", "c", "d"]
    for index, name in enumerate(names):
        if index % 2:
            await lab.http.post(f"{WEB}/snapshots?wait", json={"snapshot": {"name": name}, "flags": ["live"]})
            await lab.http.post("/v1/fsck?wait", json={})
        else:
            await lab.world.orchestrator.create("web1", DomainSnapshot(name), CreateFlag.LIVE)
    for domain, wanted in (("", ["", "d", "c", "", "b", "a"]), ("&domain=web1", names[::-1])):
        found, after = [], ""
        while True:
            page = (await lab.http.get(f"/v1/operations?limit=2{domain}{after}")).json()
            assert 0 < len(page["items"]) <= 2
            found += page["items"]
            if page["next"] is None:
                break
            after = f"&after={page['next']}"
        assert [each["subject"] for each in found] == wanted
        assert {each["journaled"] for each in found if each["kind"] == "create"} == {True}
    assert (await lab.http.get("/v1/operations?domain=nobody")).status_code == 404
    assert (await lab.http.get("/v1/operations?after=nothing")).status_code == 422


async def test_a_key_outlives_the_service(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next service knows what the key stands for, for whom; one that is too old it has forgotten."""
    key, other = {"idempotency-key": "abc"}, lab.secret(Role.OPERATOR)
    first = await lab.http.post(f"{WEB}/snapshots?wait", json=LIVE, headers=key)
    assert first.status_code == 200, first.text
    async with (
        open_service(lab.world.orchestrator, lab.service.config) as service,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=make_app(service)), base_url="http://x") as http,
    ):
        again = await http.post(f"{WEB}/snapshots?wait", json=LIVE, headers=key)
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
        assert (await http.post(f"{WEB}/snapshots", json={"flags": ["live"]}, headers=key)).status_code == 422
        assert (await http.post(f"{WEB}/snapshots?wait", json=LIVE, headers=key | other)).status_code == 409
        monkeypatch.setattr("snaporch.service.keys.KEPT_SECONDS", -1.0)
        assert (await http.post(f"{WEB}/snapshots?wait", json=LIVE, headers=key)).status_code == 409
    assert len((await lab.http.get(f"{WEB}/snapshots")).json()["items"]) == 1


def test_the_description_is_published() -> None:
    """docs/reference/openapi.json is what the service serves."""
    published = json.loads((DOCS / "reference/openapi.json").read_text())
    assert published | {"info": {}} == document(ROUTES) | {"info": {}}


def test_every_url_is_documented() -> None:
    """docs/how-to/service.md names every URL of the table with its role."""
    text = (DOCS / "how-to/service.md").read_text()
    for row in ROUTES:
        last = row.path.removeprefix("/v1/domains/{domain}")
        assert f"`{row.path}" in text or f"`{last}`" in text, row.path
