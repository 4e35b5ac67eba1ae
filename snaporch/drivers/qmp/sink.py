"""A program of its own that puts a memory stream on disk: ``python sink.py FILE RESULT RATE INDEX < pipe``.

RATE is the number of a descriptor of shared memory, by which snaporch may change at any time how many bytes a
second it takes (`set_rate`), and have it wait for a moment (`hold`).

Why not let QEMU write the file: after `cont`, a guest that writes to a page waits until QEMU's migration thread
has saved that page, and while that thread sits in a write() to a slow disk, so does the guest. QEMU therefore
writes to a pipe, and this process empties it: one thread reads into a ring of buffers, another writes them with
O_DIRECT (no page cache to flush in one long gulp) and computes the checksum on the way.

INDEX is the file for where each page is in FILE (`index`), which is made on the way, or ``-``. That it cannot be
made is no failure.

It lives in its own session and outlives the orchestrator; how it went is left in RESULT, which appears (by rename)
only when the file is complete and durable, or when it has failed: ``{"size", "checksum", "errno", "error"}``.

On an error it reports at once and then empties the pipe to its end all the same: in QEMU 7.2 a background migration
that fails (here with EPIPE) leaves RAM write-protected and the guest frozen, and while nobody empties the pipe QMP
itself can hang (docs/explanation/point.md).

It imports only what it needs: it is started once for each checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import queue
import struct
import sys
import threading
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from snaporch.drivers.qmp import index
else:
    index = ModuleType("index")
    SourceFileLoader("index", os.path.join(os.path.dirname(os.path.abspath(__file__)), "index.py")).exec_module(
        index
    )

READY = b"ready"  # said on standard output, by which a failure to start is told too
BUFFER = 2 * 2**20  # one write: large enough for the disk, small enough that the pipe never waits long for a buffer
NONE = "-"  # for INDEX
SWITCH = 0.0005  # seconds until the thread that empties the pipe gets its turn, if the other one computes
RESULT_BYTES = 4096  # more than a result ever has
SLICE = 0.05  # seconds in which a change of the rate is seen
MOMENT = 0.002  # seconds in which the end of a hold is seen
BUFFERS = 24  # how far the disk may fall behind before QEMU, and so the guest, feels it: 48 MiB


_RATE = struct.Struct("=Q")  # bytes a second
_HELD = struct.Struct("=d")  # after it: until when nothing is taken, by the monotonic clock


def shared() -> int:
    """Return a descriptor for RATE."""
    fd = os.memfd_create("snaporch-rate", os.MFD_CLOEXEC)
    os.truncate(fd, _RATE.size + _HELD.size)
    return fd


def set_rate(fd: int, rate: int) -> None:
    """Set the bytes a second that the sink with this RATE may take; 0 is no limit."""
    os.pwrite(fd, _RATE.pack(rate), 0)


def hold(fd: int, seconds: float) -> None:
    """Have the sink with this RATE take next to nothing for so long, or, with 0, go on; also if snaporch dies."""
    os.pwrite(fd, _HELD.pack(time.monotonic() + seconds), _RATE.size)


def _open_direct(path: str) -> int:
    """Open for O_DIRECT where the file system has it (tmpfs did not before Linux 6.6)."""
    with contextlib.suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def _write_all(fd: int, view: memoryview) -> None:
    if len(view) % mmap.PAGESIZE:  # the tail: O_DIRECT takes whole blocks only
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    while view:
        view = view[os.write(fd, view) :]


class Sink:
    """The ring between the two threads."""

    def __init__(self, path: str, rate: int, index_file: str) -> None:
        self.fd = _open_direct(path)
        self._index_file = index_file
        self._builder = index.Builder() if index_file != NONE else None
        self._shared = mmap.mmap(rate, _RATE.size + _HELD.size, prot=mmap.PROT_READ)
        self._owed, self._paid = 0.0, time.monotonic()
        self.empty: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self.full: queue.SimpleQueue[tuple[memoryview, int] | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self.empty.put(memoryview(mmap.mmap(-1, BUFFER)))  # page-aligned, as O_DIRECT needs
        self.error: OSError | None = None
        self.size = 0
        self.hash = xxhash.xxh3_128()

    def write(self) -> None:
        """Write full buffers until there are no more; on an error, stop the reader too."""
        try:
            while (item := self.full.get()) is not None:
                buffer, filled = item
                view = buffer[:filled]
                _write_all(self.fd, view)
                self.hash.update(view)
                if self._builder is not None:
                    self._builder.feed(view)
                self.size += filled
                self.empty.put(buffer)
            os.fsync(self.fd)
        except OSError as error:
            self.error = error
            self.empty.put(None)

    @property
    def checksum(self) -> str:
        """The file's, as the catalog has it."""
        return f"xxh3-128:{self.hash.hexdigest()}"

    def save_index(self) -> None:
        """Write the index, if there can be one; without it all is well, too."""
        if self._builder is not None:
            with contextlib.suppress(index.NotUnderstood, OSError):
                index.save(self._builder.finish(self.checksum), self._index_file)

    def read(self, source: int) -> None:
        """Fill buffers from `source` until its end, or until the writer has failed."""
        filled = BUFFER
        while filled == BUFFER:
            buffer = self.empty.get()
            if buffer is None or self.error is not None:
                return
            filled = 0
            while filled < BUFFER and (count := os.readv(source, [buffer[filled:]])):
                filled += count
            self.full.put((buffer, filled))
            self._pace(filled)
        self.full.put(None)

    def _pace(self, size: int) -> None:
        """Sleep until `size` more bytes are due, at the rate as it is from moment to moment."""
        while (left := _HELD.unpack_from(self._shared, _RATE.size)[0] - time.monotonic()) > 0:
            time.sleep(min(MOMENT, left))
        self._owed += size
        while self._owed > 0:
            (rate,) = _RATE.unpack_from(self._shared)
            now = time.monotonic()
            self._owed = max(0.0, self._owed - rate * (now - self._paid)) if rate else 0.0
            self._paid = now
            if self._owed:
                time.sleep(min(SLICE, self._owed / rate))


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unfinished(result: Path) -> Path:
    """Return where a result is written before it is renamed to `result`."""
    return result.with_name(f"{result.name}.new")


