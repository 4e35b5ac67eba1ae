"""Starts a guest at the point of a snapshot: the common part of a revert and a throw-away copy."""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import (
    Driver,
    Guard,
    GuestAgent,
    ImagePoints,
    Launch,
    LoadsMemory,
    Machine,
    PointsInside,
    check_versions,
    need,
)
from snaporch.engine.actor import Actor
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.engine.steps import Lane
from snaporch.engine.verdict import COMPLETE, UNDONE, Verdict
from snaporch.engine.ways import WAYS, Keeps
from snaporch.errors import HypervisorError
from snaporch.model.domain import DomainState, Handle
from snaporch.operations.revert_plan import RevertPlan
from snaporch.operations.shape import check_shape, wanted_disks


async def in_their_places(driver: Driver, plan: RevertPlan) -> RevertPlan:
    """Return the plan with its overlays where the driver wants them."""
    directory, disks = os.path.dirname(plan.directory), []
    owners: dict[str, tuple[int, int]] = {}
    for disk in plan.disks:
        if (frozen := plan.frozen.get(disk.target)) is not None:
            place = await driver.overlay_place(plan.domain, frozen, directory)
            disk = attrs.evolve(disk, path=f"{place.directory}/{os.path.basename(disk.path)}")  # noqa: PLW2901
            owners |= {disk.target: place.owner} if place.owner is not None else {}
        disks.append(disk)
    return attrs.evolve(plan, disks=tuple(disks), owners=owners)


