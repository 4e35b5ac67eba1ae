"""What the options of a domain's snapshots say: disks, limits, flags, and whom they are about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.domain import DomainInfo
from snaporch.model.record import SnapshotRecord
from snaporch.model.request import OnTimeout
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot
from snaporch.model.units import parse_rate

COLUMNS = ("name", "parent", "state", "memory", "size", "age", "description")  # of a list of snapshots


@attrs.frozen
class DiskRequest:
    """What the ``--disk`` options of a create say.

    Attributes:
        disks: the disks that something is said about.
        exclude: targets that are left out.
    """

    disks: tuple[DiskSnapshot, ...] = ()
    exclude: frozenset[str] = frozenset()


def parse_disks(options: Sequence[str]) -> DiskRequest:
    """Read ``TARGET``, ``TARGET=FILE``, ``TARGET=none`` and ``TARGET=internal``; FILE is relative to here.

    Raises:
        InvalidInput: there is no target, no file, or a target twice.
    """
    disks: dict[str, DiskSnapshot | None] = {}
    for option in options:
        target, equals, value = option.partition("=")
        if not target or (equals and not value):
            raise InvalidInput(f"--disk {option}: write TARGET, TARGET=FILE, TARGET=none or TARGET=internal")
        if target in disks:
            raise InvalidInput(f"--disk {option}: {target} is named twice")
        disks[target] = _one_disk(target, value)
    return DiskRequest(
        tuple(disk for disk in disks.values() if disk is not None),
        frozenset(target for target, disk in disks.items() if disk is None),
    )


def _one_disk(target: str, value: str) -> DiskSnapshot | None:
    disk = DeviceDisk(target)
    if value == "none":
        return None
    if value == "internal":
        return DiskSnapshot(disk, external=False)
    return DiskSnapshot(disk, external_sn=DeviceDisk(target, os.path.abspath(value) if value else ""))


def all_internal(request: DiskRequest, info: DomainInfo) -> DiskRequest:
    """Return the request with every writable disk internal that is not left out.

    Raises:
        InvalidInput: a disk is to have a file of its own.
    """
    for disk in request.disks:
        if disk.external_sn is not None and disk.external_sn.path:
            raise InvalidInput(f"--internal, and --disk {disk.disk.target}={disk.external_sn.path}: choose one")
    taken = [disk.target for disk in info.disks if not disk.readonly and disk.target not in request.exclude]
    disks = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in taken)
    return attrs.evolve(request, disks=disks)


def rate(text: str) -> int:
    """Return bytes a second; 0: there is no limit."""
    if not text:
        return 0
    if (rate := parse_rate(text)) <= 0:
        raise InvalidInput("--bandwidth: must be more than 0; leave it out for no limit")
    return rate


def limits(seconds: float | None, on_timeout: OnTimeout | None) -> tuple[float | None, OnTimeout]:
    """Return how long it may take, and what happens then."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise InvalidInput("--max-seconds: must be more than 0; leave it out for no limit")
    if seconds is None and on_timeout is not None:
        raise InvalidInput("--on-timeout needs --max-seconds")
    return seconds, on_timeout or OnTimeout.FAIL


def create_flags(*, live: bool, disk_only: bool, quiesce: bool, memory_file: Path | None) -> CreateFlag:
    """Return the flags of a create."""
    if disk_only and memory_file is not None:
        raise InvalidInput("--disk-only saves no memory: leave out --memory-file")
    flags = CreateFlag.LIVE if live else CreateFlag(0)
    flags |= CreateFlag.DISK_ONLY if disk_only else CreateFlag(0)
    return flags | (CreateFlag.QUIESCE if quiesce else CreateFlag(0))


def subject(verb: str, domain: str, name: str, group: str) -> tuple[tuple[str, ...], str]:
    """Return the domains and the snapshot's name: with ``--group`` the only word is the name."""
    if not group and not domain:
        raise InvalidInput(f"{verb}: name a domain, or several: --group web,db")
    if group and name:
        raise InvalidInput(
            f"--group {group} names the domains: leave out {domain!r}, the one argument is the snapshot"
        )
    return (tuple(group.split(",")), domain) if group else ((domain,), name)


def known(verb: str, domain: str, name: str, group: str) -> tuple[tuple[str, ...], str]:
    """As `subject`, of a snapshot that is there."""
    members, name = subject(verb, domain, name, group)
    if not name:
        raise InvalidInput(f"{verb}: name a snapshot, too; `snaporch list {members[0]}` lists them")
    return members, name


def columns(text: str) -> tuple[str, ...]:
    """Return what ``--columns`` names.

    Raises:
        InvalidInput: there is no such column.
    """
    asked = tuple(text.split(",")) if text else ()
    if lost := [each for each in asked if each not in COLUMNS]:
        raise InvalidInput(f"--columns: there is no column {lost[0]!r}; there are {','.join(COLUMNS)}")
    return asked


def in_sequence(records: Sequence[SnapshotRecord], sort: str) -> Sequence[SnapshotRecord]:
    """Return snapshots, of which the oldest is first, as ``--sort`` says."""
    if sort == "name":
        return sorted(records, key=lambda record: record.name)
    return sorted(records, key=lambda record: -record.size) if sort == "size" else records
