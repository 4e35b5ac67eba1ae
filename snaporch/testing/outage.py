"""A place whose power can be cut: what no fsync has reached is gone, as on a disk with a volatile cache.

Two file systems on loop devices, one in the other, all in RAM. The outer one holds nothing but the disk of the
inner one, and is shut down as the tests of Linux's own file systems do that (`XFS_IOC_GOINGDOWN` of xfstests, which
ext4 has too): from then on it writes nothing, nor its log. What is left of the disk when both are mounted anew is
what the inner file system has flushed, and what the kernel had happened to write back.

Wants root, loop devices, a /dev/shm, mkfs.ext4 and the inner file system's mkfs.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_NOLOGFLUSH = 2
_SECONDS = 30.0
_BYTES = 2 * 2**30

# The longest that each lets what was not asked for stay in RAM.
FILE_SYSTEMS = {"ext4": "commit=600", "xfs": "defaults", "btrfs": "commit=300"}


def cut(outer: Path, speakers: Iterable[int] = ()) -> None:
    """Cut the power of what is on the outer file system, at once; who writes to it goes on, and gets EIO.

    Args:
        outer: of an `Outlet`.
        speakers: processes that are stopped just before. A sync that is under way may be told to have gone well all
            the same, where a host without power would answer nothing: processes that would pass the answer on are
            stopped.
    """
    fd = os.open(outer, os.O_RDONLY)
    try:
        for pid in speakers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NOLOGFLUSH))
    finally:
        os.close(fd)


@attrs.frozen
class Outlet:
    """Where things are that need power.

    Attributes:
        place: a directory to work in.
        outer: what `cut` wants.
    """

    place: Path
    outer: Path
    _kind: str

    def restore(self) -> None:
        """Let the power come back: who has a file open there is killed, and what was not flushed is gone."""
        self.unplug()
        self.plug_in()

    def plug_in(self) -> None:
        """Mount both."""
        _run("mount", "-o", "loop,commit=600", self.outer.with_suffix(".img"), self.outer)
        _run("mount", "-o", f"loop,{FILE_SYSTEMS[self._kind]}", self.outer / "disk", self.place)

    def unplug(self) -> None:
        """Unmount both, and kill who is in the way."""
        for place in (self.place, self.outer):
            end = time.monotonic() + _SECONDS
            while _run("umount", place, check=False):
                if time.monotonic() > end:
                    raise TimeoutError(f"{place} cannot be unmounted")
                for pid in _users(place):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)


@contextmanager
def powered(kind: str) -> Iterator[Outlet]:
    """Make a file system of that kind whose power can be cut, one of FILE_SYSTEMS; yield it."""
    home = Path(tempfile.mkdtemp(prefix="snaporch-power-", dir="/dev/shm"))
    outlet = Outlet(home / "place", home / "outer", kind)
    try:
        outlet.place.mkdir()
        outlet.outer.mkdir()
        image = outlet.outer.with_suffix(".img")
        image.touch()
        os.truncate(image, _BYTES * 3 // 2)
        _run("mkfs.ext4", "-q", image)
        _run("mount", "-o", "loop", image, outlet.outer)
        disk = outlet.outer / "disk"
        disk.touch()
        os.truncate(disk, _BYTES)
        _run(f"mkfs.{kind}", "-q", disk)
        _run("umount", outlet.outer)
        outlet.plug_in()
        try:
            yield outlet
        finally:
            outlet.unplug()
    finally:
        for path in (home / "outer.img", outlet.place, outlet.outer):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        with suppress(OSError):
            home.rmdir()


def _users(place: Path) -> set[int]:
    """Return the processes, but for our own, that have something open under a directory."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with suppress(OSError):
                for link in [process / "cwd", process / "root", *(process / "fd").iterdir()]:
                    with suppress(OSError):
                        if link.readlink().is_relative_to(place):
                            found.add(int(process.name))
    return found


def _run(*words: str | Path, check: bool = True) -> int:
    return subprocess.run(words, check=check, capture_output=True).returncode  # noqa: S603 - ourselves