@attrs.define
class Restoring(Actor):
    """One domain's guest, on its way to a point.

    Attributes:
        plan: what is done.
        operation: of which this is a part.
        context: the orchestrator's.
        driver: the domain's.
        old: the domain's machine; None when it is inactive or does not answer.
        new: the machine that is brought up.
        made: the files that this operation has made.
        guard: the guard of the old guest while it is paused.
    """

    plan: RevertPlan
    operation: Operation
    context: Context
    driver: Driver
    old: Machine | None
    new: Handle | None = None
    made: set[str] = attrs.field(factory=set)
    guard: Guard | None = None

    @abc.abstractmethod
    async def can_go_on(self) -> bool:
        """Return whether all is there with which an operation that was cut short can be gone on with."""

    @abc.abstractmethod
    async def commit(self) -> Change:
        """Return what the catalog is to know."""

    @abc.abstractmethod
    async def clean_up(self) -> None:
        """Remove what nobody needs any more; the operation is complete already."""

    async def set_clock(self) -> None:
        """Have the guest's agent set its clock; called when all of the operation's guests run."""

    @property
    def verdict(self) -> Verdict:
        """What is decided of the operation, or of this domain alone where each old guest is kept in a file."""
        own = f".{self.name}" if WAYS[self.plan.way].keeps is Keeps.FILE else ""
        return self.context.verdict(f"{self.plan.operation}{own}")

    async def dismiss_guard(self) -> None:
        """The old guest runs on, or nobody is to let it run."""
        await self.send_guard_away()
        await self.verdict.forget()

    async def send_guard_away(self) -> None:
        """The operation is complete, or the old guest runs on."""
        if self.guard is not None:
            await self.guard.dismiss()
            self.guard = None

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.plan.domain.name

    def keys(self, lane: Lane) -> Sequence[str]:
        """See Actor."""
        disks = {Lane.DISK: list(self.plan.frozen), Lane.INSIDE: list(self.plan.inside)}
        return disks.get(lane, [""] if lane is Lane.DOMAIN else [])

    def path(self, target: str) -> str:
        """Return the image that a disk will be on."""
        return next(disk.path for disk in self.plan.disks if disk.target == target)

    async def make_overlay(self, target: str) -> None:
        """Make a fresh overlay over the frozen image: the snapshot itself is never written to."""
        storage, base, path = self.driver.storage, self.plan.frozen[target], self.path(target)
        await storage.make_directory(os.path.dirname(path))
        size = await storage.virtual_size(base.path, base.format)
        await storage.make_overlay(path, base, size, self.plan.owners.get(target))
        self.made.add(path)

    async def make_tpm(self) -> None:
        """Make the state of the new machine's TPM: as it was, or for the memory to bring it."""
        if self.plan.tpm:
            copy = self.plan.snapshot.tpm
            await self.driver.make_tpm(self.plan.tpm, copy.path if copy is not None else "")

    def what_to_launch(self) -> Launch:
        """Return what `launch` starts."""
        record = self.plan.snapshot
        return Launch(
            record.definition,
            self.plan.disks,
            self.plan.run_directory,
            incoming=record.memory is not None,
            template=record.template,
            generation=self.plan.generation,
            tpm=self.plan.tpm,
        )

    async def launch(self) -> None:
        """Start the new machine, its CPUs stopped, or leave that to `load`."""
        if not self._in_one_call:
            self.new = await self.driver.launch(self.what_to_launch())

    @property
    def launched(self) -> Handle:
        """The new machine."""
        if self.new is None:
            raise AssertionError("launched before it is used")
        return self.new

    def chains(self) -> dict[str, tuple[str, ...]]:
        """Return, by target, the images that back those that the new machine is to be on."""
        images = self.plan.snapshot.images
        return {target: tuple(file.path for file in chain) for target, chain in images.items()}

    async def load(self) -> None:
        """Check that the machine is the one asked for, and load the snapshot's memory into it, if there is any."""
        if self._in_one_call:
            self.new = await self.driver.restore(
                self.what_to_launch(), self._memory_file, versions=self.plan.snapshot.hypervisor
            )
        async with self.driver.connect(self.launched, self.name) as machine:
            await self.check_launched(machine)
            if self.plan.snapshot.snapshot.memory and not self._in_one_call:
                await self.load_memory(machine)

    async def check_launched(self, machine: Machine) -> None:
        """Check that a machine is the one asked for, and one that the memory fits."""
        shape = self.plan.snapshot.shape
        disks = wanted_disks(self.plan.disks, self.chains(), shape)
        check_shape(self.name, disks, shape, await machine.shape())
        if self.plan.snapshot.snapshot.memory and not self._in_one_call:
            check_versions(machine, self.plan.snapshot.hypervisor, self.plan.snapshot.name)

    async def load_memory(self, machine: Machine) -> None:
        """Load the memory into it."""
        if self.plan.snapshot.memory is not None:
            await need(machine, LoadsMemory, self.name).load(self._memory_file)
        else:
            await need(machine, PointsInside, self.name).load_inside(self.plan.tag, list(self.plan.inside))

    @property
    def _in_one_call(self) -> bool:
        """Whether the new machine is launched with its memory."""
        return self.driver.info.one_call and self.plan.snapshot.memory is not None

    @property
    def _memory_file(self) -> str:
        if self.plan.snapshot.memory is None:
            raise AssertionError("a snapshot without a memory file has none to load")
        return self.plan.snapshot.memory.path

    @property
    def frozen_inside(self) -> bool:
        """Whether the guest's memory has its file systems frozen."""
        return self.plan.snapshot.quiesced and self.plan.snapshot.snapshot.memory

    async def let_run(self, machine: Machine) -> None:
        """Let the guest run."""
        await machine.resume()

    async def arrive(self, machine: Machine) -> None:
        """Let the guest run, its file systems thawed, or see that it is paused.

        Raises:
            HypervisorError: it is in another state then.
        """
        running = self.plan.state is DomainState.RUNNING
        if running:
            await self.let_run(machine)
        if await machine.state() is not self.plan.state:
            raise HypervisorError(f"{self.name}: the guest is not {self.plan.state} after loading")
        if running and self.frozen_inside:
            await need(machine, GuestAgent, self.name).thaw()

    @property
    def points(self) -> ImagePoints:
        """What is inside the images, with no machine near."""
        return need(self.driver.storage, ImagePoints, self.name)

    # Compensations.

    async def end_new(self) -> None:
        """End the new machine."""
        if self.verdict.read() == COMPLETE:
            await self.verdict.revise(UNDONE)
        await self.driver.end(self.new, self.plan.run_directory)

    async def remove_tpm(self) -> None:
        """Remove that state."""
        if self.plan.tpm:
            await self.driver.remove_tpm(self.plan.tpm)

    async def remove_overlay(self, target: str) -> None:
        """Remove the fresh overlay."""
        if (path := self.path(target)) in self.made:
            await self.driver.storage.remove(path)
