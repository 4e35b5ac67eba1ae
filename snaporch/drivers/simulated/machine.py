"""A connection to a simulated process, and the memory streams that it controls."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import trio

from snaporch.drivers.base import (
    Capabilities,
    Guard,
    LoadNote,
    Machine,
    Overlay,
    PauseNote,
    PivotNote,
    Progress,
    Stream,
    StreamPlan,
)
from snaporch.drivers.simulated.client import Client
from snaporch.drivers.simulated.files import os_error
from snaporch.drivers.simulated.guard import load_guard, pause_guard
from snaporch.drivers.simulated.merge import Merger
from snaporch.drivers.simulated.migration import SAME, Migration, Phase
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.errors import ConnectionGone, SnaporchError, Unsupported
from snaporch.model.domain import DiskStatus, DomainState
from snaporch.model.record import FileRecord
from snaporch.model.request import MergeOptions, Strategy

T = TypeVar("T")

_LOOKS = {"state", "disks", "shape", "settings"}  # all that may be done beside a running operation


class SimulatedMachine(Machine):
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
            agent=process.guest.model.agent,
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

    async def disks(self) -> tuple[DiskStatus, ...]:
        """See Machine."""
        return await self._call("disks", self.process.status, self._speed.query)

    async def settings(self) -> dict[str, Any]:
        """See Machine; only what is not the default is in it."""
        return await self._call("settings", lambda: dict(self.process.settings), self._speed.query)

    async def pause(self) -> None:
        """See Machine."""
        await self._call("pause", self.process.stop, self._speed.pause)

    async def resume(self) -> None:
        """See Machine."""
        await self._call("resume", self.process.cont, self._speed.resume)

    async def dirty_rate(self, seconds: int = 1) -> float:
        """See Machine."""
        return await self._call("dirty_rate", lambda: self.process.guest.model.dirty_rate, float(seconds))

    def guard(self, note: PauseNote) -> Guard:
        """See Machine; a `SimulatedDriver.die` is what it waits for."""
        return pause_guard(self.client, self.process, note)

    async def load_guard(self, note: LoadNote) -> Guard:
        """See Machine."""
        return await self._call(
            "load_guard", lambda: load_guard(self.client, self.process, note), self._speed.query
        )

    async def check_agent(self) -> None:
        """See Machine."""

        def answers() -> bool:
            return self.process.guest.model.agent and self.process.guest.runs

        if not await self._call("check_agent", answers, self._speed.query):
            raise Unsupported(f"{self.label}: no guest agent answers")

    async def freeze(self) -> None:
        """See Machine."""
        await self._call("freeze", self.process.freeze, self._speed.query)

    async def thaw(self) -> None:
        """See Machine; as a real one, it tries again while the guest stands for a save that was cut short."""
        await self.client.wait(self.process.saving, self.process)
        await self._call("thaw", self.process.thaw, self._speed.query)

    def pause_times(self) -> tuple[float, float] | None:
        """See Machine; instants are those of `SimulatedHost.epoch`."""
        self.process.settle()
        stopped, started = self.process.guest.stopped, self.process.guest.started
        if self._pauses_from < stopped[0] < started[0]:
            epoch = self.client.host.epoch
            return epoch + stopped[1], epoch + started[1]
        return None

    def run_changes(self) -> int:
        """See Machine."""
        self.process.settle()
        return self.process.guest.changes - self._pauses_from

    def forget_pauses(self) -> None:
        """See Machine."""
        self.process.settle()
        self._pauses_from = self.process.guest.changes

    async def add_node(self, overlay: Overlay) -> None:
        """See Machine."""
        await self._call("add_node", lambda: self.process.add_node(overlay), self._speed.node)

    async def remove_node(self, overlay: Overlay) -> None:
        """See Machine."""
        await self._call("remove_node", lambda: self.process.remove_node(overlay), self._speed.node)

    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """See Machine."""

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
        """See Machine."""
        await self._merge("commit_image", partial(Merger(self).commit, top, base, note, options, progress))

    async def stream_image(self, top: str, base: str | None, *, options: MergeOptions, progress: Progress) -> None:
        """See Machine."""
        await self._merge("stream_image", partial(Merger(self).stream, top, base, options, progress))

    async def settle_merges(self, active: Mapping[str, str]) -> None:
        """See Machine."""

        def settle() -> None:
            if (pivot := self.process.pivot) is not None:
                self.process.end_pivot(moved=active.get(pivot.drive.target) != pivot.top)

        await self._call("settle_merges", settle, self._speed.query)

    def stream(self, plan: StreamPlan) -> Stream:
        """See Machine; a stream for the same plan as an earlier one takes that over, wherever it is."""
        return SimulatedStream(self, plan)

    async def load(self, path: str) -> None:
        """See Machine; a machine that refuses a file may be given another."""
        seconds = self.process.ram / self._speed.load_bandwidth
        await self._call("load", lambda: self.process.load(path), seconds)

    async def save_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See Machine."""
        seconds = self.process.ram / self._speed.bandwidth

        def save() -> None:
            self.process.save_inside(tag, targets, seconds)

        await self._call("save_inside", save, seconds)

    async def load_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See Machine."""
        seconds = self.process.ram / self._speed.load_bandwidth
        await self._call("load_inside", lambda: self.process.load_inside(tag, targets), seconds)

    async def delete_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See Machine; as a real one, it answers nothing before a save that was cut short is done."""
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
