"""The *Libxl Domain Snapshot API* (RFC V6) under its own names, over any driver.

The coroutines return 0 or -1 as the RFC's functions do; what went wrong is then in `libxl_ctx.error`. All else is
the orchestrator's: new Python programs use `snaporch.Orchestrator`, which raises exceptions.

    async with open_orchestrator(root) as orchestrator:
        ctx = libxl_ctx(orchestrator)
        snapshot = libxl_domain_snapshot(name="before-upgrade", memory=True)
        if await libxl_domain_snapshot_create(ctx, "web1", snapshot, LIBXL_DOMAIN_SNAPSHOT_CREATE_LIVE):
            print(ctx.error)
"""
# ruff: noqa: N801 - the RFC names its types so

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import attrs

from snaporch.errors import InvalidInput, SnaporchError
from snaporch.model.merge import MergePlan
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import CreateFlag, DeleteFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag

__all__ = [
    "LIBXL_DISK_FORMAT_QCOW2",
    "LIBXL_DISK_FORMAT_RAW",
    "LIBXL_DISK_FORMAT_UNKNOWN",
    "LIBXL_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY",
    "LIBXL_DOMAIN_SNAPSHOT_CREATE_LIVE",
    "LIBXL_DOMAIN_SNAPSHOT_DELETE_CHILDREN",
    "LIBXL_DOMAIN_SNAPSHOT_REVERT_FORCE",
    "LIBXL_DOMAIN_SNAPSHOT_REVERT_PAUSED",
    "LIBXL_DOMAIN_SNAPSHOT_REVERT_RUNNING",
    "Orchestrates",
    "libxl_ctx",
    "libxl_device_disk",
    "libxl_disk_format",
    "libxl_disk_snapshot",
    "libxl_disk_snapshot_revert",
    "libxl_domain_snapshot",
    "libxl_domain_snapshot_create",
    "libxl_domain_snapshot_delete",
    "libxl_domain_snapshot_revert",
]

LIBXL_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY = 1
LIBXL_DOMAIN_SNAPSHOT_CREATE_LIVE = 2
LIBXL_DOMAIN_SNAPSHOT_DELETE_CHILDREN = 1
LIBXL_DOMAIN_SNAPSHOT_REVERT_RUNNING = 1
LIBXL_DOMAIN_SNAPSHOT_REVERT_PAUSED = 2
LIBXL_DOMAIN_SNAPSHOT_REVERT_FORCE = 4


class libxl_disk_format(enum.IntEnum):
    """libxl's formats of images, those that snaporch knows; UNKNOWN is for snaporch to find out or choose."""

    UNKNOWN = 0
    QCOW2 = 2
    RAW = 4


LIBXL_DISK_FORMAT_UNKNOWN = libxl_disk_format.UNKNOWN
LIBXL_DISK_FORMAT_QCOW2 = libxl_disk_format.QCOW2
LIBXL_DISK_FORMAT_RAW = libxl_disk_format.RAW


F = TypeVar("F", bound=enum.Flag)


@attrs.define
class libxl_device_disk:
    """A disk, as much of libxl's structure as a snapshot needs.

    Attributes:
        vdev: the disk's name in its domain, for example ``xvda``.
        pdev_path: the image; empty in a request where it is for snaporch to fill in.
        format: of the image.
        readwrite: not 0: the guest can write to it.
    """

    vdev: str
    pdev_path: str = ""
    format: libxl_disk_format = LIBXL_DISK_FORMAT_UNKNOWN
    readwrite: int = 1


@attrs.define
class libxl_disk_snapshot:
    """What a snapshot does with one disk.

    Attributes:
        disk: the original disk.
        name: the name of the disk's snapshot.
        external: external snapshot or not.
        external_sn: the external snapshot's file and format; None exactly when `external` is false.
    """

    disk: libxl_device_disk
    name: str = ""
    external: bool = True
    external_sn: libxl_device_disk | None = None


@attrs.define
class libxl_domain_snapshot:
    """A snapshot of a domain.

    Attributes:
        name: its name; empty in a request: made from the UTC time.
        description: free text.
        creation_time: in seconds since the epoch.
        memory: save memory or not; false means a disk-only snapshot.
        memory_file: the memory state's file, when external.
        disks: what is done with each disk; in a request those that something is to be said about.
    """

    name: str = ""
    description: str = ""
    creation_time: int = 0
    memory: bool = True
    memory_file: str = ""
    disks: list[libxl_disk_snapshot] = attrs.field(factory=list)

    @property
    def num_disks(self) -> int:
        """The length of `disks`."""
        return len(self.disks)


class Orchestrates(Protocol):
    """What this is thin over: `snaporch.Orchestrator`, or anything else with these three."""

    async def create(self, domain: str, snapshot: DomainSnapshot, flags: CreateFlag) -> SnapshotRecord:
        """See `snaporch.Orchestrator`."""

    async def delete(self, domain: str, name: str, flags: DeleteFlag) -> MergePlan:
        """See `snaporch.Orchestrator`."""

    async def revert(self, domain: str, name: str, flags: RevertFlag) -> object:
        """See `snaporch.Orchestrator`."""


