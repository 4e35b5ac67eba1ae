"""What a guard does for a QEMU guest: the action of `snaporch.drivers.local.guard`.

    pause SOCKET ASIDE FD STREAM AGENT RIVAL VERDICT
    pivot SOCKET ASIDE FD JOB VERDICT
    load SOCKET ASIDE FD VERDICT AFTERWARDS TAG KEPT NODE...

A socket is ``PATH``, or ``PID:PATH`` where only that process may listen: somebody else could take its place.

SOCKET is QEMU's monitor, which serves one client at a time: snaporch, until the guard takes its place. ASIDE is a
second one, or ``-``, and FD our end of snaporch's connection, or ``-``. Where snaporch is dead, the connection is
ended and SOCKET is free. Where it is stopped, ASIDE is used, so that snaporch keeps its connection and sees by
QEMU's events what has happened; where that is not there, or taken, the connection is ended too.

``pause``: the guest is paused.

1. Where VERDICT (unless it is ``-``) says ``complete``, the process RIVAL has taken the guest's place, and nothing
   is done. Where it says ``end``, snaporch is about to end the guest: nothing is done as long as snaporch is only
   stopped. Else VERDICT is ``undone`` from now on, and RIVAL (``PID:START``, or ``-``) is ended: never two of them.
2. With STREAM ``cancel`` a memory stream is ended that would stop the guest once more at its end, where nobody
   would be left to let it run; ``keep`` leaves it alone: a background stream stops nothing later, and QEMU 7.2 must
   not lose it.
3. The guest runs.
4. The guest's file systems are thawed by the guest agent at the socket AGENT, unless that is ``-``.

``pivot``: QEMU holds what the guest writes to a disk, as the block job JOB is pending. The job ends: by the disk's
going over to the image below where VERDICT says so, else by its staying, which VERDICT says from now on. So it is
known which image the guest writes to, should QEMU die too. A job that is not pending yet holds nothing, and where
snaporch is only stopped it is left alone until it is.

``load``: the guest goes back to the snapshot TAG inside the images on the block NODEs (the memory is in the first).

1. Where VERDICT says ``load``, loading may have begun: the snapshot is loaded, and then the guest runs, unless
   AFTERWARDS is ``stand``.
2. Else VERDICT is ``undone`` from now on (unless it says ``put-back``), and the guest runs on.
3. If the snapshot cannot be loaded, the guest runs on too, from the state that it had before: that is the snapshot
   KEPT inside the images, which is loaded and then deleted, unless snaporch has done that itself.

Recovery takes a guest that runs to be at the snapshot, as long as KEPT is there.

This is only posted for a guest that ran, so it never lets one run that its user had paused.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Decide = Callable[..., str]

SECONDS = 30.0  # for a QEMU that is busy; one that does not answer for longer is not helped by waiting
RETRY_SECONDS = 0.005  # a stream that is ending passes through states in which nothing can run
LOAD_SECONDS = 3600.0  # QEMU answers nothing while all of a guest's memory goes to, or comes from, a slow disk
INSIDE = "snaporch-inside"  # the job that does that
_UCRED = struct.Struct("3i")  # struct ucred
_OVER = frozenset({"completed", "failed", "cancelled", "none"})
ASIDE_SECONDS = 3.0  # a second monitor may be somebody else's
STAY = "stay"
UNDONE = "undone"
COMPLETE = "complete"
END = "end"


def _connected(place: str, seconds: float = SECONDS) -> socket.socket:
    peer, _, path = place.partition(":") if place[0].isdecimal() else ("", "", place)
    made, deadline = socket.socket(socket.AF_UNIX), time.monotonic() + seconds
    made.settimeout(seconds)
    directory = os.open(os.path.dirname(path), os.O_PATH)  # a path of a socket may have 107 bytes, a file's more
    try:
        while True:
            try:
                made.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
            except BlockingIOError:  # others wait already, and QEMU has not come to them yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)
            else:
                ids = _UCRED.unpack(made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
                if peer and ids[0] != int(peer):
                    made.close()
                    raise ConnectionError(f"process {ids[0]} listens at {path}")
                return made
    finally:
        os.close(directory)


class Monitor:
    """QMP, as little of it as is needed: one command at a time, events passed over.

    And answers to the earlier client, which QEMU gives to whom it has: see `snaporch.drivers.qmp.calls`.
    """

    def __init__(self, path: str, seconds: float = SECONDS) -> None:
        self.socket = _connected(path, seconds)
        self.lines = self.socket.makefile("rb")
        self.number = int.from_bytes(os.urandom(6), "big")
        while b'"QMP"' not in self.lines.readline():  # the greeting comes when the earlier client is gone
            pass
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Return a command's answer; a refusal is an empty one: what counts is the state that is asked for next."""
        self.number += 1
        asked = {"execute": command, "arguments": arguments, "id": self.number}
        self.socket.sendall(json.dumps(asked).encode() + b"\n")
        while line := self.lines.readline():
            answer = json.loads(line)
            if answer.get("id") == self.number:
                return answer.get("return") or {}
        raise ConnectionError


def reach(path: str, aside: str, connection: str, *, dead: bool, seconds: float = SECONDS) -> Monitor:
    """Return a monitor that answers; see the head of this file."""
    if not dead and aside != "-":
        with contextlib.suppress(OSError):  # snaporch may have been stopped while it looked there
            return Monitor(aside, ASIDE_SECONDS)
    if connection != "-":
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(connection))) as held:
            held.shutdown(socket.SHUT_RDWR)
    return Monitor(path, seconds)


def _end_rival(rival: str) -> None:
    """Kill exactly the process that was named."""
    if rival == "-":
        return
    pid, started = map(int, rival.split(":"))
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if int(fields[19]) == started:
            signal.pidfd_send_signal(fd, signal.SIGKILL)


