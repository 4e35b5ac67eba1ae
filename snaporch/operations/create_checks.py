"""What a create looks at before it touches anything."""

from __future__ import annotations

import os
from collections.abc import Sequence

from snaporch.drivers.base import ImagePoints, Storage, need
from snaporch.errors import TargetExists
from snaporch.operations.checks import OVERLAY_BYTES, STREAM_BYTES, check_space
from snaporch.operations.create_undo import CreateUndo
from snaporch.operations.places import check_directory

INDEX_PART = 400  # of the RAM is what the index takes, at most


async def check_create(participants: Sequence[CreateUndo]) -> None:
    """Refuse what can be seen to fail, before anything is touched.

    Raises:
        TargetExists: a file is there already, or a snapshot of that name, in the catalog or inside an image.
        Refused: a directory cannot be written to, or somebody else writes to an image of an inactive domain.
        NotEnoughSpace: what may be needed by all together is more than what is free.
    """
    needs: list[tuple[Storage, str, int]] = []
    for each in participants:
        await _check_name(each)
        for base in each.plan.bases if each.machine is None else ():  # else its images are its hypervisor's
            await each.storage.chain(base.active, base.format, still=True)
        if each.plan.stream is not None:
            await each.storage.check_memory_place(each.plan.stream.path)
        for path in each.plan.files:
            await each.storage.check_place(str(each.context.root), each.name, path, "a file of the snapshot")
            await check_directory(each.context, each.storage, each.name, path, "a file of the snapshot")
            if await each.storage.exists(path):
                raise TargetExists(f"{path} exists already: nothing is overwritten; choose another file", path)
        for path, size in _needs(each).items():
            directory = os.path.dirname(path)
            await each.storage.check_writable(directory)
            needs.append((each.storage, directory, size))
    await check_space(needs)


async def _check_name(participant: CreateUndo) -> None:
    name = participant.plan.snapshot.name
    if await participant.context.catalog.has_snapshot(participant.name, name):
        raise TargetExists(f"{participant.name} has a snapshot {name!r} already; choose another name")
    for point in participant.plan.inside:
        if point.tag in await need(participant.storage, ImagePoints, participant.name).inside(point.base.active):
            raise TargetExists(f"{point.base.active} has a snapshot {point.tag!r} inside; choose another name")


def _needs(participant: CreateUndo) -> dict[str, int]:
    """Return the bytes that each file which is to be made, or to be kept inside of, may need."""
    plan, machine = participant.plan, participant.machine
    needs = {overlay.path: OVERLAY_BYTES for overlay in plan.overlays}
    if machine is not None and plan.memory_place:
        needs[plan.memory_place] = machine.capabilities.ram + STREAM_BYTES
        if plan.extra:
            needs[plan.memory_place] += machine.capabilities.ram // INDEX_PART
    return needs
