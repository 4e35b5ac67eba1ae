"""What a name in an image, or of a hypervisor's, stands for: as the kernel follows it, without opening anything."""

from __future__ import annotations

import os

from snaporch.errors import Refused

_MOST_LINKS = 40  # as the kernel follows


def file_named(name: str, directory: str) -> str:
    """Return the absolute path of the file that a name stands for in a directory, without dots.

    ``link/..`` is where the link leads to, and not the directory that has the link.
    """
    path = os.path.join(directory, name)
    plain = os.path.normpath(path)
    if os.pardir not in path.split("/"):
        return plain
    real = os.path.realpath(path)
    return plain if os.path.realpath(plain) == real else real


def check_everybodys(path: str) -> None:
    """Refuse a path by which every process finds another file, as /dev/stdin and /proc/self/fd/3.

    Raises:
        Refused: it leads through /proc, or to a descriptor of QEMU's.
    """
    here, rest, links = "/", os.path.abspath(path).split("/"), 0
    if rest[1:3] == ["dev", "fdset"]:
        raise Refused(f"cannot look at {path}: it is a descriptor of one process; name the file itself")
    while rest:
        there = os.path.normpath(os.path.join(here, rest.pop(0)))
        if there == "/proc":
            raise Refused(f"cannot look at {path}: each process finds another file by it; name the file itself")
        try:
            target = os.readlink(there)
        except OSError:
            here = there
            continue
        links += 1
        if links > _MOST_LINKS:
            return  # whoever opens it says so
        rest = [*target.split("/"), *rest]
        here = "/" if target.startswith("/") else here