def _run_again(monitor: Monitor, *, cancel: bool) -> None:
    deadline = time.monotonic() + SECONDS
    if cancel and monitor.ask("query-migrate").get("status", "none") not in _OVER:
        monitor.ask("stop")  # why it must be paused, and when it is too late: rule 6 of stream.py
        if monitor.ask("query-status").get("status") != "finish-migrate":
            monitor.ask("migrate_cancel")
        while monitor.ask("query-migrate").get("status", "none") not in _OVER and time.monotonic() < deadline:
            time.sleep(RETRY_SECONDS)
    _let_run(monitor, deadline)


def _let_run(monitor: Monitor, deadline: float) -> None:
    while not monitor.ask("query-status").get("running") and time.monotonic() < deadline:
        monitor.ask("cont")
        time.sleep(RETRY_SECONDS)


def _thaw(path: str) -> None:
    """Have the agent thaw, which it may do before it comes to it: it answers one request after the other."""
    agent = _connected(path)
    agent.sendall(b'\xff{"execute":"guest-fsfreeze-thaw"}\n{"execute":"guest-sync","arguments":{"id":74617}}\n')
    lines = agent.makefile("rb")
    while (line := lines.readline()) and b"74617" not in line:
        pass  # answers to that, and to what was asked before by whoever has died


def _end_pivot(to: Sequence[str], job: str, verdict: str, *, dead: bool, decide: Decide) -> bool:
    """Have the job end, one way or the other."""
    monitor, deadline = reach(*to, dead=dead), time.monotonic() + SECONDS
    if not dead and all(each["status"] != "pending" for each in monitor.ask("query-jobs") if each["id"] == job):
        return False
    command = "job-cancel" if decide(verdict, STAY) == STAY else "job-finalize"
    while any(each["id"] == job for each in monitor.ask("query-jobs")) and time.monotonic() < deadline:
        monitor.ask(command, id=job)
        time.sleep(RETRY_SECONDS)
    return True


def _settle(monitor: Monitor) -> str:
    """Wait until no job on what is inside images is under way; return the last one's error."""
    while True:
        job = next((each for each in monitor.ask("query-jobs") if each["id"] == INSIDE), None)
        if job is None:
            return ""
        if job["status"] == "concluded":
            monitor.ask("job-dismiss", id=INSIDE)
            return str(job.get("error", ""))
        time.sleep(RETRY_SECONDS)


class Images:
    """The images on some nodes, and what is inside."""

    def __init__(self, monitor: Monitor, nodes: list[str]) -> None:
        self.monitor = monitor
        self.nodes = nodes

    def have(self, tag: str) -> bool:
        """Return whether there is a snapshot of this name in all of them."""
        found = {node["node-name"]: node["image"] for node in self.monitor.ask("query-named-block-nodes")}
        images = [found.get(node, {}) for node in self.nodes]
        return all(any(each["name"] == tag for each in image.get("snapshots", ())) for image in images)

    def load(self, tag: str) -> bool:
        """Load a snapshot; return whether that went well."""
        before = self.monitor.ask("query-migrate-capabilities")
        plain = [each | {"state": each["capability"] == "events"} for each in before]
        self.monitor.ask("migrate-set-capabilities", capabilities=plain)
        done = self._do("snapshot-load", tag, vmstate=self.nodes[0])
        self.monitor.ask("migrate-set-capabilities", capabilities=before)
        return done

    def delete(self, tag: str) -> bool:
        """Delete a snapshot; return whether that went well."""
        return self._do("snapshot-delete", tag)

    def _do(self, command: str, tag: str, **arguments: Any) -> bool:
        self.monitor.ask(command, **{"job-id": INSIDE, "tag": tag, "devices": self.nodes}, **arguments)
        return not _settle(self.monitor)


def _end_load(to: Sequence[str], verdict: str, *what: str, dead: bool, decide: Decide) -> bool:
    """See the head of this file."""
    afterwards, tag, kept, *nodes = what
    monitor = reach(*to, dead=dead, seconds=LOAD_SECONDS)
    _settle(monitor)
    word = decide(verdict, UNDONE)
    if monitor.ask("query-status").get("running"):
        return True
    images = Images(monitor, nodes)
    if word != UNDONE and images.have(kept):
        if word == "load" and images.load(tag):
            if afterwards != "run":
                return True
        elif not (images.load(kept) and images.delete(kept)):
            return True
    _let_run(monitor, time.monotonic() + SECONDS)
    return True


def _end_pause(
    to: Sequence[str], stream: str, agent: str, rival: str, verdict: str, *, dead: bool, decide: Decide
) -> bool:
    """See the head of this file."""
    word = decide(verdict, UNDONE) if verdict != "-" else UNDONE
    if word == COMPLETE:
        return True
    if word == END and not dead:
        return False
    _end_rival(rival)
    with contextlib.suppress(OSError, ValueError):  # the QEMU is gone, and with it what was guarded
        monitor = reach(*to, dead=dead)
        if word == END:
            decide(verdict, UNDONE, over=END)
        _run_again(monitor, cancel=stream == "cancel")
    if agent != "-":
        with contextlib.suppress(OSError):
            _thaw(agent)
    return True


_ACTIONS: dict[str, Callable[..., bool]] = {"pause": _end_pause, "pivot": _end_pivot, "load": _end_load}


def act(arguments: Sequence[str], *, dead: bool, decide: Decide) -> bool:
    """Let the guest go on; return False where there is nothing to do yet. See `snaporch.drivers.local.guard`."""
    what, path, aside, connection, *rest = arguments
    return _ACTIONS[what]((path, aside, connection), *rest, dead=dead, decide=decide)