@attrs.define
class libxl_ctx:
    """The context that every call takes.

    Attributes:
        orchestrator: what does the work; it stays open for as long as the context is used.
        error: why the last call has returned -1; None after one that has returned 0.
    """

    orchestrator: Orchestrates
    error: SnaporchError | None = None


async def libxl_domain_snapshot_create(
    ctx: libxl_ctx, domname: str, snapshot: libxl_domain_snapshot, flags: int
) -> int:
    """Create a snapshot of a domain, as `snapshot` and `flags` say; see `snaporch.Orchestrator.create`.

    Args:
        ctx: context.
        domname: the domain's name.
        snapshot: what is to be created; on success it holds what was: name, time, files of every disk.
        flags: bitwise-OR of LIBXL_DOMAIN_SNAPSHOT_CREATE_*.

    Returns:
        0 on success, -1 on failure: `snapshot` is then as it was, and so is the domain.
    """

    async def call() -> None:
        record = await ctx.orchestrator.create(domname, _to_model(snapshot), _flags(CreateFlag, flags))
        _fill(snapshot, record.snapshot)

    return await _answered(ctx, call)


async def libxl_domain_snapshot_delete(ctx: libxl_ctx, domname: str, snapshot_name: str, flags: int) -> int:
    """Delete a snapshot; its changes are merged into its children. See `snaporch.Orchestrator.delete`.

    Args:
        ctx: context.
        domname: the domain's name.
        snapshot_name: the snapshot's name.
        flags: bitwise-OR of LIBXL_DOMAIN_SNAPSHOT_DELETE_*.

    Returns:
        0 on success, -1 on error.
    """

    async def call() -> None:
        await ctx.orchestrator.delete(domname, snapshot_name, _flags(DeleteFlag, flags))

    return await _answered(ctx, call)


async def libxl_domain_snapshot_revert(ctx: libxl_ctx, domname: str, snapshot_name: str, flags: int) -> int:
    """Revert a domain to a snapshot; see `snaporch.Orchestrator.revert`.

    Args:
        ctx: context.
        domname: the domain's name.
        snapshot_name: the snapshot's name.
        flags: bitwise-OR of LIBXL_DOMAIN_SNAPSHOT_REVERT_*.

    Returns:
        0 on success, -1 on error.
    """

    async def call() -> None:
        await ctx.orchestrator.revert(domname, snapshot_name, _flags(RevertFlag, flags))

    return await _answered(ctx, call)


libxl_disk_snapshot_revert = libxl_domain_snapshot_revert
"""The name under which the RFC's text has `libxl_domain_snapshot_revert`."""


async def _answered(ctx: libxl_ctx, call: Callable[[], Awaitable[None]]) -> int:
    try:
        await call()
    except SnaporchError as error:
        ctx.error = error
        return -1
    ctx.error = None
    return 0


def _flags(kind: type[F], number: int) -> F:
    try:
        return kind(number)
    except ValueError:
        raise InvalidInput(f"{number} is no combination of {', '.join(kind.__members__)}") from None


def _to_model(snapshot: libxl_domain_snapshot) -> DomainSnapshot:
    return DomainSnapshot(
        name=snapshot.name,
        description=snapshot.description,
        creation_time=snapshot.creation_time,
        memory=snapshot.memory,
        memory_file=snapshot.memory_file,
        disks=tuple(_disk_snapshot(each) for each in snapshot.disks),
    )


def _disk_snapshot(snapshot: libxl_disk_snapshot) -> DiskSnapshot:
    disk = _device(snapshot.disk)
    if snapshot.external_sn is not None:
        return DiskSnapshot(disk, snapshot.name, snapshot.external, _device(snapshot.external_sn))
    return DiskSnapshot(disk, snapshot.name, snapshot.external)


def _device(disk: libxl_device_disk) -> DeviceDisk:
    format_ = {LIBXL_DISK_FORMAT_RAW: "raw"}.get(disk.format, "qcow2")
    return DeviceDisk(disk.vdev, disk.pdev_path, format_, readonly=not disk.readwrite)


def _fill(snapshot: libxl_domain_snapshot, made: DomainSnapshot) -> None:
    for name in ("name", "description", "creation_time", "memory", "memory_file"):
        setattr(snapshot, name, getattr(made, name))
    snapshot.disks = [
        libxl_disk_snapshot(
            _from_device(each.disk),
            each.name,
            each.external,
            _from_device(each.external_sn) if each.external_sn is not None else None,
        )
        for each in made.disks
    ]


def _from_device(disk: DeviceDisk) -> libxl_device_disk:
    format_ = LIBXL_DISK_FORMAT_RAW if disk.format == "raw" else LIBXL_DISK_FORMAT_QCOW2
    return libxl_device_disk(disk.target, disk.path, format_, readwrite=int(not disk.readonly))
