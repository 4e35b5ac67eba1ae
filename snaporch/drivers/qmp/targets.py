"""Which disk of a QEMU is which target."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from string import ascii_lowercase
from typing import Any

from snaporch.drivers.qmp import flash
from snaporch.model.domain import NVRAM
from snaporch.model.names import TARGET

_GUEST_NAME = re.compile(r"(?:vd|sd|hd|xvd)[a-z]+")


def targets_of(blocks: Iterable[dict[str, Any]], *, ours: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entries of query-block, each with its disk's target.

    Nobody takes a name that is the id of a device of our own, wherever that comes.
    """
    entries = list(blocks)
    named = {_id_of(block, ours=True) for block in entries} - {""} if ours else set[str]()
    taken: set[str] = set()
    for block in entries:
        if block.get("inserted") is None and not block.get("qdev"):
            continue  # a drive that no device uses
        if ours and block.get("qdev", "").endswith(flash.CODE):
            continue  # a program of the host's
        target = _target_of(block, taken, named, ours=ours)
        taken.add(target)  # also where there is no medium: the others keep their names when it is taken out
        yield target, block


def _id_of(block: dict[str, Any], *, ours: bool) -> str:
    path = block.get("qdev", "")
    known = (part for part in path.split("/") if f"peripheral/{part}" in path)
    return next((str(part) for part in known if (TARGET if ours else _GUEST_NAME).fullmatch(part)), "")


def _target_of(block: dict[str, Any], taken: set[str], named: set[str], *, ours: bool) -> str:
    """Return the target of an entry: its device id where that is one, else counted as a guest would."""
    path, device = block.get("qdev", ""), block.get("device", "")
    if (own := _id_of(block, ours=ours)) and own not in taken:
        return own
    if ours and path.endswith(flash.STORE):
        return NVRAM
    if device.startswith("pflash"):
        return str(device)
    prefix = "vd" if "virtio" in path + device else "sd"
    return next(name for letter in ascii_lowercase if (name := prefix + letter) not in taken | named)
