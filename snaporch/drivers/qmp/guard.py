"""A program of its own that lets a guest go on when we die.

    guard.py pause SOCKET STREAM AGENT RIVAL [CATALOG OPERATION] < leash
    guard.py pivot SOCKET JOB CATALOG DOMAIN TARGET ACTIVE < leash
    guard.py load SOCKET CATALOG OPERATION AFTERWARDS TAG KEPT NODE... < leash

While a guest is held by us, SIGKILL of our process must not leave it so. This process stands by from before that
until after it, and holds one end of a pipe whose other end only we have. A byte on it is its dismissal; its end
without one means that we are dead. Then, of a guest that is paused, it

1. ends RIVAL, a process (``PID:START``, or ``-``) that was to take the guest's place: never two of them. If the
   CATALOG says that the OPERATION is complete it has taken that place, and nothing is done;
2. with STREAM ``cancel`` ends a memory stream that would stop the guest once more at its end, where nobody would
   be left to let it run; ``keep`` leaves it alone: a background stream stops nothing later, and QEMU 7.2 must not
   lose it;
3. lets the guest run;
4. has the guest's file systems thawed by the guest agent at the socket AGENT, unless that is ``-``.

Whether the point was held by then nobody can say any more. The row in the journal from before the pause still
stands, so recovery undoes the operation: see `snaporch.engine.replay`.

Of a guest whose writes to a disk are held, as the block job JOB is pending, it ends that job: where the image
ACTIVE has been removed, or the CATALOG (unless that is ``-``) has another one at the TARGET already, the disk goes
over to the one below; else it stays. Either way it is known which image the guest writes to, should QEMU die too.

Of a guest that goes back to the snapshot TAG inside the images on the block NODEs (the memory is in the first) it
finishes that: where the CATALOG says that the OPERATION may have begun to load, it is loaded, and then runs, unless
AFTERWARDS is ``stand``. Before that the guest runs on; and so it does if the point cannot be loaded: what it held
is KEPT inside, is loaded and then deleted there, unless the OPERATION has done that itself. Recovery takes a guest
that runs for the point, as long as KEPT is there.

It connects when it must and not before: QEMU answers one client a socket, and until then that is us. It is only
posted for a guest that ran, so it never lets one run that its user had paused. It imports only what it needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

READY = b"ready"
DISMISSED = b"d"
SECONDS = 30.0  # for a QEMU that is busy; one that does not answer for longer is not helped by waiting
RETRY_SECONDS = 0.005  # a stream that is ending passes through states in which nothing can run
LOAD_SECONDS = 3600.0  # QEMU answers nothing while all of a guest's memory goes to, or comes from, a slow disk
INSIDE = "snaporch-inside"  # the job that does that
_OVER = frozenset({"completed", "failed", "cancelled", "none"})
_LOADED = frozenset({"loading", "swapping", "committing"})


def _connected(path: str, seconds: float = SECONDS) -> socket.socket:
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
                return made
    finally:
        os.close(directory)


class Monitor:
    """QMP, as little of it as is needed: one command at a time, events passed over.

    And answers to the client before us, which QEMU gives to whom it has: see `snaporch.drivers.qmp.calls`.
    """

    def __init__(self, path: str, seconds: float = SECONDS) -> None:
        self.socket = _connected(path, seconds)
        self.lines = self.socket.makefile("rb")
        self.number = int.from_bytes(os.urandom(6), "big")
        while b'"QMP"' not in self.lines.readline():  # the greeting comes when the client before us is gone
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


def _run_again(path: str, *, cancel: bool) -> None:
    monitor, deadline = Monitor(path), time.monotonic() + SECONDS
    if cancel and monitor.ask("query-migrate").get("status", "none") not in _OVER:
        monitor.ask("stop")  # why it must stand, and when it is too late: rule 6 of stream.py
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


def _asked(catalog: str, sql: str, *values: str) -> Any:
    """Return the one JSON value that the catalog has for a query."""
    import sqlite3  # noqa: PLC0415 - it takes longer to load than all the rest, and mostly nobody needs it

    with contextlib.closing(
        sqlite3.connect(f"{Path(catalog).absolute().as_uri()}?mode=ro", uri=True)
    ) as connection:
        ((value,),) = connection.execute(sql, values)
    return json.loads(value)


def _state(catalog: str, operation: str) -> str:
    sql = "SELECT json_quote(json_extract(record, '$.state')) FROM operation WHERE id = ?"
    return str(_asked(catalog, sql, operation))


def is_complete(catalog: str, operation: str) -> bool:
    """Return whether an operation is."""
    return _state(catalog, operation) == "complete"


def may_have_loaded(catalog: str, operation: str) -> bool | None:
    """Return whether a revert may have begun to load; None where it is over, or nobody can say."""
    state = _state(catalog, operation)
    return True if state in _LOADED else False if state == "preparing" else None


def has_moved(catalog: str, domain: str, target: str, active: str) -> bool:
    """Return whether the catalog has another image at a disk than the one it was on."""
    disks = _asked(catalog, "SELECT json_extract(record, '$.active') FROM domain WHERE name = ?", domain)
    return bool(disks.get(target, {}).get("path") != active)


def _end_pivot(path: str, job: str, catalog: str, *disk: str) -> None:
    """Have the job end, one way or the other."""
    noted = not os.path.exists(disk[-1]) or (catalog != "-" and has_moved(catalog, *disk))
    command = "job-finalize" if noted else "job-cancel"
    monitor, deadline = Monitor(path), time.monotonic() + SECONDS
    while any(each["id"] == job for each in monitor.ask("query-jobs")) and time.monotonic() < deadline:
        monitor.ask(command, id=job)
        time.sleep(RETRY_SECONDS)


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


def _end_load(path: str, catalog: str, operation: str, *what: str) -> None:
    """See the head of this file."""
    afterwards, tag, kept, *nodes = what
    monitor = Monitor(path, LOAD_SECONDS)
    _settle(monitor)
    loaded = may_have_loaded(catalog, operation)
    if loaded is None or monitor.ask("query-status").get("running"):
        return
    images = Images(monitor, nodes)
    if loaded and images.have(kept):
        if images.load(tag):
            if afterwards != "run":
                return
        elif not (images.load(kept) and images.delete(kept)):
            return
    _let_run(monitor, time.monotonic() + SECONDS)


def _end_pause(path: str, stream: str, agent: str, rival: str, *journal: str) -> None:
    """See the head of this file."""
    if journal and is_complete(*journal):
        return
    _end_rival(rival)
    with contextlib.suppress(OSError, ValueError):  # the QEMU is gone, and with it what was guarded
        _run_again(path, cancel=stream == "cancel")
    if agent != "-":
        with contextlib.suppress(OSError):
            _thaw(agent)


def main() -> None:
    """Stand by until dismissed, or until there is something to do."""
    what, *arguments = sys.argv[1:]
    with contextlib.suppress(BrokenPipeError):  # whoever posted it was cancelled meanwhile
        os.write(1, READY)
    if os.read(0, 1) == DISMISSED:
        return
    if what == "pause":
        _end_pause(*arguments)
    else:
        with contextlib.suppress(OSError, ValueError):
            (_end_pivot if what == "pivot" else _end_load)(*arguments)


if __name__ == "__main__":
    main()
