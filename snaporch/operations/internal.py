"""Points inside images: made by the process that has the image open, or, if there is none, by snaporch itself."""

from __future__ import annotations

from collections.abc import Iterable

from snaporch.drivers.base import Driver, ImagePoints, Machine, PointsInside, need
from snaporch.engine.context import Context
from snaporch.engine.gone import is_gone
from snaporch.errors import ConnectionGone, OutcomeUnknown, Unsupported
from snaporch.model.domain import Handle
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.readers import readers


async def forget(
    driver: Driver, machine: Machine | None, handle: Handle | None, image: DeviceDisk, tag: str
) -> None:
    """Delete a snapshot inside an image, wherever it has come from. Idempotent.

    Args:
        driver: the domain's.
        machine: its machine; None when it is inactive.
        handle: that of the machine.
        image: of one of its disks; its target is the disk's.
        tag: the snapshot's name.

    Raises:
        OperationFailed: a process has the image open below another one.
    """
    if machine is not None and handle is not None:
        try:
            if image.path in {disk.active for disk in await machine.disks() if disk.target == image.target}:
                await need(machine, PointsInside, image.target).delete_inside(tag, [image.target])
                return
        except (ConnectionGone, OutcomeUnknown):
            if not await is_gone(driver, handle):  # noqa: ASYNC120 - it re-raises where it matters
                raise
    await need(driver.storage, ImagePoints, image.target).delete_inside(image.path, tag)


def points_inside(snapshots: Iterable[SnapshotRecord]) -> list[tuple[DeviceDisk, str]]:
    """Return the images that have points of snapshots inside, each with the name of one there."""
    disks = (disk for snapshot in snapshots for disk in snapshot.snapshot.disks if not disk.external)
    return [(disk.disk, disk.name) for disk in disks]


async def check_forgettable(
    context: Context, domain: str, machine: Machine | None, points: Iterable[tuple[DeviceDisk, str]]
) -> None:
    """Refuse what `forget` could not delete.

    Raises:
        Unsupported: an image is open below another one, or another domain reads it.
    """
    chains = [disk.chain for disk in await machine.disks()] if machine is not None else []
    elsewhere = await readers(context, {domain})
    storage = context.driver(await context.catalog.domain(domain)).storage
    for image, tag in points:
        for active, *below in chains:
            if image.path in below:
                raise Unsupported(
                    f"{tag} is inside {image.path}, which the running {domain} reads below {active} and nobody can "
                    "write to; shut it down first"
                )
        elsewhere.check_seen(f"{tag} is inside {image.path}")
        identity = (await storage.identities([image.path])).get(image.path, "")
        if who := elsewhere.of(identity):
            raise Unsupported(f"{tag} is inside {image.path}, which {who} reads too")
