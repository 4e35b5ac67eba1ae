"""The floor: a background snapshot with nothing around it.

    python floor.py SOCKET --disk vda=OVERLAY … [--qemu-img PROGRAM] [--file PATH]

Plain blocking socket, commands encoded beforehand, no library: what remains is QEMU, and the least that a program
in Python can add to it. It makes the overlays, then: stop, query-status, transaction, migrate, wait for the first
page to be sent, cont. Memory goes into a pipe that ``cat`` empties into nothing, or with --file (QEMU 8.2 and
later) to a ``file:`` URI, as QEMU's manual has it. Prints one JSON document.

The overlays stay in the guest's chain; memory that was written to a file is for the caller to remove.
"""

from __future__ import annotations

import argparse
import array
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

PIPE_SIZES = (16 * 2**20, 2**20)  # as snaporch's: root may have any, others mostly 1 MiB


class Qmp:
    """The least that speaks QMP."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self.message()
        self.call("qmp_capabilities")

    def message(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\n" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                sys.exit("QEMU closed the connection")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def send(self, line: bytes) -> Any:
        """Send an encoded command and return the answer; events that come before it are kept."""
        self._socket.sendall(line)
        while "event" in (message := self.message()):
            self.events.append(message)
        if "error" in message:
            sys.exit(f"{line!r}: {message['error']['desc']}")
        return message["return"]

    def call(self, command: str, **arguments: Any) -> Any:
        """Encode, send, return the answer."""
        return self.send(encoded(command, **arguments))

    def pass_descriptor(self, name: str, descriptor: int) -> None:
        """Give QEMU a file descriptor under a name."""
        line = encoded("getfd", fdname=name)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]).tobytes())
        self._socket.sendmsg([line], [rights])
        self.send(b"")

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first event, of those at hand or to come, that is wanted."""
        for event in self.events:
            if wanted(event):
                return event
        while True:
            self.events.append(self.message())
            if wanted(self.events[-1]):
                return self.events[-1]


def encoded(command: str, **arguments: Any) -> bytes:
    """Return a command as it is sent."""
    body = {"execute": command} | ({"arguments": arguments} if arguments else {})
    return json.dumps(body).encode() + b"\n"


def moment(event: dict[str, Any]) -> float:
    """Return an event's own time."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def named(name: str) -> Callable[[dict[str, Any]], bool]:
    """Return a test for events of a name."""
    return lambda event: event["event"] == name


def migration(*statuses: str) -> Callable[[dict[str, Any]], bool]:
    """Return a test for migration events of some statuses."""
    return lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in statuses


def set_capabilities(qmp: Qmp, *on: str) -> None:
    """Set all capabilities: these on, the others off."""
    known = [found["capability"] for found in qmp.call("query-migrate-capabilities")]
    qmp.call("migrate-set-capabilities", capabilities=[{"capability": c, "state": c in on} for c in known])


def add_overlays(qmp: Qmp, overlays: dict[str, str], qemu_img: str) -> list[dict[str, Any]]:
    """Make the overlays and let QEMU open them; return the transaction's actions."""
    actions = []
    for block in qmp.call("query-block"):
        image = block["inserted"]["image"]
        target = next(t for t in overlays if f"/{t}/" in block["qdev"] or block["qdev"].endswith(f"/{t}"))
        base = ["-b", image["filename"], "-F", image["format"]]
        command = [qemu_img, "create", "-q", "-u", "-f", "qcow2", *base, overlays[target]]
        subprocess.run([*command, str(image["virtual-size"])], check=True)
        node = f"floor-{os.getpid()}-{target}"
        file = {"driver": "file", "filename": overlays[target]}
        qmp.call("blockdev-add", **{"driver": "qcow2", "node-name": node, "file": file, "backing": None})
        data = {"node": block["inserted"]["node-name"], "overlay": node}
        actions.append({"type": "blockdev-snapshot", "data": data})
    return actions


def open_pipe(qmp: Qmp) -> subprocess.Popen[bytes]:
    """Give QEMU a pipe as "memory", and return the process that empties it."""
    read, write = os.pipe()
    for wanted in PIPE_SIZES:
        try:
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, wanted)
            break
        except OSError:
            continue
    drain = subprocess.Popen(["cat"], stdin=read, stdout=subprocess.DEVNULL)
    qmp.pass_descriptor("memory", write)
    os.close(read)
    os.close(write)
    return drain


def wait_armed(qmp: Qmp, query: bytes) -> None:
    """Return when the first page has been sent: the marker of docs/explanation/point.md."""
    qmp.wait(lambda event: event["event"] == "MIGRATION" and event["data"]["status"] != "setup")
    while True:
        info = qmp.send(query)
        ram = info.get("ram", {})
        if ram.get("normal", 0) + ram.get("duplicate", 0) > 0 or info["status"] == "completed":
            return
        if info["status"] == "failed":
            sys.exit(f"the migration failed: {info.get('error-desc')}")


def main() -> None:
    """Take one background snapshot and print how long everything took."""
    parser = argparse.ArgumentParser(description="One bare background snapshot.")
    parser.add_argument("socket")
    parser.add_argument("--disk", action="append", default=[], metavar="TARGET=OVERLAY")
    parser.add_argument("--qemu-img", default="qemu-img")
    parser.add_argument("--file", help="stream to this file, by QEMU itself")
    arguments = parser.parse_args()

    began = time.time()
    qmp = Qmp(arguments.socket)
    actions = add_overlays(qmp, dict(disk.split("=", 1) for disk in arguments.disk), arguments.qemu_img)
    set_capabilities(qmp, "background-snapshot", "events")
    drain = None if arguments.file else open_pipe(qmp)
    commands = {
        "stop": encoded("stop"),
        "query-status": encoded("query-status"),
        "transaction": encoded("transaction", actions=actions),
        "migrate": encoded("migrate", uri=f"file:{arguments.file}" if arguments.file else "fd:memory"),
    }
    query, resume = encoded("query-migrate"), encoded("cont")
    qmp.events.clear()

    times = [time.perf_counter()]
    for line in commands.values():
        qmp.send(line)
        times.append(time.perf_counter())
    wait_armed(qmp, query)
    times.append(time.perf_counter())
    qmp.send(resume)
    times.append(time.perf_counter())

    resumed = qmp.wait(named("RESUME"))
    ended = qmp.wait(migration("completed", "failed"))
    if drain is not None:
        drain.wait()
    total = time.time() - began
    info = qmp.call("query-migrate")
    set_capabilities(qmp)
    if ended["data"]["status"] != "completed":
        sys.exit(f"the migration failed: {info.get('error-desc')}")
    names = [*commands, "armed", "cont"]
    answer = {
        "pause": moment(resumed) - moment(qmp.wait(named("STOP"))),
        "total": total,
        "bytes": info["ram"]["transferred"],
        "steps": {name: after - before for name, (before, after) in zip(names, pairwise(times), strict=True)},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
