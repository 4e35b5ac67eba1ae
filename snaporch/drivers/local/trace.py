"""Which files a reader of an image reads, and which processes have it open: looked up anew, in headers and /proc.

An image is what it *is*: a device and an inode, or the numbers of a block device. Symbolic links, hard links and
bind mounts are names of it. A name in a catalog, or a device number of yesterday, is no proof of anything.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from snaporch.drivers.local import qcow2
from snaporch.drivers.local.names import check_everybodys, file_named
from snaporch.errors import DamagedSnapshot, Refused
from snaporch.images.kinds import Kind, Traced
from snaporch.model.names import check_text

_PROTOCOL = re.compile(r"[^:/]*:")  # as QEMU tells a protocol from a path
_FILES = ("file", "host_device")
_PLAIN = ("qcow2", "raw")
_HARMLESS = {"driver", "file", "node-name", "read-only", "auto-read-only", "cache", "discard", "detect-zeroes"}
_UNFOLLOWED = (
    "cannot look at what {above} is backed by: {name} ({why}); name the image itself "
    "(`qemu-img rebase -u -F FORMAT -b FILE {above}`)"
)
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


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a ``json:`` name with ``file.driver`` and the like as options of ``file``."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        *outer, last = key.split(".")
        place = found
        for each in outer:
            place = place.setdefault(each, {})
        place[last] = _nested(value) if isinstance(value, dict) else value
    return found


def _files_in(options: Any) -> Iterator[str]:
    """Yield the names of all files in options, at any depth."""
    if isinstance(options, dict):
        for key, value in options.items():
            yield from [value] if key == "filename" and isinstance(value, str) else _files_in(value)
    elif isinstance(options, list):
        for each in options:
            yield from _files_in(each)


def _innermost(options: dict[str, Any]) -> tuple[str, str]:
    """Return the name of the file in the options of a ``json:`` name, and the format; empty where there is none.

    Raises:
        ValueError: it names files otherwise than as an image in a file.
    """
    format_, inside = str(options.get("driver", "")), options
    while isinstance(inside.get("file"), dict) and inside.get("driver") in _PLAIN:
        if more := inside.keys() - _HARMLESS:
            raise ValueError(", ".join(sorted(more)))
        inside = inside["file"]
    name, driver = inside.get("filename"), inside.get("driver")
    if isinstance(name, str) and driver in {None, *_FILES}:
        return name if driver is None else f"{driver}:{name}", "" if format_ in _FILES else format_
    if any(True for _ in _files_in(options)):
        raise ValueError(str(driver))
    return "", ""


def _resolved(name: str, above: str) -> tuple[str, str]:
    """Return the path and, if it says one, the format of what an image's header names.

    The path is empty where it is no file of this host.

    Raises:
        Refused: it leads to files of this host in a way that is not followed.
    """
    format_, directory, given = "", os.path.dirname(above), name
    if name.startswith("json:"):
        try:
            name, format_ = _innermost(_nested(json.loads(name.removeprefix("json:"))))
            if name and not os.path.isabs(name.removeprefix("file:").removeprefix("host_device:")):
                raise ValueError("relative to each process's directory")  # noqa: TRY301 - as what else is not followed
        except (ValueError, TypeError, AttributeError) as error:
            raise Refused(_UNFOLLOWED.format(above=above, name=given, why=error)) from None
    protocol, colon, rest = name.partition(":")
    if colon and protocol in _FILES:
        name = rest
    elif _PROTOCOL.match(name):
        if any(part and os.path.isfile(os.path.join(directory, part)) for part in rest.split(":")):
            raise Refused(_UNFOLLOWED.format(above=above, name=given, why=protocol))
        name = ""
    return (file_named(name, directory) if name else ""), format_


def _probed(path: str) -> str:
    """Return what QEMU would take an image of no stated format for."""
    try:
        qcow2.header(path)
    except (DamagedSnapshot, OSError):
        return "raw"
    return "qcow2"


def _status(path: str) -> os.stat_result:
    check_everybodys(path)
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
        if link.identity in found and not link.kinds:
            continue  # several volumes have parts on one disk
        if link.identity in found:
            raise DamagedSnapshot(f"the backing chain of {path} has no end", path)
        found[link.identity] = link
    return tuple(found.values())


def _links(path: str, format_: str) -> Iterator[Traced]:
    loops = _loops()
    while path:
        status = _status(path)
        if format_ == "raw":
            yield Traced(path, identity_of(status), {Kind.BLOCK if stat.S_ISBLK(status.st_mode) else Kind.RAW: ""})
            yield from _same(status, loops)
            return
        if format_ != "qcow2":
            yield Traced(path, identity_of(status), {Kind.FOREIGN: format_})
            return
        head = qcow2.header(path)
        for name in (head.backing, head.data_file):
            check_text(name, f"what {path} leads to")
        yield Traced(path, identity_of(status), _kinds_of(head))
        yield from _same(status, loops)
        if head.data_file:
            data, _ = _resolved(head.data_file, path)
            yield Traced(data, identity_of(_status(data)), {Kind.SPLIT: data})
        if not head.backing:
            return
        below, said = _resolved(head.backing, path)
        if not below:
            yield Traced(head.backing, f"remote {head.backing}", {Kind.REMOTE: head.backing})
        path, format_ = below, head.backing_format or said or _probed(below)


def _loops() -> list[tuple[Traced, Traced]]:
    """Return the loop devices of this host, each with the file that it is on."""
    found, names = list[tuple[Traced, Traced]](), list[str]()
    with suppress(OSError):
        names = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    for name in names:
        device = Path("/sys/block", name, "loop")  # there while it has a file
        with suppress(OSError):
            file = (device / "backing_file").read_text().removesuffix("\n")
            whole = all((device / each).read_text().strip() == "0" for each in ("offset", "sizelimit"))
            loop = f"block {(device.parent / 'dev').read_text().strip()}"
            below = Traced(file, identity_of(os.stat(file)), same=whole)
            found.append((Traced(f"/dev/{name}", loop, same=whole), below))
    return found


def _same(status: os.stat_result, loops: Iterable[tuple[Traced, Traced]]) -> Iterator[Traced]:
    """Yield what else has the bytes of a file or device: its loop devices, or what a block device is on.

    Of a partition and a volume that is said, too, but they are parts: another part of the same disk is no reader.
    """
    identity = identity_of(status)
    for loop, file in loops:
        if identity == file.identity:
            yield loop
        elif identity == loop.identity:
            yield file
    if stat.S_ISBLK(status.st_mode):
        place = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
        parts = [*place.glob("slaves/*"), *([place.resolve().parent] if (place / "partition").exists() else [])]
        for part in parts:
            with suppress(OSError):
                yield Traced(f"/dev/{part.name}", f"block {(part / 'dev').read_text().strip()}")


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
