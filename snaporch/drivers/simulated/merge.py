"""Merges of images that a simulated process has open; what they change is in `process` and `files`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import trio

from snaporch.drivers.base import PivotNote, Progress
from snaporch.drivers.simulated.drive import Pivot
from snaporch.drivers.simulated.guard import pivot_guard
from snaporch.errors import NotConverging
from snaporch.model.request import MergeOptions, OnTimeout

if TYPE_CHECKING:
    from snaporch.drivers.simulated.machine import SimulatedMachine


@attrs.frozen
class Merger:
    """Merges in one process: each takes its time, and has its effect at the end of that."""

    machine: SimulatedMachine

    async def commit(self, top: str, base: str, note: PivotNote, options: MergeOptions, progress: Progress) -> None:
        """See Machine.commit_image."""
        process = self.machine.process
        drive = process.drive_over(top)
        run = process.files.run(top, base)
        size = sum(image.allocated for image in run[:-1])
        if drive.image.path != top:
            await self._copy(size, options, progress)
            process.commit(top, base)
            process.replace(drive, run)
            return
        pivot = Pivot(drive, run)
        with self._guarded(pivot, note):
            await self._catch_up(pivot, size, options, progress)
            process.hold(pivot)
            process.commit(top, base)
            with trio.CancelScope(shield=True):
                await note.write()
                pivot.noted = True
                self.machine.client.check_alive()
                await self.machine.client.reach("machine.commit_image", self.machine.label, process)
                process.end_pivot(moved=True)  # nothing happens where a guard has done so

    @contextmanager
    def _guarded(self, pivot: Pivot, note: PivotNote) -> Iterator[None]:
        """Let the guest write again if the merge fails, and have a guard see to it if snaporch dies."""
        client, process = self.machine.client, self.machine.process
        guard = pivot_guard(client, process, note)
        client.guards.add(guard)
        try:
            yield
        finally:
            client.guards.discard(guard)
            if process.pivot is pivot and not pivot.noted and not client.killed:
                process.end_pivot(moved=False)

    async def _catch_up(self, pivot: Pivot, size: int, options: MergeOptions, progress: Progress) -> None:
        """Copy what the guest goes on writing to; where it outruns that, hold it up or give up."""
        guest, speed = self.machine.process.guest, self.machine.process.speed
        writes = guest.model.disk_rate if guest.runs else 0.0
        if math.isinf(speed.merge_seconds(size, options.bandwidth, writes=writes)):
            if options.on_timeout is OnTimeout.FAIL:
                await self.machine.client.wait(options.max_seconds or 0.0, self.machine.process)
                raise NotConverging(f"{self.machine.label}: the guest writes faster than {pivot.top} merges")
            self.machine.process.hold(pivot)
            writes = 0.0
        await self._copy(size, options, progress, writes=writes)

    async def _copy(self, size: int, options: MergeOptions, progress: Progress, *, writes: float = 0.0) -> None:
        client, process = self.machine.client, self.machine.process
        progress(0, size)
        await client.wait(process.speed.merge_seconds(size, options.bandwidth, writes=writes), process)
        await client.reach("machine.merge", self.machine.label, process)
        progress(size, size)

    async def stream(self, top: str, base: str | None, options: MergeOptions, progress: Progress) -> None:
        """See Machine.stream_image."""
        process = self.machine.process
        size = sum(image.allocated for image in process.files.run(top, base)[1:])
        await self._copy(size, options, progress)
        process.pull(top, base)
