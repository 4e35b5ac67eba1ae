"""What a snapshot is expected to take of the root's file system until the next one is taken."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from statistics import median

from snaporch.engine.context import Context
from snaporch.errors import Refused
from snaporch.model.domain import DomainRecord
from snaporch.operations.estimate import LOOK_BACK


async def expected_room(context: Context, domains: Sequence[str], *, memory: bool) -> tuple[int, int]:
    """See `snaporch.Orchestrator.room_for`."""
    needed = free = 0
    for name in domains:
        record = await context.catalog.domain(name)
        driver = context.driver(record)
        if memory and await driver.present(record) is not None:
            last = [each.bytes for each in await context.catalog.checkpoints(name, LOOK_BACK)]
            needed += int(median(last)) if last else record.definition.memory
        needed += await _grown(context, record)
        _, free = await driver.storage.free(str(context.root))
    return needed, free


async def _grown(context: Context, record: DomainRecord) -> int:
    """Return by how much a domain's overlays have grown since its last snapshot; without one they are none."""
    storage, own, grown = context.driver(record).storage, await context.catalog.own_files(record.name), 0
    for disk in record.disks:
        if disk.path in own:
            with suppress(Refused):  # the create says what is wrong with it
                grown += (await storage.inspect(disk.path, disk.format))[0].allocated
    return grown
