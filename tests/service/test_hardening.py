"""Tokens, logs, sockets and values in hostile or unlucky circumstances."""

from __future__ import annotations

import fcntl
import grp
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from structlog.testing import capture_logs

from snaporch import CreateFlag, DomainDefinition, DomainSnapshot
from snaporch.batch.schedule import ScheduleInfo
from snaporch.errors import InvalidInput, Unavailable
from snaporch.service import doors, log, webhooks
from snaporch.service.app import make_app
from snaporch.service.config import Config, load_config
from snaporch.service.roles import Role, Tokens
from snaporch.service.service import open_service
from snaporch.service.webhooks import Alert, Webhooks
from snaporch.testing import open_simulated_world
from tests.service.conftest import ROOT_PEER, Lab, peer

SECONDS = 60.0
NOBODY = 65534


def test_tokens_are_changed_by_one_at_a_time(tmp_path: Path) -> None:
    """However many are made and revoked at once, each is there once made, and gone once revoked."""
    path = tmp_path / "tokens.json"
    (tmp_path / "tokens.json.0123.new").write_text("by one who was killed")

    def life(number: int) -> None:
        tokens = Tokens(path)
        kept, gone = tokens.make(f"kept{number}", Role.VIEWER), tokens.make(f"gone{number}", Role.ADMIN)
        tokens.revoke(f"gone{number}")
        for each in (tokens, Tokens(path)):
            assert each.caller(gone) is None
            assert each.caller(kept) is not None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(life, range(32)))
    assert {token.name for token in Tokens(path).all()} == {f"kept{number}" for number in range(32)}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tokens.json", "tokens.lock"]


async def test_broken_tokens(lab: Lab) -> None:
    """Tokens that cannot be read let nobody in, and say so; who needs none is answered."""
    headers = lab.secret(Role.ADMIN)
    for content in ("", "{", '[{"name": 1}]', '{"a": []}', "[null]"):
        lab.service.tokens.path.write_text(content)
        answer = await lab.http.get("/v1/whoami", headers=headers)
        assert answer.status_code == 503, answer.text
        assert "tokens.json" in answer.json()["detail"]
        assert (await lab.http.get("/v1/whoami")).status_code == 200
        with pytest.raises(Unavailable):
            lab.service.tokens.make("x", Role.VIEWER)


def test_a_log_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines for a full pipe are dropped and counted; when it is read, what was lost is said."""
    monkeypatch.setattr(log, "BYTES", 10_000)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    writer = log.LogWriter(write)
    line = "x" * 1000 + "\ud800\n"
    for _ in range(200):
        writer.write(line[:500])
        writer.write(line[500:])
        writer.flush()
    assert writer.lost >= 180
    with open(read, "rb") as lines:
        found = next(json.loads(each) for each in lines if each.startswith(b"{"))
        assert found["event"] == "log lines were lost"
        assert found["lines"] == writer.lost
        threading.Thread(target=writer.close).start()
        assert lines.readline()  # nothing is cut
    os.close(write)


def test_a_log_that_cannot_be_written() -> None:
    """Where nobody reads any more, lines are lost and nothing else is."""
    read, write = os.pipe()
    os.close(read)
    writer = log.LogWriter(write)
    writer.write("a\n")
    writer.close()
    assert writer.lost == 1
    os.close(write)


@pytest.fixture
def public() -> Iterator[Path]:
    """Give a directory that everybody can pass."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def as_nobody(act: Callable[[], object]) -> bool:
    """Return whether somebody without any rights can do something."""
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("users", [{}, {"nobody": "viewer"}])
def test_users_get_in_and_no_further(public: Path, users: dict[str, str]) -> None:
    """Where users have roles, others reach the socket and what names it, and nothing else in the root."""
    root = public / "root"
    root.mkdir(mode=0o700)
    for name in ("service.lock", "tokens.json", "catalog.sqlite3"):
        (root / name).touch(0o600)
    config = Config(users=users)
    doors.open_the_way(config, root, root / "service.lock")
    with doors.listening(config, str(root / "service.sock")):
        modes = [path.stat().st_mode & 0o777 for path in (root, root / "service.lock", root / "service.sock")]
        assert modes == ([0o711, 0o644, 0o666] if users else [0o700, 0o600, 0o600])
        if os.geteuid() == 0:  # else there is nobody to try it as
            assert as_nobody(lambda: socket.socket(socket.AF_UNIX).connect(str(root / "service.sock"))) == bool(
                users
            )
            assert not as_nobody(lambda: os.listdir(root))
            for name in ("tokens.json", "catalog.sqlite3"):
                assert not as_nobody((root / name).read_bytes)
    doors.open_the_way(Config(), root, root / "service.lock")
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_group_gets_in(public: Path) -> None:
    """With a group, its members get in and no others."""
    group = os.getegid()
    config = Config(users={"nobody": "viewer"}, group=grp.getgrgid(group).gr_name)
    doors.open_the_way(config, public)
    with doors.listening(config, str(public / "s")):
        assert [(each.stat().st_mode & 0o777, each.stat().st_gid) for each in (public, public / "s")] == [
            (0o710, group),
            (0o660, group),
        ]
    with pytest.raises(InvalidInput, match="group"):
        Config(group="nobody-is-in-such-a-group")


