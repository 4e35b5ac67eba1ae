"""Errors of a disk, in QEMU and qemu-img alike: the system calls that write to one file fail while they are to.

QEMU's own blkdebug needs an image to be opened through it from the start, by qemu-img too; this strikes whatever
program writes to the file, at the border to the kernel, and can be switched on while a guest runs.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* The order is a file: an errno and the path of the file that it is for. */
static int struck(int fd)
{
    char name[64], path[PATH_MAX] = "", wanted[PATH_MAX];
    const char *order = getenv("DISK_FAULT");
    FILE *file = order ? fopen(order, "r") : NULL;
    int number, found = 0;

    if (!file)
        return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    if (fscanf(file, "%d %4095s", &number, wanted) == 2 && readlink(name, path, sizeof path - 1) > 0)
        found = strcmp(path, wanted) == 0;
    fclose(file);
    if (found)
        errno = number;
    return found;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "pwrite64");
    return struck(fd) ? -1 : real(fd, data, size, at);
}

ssize_t pwritev64(int fd, const struct iovec *data, int count, off64_t at)
{
    static ssize_t (*real)(int, const struct iovec *, int, off64_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "pwritev64");
    return struck(fd) ? -1 : real(fd, data, count, at);
}
"""


@attrs.frozen
class DiskFault:
    """Programs that are started from now on fail to write to a file while `failing` says so."""

    order: Path

    @classmethod
    def installed(cls, directory: Path, patch: pytest.MonkeyPatch) -> DiskFault:
        """Build what strikes, and have every program that is started load it."""
        source, library, order = directory / "fault.c", directory / "fault.so", directory / "fault-order"
        source.write_text(_SOURCE)
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("DISK_FAULT", str(order))
        return cls(order)

    @contextmanager
    def failing(self, path: str, code: int) -> Iterator[str]:
        """Have all writes to a file fail; yield the system's words for it."""
        new = self.order.with_suffix(".new")
        new.write_text(f"{code} {os.path.realpath(path)}")
        new.rename(self.order)
        try:
            yield os.strerror(code)
        finally:
            self.order.unlink()


ENOSPC, EIO = errno.ENOSPC, errno.EIO
