"""Processes of this host: their start, their identity, their end.

A process is known by its id, its start time *and* the boot that this counts from: ids are used again. A zombie is
gone.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import attrs
import trio

_PF_EXITING = 0x4  # of the kernel's flags of a task


@attrs.frozen
class LocalProcess:
    """A process of this host.

    Attributes:
        pid: its process id.
        started: its start time in the kernel's clock ticks, which tells it from a later process of that id.
        boot: the host's boot in which it started: after the next, the same id and time may be another's. "" is any.
    """

    pid: int
    started: int
    boot: str = ""


def process_of(pid: int) -> LocalProcess | None:
    """Return the live process of an id; None when it is gone or a zombie."""
    began = started(pid)
    return None if began is None else LocalProcess(pid, began, boot())


def started(pid: int) -> int | None:
    """Return a live process's start time in the kernel's clock ticks; None when it is gone or a zombie."""
    try:
        fields = _fields(pid)
    except OSError:
        return None
    # A first thread that has ended looks like a zombie while others still hold files, and their locks.
    gone = fields[0] in "ZX" and int(fields[17]) <= 1
    return None if gone else int(fields[19])


def _fields(pid: int) -> list[str]:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()  # the name, in parentheses, may hold anything


@cache
def boot() -> str:
    """Return the id of the host's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _is_there(process: LocalProcess) -> bool:
    return process.boot in {"", boot()} and started(process.pid) == process.started


def alive(process: LocalProcess) -> bool:
    """Return whether exactly this process still runs."""
    _reap(process.pid)
    return _is_there(process)


def ending(process: LocalProcess) -> bool:
    """Return whether exactly this process is gone, or on its way: the kernel is closing its files."""
    if not _is_there(process):
        return True
    try:
        return bool(int(_fields(process.pid)[6]) & _PF_EXITING)
    except OSError:
        return True


def transferred(process: LocalProcess) -> int | None:
    """Return the bytes that a process has read and written so far; None when it is gone."""
    try:
        counts = Path(f"/proc/{process.pid}/io").read_text().split()
    except OSError:
        return None
    return sum(int(counts[counts.index(f"{name}:") + 1]) for name in ("rchar", "wchar"))


def _reap(pid: int) -> None:
    """Collect a child of ours that has ended; another's child, or one that runs, is left alone."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def wait_gone(process: LocalProcess) -> None:
    """Return when the process is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if _is_there(process):
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
    _reap(process.pid)


async def kill(process: LocalProcess) -> None:
    """SIGKILL exactly this process and return when it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if not _is_there(process):
            return  # the id belongs to another process now
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
    _reap(process.pid)


def directory_before(pid: int, names: Iterable[str]) -> str | None:
    """Return the directory that relative `names` of open files were relative to; a daemon has gone to / since."""
    opened = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            opened.append(os.readlink(entry))
    for name in names:
        tail = f"/{os.path.normpath(name)}"
        for path in opened:
            if path.endswith(tail):
                return path.removesuffix(tail) or "/"
    return None


def find_processes(*words: str) -> list[int]:
    """Return the ids of the processes that have all of `words` among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and set(words) <= set(command_line(int(entry.name))):
                found.append(int(entry.name))
    return found


def user_of(pid: int) -> int | None:
    """Return the id of the user that a process runs as; None when it is gone."""
    with suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return None


def command_line(pid: int) -> tuple[str, ...]:
    """Return the argv that a process was started with."""
    return tuple(Path(f"/proc/{pid}/cmdline").read_text(errors="surrogateescape").split("\0")[:-1])


def writers(paths: Iterable[str]) -> list[tuple[int, str]]:
    """Return the processes that have one of `paths` (without symbolic links) open for writing, with it."""
    wanted, found = set(paths), set()
    for entry in Path("/proc").iterdir() if wanted else ():
        if entry.name.isdecimal():
            found |= {(int(entry.name), path) for path in _written_by(entry) & wanted}
    return sorted(found)


def _written_by(process: Path) -> set[str]:
    found = set()
    with suppress(OSError):  # it is gone, or somebody else's
        for fd in (process / "fd").iterdir():
            with suppress(OSError):
                flags = next(
                    line.split()[1]
                    for line in (process / "fdinfo" / fd.name).read_text().splitlines()
                    if line.startswith("flags:")
                )
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    found.add(os.readlink(fd))
    return found


def renew_pidfile(path: str, old: int, new: int) -> None:
    """Write a process id to the file that has the id of another process; nothing happens where it has not."""
    with suppress(OSError, ValueError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and int(os.pread(fd, 32, 0)) == old:
                os.ftruncate(fd, os.pwrite(fd, f"{new}\n".encode(), 0))
        finally:
            os.close(fd)
