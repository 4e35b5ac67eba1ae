"""A process gets its huge pages back, from outside.

A background stream takes the write protection off a guest's RAM page by page, and the kernel splits each huge page
for that, for good: the next time write protection takes several times as long, with the guest paused.
`MADV_COLLAPSE` makes huge pages of them again. What a process reads and writes there is the same before and after.

Only what is private memory and there in full is touched, so that no process takes more memory than before.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROCESS_MADVISE = 440  # on every architecture
MADV_COLLAPSE = 25
CAP_SYS_NICE = 23
SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"
SIZES = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
STEP = 16 * 2**20  # bytes at a time
REST_SECONDS = 0.001  # between two steps, for what waits for the process's memory map
LEAST = 16 * 2**20  # bytes: a smaller mapping is no guest's RAM
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ENTRY = 8  # bytes that /proc/PID/pagemap has for a page
_PRIVATE = b"\x81"  # the highest of them: present, mapped by nobody else, of no file, not write-protected
_HOPELESS = frozenset({errno.EPERM, errno.ESRCH, errno.ENOSYS, errno.ENOMEM, errno.EBADF})

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def blocker() -> str:
    """Return why no process can be given its huge pages back here, or an empty string."""
    try:
        if "[never]" in Path(SETTING).read_text():
            return f"the host uses no huge pages ({SETTING} is never)"
        status = Path("/proc/self/status").read_text()
        pidfd = os.pidfd_open(os.getpid())
    except OSError as error:
        return f"the kernel does not say whether there are huge pages: {error.strerror}"
    try:
        known = _advise(pidfd)
    finally:
        os.close(pidfd)
    held = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    if not held >> CAP_SYS_NICE & 1 or known == errno.EPERM:
        return "snaporch has no CAP_SYS_NICE: run it as root, or with AmbientCapabilities=CAP_SYS_NICE"
    return "it needs Linux 6.1 or later" if known else ""


def collapse(pid: int, stop: threading.Event) -> int:
    """Make huge pages of what was split in a process, until `stop` is set; blocks.

    Whatever does not work is left as it is.

    Returns:
        The bytes for which it was tried.
    """
    done = 0
    with suppress(OSError):
        if blocker():
            return 0
        pidfd = os.pidfd_open(pid)
        try:
            for base, length in _whole(pid):
                if stop.wait(REST_SECONDS) or _advise(pidfd, _Range(base, length)) in _HOPELESS:
                    break
                done += length
        finally:
            os.close(pidfd)
    return done


def _advise(pidfd: int, *ranges: _Range) -> int:
    """Return the error number, 0 for none."""
    array = (_Range * len(ranges))(*ranges)
    count, none = ctypes.c_size_t(len(ranges)), ctypes.c_uint(0)
    said = _libc.syscall(PROCESS_MADVISE, pidfd, array, count, MADV_COLLAPSE, none)
    return ctypes.get_errno() if said < 0 else 0


def _whole(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the beginnings and lengths of memory that can be of huge pages, in steps."""
    huge = int(Path(SIZES).read_text())
    pages = huge // _PAGE
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for begin, end in _mappings(pid):
            for step in range(-(-begin // huge) * huge, end - huge + 1, STEP):
                count = (min(step + STEP, end) - step) // huge
                entries = os.pread(pagemap.fileno(), count * pages * _ENTRY, step // _PAGE * _ENTRY)
                kinds = entries[_ENTRY - 1 :: _ENTRY]
                whole = [kinds[i * pages : (i + 1) * pages].count(_PRIVATE) == pages for i in range(count)]
                at = step
                for is_whole, same in itertools.groupby(whole):
                    length = len(list(same)) * huge
                    if is_whole:
                        yield at, length
                    at += length


def _mappings(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the begin and the end of the large private mappings of no file."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, rights, _offset, _device, inode, *_name = line.split()
        begin, end = (int(word, 16) for word in place.split("-"))
        if rights == "rw-p" and inode == "0" and end - begin >= LEAST:
            yield begin, end
