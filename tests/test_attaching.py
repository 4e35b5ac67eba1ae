"""A look at a QEMU that is attached to: what is seen of it is of one program, whatever it becomes meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snaporch.drivers.qemu import attaching, surroundings
from snaporch.drivers.qmp.process import last_words
from snaporch.errors import Refused

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
    socket = str(tmp_path / "qmp.sock")
    process = subprocess.Popen(
        ["qemu-fake", "-c", PROGRAM, socket], executable=sys.executable, stdout=subprocess.PIPE
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
            await attaching.look("web", socket, 10.0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_log_of_any_size(tmp_path: Path) -> None:
    """Whoever QEMU runs as has its log open: it is not read whole."""
    log = tmp_path / "qemu.log"
    log.write_text("qemu: old\n")
    os.truncate(log, 2**36)
    with log.open("a") as file:
        file.write("\nqemu: one\nqemu: two\n")
    assert last_words(log, 5).endswith("one; two")
    assert last_words(log, 2**36 + 11) == "two"
