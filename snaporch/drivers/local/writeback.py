"""What a guest has written to its images goes to disk before it is paused, so that the pause need not wait for it.

A hypervisor that stops a guest flushes its images while the guest is paused. What a guest has written and not
synced is in the host's page cache; another process that opens the file can have it written while the guest runs on.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

SHORT_SECONDS = 0.005  # what is left after a pass that took no longer is not worth another
PASSES = 4  # a guest that writes all the time would have another one always be long


def write_back(
    paths: Iterable[str],
    sync: Callable[[int], None] = os.fdatasync,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Sync files until there is little left to sync; blocks.

    What is no regular file, cannot be opened or cannot be synced is passed over.

    Args:
        paths: the files.
        sync: syncs one, by its descriptor.
        clock: seconds.

    Returns:
        How often it went through them.
    """
    with ExitStack() as stack:
        files = [fd for path in paths if (fd := _opened(path, stack)) >= 0]
        for number in range(1, PASSES + 1):
            began = clock()
            for fd in files:
                with suppress(OSError):
                    sync(fd)
            if clock() - began < SHORT_SECONDS:
                return number
    return PASSES


def _opened(path: str, stack: ExitStack) -> int:
    """Return a descriptor of a regular file, closed with the stack, or -1."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return fd if stat.S_ISREG(os.fstat(fd).st_mode) else -1
    except OSError:
        return -1
