"""A program of its own that calls libxl for snaporch.

``python -I -S helper.py``: a request a line on standard input, an answer a line on standard output, JSON. It is a
process of its own since libxl forks (libxl-save-helper), takes SIGCHLD, blocks, and may crash.

In: ``{"id", "do": NAME, …}``, the arguments of the method `Helper.NAME` beside it. Out: ``{"id", "ok": answer}`` or
``{"id", "error": {"call", "code", "words"}}``; the words are libxl's own. ``{"do": "abort"}`` ends a save that is
under way, at once and without an answer of its own.

Its input ends when whoever started it is gone. Then a save that is under way is ended, and a guest that the last
save has left suspended runs again. All other pauses are guarded by a program of its own: see `guard`.

Rules:

1. The main thread reads, another calls libxl, one call at a time. So the end of the input, or `abort`, is seen in
   the midst of a save that may take minutes.
2. What libxl says on standard error is read as it comes (`Log`): its last error, and when a guest has suspended
   itself, of which the call that saves says nothing.
3. Before any resume the reason is looked at for which the guest is down: only a suspended one may go on.

It imports next to nothing: it is started once for each connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from snaporch.drivers.xen import binding
else:  # beside this file: it runs without the package, whose import takes longer than all that it does
    sys.path.insert(0, str(Path(__file__).parent))
    import binding

MAGIC = b"Xen saved domain, xl format\n \0 \r"
_HEADER = struct.Struct("=IIII")  # byte order, mandatory flags, optional flags, bytes of optional data
_LENGTH = struct.Struct("=I")
_ORDER, _STREAM_2, _JSON = 0x01020304, 2, 1
SUSPENDED = "guest has suspended"  # libxl_dom_suspend.c, at the level of debugging
END_SECONDS = 60.0  # libxl itself waits so long for a guest that does not react


class HelperError(Exception):
    """Something that is not for libxl to say; the text is for people."""


def write_header(fd: int, config: dict[str, Any]) -> None:
    """Begin a file as `xl save` does, so that `xl restore` takes it too."""
    data = json.dumps(config).encode() + b"\0"
    body = _LENGTH.pack(len(data)) + data
    content = MAGIC + _HEADER.pack(_ORDER, _JSON | _STREAM_2, 0, len(body)) + body
    while content:
        content = content[os.write(fd, content) :]


def read_header(fd: int) -> dict[str, Any]:
    """Read what `write_header` or `xl save` has written; the stream follows.

    Raises:
        HelperError: it is no such file.
    """
    start = os.read(fd, len(MAGIC) + _HEADER.size)
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + _HEADER.size:
        raise HelperError("it is no saved domain of Xen's")
    _order, flags, _optional, length = _HEADER.unpack(start[len(MAGIC) :])
    data = os.read(fd, length)
    if not flags & _JSON or len(data) < length:
        raise HelperError("it is cut short, or saved by a toolstack older than Xen 4.5")
    return dict(json.loads(data[_LENGTH.size :].rstrip(b"\0")))


class Log:
    """Standard error, read as it is written."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        self.text = ""
        self.suspended = 0.0
        self._fd = reading
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while data := os.read(self._fd, 1 << 16):
            text = data.decode(errors="replace")
            if SUSPENDED in text:
                self.suspended = time.time()
            self.text = (self.text + text)[-20_000:]

    def begin(self) -> None:
        """Forget what was said before."""
        self.text, self.suspended = "", 0.0

    def words(self) -> str:
        """Return the last error's words, once they have come through."""
        for _ in range(20):
            if found := str(binding.last_error(self.text)):
                return found
            time.sleep(0.01)
        return ""


