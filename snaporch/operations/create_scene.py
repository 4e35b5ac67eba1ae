"""What a create is decided by: how a domain, its machine and its disks are just now."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from snaporch.drivers.base import Machine, MemoryStreams, has, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.model.domain import DomainState
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.create_plan import Scene
from snaporch.operations.estimate import LOOK_BACK
from snaporch.operations.records import check_records


async def look(
    context: Context, name: str, operation: Operation, stack: AsyncExitStack
) -> tuple[Scene, Machine | None]:
    """Look at a domain; its machine stays connected for as long as `stack` is open."""
    record, machine = await stack.enter_async_context(context.machine_of(name))
    await check_records(context, record)
    shape = await machine.shape() if machine else None
    disks = shape.disks if shape else await context.disks_of(record, None)
    driver, directory = context.driver(record), context.directory(name)
    images = [DeviceDisk(disk.target, disk.active, disk.format) for disk in disks]
    scene = Scene(
        domain=record,
        state=await machine.state() if machine else DomainState.INACTIVE,
        disks=disks,
        capabilities=machine.capabilities if machine else None,
        settings=await _settings(machine, name),
        directory=directory,
        operation=operation.id,
        now=operation.begun,
        earlier=await context.catalog.checkpoints(name, LOOK_BACK),
        shape=shape,
        traits=driver.traits,
        places={image.target: await driver.overlay_place(record, image, directory) for image in images},
        way_back=await driver.way_back(record, machine) if machine else None,
        renamed=await context.catalog.is_own(f"{directory}/{operation.subject}.mem"),
    )
    return scene, machine


async def _settings(machine: Machine | None, name: str) -> dict[str, Any]:
    if machine is None or not has(machine, MemoryStreams):
        return {}
    return await need(machine, MemoryStreams, name).settings()
