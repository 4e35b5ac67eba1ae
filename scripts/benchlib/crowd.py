"""Several guests in one orchestrator."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio
from benchlib.lab import UP_SECONDS, GuestPlan, Qemu, Serial, made

from snaporch import Orchestrator, open_orchestrator
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.orchestrator import catalog_of


@attrs.frozen
class Crowd:
    """Running guests vm0, vm1, … in an orchestrator of their own, in `place`."""

    orchestrator: Orchestrator
    place: Path
    guests: dict[str, Serial]
    booted: dict[str, int]

    @property
    def root(self) -> Path:
        """The orchestrator's root."""
        return self.orchestrator.root

    def check(self) -> None:
        """End the program when a guest has found something wrong."""
        for name, serial in self.guests.items():
            if troubles := serial.troubles(self.booted[name])[:3]:
                sys.exit(f"{name} is not well: {'; '.join(troubles)}")

    async def alive(self) -> None:
        """Wait until every guest has said something again, and nothing wrong."""
        for serial in self.guests.values():
            await serial.more(serial.mark(), 2)
        self.check()


@asynccontextmanager
async def running_crowd(place: Path, cache: Path, qemu: Qemu, plan: GuestPlan, count: int) -> AsyncIterator[Crowd]:
    """Start guests on fresh disks under a fresh root in `place`; end them and remove their files afterwards."""
    home = Path(tempfile.mkdtemp(prefix="crowd-", dir=place))
    guests: dict[str, Serial] = {}
    (home / "root").mkdir(mode=0o700)
    drivers = {"qemu": QemuDriver(storage=LocalStorage(qemu.img))}
    try:
        async with open_orchestrator(home / "root", drivers=drivers) as orchestrator:
            try:
                for name in [f"vm{number}" for number in range(count)]:
                    definition = await made(name, home, cache, qemu, plan)
                    guests[name] = Serial(Path(definition.serial))
                    await orchestrator.define(definition)
                    await orchestrator.start(name)
                    await guests[name].more(0, 3, UP_SECONDS)
                yield Crowd(orchestrator, home, guests, {name: s.mark() for name, s in guests.items()})
            finally:
                with trio.CancelScope(shield=True):
                    for record in await catalog_of(orchestrator).domains():
                        await orchestrator.destroy(record.name)
    finally:
        shutil.rmtree(home, ignore_errors=True)
