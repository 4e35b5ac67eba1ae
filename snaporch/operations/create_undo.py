"""Undoing a create: the compensations. Each of them looks at what exists.

The order in which they run is in `snaporch.engine.steps`. What they share with the steps is in `CreateUndo`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs

from snaporch.drivers.base import (
    Driver,
    ImagePoints,
    Inside,
    Machine,
    MemoryStreams,
    Overlay,
    Overlays,
    PivotNote,
    Storage,
    Stream,
    need,
)
from snaporch.engine.actor import Actor
from snaporch.engine.context import Context
from snaporch.engine.gone import unless_gone
from snaporch.engine.run import Operation
from snaporch.engine.steps import Lane
from snaporch.engine.verdict import STAY, Verdict
from snaporch.errors import ConnectionGone, OperationFailed
from snaporch.model.convert import dumps
from snaporch.model.formats import versioned
from snaporch.model.record import FileRecord
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.create_plan import CreatePlan
from snaporch.operations.disks import release_marks
from snaporch.operations.internal import forget

T = TypeVar("T")


@versioned("create-note")
@attrs.frozen
class Held:
    """What an operation has found out about its point: noted in the journal, for recovery after a crash.

    Attributes:
        point: when the guest was paused, by the host's clock.
        pause: the hypervisor's own time stamps of the beginning and the end of the pause.
        between: snaporch's own time between the commands of the pause, in seconds.
        memory: the memory file, once it is sealed.
        images: by target, the frozen chain, once it is sealed.
        inside: by target, the point inside the image, once it is sealed.
        setup: see `Timings.setup`.
        missed: see `Timings.missed`.
        tpm: the copy of the TPM's state, once it is sealed.
    """

    point: float = 0.0
    pause: tuple[float, float] | None = None
    between: float | None = None
    memory: FileRecord | None = None
    images: dict[str, tuple[FileRecord, ...]] = attrs.field(factory=dict)
    inside: dict[str, FileRecord] = attrs.field(factory=dict)
    setup: float | None = None
    missed: bool = False
    tpm: FileRecord | None = None


@attrs.define
class CreateUndo(Actor):
    """The part of a create that undoes it, and what it shares with the rest.

    Attributes:
        plan: what is done.
        operation: of which this is a part.
        context: the orchestrator's.
        driver: the domain's.
        machine: the domain's; None when inactive.
        held: what it knows of the point.
        made: the files that this operation has made.
    """

    plan: CreatePlan
    operation: Operation
    context: Context
    driver: Driver
    machine: Machine | None
    held: Held = attrs.field(factory=Held)
    made: set[str] = attrs.field(factory=set)
    _stream: Stream | None = None
    _unmerged: bool = False

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.plan.domain.name

    def keys(self, lane: Lane) -> Sequence[str]:
        """See Actor."""
        if lane is Lane.DISK:
            return [overlay.target for overlay in self.plan.overlays]
        if lane is Lane.INSIDE:
            return [point.target for point in self.plan.inside]
        return [""] if lane is Lane.DOMAIN or self.plan.stream else []

    @property
    def storage(self) -> Storage:
        """Where the domain's files are."""
        return self.driver.storage

    @property
    def _hypervisor(self) -> Machine:
        if self.machine is None:
            raise ConnectionGone(f"{self.name} is inactive")
        return self.machine

    def _able(self, trait: type[T]) -> T:
        return need(self._hypervisor, trait, self.name)

    @property
    def _points(self) -> ImagePoints:
        return need(self.storage, ImagePoints, self.name)

    @property
    def stream(self) -> Stream:
        """The memory stream; made on first use."""
        if self._stream is None:
            if self.plan.stream is None:
                raise AssertionError("a plan without memory has no memory lane")
            self._stream = self._able(MemoryStreams).stream(self.plan.stream)
        return self._stream

    def _note(self, **found: Any) -> None:
        """Note what was found out; the journal's next row has it."""
        self.held = attrs.evolve(self.held, **found)
        self.operation.notes[self.name] = dumps(self.held)

    async def unless_gone(self, call: Callable[[], Awaitable[object]]) -> bool:
        """See `snaporch.engine.gone.unless_gone`."""
        handle = self.plan.domain.handle if self.machine is not None else None
        return await unless_gone(self.driver, handle, call)

    def _overlay(self, target: str) -> Overlay:
        return next(overlay for overlay in self.plan.overlays if overlay.target == target)

    def _inside(self, target: str) -> Inside:
        return next(point for point in self.plan.inside if point.target == target)

    async def is_whole(self) -> bool:
        """Return whether all files of this create still exist; if not, a rollback had begun before the crash."""
        there = [await self.storage.exists(path) for path in self.plan.files if path not in self.plan.extra]
        there += [point.tag in await self._points.inside(point.base.active) for point in self.plan.inside]
        return all(there)

    async def abort_stream(self) -> None:
        """End the stream, whatever it is doing."""
        if self.machine is not None:
            await self.stream.abort()
        elif self.plan.stream is not None:
            await self.driver.abandon(self.plan.stream)

    async def switch_back(self) -> None:
        """Put the disks back on the images that they were on, with everything that the guest has written since.

        From here on the snapshot's images may be written to; the missing memory file says so (see `is_whole`). An
        overlay is removed when both images have the same contents and before the disk moves to its base. Invariant:
        an overlay that exists has the newest data; if it is gone, its base is complete. A crash cannot break this.
        """
        self._unmerged = True
        await self.remove_memory_file()
        await self._obey_guards()
        if not await self.unless_gone(self._merge_back):
            # The guest is gone; what it wrote last is in the overlays: merge them offline.
            for overlay in self.plan.overlays:
                if overlay.path in self.made and await self.storage.exists(overlay.path):
                    await self.storage.commit_overlay(overlay.path)
        self._unmerged = False

    async def _merge_back(self) -> None:
        machine = self._able(Overlays)
        noted = {
            overlay.target: overlay.path if await self.storage.exists(overlay.path) else overlay.base.active
            for overlay in self.plan.overlays
        }
        await machine.settle_merges(noted)
        switched = {disk.active for disk in await self._hypervisor.disks()}
        for overlay in self.plan.overlays:
            if overlay.path in switched:
                verdict = self._verdict(overlay)
                await machine.merge_back(overlay, PivotNote(partial(self._removed, overlay), verdict.path))
                await verdict.forget()

    def _verdict(self, overlay: Overlay) -> Verdict:
        return self.context.verdict(f"{self.name}.{overlay.target}")

    async def _obey_guards(self) -> None:
        """Remove overlays whose removal a crash has interrupted: no disk is on them any more."""
        for overlay in self.plan.overlays:
            verdict = self._verdict(overlay)
            if verdict.read() not in {"", STAY}:
                await self._removed(overlay)
            await verdict.forget()

    async def _removed(self, overlay: Overlay) -> None:
        path = overlay.path
        await self._verdict(overlay).insist(f"{overlay.base.format}:{overlay.base.active}", self.name)
        try:
            await self.storage.remove(path)
        except OSError:  # one that is gone must not be gone on with, whatever else went wrong
            if await self.storage.exists(path):  # noqa: ASYNC120 - it re-raises where it matters
                await self._verdict(overlay).forget()  # noqa: ASYNC120 - as above
                raise

    async def close_overlay(self, target: str) -> None:
        """Let the hypervisor close the overlay."""
        await self.unless_gone(lambda: self._able(Overlays).close_overlay(self._overlay(target)))

    async def remove_overlay(self, target: str) -> None:
        """Remove the overlay, if we made it and what the guest has written to it is elsewhere."""
        path = self._overlay(target).path
        if self._unmerged:
            raise OperationFailed(f"{path} holds what the guest has written and is kept")
        await self._remove(path)
        await release_marks(self.context, self.storage, self._overlay(target).base.chain)

    async def remove_memory_file(self) -> None:
        """Remove the memory file, if we made it."""
        if self.plan.stream is not None:
            await self._remove(self.plan.stream.path)
            if self.plan.stream.index:
                await self._remove(self.plan.stream.index)

    async def remove_tpm_copy(self) -> None:
        """Remove the copy of the TPM's state, if we made it."""
        if self.plan.tpm:
            await self._remove(self.plan.tpm)

    async def _remove(self, path: str) -> None:
        if path in self.made:
            await self.storage.remove(path)

    async def forget_inside(self, target: str) -> None:
        """Delete the point, if it is there: no other snapshot inside the image had its name."""
        point = self._inside(target)
        image = DeviceDisk(target, point.base.active, point.base.format)
        await forget(self.driver, self.machine, self.plan.domain.handle, image, point.tag)
