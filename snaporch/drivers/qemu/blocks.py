"""The disks of a QEMU's command line: which image each of them opens, and how it is put on another; no I/O.

A disk is given as -blockdev (JSON or key=value; the file inside, or a node of its own; filters above), as -drive in
one of its spellings, or by a short form. To put one on another image the *layer* that opens its active image is
written anew, and keeps its name, so that all that refers to it still does. What says by which images the old one is
backed is dropped: the new one's header says that, and what came of it is compared before anything is done with it.
Nodes that nothing refers to any more are left out. What cannot be followed so has a reason, which is an error only
where that disk is to be put on another image.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from snaporch.drivers.local.names import file_named
from snaporch.drivers.qemu.options import Keys, Option, Tree
from snaporch.errors import Unsupported
from snaporch.model.rfc import DeviceDisk

_FILTERS = frozenset({"throttle", "copy-on-read"})
_FORMATS = frozenset({"qcow2", "raw"})
_FILES = frozenset({"file", "host_device", "host_cdrom"})
# Of a layer's options, those that any driver takes; the others are its own.
_GENERIC = frozenset(
    {"node-name", "discard", "cache", "read-only", "auto-read-only", "force-share", "detect-zeroes"}
)
_OF_FILE = _GENERIC | {"locking", "aio", "aio-max-batch", "drop-cache"}
_CHILDREN = ("file", "backing", "data-file")
_ON = frozenset({"on", "true", "yes"})
_UNFOLLOWED = {
    "encrypt": "is encrypted, and what the guest writes from then on would not be",
    "data-file": "keeps its data in another file",
    "offset": "is a part of its file",
    "size": "is a part of its file",
}
_SHORT = {
    "hda": {"index": "0", "media": "disk"},
    "hdb": {"index": "1", "media": "disk"},
    "hdc": {"index": "2", "media": "disk"},
    "hdd": {"index": "3", "media": "disk"},
    "cdrom": {"index": "2", "media": "cdrom"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "pflash": {"if": "pflash"},
    "sd": {"if": "sd"},
    "mtdblock": {"if": "mtd"},
}


@attrs.define
class Drive:
    """A disk on a command line.

    Attributes:
        text: its option, for people.
        path: the image that it opens, absolute; empty where there is none, or none that can be followed.
        problem: why it cannot be put on another image, or empty.
        removable: its medium can be taken out: without an image it is an empty drive.
        writes: the guest may write to it.
    """

    text: str
    path: str = ""
    problem: str = ""
    removable: bool = False
    writes: bool = False

    def put_on(self, disk: DeviceDisk) -> None:
        """Open another image.

        Raises:
            Unsupported: it cannot be followed.
        """
        raise Unsupported(f"{disk.target} cannot be put on another image ({self.text}): {self.problem}")

    def take_out(self) -> None:
        """Leave the drive without a medium.

        Raises:
            Unsupported: it cannot be.
        """
        raise Unsupported(f"{self.text}: its medium cannot be taken out")


@attrs.define
class _Keyed(Drive):
    """A -drive, or a short form of one."""

    keys: Keys = attrs.field(factory=Keys)

    def put_on(self, disk: DeviceDisk) -> None:
        """See Drive."""
        if self.problem:
            Drive.put_on(self, disk)
        kept = self.keys.without(
            lambda key: (
                key in {"file", "driver", "format", "file.driver", "file.filename"} or key.startswith("backing")
            )
        )
        self.keys = Keys((*kept.pairs, ("file", disk.path), ("format", disk.format)))

    def take_out(self) -> None:
        """See Drive."""
        if not self.removable:
            Drive.take_out(self)
        kept = ("if", "id", "index", "bus", "unit", "media")
        self.keys = self.keys.without(lambda key: key not in kept)


@attrs.define
class _Node(Drive):
    """A -blockdev that no other one is under."""

    layer: dict[str, Any] = attrs.field(factory=dict)
    file: dict[str, Any] | None = None
    inside: bool = True

    def put_on(self, disk: DeviceDisk) -> None:
        """See Drive."""
        if self.problem:
            Drive.put_on(self, disk)
        layer, file = self.layer, self.layer if self.file is None else self.file
        named = self.file is not None and self.inside
        new_file = {key: value for key, value in file.items() if key in _OF_FILE and (named or key != "node-name")}
        alike = layer["driver"] == disk.format == "qcow2"  # what is qcow2's own holds for the new layer too
        kept = {key: value for key, value in layer.items() if key in _GENERIC or (alike and key not in _CHILDREN)}
        layer.clear()
        layer.update(kept | {"driver": disk.format, "file": new_file | {"driver": "file", "filename": disk.path}})


@attrs.define
class Blocks:
    """The disks of one command line, which can be put on other images.

    Attributes:
        options: all options of the command line.
        cwd: what relative paths are relative to.
        drives: the disks, in their order.
    """

    options: Sequence[Option]
    cwd: str
    drives: list[Drive] = attrs.field(factory=list)
    _trees: dict[int, Tree] = attrs.field(factory=dict)
    _keyed: dict[int, _Keyed] = attrs.field(factory=dict)
    _referred: set[str] = attrs.field(factory=set)

    def __attrs_post_init__(self) -> None:
        for number, option in enumerate(self.options):
            if option.name == "blockdev":
                self._trees[number] = Tree.parse(option.value or "", "driver")
            elif option.name == "drive" or option.name in _SHORT:
                self._keyed[number] = self._drive(option)
        self._referred = set(self._references())
        used = self._used()
        for number, option in enumerate(self.options):
            if number in self._keyed:
                drive: Drive = self._keyed[number]
            elif number in self._trees and self._trees[number].get("node-name") not in self._referred:
                top = self._trees[number]
                drive = self._node(option, top.options)
                drive.writes = top.get("node-name") in used and top.get("read-only") not in _ON
            else:
                continue
            self.drives.append(drive)

    # --- what there is

    def _named(self) -> dict[str, dict[str, Any]]:
        """Return all nodes by name, those inside others too."""
        return {
            str(node["node-name"]): node
            for tree in self._trees.values()
            for node in _nodes(tree.options)
            if "node-name" in node
        }

    def _used(self) -> set[str]:
        """Return all words of what is no -blockdev: a device among them names the node that it is on."""
        return {word for option in self.options if option.name != "blockdev" for word in _words(option)}

    def _references(self) -> Iterator[str]:
        """Yield the names of the nodes that another -blockdev has under it."""
        for tree in self._trees.values():
            for node in _nodes(tree.options):
                yield from (node[child] for child in _CHILDREN if isinstance(node.get(child), str))

    def _path(self, name: str) -> str:
        return file_named(name, self.cwd) if name else ""

    def _node(self, option: Option, top: dict[str, Any]) -> Drive:
        layer, problem = self._layer(top)
        if problem:
            return Drive(option.text, self._path(_filename(layer)), problem)
        driver = layer["driver"]
        if driver in _FILES:
            return _Node(option.text, self._path(str(layer.get("filename", ""))), layer=layer)
        file, inside = layer.get("file"), True
        if isinstance(file, str):
            file, inside = self._named().get(file), False
        if not isinstance(file, dict) or file.get("driver") not in _FILES:
            how = file.get("driver") if isinstance(file, dict) else "a node that is not there"
            return Drive(option.text, self._path(_filename(layer)), f"its image is reached by {how}")
        return _Node(option.text, self._path(str(file.get("filename", ""))), layer=layer, file=file, inside=inside)

    def _layer(self, node: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Return the layer that opens the active image of the disk at `node`, and why it cannot be followed."""
        while node.get("driver") in _FILTERS:
            below = node.get("file")
            found = self._named().get(below) if isinstance(below, str) else below
            if not isinstance(found, dict):
                return node, "what is below its filter is not there"
            node = found
        if node.get("driver") not in _FORMATS | _FILES:
            return node, f"its driver is {node.get('driver')}"
        return node, next((f"it {why}" for key, why in _UNFOLLOWED.items() if _is_set(node, key)), "")

    def _drive(self, option: Option) -> _Keyed:
        keys = Keys.parse(option.value or "", "file")
        if option.name != "drive":
            keys = Keys((*_SHORT[option.name].items(), ("file", option.value or "")))
        drive = _Keyed(option.text, keys=keys, removable=keys.get("media") == "cdrom" or keys.get("if") == "floppy")
        name, drive.problem = _file_of(keys)
        drive.path = self._path(name)
        drive.writes = not (keys.is_on("readonly") or keys.is_on("read-only") or keys.get("media") == "cdrom")
        return drive

    # --- on other images

    def put_on(self, launched: Iterable[DeviceDisk], disks: Iterable[DeviceDisk]) -> None:
        """Put disks on other images.

        Args:
            launched: the disks as the command line has them.
            disks: as they are to be, by target; one that is not among them is to have no medium.

        Raises:
            Unsupported: a disk is not found, or cannot be followed.
        """
        wanted = {disk.target: disk for disk in disks}
        free = list(self.drives)
        for was in launched:
            drive, disk = _take(free, was.path), wanted.get(was.target)
            if disk is None:
                if drive is not None:
                    drive.take_out()
                continue
            same = (os.path.realpath(disk.path), disk.format) == (os.path.realpath(was.path), was.format)
            if drive is None and same:
                drive = _empty(free)  # its medium was put in later
                same = drive is None  # else what comes of it is seen when the machines are compared
            if drive is None and not same:
                problems = "".join(f"; {each.text}: {each.problem}" for each in free if each.problem)
                raise Unsupported(
                    f"QEMU's command line does not say how {was.target} is opened on {was.path}{problems}"
                )
            if drive is not None and not same:
                drive.put_on(disk)

    def rewritten(self) -> list[tuple[Option, ...]]:
        """Return for each option of the command line what is to stand for it."""
        gone = self._unreferred()
        found: list[tuple[Option, ...]] = []
        for number, option in enumerate(self.options):
            if number in gone:
                found.append(())
            elif number in self._trees:
                text = self._trees[number].text()
                old = Tree.parse(option.value or "", "driver")
                found.append((option if old.text() == text else Option("blockdev", text),))
            elif number in self._keyed:
                same = self._keyed[number].keys == self._drive(option).keys
                found.append((option if same else Option("drive", self._keyed[number].keys.text()),))
            else:
                found.append((option,))
        return found

    def _unreferred(self) -> set[int]:
        """Return the -blockdevs that were under others and are no longer under any, nor given to a device."""
        gone: set[int] = set()
        used = self._used()
        while True:
            left = {number: tree for number, tree in self._trees.items() if number not in gone}
            under = {
                str(node[child])
                for tree in left.values()
                for node in _nodes(tree.options)
                for child in _CHILDREN
                if isinstance(node.get(child), str)
            }
            more = {
                number
                for number, tree in left.items()
                if (name := tree.get("node-name")) in self._referred and name not in under | used
            }
            if not more:
                return gone
            gone |= more


