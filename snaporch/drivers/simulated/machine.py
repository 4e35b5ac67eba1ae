"""A connection to a simulated process, and the memory streams that it controls."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import trio

from snaporch.drivers.base import (
    Capabilities,
    DirtyRate,
    Guard,
    GuestAgent,
    GuestVerb,
    LiveCopies,
    LiveMerges,
    LoadNote,
    LoadsMemory,
    Machine,
    MemoryStreams,
    Overlay,
    Overlays,
    PauseNote,
    PivotNote,
    PointsInside,
    Progress,
    Stream,
    StreamPlan,
    Trait,
    untold,
)
from snaporch.drivers.qmp.run_states import refusal
from snaporch.drivers.simulated.client import Client
from snaporch.drivers.simulated.files import os_error
from snaporch.drivers.simulated.guard import load_guard, pause_guard
from snaporch.drivers.simulated.merge import Merger
from snaporch.drivers.simulated.migration import SAME, Migration, Phase
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.errors import ConnectionGone, SnaporchError, Unsupported
from snaporch.model.domain import DiskStatus, DomainState
from snaporch.model.record import FileRecord
from snaporch.model.request import MergeOptions, OnTimeout, Strategy

T = TypeVar("T")

MACHINE_TRAITS = frozenset(
    [
        Trait.MEMORY_STREAMS,
        Trait.LOADS_MEMORY,
        Trait.OVERLAYS,
        Trait.LIVE_MERGES,
        Trait.LIVE_COPIES,
        Trait.POINTS_INSIDE,
        Trait.DIRTY_RATE,
    ]
)
_TO_THE_END = MergeOptions(on_timeout=OnTimeout.PAUSE)
_LOOKS = {"state", "condition", "disks", "shape", "settings"}  # all that may be done beside a running operation


class SimulatedMachine(
    Machine, MemoryStreams, LoadsMemory, Overlays, LiveMerges, LiveCopies, PointsInside, GuestAgent, DirtyRate
):
    """See Machine; got from `SimulatedDriver.connect`."""

    def __init__(self, client: Client, process: SimulatedProcess, label: str, *, observer: bool = False) -> None:
        self.client = client
        self.process = process
        self.label = label
        self._speed = process.speed
        self._observer = observer
        self._open = True
        self._pauses_from = process.guest.changes
        blocker = process.guest.model.background_blocker
        self.capabilities = Capabilities(
            hypervisor=process.versions.get("hypervisor", "simulated"),
            background=not blocker,
            background_blocker=blocker,
            versions=process.versions,
            ram=process.ram,
            traits=MACHINE_TRAITS
            | ({Trait.GUEST_AGENT} if process.guest.model.agent else set())
            | ({Trait.BACKGROUND_STREAMS, Trait.LATE_STOPS} if not blocker else set()),
        )

    def __repr__(self) -> str:
        """Show what a test that fails wants to know."""
        state = "open" if self._open else "closed"
        return f"<SimulatedMachine {self.label!r} process {self.process.pid}, {state}>"

    def close(self) -> None:
        """End the connection; the process goes on."""
        self._open = False
        if self.process.client is self:
            self.process.client = None
            self.process.notify()

    def check_open(self, name: str) -> None:
        """Raise when this connection cannot carry a command.

        Raises:
            ConnectionGone: it was closed.
            AssertionError: it is for looking only.
        """
        self.client.check_alive()
        if not self._open:
            raise ConnectionGone(f"{self.label}: the connection was closed")
        if self._observer and name not in _LOOKS:
            raise AssertionError(f"bug: {name} over a connection that is for looking only")

    async def _call(self, name: str, effect: Callable[[], T], seconds: float) -> T:
        self.check_open(name)
        return await self.client.call(f"machine.{name}", self.label, effect, seconds, self.process)

    async def state(self) -> DomainState:
        """See Machine."""
        runs = await self._call("state", lambda: self.process.guest.runs, self._speed.query)
        return DomainState.RUNNING if runs else DomainState.PAUSED

    async def refusal(self, verb: GuestVerb) -> str:
        """See Machine; as a QEMU in that run state."""
        return refusal(await self.condition(), verb)

    async def condition(self) -> str:
        """See Machine."""

        def found() -> str:
            return self.process.condition or ("running" if self.process.guest.runs else "paused")

        return await self._call("condition", found, self._speed.query)

    async def disks(self) -> tuple[DiskStatus, ...]:
        """See Machine."""
        return await self._call("disks", self.process.status, self._speed.query)

    async def settings(self) -> dict[str, Any]:
        """See MemoryStreams; only what is not the default is in it."""
        return await self._call("settings", lambda: dict(self.process.settings), self._speed.query)

    async def pause(self) -> None:
        """See Machine."""
        await self._call("pause", self.process.stop, self._speed.pause)

    async def resume(self) -> None:
        """See Machine."""
        await self._call("resume", self.process.cont, self._speed.resume)

    async def dirty_rate(self, seconds: int = 1) -> float:
        """See DirtyRate."""
        return await self._call("dirty_rate", lambda: self.process.guest.model.dirty_rate, float(seconds))

    def guard(self, note: PauseNote) -> Guard:
        """See Machine; a `SimulatedDriver.die` is what it waits for."""
        return pause_guard(self.client, self.process, note)

    async def load_guard(self, note: LoadNote) -> Guard:
        """See PointsInside."""
        return await self._call(
            "load_guard", lambda: load_guard(self.client, self.process, note), self._speed.query
        )

    async def check_agent(self) -> None:
        """See GuestAgent."""

        def answers() -> bool:
            return self.process.guest.model.agent and self.process.guest.runs

        if not await self._call("check_agent", answers, self._speed.query):
            raise Unsupported(f"{self.label}: no guest agent answers")

    async def freeze(self) -> None:
        """See GuestAgent."""
        await self._call("freeze", self.process.freeze, self._speed.query)

    async def thaw(self) -> None:
        """See GuestAgent; as a real one, it tries again while the guest is paused for a save that was cut short."""
        await self.client.wait(self.process.saving, self.process)
        await self._call("thaw", self.process.thaw, self._speed.query)

    async def set_clock(self) -> float:
        """See GuestAgent."""
        await self.check_agent()
        return 0.0

    def pause_times(self) -> tuple[float, float] | None:
        """See Machine; instants are those of `SimulatedHost.epoch`."""
        self.process.settle()
        stopped, started = self.process.guest.stopped, self.process.guest.started
        if self._pauses_from < stopped[0] < started[0]:
            epoch = self.client.host.epoch
            return epoch + stopped[1], epoch + started[1]
        return None

    def run_times(self) -> tuple[float | None, float | None]:
        """See Machine; instants are those of `SimulatedHost.epoch`."""
        self.process.settle()

        def known(change: int, at: float) -> float | None:
            return self.client.host.epoch + at if change > self._pauses_from else None

        return known(*self.process.guest.stopped), known(*self.process.guest.started)

    def run_changes(self) -> int:
        """See Machine."""
        self.process.settle()
        return self.process.guest.changes - self._pauses_from

    def forget_pauses(self) -> None:
        """See Machine."""
        self.process.settle()
        self._pauses_from = self.process.guest.changes

    async def open_overlay(self, overlay: Overlay) -> None:
        """See Overlays."""
        await self._call("open_overlay", lambda: self.process.open_overlay(overlay), self._speed.node)

    async def close_overlay(self, overlay: Overlay) -> None:
        """See Overlays."""
        await self._call("close_overlay", lambda: self.process.close_overlay(overlay), self._speed.node)

    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """See Overlays."""

        def check(target: str) -> None:
            for fault in self.client.host.faults.take(f"machine.switch.{target}", self.label):
                raise fault.raised(self.label) or self.process.refusal("transaction", f"{target} failed")

        await self._call("switch", lambda: self.process.switch(overlays, check), self._speed.switch)

    async def _merge(self, name: str, merge: Callable[[], Awaitable[None]]) -> None:
        self.check_open(name)
        faults = await self.client.enter(f"machine.{name}", self.label, self.process)
        await merge()
        await self.client.leave(f"machine.{name}", self.label, 0.0, self.process, faults)

    async def commit_image(
        self, top: str, base: str, *, note: PivotNote, options: MergeOptions, progress: Progress
    ) -> None:
        """See LiveMerges."""
        await self._merge("commit_image", partial(Merger(self).commit, top, base, note, options, progress))

    async def merge_back(self, overlay: Overlay, note: PivotNote) -> None:
        """See Overlays."""
        await self.commit_image(overlay.path, overlay.base.active, note=note, options=_TO_THE_END, progress=untold)

    async def stream_image(self, top: str, base: str | None, *, options: MergeOptions, progress: Progress) -> None:
        """See LiveCopies."""
        await self._merge("stream_image", partial(Merger(self).stream, top, base, options, progress))

    async def settle_merges(self, active: Mapping[str, str]) -> None:
        """See Overlays."""

        def settle() -> None:
            if (pivot := self.process.pivot) is not None:
                self.process.end_pivot(moved=active.get(pivot.drive.target) != pivot.top)

        await self._call("settle_merges", settle, self._speed.query)

    def stream(self, plan: StreamPlan) -> Stream:
        """See MemoryStreams; a stream for the same plan as an earlier one takes that over, wherever it is."""
        return SimulatedStream(self, plan)

    async def load(self, path: str, offset: int = 0) -> None:
        """See LoadsMemory; a machine that refuses a file may be given another."""
        seconds = self.process.ram / self._speed.load_bandwidth
        await self._call("load", lambda: self.process.load(path, offset), seconds)

    async def save_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See PointsInside."""
        seconds = self.process.ram / self._speed.bandwidth

        def save() -> None:
            self.process.save_inside(tag, targets, seconds)

        await self._call("save_inside", save, seconds)

    async def load_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See PointsInside."""
        seconds = self.process.ram / self._speed.load_bandwidth
        await self._call("load_inside", lambda: self.process.load_inside(tag, targets), seconds)

    async def delete_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See PointsInside; as a real one, it answers nothing before a save that was cut short is done."""
        await self.client.wait(self.process.saving, self.process)
        await self._call("delete_inside", lambda: self.process.delete_inside(tag, targets), self._speed.merge)

    async def shutdown(self) -> None:
        """See Machine."""
        await self._call("shutdown", self.process.power_button, self._speed.query)

    async def quit(self) -> None:
        """See Machine."""
        self.check_open("quit")
        faults = await self.client.enter("machine.quit", self.label, self.process)
        self.process.end("it was told to quit")
        await self.client.leave("machine.quit", self.label, self._speed.quit, None, faults)


