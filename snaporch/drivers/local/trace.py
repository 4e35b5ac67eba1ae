"""Which files a reader of an image reads, and which processes have it open: looked up anew, in headers and /proc.

An image is what it *is*: a device and an inode, or the numbers of a block device. Symbolic links, hard links and
bind mounts are names of it. A name in a catalog, or a device number of yesterday, is no proof of anything.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from snaporch.drivers.local import qcow2
from snaporch.errors import DamagedSnapshot, Refused
from snaporch.images.kinds import Kind, Traced
from snaporch.model.names import check_text

_PROTOCOL = re.compile(r"[^:/]*:")  # as QEMU tells a protocol from a path
_FILES = {"file", "host_device"}
_MARK = "user.snaporch.frozen."


def identity_of(status: os.stat_result) -> str:
    """Return what a file is, whatever its name."""
    if stat.S_ISBLK(status.st_mode):
        return f"block {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)} {status.st_ino}"


def is_block_device(path: str) -> bool:
    """Return whether `path` is a block device."""
    with suppress(OSError):
        return stat.S_ISBLK(os.stat(path).st_mode)
    return False


def _innermost(options: dict[str, Any]) -> tuple[str, str]:
    """Return the file and the format in the options of a ``json:`` name; the file is empty where there is none."""
    format_ = str(options.get("driver", ""))
    while isinstance(options.get("file"), dict):
        options = options["file"]
    plain = options.get("driver", "file") in _FILES and "filename" in options
    return (str(options["filename"]) if plain else ""), (format_ if format_ not in _FILES else "")


def _resolved(name: str, above: str) -> tuple[str, str]:
    """Return the path and, if it says one, the format of what an image's header names; the path may be empty."""
    format_ = ""
    if name.startswith("json:"):
        with suppress(ValueError):
            name, format_ = _innermost(json.loads(name.removeprefix("json:")))
            return (os.path.join(os.path.dirname(above), name) if name else ""), format_
        return "", ""
    name = name.removeprefix("file:")
    if _PROTOCOL.match(name):
        return "", ""
    return os.path.abspath(os.path.join(os.path.dirname(above), name)), ""


def _probed(path: str) -> str:
    """Return what QEMU would take an image of no stated format for."""
    try:
        qcow2.header(path)
    except (DamagedSnapshot, OSError):
        return "raw"
    return "qcow2"


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise Refused(f"cannot look at {path}: {error.strerror}") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise Refused(f"{path} is neither a file nor a block device")
    return status


def trace(path: str, format_: str) -> tuple[Traced, ...]:
    """Return every file that a reader of the image at `path` reads, the image itself first.

    Raises:
        Refused: one cannot be looked at.
        DamagedSnapshot: one is not what it is said to be, or the chain has no end.
    """
    found: dict[str, Traced] = {}
    for link in _links(path, format_):
        if link.identity in found:
            raise DamagedSnapshot(f"the backing chain of {path} has no end", path)
        found[link.identity] = link
    return tuple(found.values())


def _links(path: str, format_: str) -> Iterator[Traced]:
    while path:
        status = _status(path)
        if format_ == "raw":
            yield Traced(path, identity_of(status), {Kind.BLOCK if stat.S_ISBLK(status.st_mode) else Kind.RAW: ""})
            return
        if format_ != "qcow2":
            yield Traced(path, identity_of(status), {Kind.FOREIGN: format_})
            return
        head = qcow2.header(path)
        for name in (head.backing, head.data_file):
            check_text(name, f"what {path} leads to")
        yield Traced(path, identity_of(status), _kinds_of(head))
        if head.data_file:
            data, _ = _resolved(head.data_file, path)
            yield Traced(data, identity_of(_status(data)), {Kind.SPLIT: data})
        if not head.backing:
            return
        below, said = _resolved(head.backing, path)
        if not below:
            yield Traced(head.backing, f"remote {head.backing}", {Kind.REMOTE: head.backing})
        path, format_ = below, head.backing_format or said or _probed(below)


def _kinds_of(head: qcow2.Header) -> dict[Kind, str]:
    kinds = {Kind.QCOW2: ""}
    if head.encryption:
        kinds[Kind.ENCRYPTED] = head.encryption
    if head.data_file:
        kinds[Kind.SPLIT] = head.data_file
    if head.full:
        kinds[Kind.FULL] = head.full
    if head.bitmaps:
        kinds[Kind.BITMAPS] = ", ".join(head.bitmaps)
    if head.backing and not head.backing_format and not head.backing.startswith("json:"):
        kinds[Kind.UNTYPED] = head.backing
    return kinds


def identities(paths: Collection[str]) -> dict[str, str]:
    """Return what files are, by path; those that are not there are left out.

    Raises:
        Refused: one cannot be looked at.
    """
    found = {}
    for path in paths:
        try:
            found[path] = identity_of(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise Refused(f"cannot look at {path}: {error.strerror}") from None
    return found


def openers(wanted: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return, by identity, the processes that have one of these files open, but this one; as far as /proc shows."""
    found: dict[str, set[int]] = {}
    for entry in Path("/proc").iterdir() if wanted else ():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            for identity in _opened(entry).intersection(wanted):
                found.setdefault(identity, set()).add(int(entry.name))
    return {identity: tuple(sorted(pids)) for identity, pids in found.items()}


def _opened(process: Path) -> set[str]:
    found = set()
    with suppress(OSError):  # it is gone, or somebody else's
        for fd in (process / "fd").iterdir():
            with suppress(OSError):
                status = fd.stat()
                if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                    found.add(identity_of(status))
    return found


# --- marks: what a second root sees -------------------------------------------------------------------------------


def _attribute(root: str) -> str:
    return _MARK + blake2b(os.fsencode(root), digest_size=8).hexdigest()


def mark(path: str, root: str) -> None:
    """Mark an image as frozen for a root, where its file system has extended attributes and it may be marked.

    Nothing is written where the mark is there: a mark changes the file's ctime.
    """
    words = json.dumps({"root": root, "inode": os.stat(path).st_ino}).encode()
    with suppress(OSError):
        if _read(path, _attribute(root)) != words:
            os.setxattr(path, _attribute(root), words)


def _read(path: str, name: str) -> bytes:
    with suppress(OSError):
        return os.getxattr(path, name)
    return b""


def unmark(path: str, root: str) -> None:
    """Take a root's mark off an image, if it is there."""
    with suppress(OSError):
        os.removexattr(path, _attribute(root))


def marks(path: str) -> tuple[str, ...]:
    """Return the roots that an image is frozen for; a copy of a frozen image is not frozen."""
    names: list[str] = []
    with suppress(OSError):
        names = [name for name in os.listxattr(path) if name.startswith(_MARK)]
    found = []
    for name in names:
        with suppress(OSError, ValueError, KeyError):
            said = json.loads(_read(path, name))
            if said["inode"] == os.stat(path).st_ino:
                found.append(str(said["root"]))
    return tuple(found)
