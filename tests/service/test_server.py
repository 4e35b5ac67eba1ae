"""The service as a process: its lock, its socket, its signals, systemd, TLS; the command line through it."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme

from snaporch.cli import execute
from snaporch.service.owner import owner
from tests.cli.conftest import SECONDS, Program, Ran, until
from tests.test_priority import may_have_priority, policy


@contextmanager
def serving(program: Program, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a service until the end of the body; it is told to stop, and does."""
    root = program.directory / "root"
    log = open(program.directory / "service.log", "a")  # noqa: SIM115 - the process writes to it
    command = [sys.executable, "-m", "snaporch", "--root", str(root), "serve", *arguments]
    with log, subprocess.Popen(command, stderr=log, env=os.environ | environment, text=True) as process:
        try:
            until(lambda: owner(root) is not None or process.poll() is not None)
            yield process
        finally:
            process.terminate()
            process.wait(SECONDS)


def logged(program: Program) -> list[dict[str, Any]]:
    """Return what the services have logged."""
    return [json.loads(line) for line in (program.directory / "service.log").read_text().splitlines()]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """The program, on a root where nothing is."""
    (tmp_path / "web.toml").write_text('name = "web"\nmemory = "64MiB"\n')
    return Program(tmp_path)


def test_one_process_owns_the_root(program: Program) -> None:
    """A second service is refused; the socket is ours alone, and is gone when the service is, as is its lock."""
    root = program.directory / "root"
    with serving(program) as process:
        assert (root / "service.sock").stat().st_mode & 0o777 == 0o600
        second = program.run("serve")
        assert (second.status, "owns" in second.err) == (2, True)
        assert owner(root) is not None
        process.terminate()
        assert process.wait(SECONDS) == 0
        assert not (root / "service.sock").exists()
        assert owner(root) is None
    with serving(program) as process:
        process.kill()
        process.wait()
        assert (root / "service.sock").exists()
        assert owner(root) is None
    with serving(program):
        assert program.answer("domain", "list") == []


def has_priority(thread: int) -> bool:
    return policy(thread) == os.SCHED_RR


def test_priority(program: Program) -> None:
    """The service's thread has real-time priority where it may, no other thread of it has; or it says that not."""
    with serving(program) as process:
        assert program.answer("operations") == []
        assert has_priority(process.pid) == may_have_priority()
        others = {int(task) for task in os.listdir(f"/proc/{process.pid}/task")} - {process.pid}
        assert others
        assert not any(map(has_priority, others))
    assert any("real-time" in line["event"] for line in logged(program)) != may_have_priority()
    (program.directory / "root" / "service.toml").write_text("realtime = false\n")
    with serving(program) as process:
        assert not has_priority(process.pid)


def test_nobody_reads_the_log(program: Program) -> None:
    """A service whose standard error is gone works as before: what it would say is lost, and nothing else."""
    command = [sys.executable, "-m", "snaporch", "--root", str(program.directory / "root"), "serve"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: owner(program.directory / "root") is not None or process.poll() is not None)
            assert process.stderr is not None
            process.stderr.close()
            for _ in range(3):  # each of them is logged, as an operation and for the audit
                assert program.answer("recover") == []
                assert program.run("fsck").status == 0
            assert process.poll() is None
        finally:
            process.terminate()
            assert process.wait(SECONDS) == 0


def here(program: Program, *arguments: str) -> Ran:
    """Run the command line in this process: a new one takes a second."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = execute(["--root", str(program.directory / "root"), *arguments])
    return Ran(status, out.getvalue(), err.getvalue())


def test_the_command_line_says_the_same_through_the_service(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, errors and exit status of every verb are the same with a service and without."""
    verbs: list[tuple[str, ...]] = [
        ("domain", "define", "web.toml"),
        ("domain", "list"),
        ("domain", "show", "web"),
        ("domain", "tag", "web", "a"),
        ("list", "web"),
        ("tree", "web"),
        ("operations",),
        ("create", "web", "one"),
        ("create", "web", "--disk-only", "--live"),
        ("create", "no/body"),
        ("revert", "web", "one"),
        ("delete", "web", "one", "--dry-run"),
        ("verify", "web", "one"),
        ("show", "web", "one"),
        ("domain", "pause", "web"),
        ("domain", "shutdown", "web"),
        ("domain", "show", "a/b"),
        ("domain", "attach", "other", "--qmp", "root/none.sock"),
        ("recover",),
        ("fsck",),
        ("domain", "undefine", "web"),
        ("domain", "undefine", "web"),
    ]

    asked = [("--json", *verb) if index % 3 else verb for index, verb in enumerate(verbs)]
    monkeypatch.chdir(program.directory)
    without = [here(program, *verb) for verb in asked]
    with serving(program):
        through = [here(program, *verb) for verb in asked]
    for verb, one, other in zip(asked, without, through, strict=True):
        assert one == other, verb
    assert {ran.status for ran in without} >= {0, 2, 3}
    audited = [line for line in logged(program) if line["event"] == "audit"]
    assert {line["by"] for line in audited} == {f"uid:{os.geteuid()}"}


