"""Which domains a plan is about; no I/O."""

from __future__ import annotations

import os
from collections.abc import Collection
from fnmatch import fnmatchcase

import attrs

from snaporch.batch.plan import Select
from snaporch.model.domain import DomainRecord


@attrs.frozen
class Item:
    """One snapshot of a batch: of a domain or, at one point in time, of a group.

    Attributes:
        name: the domain's or the group's.
        members: the domains.
        places: storage directories that it writes to or reads images from.
    """

    name: str
    members: tuple[str, ...]
    places: frozenset[str] = frozenset()


def selects(select: Select, name: str, tags: Collection[str]) -> bool:
    """Return whether a plan is about a domain by itself; a group's members are not taken twice."""
    if any(fnmatchcase(name, glob) for glob in select.exclude):
        return False
    if any(name in members for members in select.groups.values()):
        return False
    asked = name in select.names or any(fnmatchcase(name, glob) for glob in select.globs)
    return asked or not set(select.tags).isdisjoint(tags)


def places(root: str, record: DomainRecord) -> frozenset[str]:
    """Return the storage directories of a domain: that of the root, and those of its images elsewhere."""
    directories = {os.path.dirname(disk.path) for disk in record.disks if not disk.readonly}
    return frozenset({root, *(d for d in directories if not f"{d}/".startswith(f"{root}/"))})