def _words(option: Option) -> list[str]:
    return re.split(r'[,="\s:{}]+', option.value or "")


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in _CHILDREN:
        if isinstance(below := node.get(child), dict):
            yield from _nodes(below)


def _is_set(options: dict[str, Any], key: str) -> bool:
    """Return whether an option is there that says more than the default."""
    value = options.get(key)
    return value is not None and not (key == "offset" and str(value) == "0")


def _filename(node: dict[str, Any]) -> str:
    """Return the first name of a file in a node."""
    return next((str(found["filename"]) for found in _nodes(node) if "filename" in found), "")


def _file_of(keys: Keys) -> tuple[str, str]:
    """Return the file that a -drive opens, and why it cannot be followed."""
    name, by = (
        keys.get("file") or keys.get("file.filename") or keys.get("filename"),
        keys.get("file.driver", "file"),
    )
    name, problem = _json_file(name) if name.startswith("json:") else (name.removeprefix("file:"), "")
    formats = {keys.get("format"), keys.get("driver")} - {""}
    if keys.is_on("snapshot"):
        problem = "it is on a temporary file (snapshot=on)"
    elif keys.is_on("copy-on-read"):
        problem = "what is read of it is copied to its image, also when a checkpoint has frozen that (copy-on-read)"
    elif odd := formats - _FORMATS - _FILES:
        problem = f"its format is {odd.pop()}"
    elif by not in _FILES or re.match(r"[A-Za-z][\w+.-]*:", name):
        problem = f"its image is no file: {name or by}"
    for key, why in _UNFOLLOWED.items():
        if any(given == key or given.startswith(f"{key}.") for given, _ in keys.pairs):
            problem = f"it {why}"
    return name, problem


def _json_file(name: str) -> tuple[str, str]:
    try:
        options = json.loads(name.removeprefix("json:"))
    except ValueError:
        return "", f"{name[:60]} is not understood"
    inner = options.get("file", options)
    if isinstance(inner, dict) and inner.get("driver") in _FILES and not set(_UNFOLLOWED) & options.keys():
        return str(inner.get("filename", "")), ""
    return _filename(options), f"its image is no file: {name[:60]}"


def _take(drives: list[Drive], path: str) -> Drive | None:
    """Take out of a list the drive that opens an image."""
    for drive in drives:
        if drive.path and os.path.realpath(drive.path) == os.path.realpath(path):
            drives.remove(drive)
            return drive
    return None


def _empty(drives: list[Drive]) -> Drive | None:
    """Return the one drive that has no medium, if there is just one."""
    found = [drive for drive in drives if drive.removable and not drive.path and not drive.problem]
    return found[0] if len(found) == 1 else None
