"""What lies between a disk of a QEMU and a plain image, read from the names that QEMU gives its nodes. No I/O.

QEMU names a node by its file where that says all, and else by ``json:`` and all of its options.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from snaporch.images.kinds import Kind, Traced

_FORMATS = {"qcow2", "raw"}
_FILES = {"file", "host_device"}
_FILTERS = {
    "throttle",
    "copy-on-read",
    "quorum",
    "blkdebug",
    "blkverify",
    "blklogwrites",
    "blkreplay",
    "preallocate",
}
_FILTERS |= {"compress", "copy-before-write", "snapshot-access"}
_PROTOCOL = re.compile(r"([^:/]+):")
_TEMPORARY = re.compile(r"vl\.\w{6}")  # in TMPDIR; QEMU has unlinked it


def _drivers(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a node's options and those of what it is on, down to the file."""
    inner: Any = options
    while isinstance(inner, dict):
        yield inner
        inner = inner.get("file")


def _kind(options: dict[str, Any]) -> tuple[Kind, str] | None:
    driver = str(options.get("driver", "file"))
    if driver in _FILTERS:
        return Kind.FILTERED, driver
    if driver == "raw" and {"offset", "size"} & options.keys():
        begin, size = options.get("offset", 0), options.get("size", "all")
        return Kind.SLICED, f"offset={begin}, size={size}"
    if driver in _FILES:
        temporary = _TEMPORARY.fullmatch(os.path.basename(str(options.get("filename", ""))))
        return (Kind.TEMPORARY, "") if temporary else None
    if driver in _FORMATS:
        return None
    return (Kind.FOREIGN if "file" in options else Kind.REMOTE), driver


def _of_name(name: str) -> tuple[Kind, str] | None:
    if name.startswith("json:"):
        options = json.loads(name.removeprefix("json:"))
        return next((found for each in _drivers(options) if (found := _kind(each))), None)
    if (protocol := _PROTOCOL.match(name)) and protocol[1] not in _FILES:
        return (Kind.FILTERED if protocol[1] in _FILTERS else Kind.REMOTE), protocol[1]
    return None


def oddity(path: str, driver: str, image: dict[str, Any], bitmaps: Sequence[str] = ()) -> Traced | None:
    """Return a disk's image with what is odd about it or about what backs it; None: nothing is.

    Args:
        path: of the image, as it is told to people.
        driver: of the node that the device is on.
        image: as ``query-block`` has it.
        bitmaps: names of the dirty bitmaps of that node: QEMU may not have written them to the image yet, or never.
    """
    kinds: dict[Kind, str] = {}
    if bitmaps:
        kinds[Kind.BITMAPS] = ", ".join(bitmaps)
    if driver not in _FORMATS | _FILES:
        kinds[Kind.FILTERED if driver in _FILTERS else Kind.FOREIGN] = driver
    link: dict[str, Any] | None = image
    while link is not None:
        if found := _of_name(link["filename"]):
            kinds.setdefault(*found)
        link = link.get("backing-image")
    return Traced(path, "", kinds) if kinds else None
