"""What could be attached to, as /proc has it, and what stands in the way."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snaporch import Discovered, InvalidInput, Unsupported, open_orchestrator
from snaporch.cli import execute
from snaporch.drivers.qemu import discover as proc
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.simulated import SimulatedDriver, SimulatedHost
from snaporch.model.names import check_socket

SECRET = "tiger-1234"  # noqa: S105 - it is to be looked for
QMP = "-qmp unix:/run/web.sock,server=on,wait=off"


@pytest.fixture
def pid() -> Iterator[int]:
    """A process that does nothing, which is to be taken for a QEMU."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def look(monkeypatch: pytest.MonkeyPatch, pid: int, words: str, known: dict[int, str] | None = None) -> Discovered:
    """Return what is said of a process whose command line is this one; all others are no QEMUs."""
    argv = ("/usr/bin/qemu-system-x86_64", *words.split())
    monkeypatch.setattr(proc, "command_line", lambda each: argv if each == pid else ("sh",))
    monkeypatch.setattr(proc, "foreign", lambda _: "")
    (found,) = proc.discover(known or {})
    assert SECRET not in repr(found)
    return found


@pytest.mark.parametrize(
    ("words", "name", "socket", "blocker"),
    [
        (f"-name web {QMP}", "web", "/run/web.sock", ""),
        (f"-name guest=web,debug-threads=on {QMP}", "web", "/run/web.sock", ""),
        ("-chardev socket,id=m,path=/m,server=on -mon chardev=m,mode=control", "", "/m", ""),
        ("-chardev socket,id=m,path=m,server=on -qmp chardev:m", "", f"{os.getcwd()}/m", ""),
        ("-chardev socket,id=m,path=/m,server=on -mon chardev=m,mode=readline", "", "", "no QMP socket"),
        ("-monitor unix:/m,server=on", "", "", "no QMP socket"),
        ("-qmp tcp:localhost:4444,server=on", "", "", "no QMP socket"),
        ("-qmp unix:/m", "", "", "no QMP socket"),
        (f"-object secret,id=s,data={SECRET} -name web", "web", "", "no QMP socket"),
        (f"-name web -password={SECRET}", "", "", "an option that is not known"),
        (f"-name web {QMP} -pidfile /var/lib/libvirt/qemu/web.pid", "web", "/run/web.sock", "--driver libvirt"),
        ("-chardev socket,id=snaporch0,fd=7,server=on -mon chardev=snaporch0,mode=control", "", "", "another root"),
    ],
)
def test_command_lines(  # noqa: PLR0917 - a table's row
    words: str, name: str, socket: str, blocker: str, pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name and QMP sockets are told, and no secret."""
    found = look(monkeypatch, pid, words)
    assert (found.name, found.sockets, found.pid) == (name, (socket,) if socket else (), pid)
    assert (blocker in found.blocker, bool(found.blocker)) == (True, bool(blocker))


def test_what_is_here_already(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and nothing stands in its way."""
    found = look(monkeypatch, pid, f"-name web {QMP}", {pid: "mine"})
    assert (found.domain, found.blocker) == ("mine", "")


def test_another_users(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said whose it is."""
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setattr(proc, "command_line", lambda each: ("qemu-kvm", *QMP.split()) if each == pid else ("sh",))
    (found,) = proc.discover({})
    assert "it runs as" in found.blocker


async def test_drivers(tmp_path: Path) -> None:
    """One that cannot list is passed over, or refused when it is named; so is one that there is not."""
    drivers = {"qemu": QemuDriver(), "simulated": SimulatedDriver(SimulatedHost())}
    async with open_orchestrator(tmp_path, drivers=drivers) as orch:
        assert {each.driver for each in await orch.discover()} <= {"qemu"}
        with pytest.raises(Unsupported, match="cannot list what could be attached to"):
            await orch.discover("simulated")
        with pytest.raises(InvalidInput, match="there is no driver 'qmeu'"):
            await orch.discover("qmeu")


def test_the_verb(
    tmp_path: Path, pid: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """People are told the command that attaches; --json has all of it."""
    look(monkeypatch, pid, f"-name web {QMP}")
    arguments = ["--root", str(tmp_path), "domain", "discover", "--driver", "qemu"]
    assert execute(arguments) == 0
    assert "`snaporch domain attach web --qmp /run/web.sock`" in capsys.readouterr().out
    assert execute([*arguments, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert (document["name"], document["pid"], document["sockets"]) == ("web", pid, ["/run/web.sock"])


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("localhost:4444", "one more monitor"),
        (":4444", "one more monitor"),
        ("[::1]:9", "one more monitor"),
        ("tcp:192.0.2.1:5,server=on", "one more monitor"),
        ("unix:/run/a.sock,server=on", "give its path alone"),
    ],
)
async def test_no_path_of_a_socket(tmp_path: Path, address: str, word: str) -> None:
    """Who is at the other end of a connection over TCP nobody knows: it is said what to do."""
    async with open_orchestrator(tmp_path, drivers={"qemu": QemuDriver()}) as orch:
        with pytest.raises(InvalidInput, match=f"path of a unix socket: .*{word}"):
            await orch.attach("web", address)
    for path in ("/run/a:1", "./a:1", "a.sock"):
        assert check_socket(path) == path
