"""What is written to images and not synced is on disk before QEMU is told to stop the guest."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.model.request import Strategy
from tests.live.world import MIB, MakeWorld

pytestmark = pytest.mark.live

CACHESTAT = 451  # on every architecture; Linux 6.5


def unsynced(path: str) -> int:
    """Return how many bytes of a file are in the page cache and not on disk, or on their way there."""
    everything, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    fd = os.open(path, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(CACHESTAT, fd, ctypes.byref(everything), ctypes.byref(found), 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)
    return (found[1] + found[2]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PAUSED])
async def test_synced_before_the_pause(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
) -> None:
    """An image with much unsynced has nothing of it left when the guest is stopped, which would flush it."""
    world = await make_world(disks=dict.fromkeys(["vda", "vdb", "vdc", "vdd", "vde"], "raw"))
    (image,) = [disk.path for disk in world.definition.disks if disk.target == "vde"]  # the guest leaves it alone
    left = []
    pause = QemuMachine.pause

    async def looked(machine: QemuMachine) -> None:
        left.append(unsynced(image))
        await pause(machine)

    monkeypatch.setattr(QemuMachine, "pause", looked)
    data = os.urandom(12 * MIB)
    with Path(image).open("r+b") as file:
        file.write(data)
    assert unsynced(image) > 4 * MIB  # the kernel may have begun to write by itself
    await world.create("first", strategy)
    assert left == [0]
    await world.check_runs()
