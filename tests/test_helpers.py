"""The two helper processes, at the moment in which snaporch dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from snaporch.drivers.local import guard
from snaporch.drivers.qmp import guard as action
from snaporch.drivers.qmp import sink, stream

SECONDS = 60.0
GREETING = {"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}


class Paused:
    """QEMU with a paused guest that still has something to tell the client before; or with one that migrates."""

    def __init__(self, path: Path, *, migrates: bool = False) -> None:
        self.asked: list[str] = []
        self._runs = self._migrates = migrates
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(0)

    def serve(self) -> None:
        """Serve one client to its end."""
        with self.listener, self.listener.accept()[0] as client, client.makefile("rw") as lines:

            def say(*messages: object) -> None:
                lines.write("".join(json.dumps(message) + "\n" for message in messages))
                lines.flush()

            stale = [{"return": {"status": "completed", "running": False}, "id": 7}, {"return": {}}]
            say(stale[0], GREETING, *stale)
            for line in lines:
                command = json.loads(line)
                self.asked.append(command["execute"])
                self._runs = command["execute"] == "cont" or (self._runs and command["execute"] != "stop")
                self._migrates = self._migrates and command["execute"] != "migrate_cancel"
                status = "active" if self._migrates else "none"
                say({"return": {"running": self._runs, "status": status}, "id": command["id"]})


def _has_open(pid: int, path: Path) -> bool:
    return any(os.path.realpath(entry) == str(path) for entry in Path(f"/proc/{pid}/fd").iterdir())


ASKED = ["qmp_capabilities", "query-migrate"], ["query-status", "cont", "query-status"]


@pytest.mark.parametrize(
    ("crowded", "stream"),
    [(False, []), (True, []), (False, ["stop", "query-status", "migrate_cancel", "query-migrate"])],
)
def test_guard(tmp_path: Path, *, crowded: bool, stream: list[str]) -> None:
    """The guest is let run once, whatever QEMU still has to tell the dead one, and whoever waits before us.

    While a stream is cancelled it stands.
    """
    qemu = Paused(tmp_path / "qmp", migrates=bool(stream))
    first = socket.socket(socket.AF_UNIX)
    if crowded:
        first.connect(str(tmp_path / "qmp"))
    arguments = [sys.executable, "-I", "-S", guard.__file__, action.__file__]
    arguments += ["pause", str(tmp_path / "qmp"), "-", "-", "cancel", "-", "-", "-"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(len(guard.READY)) == guard.READY
        process.stdin.close()
        if crowded:
            while not _has_open(process.pid, tmp_path):  # as long as it tries to connect
                pass
            qemu.listener.accept()[0].close()
        first.close()
        server = threading.Thread(target=qemu.serve)
        server.start()
        assert process.wait(SECONDS) == 0
        server.join(SECONDS)
    assert qemu.asked == [*ASKED[0], *stream, *ASKED[1]]


def test_sink_whose_starter_is_gone(tmp_path: Path) -> None:
    """It ends with its pipe, though nobody is there to be told that it has begun."""
    path, result = tmp_path / "memory", tmp_path / "result"
    path.touch()
    sink.reserve(result)
    rate = sink.shared()
    gone, output = os.pipe()
    os.close(gone)
    command = [sys.executable, sink.__file__, str(path), str(result), str(rate), sink.NONE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, pass_fds=[rate]) as process:
        os.close(output)
        process.communicate(b"x" * 5000, timeout=SECONDS)
    assert process.returncode == 0
    assert path.read_bytes() == b"x" * 5000
    assert json.loads(result.read_text())["size"] == 5000


@pytest.mark.parametrize("release", [True, False], ids=["let go", "by itself"])
def test_sink_that_is_held(tmp_path: Path, *, release: bool) -> None:
    """It takes no more than a buffer and what is in its pipe, until it is let go or the time is over."""
    path, result, rate = tmp_path / "memory", tmp_path / "result", sink.shared()
    path.touch()
    sink.reserve(result)
    seconds = SECONDS if release else 3.0
    command = [sys.executable, sink.__file__, str(path), str(result), str(rate), sink.NONE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[rate]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(len(sink.READY)) == sink.READY
        began = time.monotonic()
        sink.hold(rate, seconds)
        feeder = threading.Thread(target=process.communicate, args=(bytes(4 * sink.BUFFER),))
        feeder.start()
        feeder.join(0.25)
        assert feeder.is_alive()
        if release:
            sink.hold(rate, 0)
        feeder.join(SECONDS)
    assert process.returncode == 0
    assert (time.monotonic() - began < seconds) is release
    assert json.loads(result.read_text())["size"] == 4 * sink.BUFFER


def test_a_sink_of_another_installation_is_known(tmp_path: Path) -> None:
    """After an upgrade the program is elsewhere, and what wrote before it still writes."""
    program, memory = tmp_path / "sink.py", str(tmp_path / "one.mem")
    program.write_text("print(flush=True); input()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(program), memory], **pipes) as process:  # type: ignore[call-overload]
        try:
            process.stdout.readline()  # before it runs, the kernel may not know its arguments yet
            assert stream._sinks(memory) == [process.pid]
            assert not stream._sinks(memory + "2")
        finally:
            process.kill()
