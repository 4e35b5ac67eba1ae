"""Undoing a revert: the compensations. Each of them looks at what exists.

The order in which they run is in `snaporch.engine.ways`. What they share with the steps is in `RevertPart`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import LoadNote, Machine, PauseNote, PointsInside, need
from snaporch.engine.gone import unless_gone
from snaporch.engine.verdict import LOAD, PUT_BACK
from snaporch.engine.ways import WAYS
from snaporch.errors import OperationFailed
from snaporch.model.domain import DomainState, Handle
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.internal import forget
from snaporch.operations.keeping import Keeping


@attrs.define
class RevertUndo(Keeping):
    """The part of a revert that undoes it.

    Attributes:
        loaded: the point is in the old process already: when snaporch had died a guard has loaded it.
    """

    loaded: bool = False

    # The guard, which a rollback needs too: it may be cut short itself.

    async def post_guard(self) -> None:
        """Start a guard: if snaporch dies before the revert is complete, it goes back to the old guest."""
        if self.old is None or self.plan.was is not DomainState.RUNNING or self.guard is not None:
            return
        plan, verdict = self.plan, self.verdict.path
        if WAYS[plan.way].same_process:
            run = plan.state is DomainState.RUNNING
            self.guard = await need(self.old, PointsInside, self.name).load_guard(
                LoadNote(plan.tag, plan.kept, tuple(plan.inside), verdict, run=run)
            )
        else:
            self.guard = self.old.guard(PauseNote(keep_stream=False, rival=self.new, verdict=verdict))
        await self.guard.post()

    def image(self, target: str) -> DeviceDisk:
        """Return the disk with the point inside."""
        return next(disk for disk in self.plan.disks if disk.target == target)

    async def keeps_present(self) -> bool:
        """Return whether what the guest held before is kept inside: if not, that is what it holds."""
        return all([self.plan.kept in await self._inside(target) for target in self.plan.inside])

    async def can_go_on(self) -> bool:
        """Return whether all is there with which a revert that was cut short can be gone on with."""
        if WAYS[self.plan.way].same_process:
            return await self.keeps_present()
        return self.new is not None

    async def load_present(self) -> None:
        """Load what the guest held before, where its process is still there.

        Before it runs, that is no longer kept: so, if snaporch dies, it is known which of the two the guest is.
        """
        kept, targets = self.plan.kept, list(self.plan.inside)
        if self.verdict.read() == LOAD:
            await self.verdict.revise(PUT_BACK)
        if self.old is not None and self.verdict.read() == PUT_BACK and await self.keeps_present():
            await self._unless_gone(partial(self.load_again, self.old, kept, targets))
        if self.old is not None:
            await self._unless_gone(partial(need(self.old, PointsInside, self.name).delete_inside, kept, targets))

    async def load_again(self, machine: Machine, tag: str, targets: Sequence[str]) -> None:
        """Load something from inside the images in the process that has them open."""
        if await machine.state() is DomainState.RUNNING:
            await machine.pause()
        await need(machine, PointsInside, self.name).load_inside(tag, targets)

    async def _unless_gone(self, call: Callable[[], Awaitable[None]]) -> None:
        if not await unless_gone(self.driver, self.plan.domain.handle, call):
            self.old = None

    async def _inside(self, target: str) -> tuple[str, ...]:
        return await self.points.inside(self.image(target).path)

    async def restore_image(self, target: str) -> None:
        """Put an image back to what it held before, where no process has it open any more."""
        if self.old is None and self.plan.kept in await self._inside(target):
            await self.points.restore_inside(self.image(target).path, self.plan.kept)

    async def forget_kept(self, target: str) -> None:
        """Give up what was kept inside an image."""
        await self.forget(self.old, self.plan.domain.handle, target)

    async def forget(self, machine: Machine | None, handle: Handle | None, target: str) -> None:
        """Give it up in the machine that has the image open, or without one."""
        await forget(self.driver, machine, handle, self.image(target), self.plan.kept)

    async def run_old(self) -> None:
        """Let the old guest run on, if it is there."""
        if self.old is not None and self.plan.was is DomainState.RUNNING:
            await self._unless_gone(self.old.resume)

    async def mourn_old(self) -> None:
        """Say, once, what FORCE has cost: the machine that was ended first cannot be brought back."""
        domain, old = await self.context.catalog.domain(self.name), self.plan.domain.handle
        if domain.handle is None or domain.handle != old or await self.driver.alive(old):
            return  # it is known, or not so
        if self.kept.memory is not None:
            return  # it is put back another time
        await self.context.catalog.write(Change(domains=(attrs.evolve(domain, handle=None),)))
        raise OperationFailed(
            f"the old guest was ended and its memory is lost; its disks are whole: "
            f"`snaporch domain start {self.name}` boots it"
        )