def test_without_a_service_http_is_not_imported(program: Program) -> None:
    """A verb in this process does not wait for the import of what it does not need."""
    code = (
        "import sys; from snaporch.cli import execute; execute(sys.argv[1:]);"
        "print([m for m in ('httpx2', 'starlette', 'hypercorn', 'anyio') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "--root", str(program.directory / "root"), "domain", "list"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_tcp_is_tls_and_tokens(program: Program) -> None:
    """Over TCP nobody gets in without a token, and nobody without TLS; SIGHUP takes a new configuration."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    directory = program.directory
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    config = directory / "root" / "service.toml"
    config.parent.mkdir(mode=0o700)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = f'listen = "127.0.0.1:{port}"\ncertificate = "{directory}/cert.pem"\nkey = "{directory}/key.pem"\n'
    config.write_text(text)
    secret = program.answer("token", "make", "ci", "--role", "operator")["token"]
    with serving(program) as process, httpx2.Client(base_url=f"https://127.0.0.1:{port}", verify=context) as http:
        assert http.get("/v1/domains").status_code == 401
        assert http.get("/v1/health").status_code == 200
        http.headers["authorization"] = f"Bearer {secret}"
        assert http.get("/v1/whoami").json() == {"name": "token:ci", "role": "operator"}
        assert http.post("/v1/domains", json={"name": "web"}).status_code == 403
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{port}/v1/health")
        config.write_text(text + "body_bytes = 10\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: any(line["event"] == "reloaded" for line in logged(program)))
        assert http.post("/v1/domains/web/start", content=b" " * 11).status_code == 413
        config.write_text("nonsense = 1\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: any(line["event"].startswith("not reloaded") for line in logged(program)))
        program.answer("token", "revoke", "ci")
        assert http.get("/v1/domains").status_code == 401
    refused = [line for line in logged(program) if line["event"] == "audit" and line["status"] in {401, 403, 413}]
    assert {line["by"] for line in refused} == {"anonymous", "token:ci", "unknown token"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('listen = "0.0.0.0:8443"', "certificate"),
        ('listen = "here"', "ADDRESS:PORT"),
        ('log = "loud"', "json"),
        ('users = {alice = "boss"}', "boss"),
        ('directories = ["relative"]', "absolute"),
        ("runing = 1", "runing"),
        ("= 1", "service.toml"),
    ],
)
def test_a_wrong_configuration_is_refused(program: Program, text: str, says: str) -> None:
    """It says what is wrong and where, and serves nobody."""
    (program.directory / "service.toml").write_text(text)
    ran = program.run("serve", "--config", "service.toml")
    assert (ran.status, says in ran.err) == (2, True), ran.err


def test_systemd(program: Program) -> None:
    """Systemd is told of readiness, life, reload and stop; its socket is taken, and left to it."""
    path = program.directory / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard, socket.socket(socket.AF_UNIX) as given:
        heard.bind(str(program.directory / "n"))
        heard.settimeout(SECONDS)
        given.bind(str(path))
        given.listen()
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
            "os.execv(sys.executable, [sys.executable, '-m', 'snaporch', *sys.argv[2:]])"
        )
        arguments = [str(given.fileno()), "--root", str(program.directory / "root"), "serve"]
        environment = os.environ | {
            "LISTEN_FDS": "1",
            "NOTIFY_SOCKET": str(program.directory / "n"),
            "WATCHDOG_USEC": "200000",
        }
        command = [sys.executable, "-c", code, *arguments]
        options = {"pass_fds": [given.fileno()], "env": environment, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **options) as process:  # type: ignore[call-overload]
            try:
                assert next(said for said in iter(lambda: heard.recv(999), b"") if said == b"READY=1")
                assert b"WATCHDOG=1" in {heard.recv(999), heard.recv(999)}
                transport = httpx2.HTTPTransport(uds=str(path))
                with httpx2.Client(transport=transport, base_url="http://x") as http:
                    assert http.get("/v1/ready").json() == {"ready": True}
                process.send_signal(signal.SIGHUP)
                assert next(
                    said for said in iter(lambda: heard.recv(999), b"") if said.startswith(b"RELOADING=1\nMO")
                )
            finally:
                process.terminate()
            assert next(said for said in iter(lambda: heard.recv(999), b"") if said == b"STOPPING=1")
            assert process.wait(SECONDS) == 0
        assert path.exists()
