"""A driver with few traits, to read before one writes one's own: docs/how-to/write-a-driver.md goes through it.

The hypervisor is a `SimulatedHost`, of which this driver makes less than `SimulatedDriver` does: memory can be
streamed and disks go over to overlays, and that is all.

- A machine is launched and its memory loaded in one call (`Info.one_call`).
- A name is one machine: no other starts beside it.
- A stream stops the guest by itself (`Capabilities.stops_itself`), and none is a background one.
- Nothing is kept inside images, and images that a machine has open are not merged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import (
    Address,
    Capabilities,
    Driver,
    Guard,
    Info,
    Launch,
    Machine,
    MemoryStreams,
    Overlay,
    Overlays,
    PauseNote,
    PivotNote,
    Progress,
    Stream,
    StreamPlan,
    Trait,
    Writer,
)
from snaporch.drivers.simulated.client import Client
from snaporch.drivers.simulated.drive import Pivot
from snaporch.drivers.simulated.guard import pause_guard
from snaporch.drivers.simulated.host import SimulatedHost
from snaporch.drivers.simulated.migration import Phase
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.drivers.simulated.storage import SimulatedStorage
from snaporch.errors import ConnectionGone, HypervisorError, InvalidInput, Refused, Unsupported
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainState, Handle
from snaporch.model.record import FileRecord

LOOK_SECONDS = 0.01  # a stream tells nobody how far it is

MACHINE_TRAITS = frozenset([Trait.MEMORY_STREAMS, Trait.OVERLAYS])


class ExampleStorage(SimulatedStorage):
    """Files of the simulated host; of what they can be asked for beside the core, only merges are named."""

    traits = frozenset([Trait.OFFLINE_MERGES])


class ExampleStream(Stream):
    """See Stream."""

    def __init__(self, process: SimulatedProcess, plan: StreamPlan) -> None:
        self._process = process
        self._plan = plan

    async def open(self) -> None:
        """See Stream."""
        await trio.lowlevel.checkpoint()
        self._process.prepare(self._plan)

    async def start(self) -> None:
        """See Stream."""
        await trio.lowlevel.checkpoint()
        self._process.settle()
        self._process.migrate(self._plan)

    async def armed(self) -> None:
        """See Stream; there are no background streams here."""
        raise AssertionError("only a background stream is armed")

    async def finished(self, progress: Progress) -> None:
        """See Stream: by then the guest is paused."""
        while (migration := self._migration()).active:
            progress(migration.file.size, migration.total)
            await trio.sleep(LOOK_SECONDS)
            self._process.settle()
        if migration.phase is not Phase.COMPLETED:
            raise HypervisorError(f"the memory stream failed: {migration.error or migration.phase}")
        progress(migration.file.size, migration.file.size)

    def _migration(self) -> Any:
        if self._process.ended or self._process.migration is None:
            raise ConnectionGone("the machine is gone")
        return self._process.migration

    async def limit(self, bandwidth: int) -> None:
        """See Stream."""
        await trio.lowlevel.checkpoint()
        self._process.limit_stream(bandwidth)

    async def seal(self) -> FileRecord:
        """See Stream."""
        await trio.lowlevel.checkpoint()
        self._process.settings = dict(self._plan.settings)
        record: FileRecord = self._migration().file.record()
        return record

    async def forget(self) -> None:
        """See Stream: nothing was kept."""

    async def abort(self) -> None:
        """See Stream; the stream's end lets a guest that it had stopped run again."""
        await trio.lowlevel.checkpoint()
        if not self._process.ended:
            self._process.settle()
            self._process.abort_stream(self._plan.settings)


class ExampleMachine(Machine, MemoryStreams, Overlays):
    """See Machine: the core, and two traits."""

    def __init__(self, client: Client, process: SimulatedProcess) -> None:
        self._client = client
        self._process = process
        self._pauses_from = process.guest.changes
        self.capabilities = Capabilities(
            hypervisor="example 1",
            background=False,
            background_blocker="the example knows no background streams",
            versions=process.versions,
            ram=process.ram,
            traits=MACHINE_TRAITS,
            stops_itself=True,
        )

    async def _there(self) -> SimulatedProcess:
        await trio.lowlevel.checkpoint()
        self._process.settle()
        if self._process.ended:
            raise ConnectionGone(f"{self._process.name}: its machine is gone")
        return self._process

    async def state(self) -> DomainState:
        """See Machine."""
        return DomainState.RUNNING if (await self._there()).guest.runs else DomainState.PAUSED

    async def disks(self) -> tuple[DiskStatus, ...]:
        """See Machine."""
        return (await self._there()).status()

    async def pause(self) -> None:
        """See Machine."""
        (await self._there()).stop()

    async def resume(self) -> None:
        """See Machine."""
        (await self._there()).cont()

    def guard(self, note: PauseNote) -> Guard:
        """See Machine."""
        return pause_guard(self._client, self._process, note)

    def pause_times(self) -> tuple[float, float] | None:
        """See Machine."""
        stopped, started = self._process.guest.stopped, self._process.guest.started
        if self._pauses_from < stopped[0] < started[0]:
            return self._client.host.epoch + stopped[1], self._client.host.epoch + started[1]
        return None

    def run_changes(self) -> int:
        """See Machine."""
        return self._process.guest.changes - self._pauses_from

    def forget_pauses(self) -> None:
        """See Machine."""
        self._pauses_from = self._process.guest.changes

    async def shutdown(self) -> None:
        """See Machine."""
        (await self._there()).power_button()

    async def quit(self) -> None:
        """See Machine."""
        (await self._there()).end("it was told to quit")

    # MemoryStreams.

    async def settings(self) -> dict[str, Any]:
        """See MemoryStreams."""
        return dict((await self._there()).settings)

    def stream(self, plan: StreamPlan) -> Stream:
        """See MemoryStreams."""
        return ExampleStream(self._process, plan)

    # Overlays.

    async def open_overlay(self, overlay: Overlay) -> None:
        """See Overlays."""
        (await self._there()).open_overlay(overlay)

    async def close_overlay(self, overlay: Overlay) -> None:
        """See Overlays."""
        (await self._there()).close_overlay(overlay)

    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """See Overlays."""
        (await self._there()).switch(overlays, lambda _: None)

    async def settle_merges(self, active: Mapping[str, str]) -> None:
        """See Overlays: no merge here is ever cut short."""

    async def merge_back(self, overlay: Overlay, note: PivotNote) -> None:
        """See Overlays: the hypervisor holds up what the guest writes until the disk is on its base again."""
        process, moved = await self._there(), False
        run = process.files.run(overlay.path, overlay.base.active)
        process.hold(Pivot(process.drive_over(overlay.path), run))
        try:
            process.commit(overlay.path, overlay.base.active)
            await note.write()
            moved = True
        finally:
            process.end_pivot(moved=moved)


