"""The memory stream of a Xen guest: libxl's, to a file.

The guest suspends itself at the stream's end, by a call of its own to the hypervisor: that is the point, and why a
guest must run to be saved. It stays suspended until `XenMachine.resume`. With LIVE memory is sent while the guest
runs, and then what it has written to meanwhile, up to five rounds; without, it suspends itself first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import attrs
import trio

from snaporch.drivers.base import Progress, StreamPlan
from snaporch.drivers.base.machine import Stream
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.xen.client import HelperClient
from snaporch.errors import CommandRefused, ConnectionGone, HypervisorError, Unsupported
from snaporch.model.record import FileRecord
from snaporch.model.request import Strategy

POLL_SECONDS = 0.25  # how far it is, the file says: libxl says nothing
ABORT_SECONDS = 90.0  # libxl waits up to a minute for a guest that does not react


@attrs.define
class XenStream(Stream):
    """See Stream.

    Attributes:
        helper: of the guest's connection.
        domid: the guest's.
        plan: how.
        ram: bytes of guest RAM.
        suspended: told since when the guest is.
    """

    helper: HelperClient
    domid: int
    plan: StreamPlan
    ram: int
    suspended: Callable[[float], None]
    _save: int | None = None

    async def open(self) -> None:
        """See Stream: there is nothing to prepare."""
        if self.plan.bandwidth:
            raise Unsupported("Xen sends a guest's memory as fast as it can: leave out the bandwidth")
        await trio.lowlevel.checkpoint()

    async def start(self) -> None:
        """See Stream."""
        live = self.plan.strategy is not Strategy.PAUSED
        self._save = await self.helper.send("save", domid=self.domid, path=self.plan.path, live=live)

    async def armed(self) -> None:
        """See Stream: there is no background stream."""
        raise Unsupported("Xen cannot write-protect a guest's memory")

    async def finished(self, progress: Progress) -> None:
        """See Stream; the guest is then suspended."""
        if self._save is None:
            raise AssertionError("started before it is waited for")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, progress)
            answer = await self._answer(self._save)
            nursery.cancel_scope.cancel()
        self.suspended(answer)

    async def _answer(self, number: int) -> float:
        try:
            answer = await self.helper.receive(number)
        except CommandRefused as error:
            self._save = None
            raise HypervisorError(f"{self.helper.label}: memory was not saved: {error.description}") from error
        self._save = None
        return float(answer["suspended"])

    async def _watch(self, progress: Progress) -> None:
        while True:
            with suppress(OSError):
                progress(min(os.stat(self.plan.path).st_size, self.ram), self.ram)
            await trio.sleep(POLL_SECONDS)

    async def limit(self, bandwidth: int) -> None:
        """See Stream; refused before, as `Capabilities.limits_streams` says."""
        await trio.lowlevel.checkpoint()
        if bandwidth:
            raise Unsupported("Xen sends a guest's memory as fast as it can: leave out the bandwidth")

    async def seal(self) -> FileRecord:
        """See Stream."""
        return await LocalStorage().seal(self.plan.path)

    async def forget(self) -> None:
        """See Stream."""
        await trio.lowlevel.checkpoint()

    async def abort(self) -> None:
        """See Stream: the guest runs on, or again."""
        if (number := self._save) is None:
            return
        with suppress(ConnectionGone), trio.fail_after(ABORT_SECONDS):
            await self.helper.abort()
            with suppress(CommandRefused):
                await self.helper.receive(number)
        self._save = None
