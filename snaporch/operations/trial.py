"""A throw-away copy of a guest: does a snapshot load, and does it run?

It is launched on overlays of its own (of points inside images: on copies), without network and without the
outside's serial ports, loads the memory and runs for a few seconds; then all of it is removed. Neither the domain
nor the snapshot is touched. A verify with `boot` runs such a copy, and a revert by the way *proven* begins with
one.
"""

from __future__ import annotations

import os
from typing import ClassVar

import attrs
import trio

from snaporch.catalog import Change
from snaporch.drivers.base import Launch, LoadsMemory, Machine, need
from snaporch.engine.ways import WAYS, performed
from snaporch.errors import CommandRefused, HypervisorError, Unsupported
from snaporch.model.domain import DomainRecord, DomainState
from snaporch.model.names import short
from snaporch.model.record import SnapshotRecord
from snaporch.model.way import Way
from snaporch.operations.restoring import Restoring
from snaporch.operations.revert_plan import RevertPlan, fresh_disks, tpm_place

RUN_SECONDS = 3.0  # a guest whose memory does not fit its devices or disks panics within its first timer ticks


def plan_trial(domain: DomainRecord, record: SnapshotRecord, *, directory: str, operation: str) -> RevertPlan:
    """Return the plan of a throw-away copy: all of its disks are files of its own.

    Raises:
        Unsupported: there is a disk that the snapshot does not hold, and that the copy would write to.
    """
    disks, frozen = fresh_disks(domain, record, directory, operation)
    inside = {disk.disk.target: disk for disk in record.snapshot.disks if not disk.external}
    held = {*frozen, *inside}
    if shared := [disk.target for disk in disks if disk.target not in held and not disk.readonly]:
        raise Unsupported(
            f"{record.name} does not hold {', '.join(shared)}: a copy of its guest would write to that"
        )
    return RevertPlan(
        domain=domain,
        snapshot=record,
        state=DomainState.RUNNING,
        was=DomainState.INACTIVE,
        disks=tuple(
            attrs.evolve(disk, path=f"{directory}/{disk.target}.{short(operation)}.qcow2")
            if disk.target in inside
            else disk
            for disk in disks
        ),
        frozen=frozen | {target: disk.disk for target, disk in inside.items()},
        way=Way.VERIFY,
        directory=f"{directory}/run-{short(operation)}",
        operation=operation,
        inside={target: disk.name for target, disk in inside.items()},
        generation=record.definition.new_generation(),
        tpm=tpm_place(record.definition, directory, operation),
    )


@attrs.define
class Trial(Restoring):
    """A throw-away copy of a snapshot's guest: one that takes nobody's place.

    Attributes:
        rival: the guest whose place another is to take is there, and may keep the copy from running: it has images
            locked. That the copy loads is then enough.
    """

    performs: ClassVar = performed([WAYS[Way.VERIFY]])

    rival: bool = False

    def what_to_launch(self) -> Launch:
        """Return what `launch` starts: nothing of the outside world is in it."""
        return attrs.evolve(super().what_to_launch(), isolated=True, incoming=self.plan.snapshot.snapshot.memory)

    async def make_overlay(self, target: str) -> None:
        """Make an overlay or, of a point inside an image, which others may be on, a copy."""
        if target not in self.plan.inside:
            await super().make_overlay(target)
            return
        path = self.path(target)
        await self.driver.storage.make_directory(os.path.dirname(path))
        await self.points.extract_disk(self.plan.frozen[target].path, self.plan.inside[target], path)
        self.made.add(path)

    @property
    def _memory(self) -> str:
        return str(self.plan.run_directory / "memory")

    def chains(self) -> dict[str, tuple[str, ...]]:
        """Return what backs the copy's images: the copy of a point inside an image has no backing."""
        return super().chains() | dict.fromkeys(self.plan.inside, ())

    async def load_memory(self, machine: Machine) -> None:
        """Load the memory into it; one that is inside an image is copied first."""
        if not self.plan.memory_inside:
            await super().load_memory(machine)
            return
        target, tag = next(iter(self.plan.inside.items()))
        await self.driver.storage.make_directory(self.plan.directory)
        await self.points.extract_memory(self.plan.frozen[target].path, tag, self._memory)
        await need(machine, LoadsMemory, self.name).load(self._memory)

    async def end_new(self) -> None:
        """End the copy's process, and remove its memory."""
        if self.plan.memory_inside:
            await self.driver.storage.remove(self._memory)
        await super().end_new()

    async def run_awhile(self) -> None:
        """Let the copy run, and look whether it still does."""
        async with self.driver.connect(self.launched, self.name) as machine:
            try:
                await machine.resume()
            except CommandRefused as error:
                if self.rival:
                    return  # the memory is loaded; what bars the copy goes with the old guest
                if self.plan.domain.handle is None:
                    raise
                why = f"the copy has loaded the memory, and cannot run beside the guest: {error.description}"
                raise Unsupported(f"{self.name}: {why}") from None
            await trio.sleep(RUN_SECONDS)
            if await machine.state() is not DomainState.RUNNING:
                raise HypervisorError(f"{self.name}: the guest stopped by itself within {RUN_SECONDS:g} s")

    async def can_go_on(self) -> bool:
        """Return False: there is nothing in it for anybody."""
        return False

    async def commit(self) -> Change:
        """Return that there is nothing for the catalog to know."""
        return Change()

    async def clean_up(self) -> None:
        """Remove the copy."""
        await self.end_new()
        await self.remove_tpm()
        for target in self.plan.frozen:
            await self.remove_overlay(target)

    async def find(self) -> None:
        """Know what a trial that was cut short may have left."""
        self.new = await self.driver.find(self.plan.run_directory)
        self.made = {self.path(target) for target in self.plan.frozen}