@pytest.mark.parametrize(("address", "good"), [("", False), ("127.0.0.1", True), ("::", False), ("::1", True)])
def test_a_socket_from_systemd(monkeypatch: pytest.MonkeyPatch, address: str, *, good: bool) -> None:
    """TCP without a certificate is for loopback addresses only, whoever has made the socket."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.create_server((address, 0), family=family)
    monkeypatch.setattr(doors, "activated", lambda: [made])
    if good:
        with doors.listening(Config(), "/nowhere") as sockets:
            assert sockets == [made]
    else:
        with pytest.raises(InvalidInput, match="certificate"), doors.listening(Config(), "/nowhere"):
            pass
    assert made.fileno() == -1


@pytest.mark.parametrize(
    "text",
    [
        "running = 0",
        "queued = -1",
        "streams = 10000000",
        "body_bytes = 9999999999999",
        "stop_seconds = -1.0",
        "per_user = 0",
    ],
)
def test_settings_have_ranges(tmp_path: Path, text: str) -> None:
    """A number that makes no sense is refused by name."""
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(InvalidInput, match=text.partition(" ")[0]):
        load_config(tmp_path / "s.toml")


WEB = "/v1/domains/web1"
BAD: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", f"{WEB}/shutdown", {"timeout": 1e9}),
    ("POST", f"{WEB}/shutdown", {"timeout": -5}),
    ("PUT", f"{WEB}/depth", {"depth": 10**40}),
    ("PUT", f"{WEB}/depth", {"depth": -1}),
    ("PUT", f"{WEB}/tags", {"tags": ["a"] * 101}),
    ("POST", f"{WEB}/flatten", {"depth": -1}),
    ("POST", "/v1/recover", {"patience": -1}),
    ("POST", "/v1/recover", {"patience": 1e300}),
    ("POST", f"{WEB}/snapshots", {"options": {"bandwidth": -1}}),
    ("POST", f"{WEB}/snapshots", {"options": {"bandwidth": 10**30}}),
    ("POST", f"{WEB}/snapshots", {"options": {"max_seconds": -4}}),
    ("POST", f"{WEB}/snapshots", {"snapshot": {"creation_time": 10**30}}),
    ("POST", f"{WEB}/snapshots", {"snapshot": {"description": "\ud800"}}),
    ("POST", f"{WEB}/snapshots", {"snapshot": {"description": "a\0"}}),
    ("POST", f"{WEB}/snapshots", {"snapshot": {"description": "a" * 70_000}}),
    ("POST", f"{WEB}/snapshots", {"snapshot": {"name": "\udfff"}}),
    ("POST", f"{WEB}/delete", {"names": ["a"] * 20_000}),
    ("POST", "/v1/domains", {"name": "x", "append": "\ud800"}),
    ("POST", "/v1/domains", {"name": "x", "driver": "\ud800"}),
    ("POST", "/v1/domains", {"name": "x", "vcpus": 10**30}),
    ("POST", "/v1/domains", {"name": "x", "\ud800": 1}),
    ("POST", f"{WEB}/attach", {"socket": "/images/x", "driver": "nothing"}),
)


async def test_values_have_ranges(lab: Lab) -> None:
    """What is out of range, half a character or no driver is refused: 422, with the place; nothing changes."""
    before = await lab.world.everything()
    for method, url, body in BAD:
        answer = await lab.http.request(method, url, content=json.dumps(body))
        assert answer.status_code == 422, (url, body, answer.text[:200])
    assert await lab.world.everything() == before


@pytest.mark.parametrize(
    "address", ["http://example.org/x", "ftp://localhost/", "https:///x", "/x", "http://localhost@e.org/"]
)
def test_addresses_of_webhooks(address: str) -> None:
    """Encrypted, or on this host."""
    with pytest.raises(InvalidInput, match="webhooks"):
        Config(webhooks=(address,))


async def test_webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alert is sent until it is taken, and no redirect is followed; beyond a number, they are dropped."""
    monkeypatch.setattr(webhooks, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(webhooks, "UNDER_WAY", 2)
    asked: list[tuple[str, dict[str, Any]]] = []
    done = trio.Event()
    answers = {"/taken": ["503 Later", "429 Later", "204 Fine"], "/refused": ["400 No"], "/moved": ["302 There"]}

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"}" not in data:
                data += await stream.receive_some()
            head, _, body = data.decode().partition("\r\n\r\n")
            path = head.split()[1]
            asked.append((path, json.loads(body)))
            status = answers[path].pop(0)
            more = f"location: http://{address}/elsewhere\r\n"
            await stream.send_all(
                f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n{more}connection: close\r\n\r\n".encode()
            )
            if not any(answers.values()):
                done.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        schedule = ScheduleInfo("nightly", "/p/nightly.toml", error="no such domain", overdue=True)
        hooks = Webhooks(lambda: [f"http://{address}{path}" for path in answers], lambda: [schedule])
        with capture_logs() as lines:
            nursery.start_soon(hooks.run)
            with trio.fail_after(SECONDS):
                await done.wait()
                await trio.testing.wait_all_tasks_blocked()
        with capture_logs() as dropped:
            for _ in range(3):
                hooks.tell(Alert("plan-failed", "nightly", "why"))
        assert [line["event"] for line in dropped] == ["an alert was dropped: too many are not delivered yet"]
        nursery.cancel_scope.cancel()
    assert sorted(path for path, _ in asked) == ["/moved", "/refused", "/taken", "/taken", "/taken"]
    expected = {"kind": "plan-overdue", "subject": "nightly", "text": "no such domain"}
    assert all(body.items() >= expected.items() for _, body in asked)
    assert [line["status"] for line in lines if line["event"] == "an alert was refused"] in ([400, 302], [302, 400])


async def test_the_same_answer_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key stands for one request, whatever its host name and how long it waits, and for its answer, for good."""
    monkeypatch.setattr("snaporch.service.jobs.RESULTS", 1)  # others are forgotten when another job comes
    url, key = f"{WEB}/snapshots", {"idempotency-key": "k"}
    asked: tuple[tuple[str, dict[str, Any], str], ...] = (
        (url, {"snapshot": {"name": "good"}, "flags": ["live"]}, "good"),
        (url, {"snapshot": {"name": "good", "description": "again"}, "flags": ["live"]}, "bad"),
        ("/v1/fsck", {}, "fsck"),
    )
    async with open_simulated_world(tmp_path / "root") as world:
        answers = []
        for restart in range(2):
            async with open_service(world.orchestrator, Config(directories=("/images",))) as service:
                transport = httpx2.ASGITransport(app=make_app(service))
                async with httpx2.AsyncClient(transport=transport, base_url=f"http://x{restart}") as http:
                    with peer(ROOT_PEER):
                        for wait in ("?wait=60", "?wait=59"):
                            for path, body, name in asked:
                                headers = {"idempotency-key": name}
                                answer = await http.post(path + wait, json=body, headers=headers)
                                answers.append((name, answer.status_code, answer.json()))
                        other = await http.post(url, json={}, headers=key | {"idempotency-key": "good"})
                        assert other.status_code == 422
        for name in ("good", "bad", "fsck"):
            found = [rest for each, *rest in answers if each == name]
            assert found == found[:1] * 4
        assert [status for _, status, _ in answers[:3]] == [200, 409, 200]
        assert len(await world.orchestrator.list("web1")) == 1


async def test_changes(tmp_path: Path) -> None:
    """From the feed an inventory can be kept: by numbers that hold across restarts, with what is gone."""
    inventory: dict[tuple[str, str, str], Any] = {}
    revision = 0
    async with open_simulated_world(tmp_path / "root") as world:
        orch = world.orchestrator

        async def follow(http: httpx2.AsyncClient, **query: float) -> dict[str, Any]:
            nonlocal revision
            page: dict[str, Any] = {"more": True}
            while page["more"]:
                asked = query | {"after": revision, "limit": 2}
                page = (await http.get("/v1/changes", params=asked)).json()
                for item in page["items"]:
                    assert item["revision"] > revision
                    revision = item["revision"]
                    at = (item["kind"], item["domain"], item["name"])
                    inventory.pop(at, None)
                    if not item["gone"]:
                        inventory[at] = item["record"]
                assert page["revision"] == revision
            return page

        for restart in range(2):
            async with open_service(orch) as service:
                transport = httpx2.ASGITransport(app=make_app(service))
                async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
                    with peer(ROOT_PEER):
                        names = [f"n{restart}{number}" for number in range(3)]
                        for name in names:
                            await orch.create("web1", DomainSnapshot(name), CreateFlag.LIVE)
                        copy = f"copy{restart}"
                        await orch.clone("web1", names[1], copy)
                        await follow(http)
                        assert inventory["domain", copy, ""]["origin"]["name"] == names[1]
                        await orch.destroy(copy)
                        await orch.undefine(copy, discard=True)
                        await orch.delete("web1", names[0])
                        await orch.define(DomainDefinition("new", driver="simulated"))
                        await orch.undefine("new")
                        await follow(http, wait=60)
                        assert {name for kind, _, name in inventory if kind == "snapshot"} == {
                            record.name for record in await orch.list("web1")
                        }
                        assert [at for at in inventory if at[0] == "domain"] == [("domain", "web1", "")]
                        assert all("images" not in record for record in inventory.values())
                        assert (await http.get("/v1/changes?after=99999999")).json()["gap"]
                        present = (await http.get("/v1/changes?after=now")).json()
                        assert (present["items"], present["revision"]) == ([], revision)
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(partial(follow, http, wait=60))
                            await orch.tag("web1", [f"t{restart}"])
                        assert inventory["domain", "web1", ""]["tags"] == [f"t{restart}"]