class SimulatedStream(Stream):
    """See Stream. The stream itself is the hypervisor's and goes on without this object."""

    def __init__(self, machine: SimulatedMachine, plan: StreamPlan) -> None:
        self._machine = machine
        self._client = machine.client
        self._process = machine.process
        self._plan = plan
        self._half = False

    async def _call(self, name: str, effect: Callable[[], T], seconds: float) -> T:
        self._machine.check_open(name)
        return await self._client.call(f"stream.{name}", self._machine.label, effect, seconds, self._process)

    def _migration(self) -> Migration:
        migration = self._process.migration
        if migration is None or migration.file.path != self._plan.path:
            raise AssertionError(f"bug: no stream to {self._plan.path} was started")
        return migration

    async def open(self) -> None:
        """See Stream."""
        await self._call("open", lambda: self._process.prepare(self._plan), self._process.speed.stream)

    async def start(self) -> None:
        """See Stream."""

        def begin() -> None:
            self._process.migrate(self._plan)
            self._client.host.watch(self._process)

        await self._call("start", begin, self._process.speed.stream)

    async def start_early(self, seconds: float) -> bool:
        """See Stream."""
        await self.start()
        await trio.sleep(seconds)
        await self._machine.pause()
        if self._migration().taken is None:
            return True
        await self.abort()
        await self._machine.resume()
        await self._call("anew", self._migration().file.empty, self._process.speed.stream)
        await self.open()
        return False

    def setup_seconds(self) -> float | None:
        """See Stream."""
        return self._process.ram / self._process.speed.arm_rate

    async def armed(self) -> None:
        """See Stream."""
        self._machine.check_open("armed")
        if self._plan.strategy is not Strategy.BACKGROUND:
            raise AssertionError("bug: only a background stream is ever armed")
        faults = await self._client.enter("stream.armed", self._machine.label, self._process)
        while (migration := self._migration()).active and migration.taken is None:
            await self._look_again("stream.armed", migration)
        self._check(migration)
        await self._client.leave("stream.armed", self._machine.label, 0.0, self._process, faults)

    async def finished(self, progress: Progress) -> None:
        """See Stream; `progress` counts what was sent and what is known to be left."""
        self._machine.check_open("finished")
        faults = await self._client.enter("stream.finished", self._machine.label, self._process)
        while (migration := self._migration()).active:
            progress(migration.file.size, migration.total)
            await self._look_again("stream.finished", migration)
            await self._pass_half(migration)
        self._process.settings = dict(self._plan.settings)
        self._check(migration)
        progress(migration.file.size, migration.file.size)
        await self._client.leave("stream.finished", self._machine.label, 0.0, self._process, faults)

    async def _look_again(self, at: str, migration: Migration) -> None:
        """Wait until something can be new; raises when the machine is gone by then."""
        with trio.move_on_after(max(migration.next_look() - self._client.host.now(), SAME)):
            await self._process.changed.wait()
        self._machine.check_open(at)
        await self._client.reach(at, self._machine.label, self._process)

    async def _pass_half(self, migration: Migration) -> None:
        """Let a fault strike in mid-stream; an error is the stream's own, so the hypervisor knows of it."""
        if self._half or not migration.active or migration.sent * 2 < migration.ram:
            return
        self._half = True
        try:
            await self._client.enter("stream.half", self._machine.label, self._process)
        except (OSError, SnaporchError) as error:
            if self._process.ended or self._process.hung:
                raise
            migration.fail(error)

    async def limit(self, bandwidth: int) -> None:
        """See Stream."""
        await self._call("limit", lambda: self._process.limit_stream(bandwidth), self._process.speed.query)

    def _check(self, migration: Migration) -> None:
        if migration.error is not None:
            raise migration.error
        if migration.phase is Phase.CANCELLED:
            raise self._process.refusal("migrate", "the migration was cancelled")

    async def seal(self) -> FileRecord:
        """See Stream."""

        def record() -> FileRecord:
            migration = self._migration()
            if migration.phase is not Phase.COMPLETED:
                raise AssertionError("bug: a stream is sealed before it has finished")
            if not migration.file.linked:
                raise os_error(errno.ENOENT, migration.file.path)
            return migration.file.record()

        return await self._call("seal", record, self._process.speed.fsync)

    async def forget(self) -> None:
        """See Stream: there is nothing."""

    async def abort(self) -> None:
        """See Stream; with the process gone there is nothing to end, and nothing is raised."""
        self._client.check_alive()
        if self._client.host.find(self._process.handle) is None:
            return
        settings = self._plan.settings
        await self._call("abort", lambda: self._process.abort_stream(settings), self._process.speed.stream)