class ExampleDriver(Driver):
    """See Driver."""

    info = Info("example", MACHINE_TRAITS | ExampleStorage.traits, one_call=True)

    def __init__(self, host: SimulatedHost | None = None) -> None:
        self._client = Client(host or SimulatedHost())
        self.host = self._client.host
        self.storage = ExampleStorage(self._client)

    async def launch(self, launch: Launch) -> Handle:
        """See Driver; only a throw-away copy may have the name of a machine that is there."""
        await trio.lowlevel.checkpoint()
        name = launch.definition.name
        if not launch.isolated and self.host.running(name):
            raise Refused(f"there is a machine {name} already")
        return self.host.start(launch).handle

    async def restore(
        self, launch: Launch, memory: str, *, offset: int = 0, versions: Mapping[str, str] | None = None
    ) -> Handle:
        """See Driver."""
        label = launch.definition.name
        if versions is not None and any(versions.get(key) != value for key, value in self.host.versions.items()):
            raise Unsupported(f"{label}: its memory is of another version of the hypervisor")
        handle = await self.launch(attrs.evolve(launch, incoming=True))
        process = self._find(handle, label)
        try:
            process.load(memory, offset)
        except HypervisorError:
            process.end("its memory could not be loaded")
            raise
        return handle

    def _find(self, handle: Handle, label: str) -> SimulatedProcess:
        if (process := self.host.find(handle)) is None:
            raise ConnectionGone(f"{label}: its machine is gone")
        return process

    async def find(self, directory: Path) -> Handle | None:
        """See Driver."""
        await trio.lowlevel.checkpoint()
        process = self.host.launched_in(directory)
        return None if process is None else process.handle

    @asynccontextmanager
    async def connect(self, handle: Handle, label: str) -> AsyncIterator[Machine]:
        """See Driver."""
        await trio.lowlevel.checkpoint()
        yield ExampleMachine(self._client, self._find(handle, label))

    query = connect

    async def alive(self, handle: Handle) -> bool:
        """See Driver."""
        await trio.lowlevel.checkpoint()
        return self.host.find(handle) is not None

    async def wait_gone(self, handle: Handle) -> None:
        """See Driver."""
        while await self.alive(handle):  # noqa: ASYNC110 - as it would be asked of a real one
            await trio.sleep(LOOK_SECONDS)

    async def kill(self, handle: Handle) -> None:
        """See Driver."""
        await trio.lowlevel.checkpoint()
        if (process := self.host.find(handle)) is not None:
            process.end("it was killed")

    async def attach(self, name: str, address: Address) -> tuple[DomainDefinition, Handle]:
        """See Driver; by the name of the machine."""
        await trio.lowlevel.checkpoint()
        if address.qmp or address.uri:
            raise InvalidInput(f"{name}: a machine of the example is attached to by its name: --of NAME")
        if not (found := self.host.running(address.of or name)):
            raise ConnectionGone(f"there is no machine {address.of or name}")
        disks = tuple(attrs.evolve(disk) for disk in found[0].launch.disks)
        definition = attrs.evolve(found[0].launch.definition, name=name, disks=disks, driver=self.name)
        return definition, found[0].handle

    async def writers_of(self, paths: Collection[str], besides: Handle | None = None) -> tuple[Writer, ...]:
        """See Driver."""
        await trio.lowlevel.checkpoint()
        writers = self.host.locks.writers
        found = ((path, str(writers[path][0])) for path in sorted(paths) if path in writers)
        return tuple(Writer(f"machine {pid}", path) for path, pid in found if besides is None or pid != besides.id)

    async def doctor(self) -> dict[str, Any]:
        """See Driver."""
        await trio.lowlevel.checkpoint()
        return {"hypervisor": "example 1", "machines": len(self.host.running())}
