"""Keeps the old guest's memory in a file while its machine is ended for another one; puts it back if that fails.

    keep_old        the guest is paused: its memory goes to a file; nobody writes to its disks any more
    put_back        a machine like the old one, on the old one's disks, loads it and runs
    remove_kept     the new guest is there, or the old one is back

Rule: a guest is never put back once it has run on: its disks would then be newer than its memory. So before the
guest runs again, wherever it is, the file is removed, or its guard, which lets it run when snaporch dies, says by
the verdict that it does. The guard is there until the old machine has ended, so no guest stays paused. A new one
that is found with the file is ended and put back again; one without has loaded it, and may have run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import Launch, Machine, MemoryStreams, Stream, StreamPlan, need
from snaporch.engine.gone import unless_gone
from snaporch.engine.verdict import UNDONE, guard_acted
from snaporch.errors import HypervisorError, OperationFailed
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainState, Handle
from snaporch.model.record import FileRecord
from snaporch.model.request import Strategy
from snaporch.operations.restoring import Restoring


@attrs.frozen
class Kept:
    """What a revert has found out about the guest that it ends: noted in the journal, for recovery.

    Attributes:
        memory: the file with what the guest held, once it is sealed.
        stopped: when the guest last ran, by the host's clock.
    """

    memory: FileRecord | None = None
    stopped: float | None = None


@attrs.define
class Keeping(Restoring):
    """The part of a revert that keeps the old guest.

    Attributes:
        kept: what is known of that.
        lost: the old guest is in the file and nowhere else.
    """

    kept: Kept = attrs.field(factory=Kept)
    lost: bool = False
    _stream: Stream | None = None

    def note(self, **found: Any) -> None:
        """Note what was found out; the journal's next row has it."""
        self.kept = attrs.evolve(self.kept, **found)
        self.operation.notes[self.name] = dumps(self.kept)

    def note_stop(self, machine: Machine) -> None:
        """Note when the old guest last ran: by its hypervisor's clock, if that says it."""
        self.note(stopped=machine.run_times()[0] or time.time())

    # Doing.

    async def keep_old(self) -> None:
        """Keep the memory of the old guest, which is paused."""
        if self.plan.keep is None or self.old is None:
            return
        await self.driver.storage.make_directory(os.path.dirname(self.plan.keep.path))
        await self.driver.storage.make_file(self.plan.keep.path)
        stream = self._stream = need(self.old, MemoryStreams, self.name).stream(self.plan.keep)
        await stream.open()
        await stream.start()
        if self.plan.keep.strategy is Strategy.BACKGROUND:
            await stream.armed()
        await stream.finished(self._progress)
        if self.kept.stopped is None:  # the hypervisor has stopped it by itself
            self.note_stop(self.old)
        self.note(memory=await stream.seal())
        await stream.forget()

    async def check_stood(self) -> None:
        """See that what is kept is what the guest holds.

        Raises:
            HypervisorError: the guest has run since.
        """
        if self.kept.memory is None or self.old is None or self.plan.was is not DomainState.RUNNING:
            return
        if self.verdict.read() == UNDONE:
            raise HypervisorError(guard_acted(self.name))
        running = await self.old.state() is DomainState.RUNNING  # asked first: all earlier events are there then
        if running or self.old.run_changes() > 1:
            raise HypervisorError(
                f"{self.name}: another program let the guest run while its memory was being saved"
            )

    def _progress(self, done: int, total: int) -> None:
        self.context.events.publish(self.operation.progress(self.name, done, total))

    # Compensations.

    async def abort_keeping(self) -> None:
        """End the stream, whatever it is doing."""
        if self.plan.keep is None:
            return
        if self.old is None:
            await self.driver.abandon(self.plan.keep)
            return
        # After a crash of snaporch's it is another one's.
        stream = self._stream or need(self.old, MemoryStreams, self.name).stream(self.plan.keep)
        if not await unless_gone(self.driver, self.plan.domain.handle, stream.abort):
            self.old = None

    async def put_back(self) -> None:
        """Bring up what was kept, where the old machine was ended; then the domain is as it was before."""
        if self.plan.keep is None or self.kept.memory is None or self.verdict.read() == UNDONE:
            return
        if self.old is not None and await unless_gone(self.driver, self.plan.domain.handle, self.old.state):
            return
        self.old = None
        back = await self.driver.find(self._back_directory)
        if await self.driver.storage.exists(self.plan.keep.path):
            back = await self._load_kept(self.plan.keep, back)
        if back is None:
            return  # what was put back has run, and is gone since
        async with self.driver.connect(back, self.name) as machine:
            if self.plan.was is DomainState.RUNNING:
                await machine.resume()
        if self.plan.domain.handle is not None:
            back = await self.driver.take_place(self.plan.domain.handle, back)
            await self.driver.forget(self.plan.domain.handle)  # before nobody knows it any more
        domain = await self.context.catalog.domain(self.name)
        await self.context.catalog.write(Change(domains=(attrs.evolve(domain, handle=back),)))

    @property
    def _back_directory(self) -> Path:
        """Where the machine is launched that is put back."""
        return Path(f"{self.plan.directory}-back")

    async def _load_kept(self, keep: StreamPlan, begun: Handle | None) -> Handle:
        """Return a machine that has loaded the file, which is then gone; one that had begun to is ended."""
        self.lost = True
        for each in (begun, self.plan.domain.handle):
            if each is not None:
                await self.driver.kill(each)
        await self.driver.clear(self._back_directory)
        domain = self.plan.domain
        launch = Launch(
            domain.definition,
            domain.disks,
            self._back_directory,
            incoming=True,
            template=domain.template,
            generation=domain.generation,
            tpm=domain.tpm,
        )
        back = await self.driver.restore(launch, keep.path)
        await self.driver.storage.remove(keep.path)
        self.lost = False
        return back

    async def remove_kept(self) -> None:
        """Remove the file, unless it is all that there is of the old guest.

        Raises:
            OperationFailed: it is.
        """
        if self.plan.keep is None:
            return
        if self.lost:
            raise OperationFailed(f"{self.plan.keep.path} is the only copy of the old guest's memory, and is kept")
        self.note(memory=None)
        await self.driver.storage.remove(self.plan.keep.path)
