"""A look at a QEMU that is attached to: what is seen of it is of one program, whatever it becomes meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from snaporch.drivers.qemu import attaching, surroundings
from snaporch.drivers.qmp.process import last_words
from snaporch.errors import Refused
from snaporch.orchestrator import open_orchestrator

PROGRAM = """
import json, os, signal, socket, sys
signal.signal(signal.SIGUSR1, lambda *_: os.execv("/bin/sleep", ["qemu-sleep", "60"]))
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
print(flush=True)
connection, _ = listener.accept()
connection.set_inheritable(True)
lines = connection.makefile("rw")
version = {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}
print(json.dumps({"QMP": {"version": version, "capabilities": []}}), file=lines, flush=True)
print(json.dumps({"return": {}, "id": json.loads(lines.readline())["id"]}), file=lines, flush=True)
while True:
    signal.pause()
"""


async def test_it_becomes_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks it runs another program, which may have other rights: nothing is known of it."""
    path = str(tmp_path / "qmp.sock")
    process = subprocess.Popen(
        ["qemu-fake", "-c", PROGRAM, path], executable=sys.executable, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()

    def becomes_another(pid: int) -> str:
        before = os.readlink(f"/proc/{pid}/exe")
        os.kill(pid, signal.SIGUSR1)
        while os.readlink(f"/proc/{pid}/exe") == before:
            time.sleep(0.001)
        return ""

    monkeypatch.setattr(surroundings, "foreign", becomes_another)
    try:
        with pytest.raises(Refused, match="has become another program"):
            await attaching.look("web", path, 10.0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    "says", [b"QEMU 10.0 monitor - type 'help'\r\n(qemu) ", b""], ids=["a monitor for people", "nothing"]
)
async def test_no_machine_is_there(says: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, and not failed: it was only looked at."""
    monkeypatch.setattr("snaporch.drivers.qemu.driver.CONNECT_SECONDS", 0.5)
    path = str(tmp_path / "monitor.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(1)

        async def answer() -> None:
            peer, _ = await trio.socket.from_stdlib_socket(listening).accept()
            with peer:
                await peer.send(says)
                await trio.sleep_forever()

        async with open_orchestrator(tmp_path / "root") as orch, trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with pytest.raises(Refused, match=r"discover|attach to the QMP socket"):
                await orch.attach("web", path)
            assert not await orch.domains()
            nursery.cancel_scope.cancel()


def test_a_log_of_any_size(tmp_path: Path) -> None:
    """Whoever QEMU runs as has its log open: it is not read whole."""
    log = tmp_path / "qemu.log"
    log.write_text("qemu: old\n")
    os.truncate(log, 2**36)
    with log.open("a") as file:
        file.write("\nqemu: one\nqemu: two\n")
    assert last_words(log, 5).endswith("one; two")
    assert last_words(log, 2**36 + 11) == "two"
