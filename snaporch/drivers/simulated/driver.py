"""The simulated hypervisor, as snaporch sees it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import (
    Address,
    Clones,
    Copied,
    Driver,
    Info,
    Launch,
    Original,
    Place,
    StartsBeside,
    StreamPlan,
    Trait,
    Writer,
)
from snaporch.drivers.simulated.client import Client, SimulatedKill
from snaporch.drivers.simulated.host import SimulatedHost
from snaporch.drivers.simulated.machine import MACHINE_TRAITS, SimulatedMachine
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.drivers.simulated.storage import SimulatedStorage
from snaporch.errors import ConnectionGone
from snaporch.model.domain import DomainDefinition, Handle
from snaporch.model.rfc import DeviceDisk


class SimulatedDriver(Driver, StartsBeside, Clones):
    """A driver for domains that exist in a `SimulatedHost` only.

    It keeps the promises of `Driver`, and checks those of its caller: where snaporch would lose or mix up a guest's
    data (write to a frozen image, remove one in use, use an overlay again that was merged away) it raises
    AssertionError.
    """

    info = Info(
        "simulated",
        MACHINE_TRAITS
        | {Trait.BACKGROUND_STREAMS, Trait.GUEST_AGENT, Trait.STARTS_BESIDE, Trait.CLONES}
        | SimulatedStorage.traits,
    )

    def __init__(self, host: SimulatedHost | None = None) -> None:
        self.host = SimulatedHost() if host is None else host
        self._client = Client(self.host)
        self._machines: set[SimulatedMachine] = set()
        self.storage = SimulatedStorage(self._client)

    def die(self) -> None:
        """Be of a program that was killed (SIGKILL): nothing that it does from now on reaches the host.

        Every call, of this driver and of all that was got from it, raises SimulatedKill without effect; its
        connections are closed. The host is as it was, for the driver of the next program. What has had its effect
        keeps it, streams under way go on; guards that were posted act.
        """
        self._client.killed = True
        for machine in tuple(self._machines):
            machine.close()
        for guard in tuple(self._client.guards):
            guard.hear()

    def stop(self) -> None:
        """Be of a program that is stopped (SIGSTOP): its calls come to an end when it goes on, see `go_on`.

        Guards act when they have heard nothing of it for a while.
        """
        self._client.works = trio.Event()
        for guard in tuple(self._client.guards):
            guard.miss()

    def go_on(self) -> None:
        """Go on after `stop`."""
        self._client.works.set()
        for guard in tuple(self._client.guards):
            guard.hear_again()

    async def launch(self, launch: Launch) -> Handle:
        """See Driver; when it raises, or is cancelled, no process is left."""
        label = launch.definition.name
        faults = await self._client.enter("driver.launch", label)
        process = self.host.start(launch)
        try:
            await self._client.leave("driver.launch", label, self.host.speed.launch, process, faults)
        except SimulatedKill:
            raise  # nobody is left to end it
        except BaseException:
            process.end("nobody wants it any more")
            raise
        return process.handle

    async def find(self, directory: Path) -> Handle | None:
        """See Driver."""

        def look() -> Handle | None:
            found = self.host.launched_in(directory)
            return None if found is None else found.handle

        return await self._client.call("driver.find", "", look)

    @asynccontextmanager
    async def connect(self, handle: Handle, label: str) -> AsyncIterator[SimulatedMachine]:
        """See Driver; while another connection is open it waits for its end, up to `connect_deadline`."""
        found = await self._reached("driver.connect", handle, label)
        await self._wait_for_turn(found, label)
        machine = SimulatedMachine(self._client, found, label)
        found.client = machine
        self._machines.add(machine)
        try:
            yield machine
        finally:
            self._machines.discard(machine)
            machine.close()

    @asynccontextmanager
    async def query(self, handle: Handle, label: str) -> AsyncIterator[SimulatedMachine]:
        """See Driver; only what asks is allowed."""
        machine = SimulatedMachine(
            self._client, await self._reached("driver.query", handle, label), label, observer=True
        )
        try:
            yield machine
        finally:
            machine.close()

    async def _reached(self, at: str, handle: Handle, label: str) -> SimulatedProcess:
        faults = await self._client.enter(at, label)
        found = self.host.find(handle)
        if found is None:
            raise ConnectionGone(f"{label}: its process ({handle.id}) is gone")
        await self._client.leave(at, label, self.host.speed.connect, found, faults)
        return found

    async def _wait_for_turn(self, process: SimulatedProcess, label: str) -> None:
        with trio.move_on_after(self.host.speed.connect_deadline) as scope:
            while (process.client is not None or process.hung) and not process.ended:
                await process.changed.wait()
        self._client.check_alive()
        if scope.cancelled_caught or process.ended:
            why = process.ended or "nothing answers: it hangs, or serves another client"
            raise ConnectionGone(f"{label}: cannot connect to {process.socket}: {why}")

    async def alive(self, handle: Handle) -> bool:
        """See Driver."""
        self._client.check_alive()
        await trio.lowlevel.checkpoint()
        return self.host.find(handle) is not None

    def pid(self, handle: Handle) -> int:
        """See Driver."""
        return int(handle.id)

    async def writers_of(self, paths: Collection[str], besides: Handle | None = None) -> tuple[Writer, ...]:
        """See Driver."""

        def look() -> tuple[Writer, ...]:
            open_for_writing = ((path, self.host.locks.writers.get(path)) for path in sorted(paths))
            found = ((path, lock[0]) for path, lock in open_for_writing if lock is not None)
            return tuple(
                Writer(f"process {pid}", path) for path, pid in found if besides is None or str(pid) != besides.id
            )

        return await self._client.call("driver.writers_of", "", look)

    async def abandon(self, plan: StreamPlan) -> None:  # noqa: ARG002 - the interface has it
        """See Driver; a stream ends with its machine."""
        await self._client.call("driver.abandon", "", lambda: None)

    async def clear(self, directory: Path) -> None:
        """See Driver; there is nothing.

        Raises:
            AssertionError: the process is there.
        """

        def check() -> None:
            if self.host.launched_in(directory) is not None:
                raise AssertionError(f"bug: {directory} is cleared below a running process")

        await self._client.call("driver.clear", "", check)

    async def forget(self, handle: Handle) -> None:
        """See Driver."""
        if (directory := Path(handle.data["directory"])).name.startswith("run-"):
            await self.clear(directory)

    async def wait_gone(self, handle: Handle) -> None:
        """See Driver."""
        found = self.host.find(handle)
        label = found.name if found else ""
        faults = await self._client.enter("driver.wait_gone", label)
        if found is not None:
            await self._client.wait(math.inf, found)
        await self._client.leave("driver.wait_gone", label, 0.0, None, faults)

    async def kill(self, handle: Handle) -> None:
        """See Driver."""

        def end() -> None:
            if (found := self.host.find(handle)) is not None:
                found.end("it was killed")

        found = self.host.find(handle)
        await self._client.call(
            "driver.kill", found.name if found else "", end, self.host.speed.quit if found else 0
        )

    async def attach(self, name: str, address: Address) -> tuple[DomainDefinition, Handle]:
        """See Driver.

        Raises:
            ConnectionGone: nothing listens there.
        """

        def look() -> tuple[DomainDefinition, Handle]:
            found = self.host.listening(address.qmp)
            if found is None:
                raise ConnectionGone(f"{name}: cannot connect to {address.qmp}: no such socket")
            disks = tuple(DeviceDisk(d.target, d.image.path, d.image.format, d.readonly) for d in found.drives)
            definition = attrs.evolve(found.launch.definition, name=name, disks=disks, driver=self.name)
            return definition, found.handle

        return await self._client.call("driver.attach", name, look, self.host.speed.connect)

    async def beside_blocker(self, launch: Launch) -> str:
        """See StartsBeside: a port, or an image that is being written to."""

        def look() -> str:
            reasons = (self.host.locks.writing(disk.path) for disk in launch.disks)
            return self.host.conflict(launch) or next(filter(None, reasons), "")

        return await self._client.call("driver.beside_blocker", launch.definition.name, look)

    async def copies(self, original: Original, places: Sequence[Place]) -> tuple[Copied, ...]:
        """See Clones: each has ports of its own."""

        def look() -> tuple[Copied, ...]:
            return tuple(self.host.copied(original, place) for place in places)

        return await self._client.call("driver.copies", original.definition.name, look)

    async def free_ram(self) -> int | None:
        """See Driver."""
        return await self._client.call("driver.free_ram", "", lambda: self.host.free_ram)

    async def doctor(self) -> dict[str, Any]:
        """See Driver."""

        def look() -> dict[str, Any]:
            return {
                "hypervisor": self.host.versions.get("hypervisor", "simulated"),
                "background": self.host.model.background_blocker or "available",
                "processes": len(self.host.running()),
            }

        return await self._client.call("driver.doctor", "", look)
