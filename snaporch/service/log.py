"""Log lines go to standard error from a thread of their own: a reader that does not read delays nothing."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time

BYTES = 16 << 20  # that wait to be written; lines beyond that are lost, and counted
FAREWELL_SECONDS = 1.0  # at the end, for what waits still

_END = b""


class _Lines(queue.Queue[bytes]):
    """A queue whose size is that of its lines in bytes, and one for each."""

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._size = 0

    def _qsize(self) -> int:
        return self._size

    def _put(self, item: bytes) -> None:
        super()._put(item)
        self._size += len(item) + 1

    def _get(self) -> bytes:
        line: bytes = super()._get()
        self._size -= len(line) + 1
        return line


class LogWriter:
    """A text file, as far as a logger needs one, whose writes return at once.

    Attributes:
        lost: lines that were not written.
    """

    def __init__(self, fd: int = 2) -> None:
        self.lost = 0
        self._fd = fd
        self._told = 0
        self._begun = ""
        self._lines = _Lines(BYTES)
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, text: str) -> None:
        """Have a text written, some time; as a whole line, or not at all."""
        self._begun += text
        if not self._begun.endswith("\n"):
            return
        line, self._begun = self._begun.encode(errors="backslashreplace"), ""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lost += 1

    def flush(self) -> None:
        """Wait for nothing."""

    def close(self) -> None:
        """Write what waits still, if that is soon."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._lines.put(_END, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                return
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _write_all(self) -> None:
        while line := self._lines.get():
            if not self._write(line):
                self.lost += 1
            elif more := self.lost - self._told:
                self._told += more
                self._write(b'{"event": "log lines were lost", "level": "warning", "lines": %d}\n' % more)

    def _write(self, data: bytes) -> bool:
        """Return whether all could be written; it is waited for."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # somebody else has made it so
                time.sleep(0.05)
            except OSError:
                return False
        return True
