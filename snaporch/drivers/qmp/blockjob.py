"""One block job of a QEMU, followed from its start to its end, and the guest that it has to catch up with.

A commit of the image that a guest writes to is *ready* once it has copied all that was there and all that the guest
has written since; only then can it end. A guest that writes faster than that is held back step by step (`Brake`):
at first not at all, then its writes to that disk are throttled, then, if the caller allows it, its CPUs stop.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs
import trio

from snaporch.drivers.base import Guard, Machine, Progress
from snaporch.drivers.qmp.protocol import QMP
from snaporch.drivers.qmp.subscription import Subscription
from snaporch.errors import CommandRefused, ConnectionGone, HypervisorError, NotConverging
from snaporch.model.domain import DomainState
from snaporch.model.request import MergeOptions, OnTimeout

PREFIX = "snaporch-"  # of a job's id and of a throttle group's; the target of a disk follows
POLL_SECONDS = 0.25  # QEMU says when a job is ready or over, but not how far it is
STAGNANT_SECONDS = 30.0
END_SECONDS = 10.0
THROTTLED = 0.5  # of what the job copies: then each second of it brings the end nearer by as much
THROTTLED_LEAST = 64 * 1024  # bytes a second: for less a guest would hang

_EVENTS = ("BLOCK_JOB_READY", "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


@attrs.define
class Patience:
    """Says when a job has had time enough to catch up with its guest.

    That is after `max_seconds` or, where there is no limit, once it has come no nearer for STAGNANT_SECONDS.
    """

    max_seconds: float | None
    _since: float = attrs.field(factory=trio.current_time)
    _nearest: float = math.inf

    def spent(self, remaining: int) -> bool:
        """Return whether it is, so many bytes being left."""
        now = trio.current_time()
        if self.max_seconds is None and remaining < self._nearest:
            self._nearest, self._since = remaining, now
        return now - self._since >= (STAGNANT_SECONDS if self.max_seconds is None else self.max_seconds)


@attrs.define
class BlockJob:
    """A block job that runs; `started` gives one.

    Attributes:
        id: its id.
        progress: told how far it is.
        way_out: the command by which it ends where the body does not see it through.
    """

    id: str
    progress: Progress
    _qmp: QMP
    _events: Subscription
    way_out: str = "job-cancel"
    _began: float = attrs.field(factory=trio.current_time)
    _copied: int = 0

    @property
    def rate(self) -> float:
        """Bytes a second that it has copied so far."""
        return self._copied / max(trio.current_time() - self._began, POLL_SECONDS)

    async def reach(self, name: str, patience: Patience | None = None) -> bool:
        """Return True when QEMU says `name` of it, False when there is no more patience.

        Raises:
            HypervisorError: it failed, or came to another end.
        """
        while True:
            with trio.move_on_after(POLL_SECONDS) as scope:
                await self.event(name)
            if not scope.cancelled_caught:
                return True
            remaining = await self._look()
            if patience is not None and patience.spent(remaining):
                return False

    async def event(self, name: str) -> None:
        """Return when QEMU says `name` of it; as `reach`."""
        async for event in self._events:
            if event.data.get("device", event.data.get("id")) != self.id:
                continue
            if error := event.data.get("error"):
                raise HypervisorError(f"{self._qmp.label}: merging {self.id} failed: {error}")
            if event.name == name:
                return
            raise HypervisorError(f"{self._qmp.label}: merging {self.id} ended early ({event.name})")

    async def _look(self) -> int:
        """Tell how far it is, and return the bytes that are left."""
        for job in await self._qmp.execute("query-jobs"):
            if job["id"] == self.id:
                self._copied, total = job["current-progress"], job["total-progress"]
                self.progress(self._copied, total)
                return int(total - self._copied)
        return 0  # it has ended, and the event that says so is on its way


@asynccontextmanager
async def started(
    qmp: QMP, job: str, command: str, arguments: Mapping[str, Any], *, bandwidth: int, progress: Progress
) -> AsyncIterator[BlockJob]:
    """Start a job that the body sees through to its end; else it takes its way out, and has ended on return."""
    with qmp.subscribe(*_EVENTS) as events:
        begun = BlockJob(job, progress, qmp, events)
        try:
            await qmp.execute(command, {"job-id": job, "speed": bandwidth, **arguments})
            yield begun
        except BaseException:
            with trio.move_on_after(END_SECONDS, shield=True), suppress(HypervisorError):
                await end(qmp, job, begun.way_out)  # noqa: ASYNC102 - it has a deadline
            raise


async def end(qmp: QMP, job: str, command: str) -> None:
    """Have a job end, by `job-cancel` or `job-finalize`, and wait until it has."""
    with qmp.subscribe("JOB_STATUS_CHANGE") as changes:
        with suppress(CommandRefused):  # it is at its end already
            await qmp.execute(command, {"id": job})
        while any(each["id"] == job for each in await qmp.execute("query-jobs")):
            await changes.receive()


# --- the guest ----------------------------------------------------------------------------------------------------


async def _throttle(qmp: QMP, block: Mapping[str, Any], group: str, rate: int) -> None:
    """Limit what a guest writes to a disk, a row of query-block; 0 is no limit."""
    device = {"id": block["qdev"]} if block.get("qdev") else {"device": block["device"]}
    limits = dict.fromkeys(_LIMITS, 0) | {"bps_wr": rate}
    await qmp.execute("block_set_io_throttle", {**device, **limits} | ({"group": group} if rate else {}))


async def unthrottle(qmp: QMP) -> None:
    """Take back every limit that `Brake` has set, in this life or in one that has crashed."""
    for block in await qmp.execute("query-block"):
        if block.get("inserted", {}).get("group", "").startswith(PREFIX):
            await _throttle(qmp, block, "", 0)


@attrs.define
class Brake:
    """Holds a guest back while a job catches up with what it writes to one disk.

    Attributes:
        node: the block node that the guest writes to.
        group: for the limit: found by it, if snaporch crashes.
        guard: lets a guest run that snaporch has stopped, if snaporch dies.
        machine: the guest's.
    """

    node: str
    group: str
    guard: Guard
    machine: Machine
    _qmp: QMP
    _throttled: bool = False
    _stopped: bool = False

    async def catch_up(self, job: BlockJob, name: str, options: MergeOptions) -> None:
        """Return when QEMU says `name` of a job that can get there only when it has caught up.

        Raises:
            NotConverging: it has not, and the guest is not to be paused.
        """
        if await job.reach(name, Patience(options.max_seconds)):
            return
        slowed = not self._throttled and await self._slow_down(job.rate)
        if slowed and await job.reach(name, Patience(options.max_seconds)):
            return
        if options.on_timeout is OnTimeout.FAIL and not self._stopped:
            raise NotConverging(f"{self._qmp.label}: the guest writes faster than {job.id} merges")
        await self._stop()
        while not await job.reach(name, Patience(None)):
            await self._stop()  # its guard may have let it run, as snaporch was stopped

    async def _slow_down(self, rate: float) -> bool:
        """Throttle the guest's writes to half of what the job copies; not where somebody else has set limits."""
        for block in await self._qmp.execute("query-block"):
            inserted = block.get("inserted", {})
            if inserted.get("node-name") == self.node and not any(inserted[limit] for limit in _LIMITS):
                self._throttled = True
                await _throttle(self._qmp, block, self.group, max(int(rate * THROTTLED), THROTTLED_LEAST))
        return self._throttled

    async def _stop(self) -> None:
        if await self.machine.state() is DomainState.RUNNING:
            await self.guard.dismiss()
            await self.guard.post()
            self._stopped = True
            await self.machine.pause()

    async def release(self) -> None:
        """Let the guest go on as before. Idempotent."""
        with suppress(ConnectionGone):  # then there is no guest any more
            if self._stopped:
                await self.machine.resume()
            if self._throttled:
                await unthrottle(self._qmp)
        await self.guard.dismiss()


@asynccontextmanager
async def braked(brake: Brake) -> AsyncIterator[Brake]:
    """Let the guest go on as before when the body is left."""
    try:
        yield brake
    finally:
        with trio.move_on_after(END_SECONDS, shield=True):
            await brake.release()  # noqa: ASYNC102 - it has a deadline