class Helper:
    """Does what requests ask for; the methods without underscore are their names."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.libxl = binding.Libxl(binding.DEBUG)
        self.saved: int | None = None

    # --- looking

    def hello(self) -> dict[str, Any]:
        """Return what hypervisor and host are and have."""
        return {"version": binding.version(), "physinfo": self.libxl.physinfo()}

    def info(self, domid: int) -> dict[str, Any] | None:
        """See Libxl."""
        return self.libxl.info(domid)

    def config(self, domid: int) -> dict[str, Any]:
        """See Libxl."""
        return self.libxl.config(domid)

    def header(self, path: str, offset: int) -> dict[str, Any]:
        """Return the configuration that a memory file has."""
        with _opened(path, offset) as fd:
            return read_header(fd)

    def memory(self, config: dict[str, Any]) -> dict[str, int]:
        """Return the bytes that a domain of a configuration needs, and those that are free."""
        return {"needed": self.libxl.needed_memory(config), "free": self.libxl.free_memory()}

    # --- running

    def create(self, config: dict[str, Any]) -> int:
        """See Libxl."""
        return self.libxl.create(config)

    def restore(self, path: str, offset: int, config: dict[str, Any]) -> int:
        """Start a domain with the memory of a file, paused at the point; return its id."""
        with _opened(path, offset) as fd:
            read_header(fd)
            return self.libxl.restore(config, fd)

    def pause(self, domid: int) -> None:
        """Pause a guest; not twice, as pauses are counted."""
        if not self._state(domid).get("paused"):
            self.libxl.pause(domid)

    def run(self, domid: int) -> float:
        """Let a guest run that is suspended or paused; return when it did, by the clock.

        Raises:
            HelperError: it is down for another reason.
        """
        state = self._state(domid)
        if state.get("shutdown"):
            if (why := state.get("shutdown_reason", "poweroff")) != "suspend":
                raise HelperError(f"the guest is down: {why}")
            self.libxl.resume(domid)
        if state.get("paused"):
            self.libxl.unpause(domid)
        self.saved = None
        return time.time()

    def shutdown(self, domid: int) -> None:
        """See Libxl."""
        self.libxl.shutdown(domid)

    def destroy(self, domid: int) -> None:
        """End a domain, if it is there."""
        if self.libxl.info(domid) is not None:
            self.libxl.destroy(domid)

    def rename(self, domid: int, new: str) -> None:
        """Give a domain a name."""
        old = str(self.libxl.config(domid)["c_info"]["name"])
        if old != new:
            self.libxl.rename(domid, old, new)

    def tell(self, domid: int, disks: dict[str, list[str]]) -> None:
        """Have libxl know on which images disks are: by vdev, path and format."""
        config = self.libxl.config(domid)
        for disk in config.get("disks", ()):
            if disk["vdev"] in disks:
                disk["pdev_path"], disk["format"] = disks[disk["vdev"]]
        self.libxl.tell(domid, config)

    def tell_interfaces(self, domid: int, names: dict[str, str]) -> None:
        """Have libxl know what network devices are called in dom0, by their number."""
        config = self.libxl.config(domid)
        for number, nic in enumerate(config.get("nics", ())):
            if (name := names.get(str(nic.get("devid", number)))) is not None:
                nic["ifname"] = name
        self.libxl.tell(domid, config)

    def save(self, domid: int, path: str, *, live: bool) -> dict[str, Any]:
        """Write memory to a file that exists; the guest is suspended on return.

        Returns:
            ``suspended``: since when, by the clock.
        """
        self.log.begin()
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            write_header(fd, self.libxl.config(domid))
            self.saved = domid
            self.libxl.suspend(domid, fd, live=live)
        except BaseException:
            self.run_if_suspended(domid)
            raise
        finally:
            os.close(fd)
        state = self._state(domid)
        if not state.get("shutdown") or state.get("shutdown_reason") != "suspend":
            raise HelperError(f"the guest is not suspended: {state.get('shutdown_reason', 'it runs')}")
        return {"suspended": self.log.suspended or time.time()}

    def abort(self) -> None:
        """End a save that is under way: called beside it."""
        for child in _children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)

    def _state(self, domid: int) -> dict[str, Any]:
        if (state := self.libxl.info(domid)) is None:
            raise HelperError("the domain is gone")
        return dict(state)

    def run_if_suspended(self, domid: int) -> None:
        """Let a guest run that is suspended; one that is down for another reason is left alone."""
        state = self.libxl.info(domid) or {}
        if state.get("shutdown") and state.get("shutdown_reason") == "suspend":
            self.libxl.resume(domid)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request."""
        arguments = {name: value for name, value in request.items() if name not in {"id", "do"}}
        try:
            return {"id": request["id"], "ok": getattr(self, request["do"])(**arguments)}
        except binding.LibxlError as error:
            found = {"call": error.call, "code": error.code, "words": self.log.words()}
        except HelperError as error:
            found = {"call": request["do"], "code": 0, "words": str(error)}
        except OSError as error:
            found = {"call": request["do"], "code": 0, "words": f"{error.filename}: {error.strerror}"}
        return {"id": request["id"], "error": found}


@contextlib.contextmanager
def _opened(path: str, offset: int) -> Any:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.lseek(fd, offset, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _children() -> list[int]:
    """Return the processes that libxl has started for a save or a restore."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def _work(helper: Helper, requests: queue.SimpleQueue[dict[str, Any] | None], out: int) -> None:
    while (request := requests.get()) is not None:
        answer = helper.answer(request)
        with contextlib.suppress(OSError):  # whoever asked is gone
            os.write(out, json.dumps(answer).encode() + b"\n")
    if helper.saved is not None:
        helper.run_if_suspended(helper.saved)


def main() -> None:
    """Serve until the input ends."""
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever libxl prints is no answer
    helper, requests = Helper(Log()), queue.SimpleQueue[dict[str, Any] | None]()
    worker = threading.Thread(target=_work, args=(helper, requests, out))
    worker.start()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "abort":
            helper.abort()
        else:
            requests.put(request)
    helper.abort()
    requests.put(None)
    worker.join(END_SECONDS)


if __name__ == "__main__":
    main()
