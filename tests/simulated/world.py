"""What the tests of the simulated hypervisor do again and again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from snaporch.drivers.base import Launch, Overlay, PivotNote, StreamPlan, untold
from snaporch.drivers.simulated import (
    SimulatedDriver,
)
from snaporch.drivers.simulated.machine import SimulatedMachine
from snaporch.model.domain import DomainDefinition, Handle
from snaporch.model.request import MergeOptions, Strategy
from snaporch.model.rfc import DeviceDisk

GIB = 2**30
MEMORY = "/snapshots/memory"
DISKS = (DeviceDisk("vda", "/images/vda"), DeviceDisk("vdb", "/images/vdb"))
WEB = DomainDefinition("web1", memory=GIB, disks=DISKS, driver="simulated")
BESIDE = Path("/run/beside")


def nothing(done: int, total: int) -> None:
    """Hear of progress."""


async def running(driver: SimulatedDriver, definition: DomainDefinition = WEB) -> Handle:
    """Launch a domain and let it run for a second."""
    process = await driver.launch(Launch(definition, definition.disks, Path("/run")))
    async with driver.connect(process, definition.name) as machine:
        await machine.resume()
    await trio.sleep(1)
    return process


async def overlays(driver: SimulatedDriver, machine: SimulatedMachine, name: str = "s1") -> list[Overlay]:
    """Make and open an overlay for each disk."""
    await driver.storage.make_directory("/snapshots")
    made = []
    for disk in await machine.disks():
        overlay = Overlay(disk, f"/snapshots/{name}-{disk.target}")
        base = DeviceDisk(disk.target, disk.active, disk.format)
        await driver.storage.make_overlay(overlay.path, base, disk.virtual_size)
        await machine.open_overlay(overlay)
        made.append(overlay)
    return made


async def background(
    driver: SimulatedDriver, machine: SimulatedMachine, *, name: str = "s1", too_early: bool = False
) -> list[Overlay]:
    """Take a checkpoint, or what looks like one; its memory is in MEMORY-NAME."""
    made = await overlays(driver, machine, name)
    path = f"{MEMORY}-{name}"
    await driver.storage.make_file(path)
    stream = machine.stream(StreamPlan(path, Strategy.BACKGROUND))
    await stream.open()
    await machine.pause()
    await machine.switch(made)
    await stream.start()
    if too_early:
        await machine.resume()
    await stream.armed()
    await machine.resume()
    await stream.finished(nothing)
    await stream.seal()
    return made


async def restored(driver: SimulatedDriver, frozen: dict[str, str], memory: str) -> Handle:
    """Launch a second domain on overlays over the frozen images and load the memory."""
    disks = []
    for target, path in frozen.items():
        await driver.storage.make_overlay(f"/snapshots/back-{target}", DeviceDisk(target, path), GIB)
        disks.append(DeviceDisk(target, f"/snapshots/back-{target}"))
    process = await driver.launch(Launch(WEB, tuple(disks), BESIDE, incoming=True))
    async with driver.connect(process, "web1") as machine:
        await machine.load(memory)
    return process


FROZEN = {disk.target: disk.path for disk in DISKS}


async def merged_back(
    driver: SimulatedDriver, machine: SimulatedMachine, made: Sequence[Overlay], *, removed: bool = True
) -> None:
    """Merge overlays that disks are on into what is below, as a rollback does, which has them removed."""
    for overlay in made:
        gone = partial(driver.storage.remove, overlay.path) if removed else trio.lowlevel.checkpoint
        note = PivotNote(gone, Path("verdict"))
        await machine.commit_image(
            overlay.path, overlay.base.active, note=note, options=MergeOptions(), progress=untold
        )