def _report(result: str, sink: Sink | None, error: OSError | None) -> None:
    answer = {
        "size": sink.size if sink else 0,
        "checksum": sink.checksum if sink else "",
        "errno": error.errno if error else None,
        "error": error.strerror if error else None,
    }
    new = unfinished(Path(result))
    with open(new, "r+") as file:
        file.write(json.dumps(answer))  # the spaces behind it are no harm in JSON
    os.rename(new, result)


def reserve(result: Path) -> None:
    """Take the room for the result, before the sink is started: that there is none may be what it has to say."""
    new = unfinished(result)
    with open(new, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(" " * RESULT_BYTES)


def _say(words: bytes) -> None:
    """Tell whoever has started us, once: nobody listens after that, and perhaps nobody does any more."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, words)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


def _discard(source: int) -> None:
    while os.read(source, BUFFER):
        pass


def main() -> None:
    """Run until standard input ends."""
    path, result, rate, index_file = sys.argv[1:]
    sys.setswitchinterval(SWITCH)
    sink, error = None, None
    try:
        sink = Sink(path, int(rate), index_file)
        writer = threading.Thread(target=sink.write)
        writer.start()
        _say(READY)
        sink.read(0)
        writer.join()
        if sink.error is None:
            sink.save_index()
            _sync_directory(path)
        error = sink.error
    except OSError as failure:
        error = failure
        _say(str(failure).encode())
    _report(result, sink, error)
    _discard(0)


if __name__ == "__main__":
    main()
