"""The tiny guest in a real QEMU, as a world of the conformance suite."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import attrs
import pytest
import trio

from snaporch.drivers.base import Launch
from snaporch.model.record import Event
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeviceDisk, DiskSnapshot, DomainSnapshot
from snaporch.orchestrator import Orchestrator
from tests.live import world as live

SLOW_BANDWIDTH = 20 * live.MIB
TOO_LONG = "x" * 300  # for a file's name, which nothing can know before it tries


@attrs.define
class QemuWorld:
    """See `snaporch.testing.World`."""

    live: live.World

    @property
    def orchestrator(self) -> Orchestrator:
        """See World."""
        return self.live.orch

    @property
    def domain(self) -> str:
        """See World."""
        return live.NAME

    @property
    def slow(self) -> int:
        """See World."""
        return SLOW_BANDWIDTH

    def of(self, domain: str) -> QemuWorld:
        """See World."""
        return QemuWorld(attrs.evolve(self.live, log=self.live.root / domain / "serial.log"))

    async def number(self) -> int:
        """See World."""
        return (await self.live.reports(1))[0].seq

    async def go_on(self) -> None:
        """See World."""
        await self.live.reports(3)

    async def check_consistent(self) -> None:
        """See World."""
        await self.live.check_consistent()

    async def check_still(self) -> None:
        """See World."""
        await self.live.check_still()

    async def start(self) -> None:
        """See World."""
        since = self.live.position()
        await self.live.orch.start(live.NAME)
        await self.live.wait_report(lambda report: report.errors == 0, since=since)
        await self.live.reports(1)

    async def everything(self) -> Mapping[str, object]:
        """See World."""
        return await self.live.everything()

    async def damage(self, path: str) -> None:
        """See World."""
        file = trio.Path(path)
        content = bytearray(await file.read_bytes())
        content[len(content) // 2] ^= 1
        await file.write_bytes(content)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """See World."""

        async def blocker(_launch: Launch) -> str:
            await trio.lowlevel.checkpoint()
            return "two have no room here"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.orchestrator._context.drivers["qemu"], "beside_blocker", blocker)
            yield

    def troubles(self, strategy: Strategy) -> Sequence[str]:  # noqa: ARG002 - the interface has it
        """See World."""
        return "overlay", "memory file", "writer"

    @asynccontextmanager
    async def break_next(self, trouble: str) -> AsyncIterator[DomainSnapshot]:
        """See World."""
        directory = self.live.root / live.NAME
        if trouble == "writer":
            async with trio.open_nursery() as nursery:
                await nursery.start(live.when, self.orchestrator, _streams, self._kill_writer)
                yield DomainSnapshot("broken")
                nursery.cancel_scope.cancel()
        elif trouble == "memory file":
            yield DomainSnapshot("broken", memory_file=f"{directory}/{TOO_LONG}")
        else:
            overlay = DeviceDisk("vdb", f"{directory}/{TOO_LONG}")
            yield DomainSnapshot("broken", disks=(DiskSnapshot(DeviceDisk("vdb"), external_sn=overlay),))

    def _kill_writer(self) -> None:
        for pid in self.live.sinks():
            os.kill(pid, signal.SIGKILL)


def _streams(event: Event) -> bool:
    return event.kind == "progress" and event.done > 0
