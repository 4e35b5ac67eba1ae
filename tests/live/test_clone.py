"""Clones of a real guest, which says itself whether it is whole."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import trio

from snaporch import CloneOptions, DomainSnapshot, DomainState, Refused, TargetExists
from snaporch.model.rfc import CreateFlag
from tests.live.world import MIB, NAME, MakeWorld, World, processes

pytestmark = pytest.mark.live


def copy_of(world: World, name: str) -> World:
    """Return a clone as a world: what its guest says is in its own log."""
    return attrs.evolve(world, log=world.root / name / "serial.log")


def listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        return True


def qemus(directory: Path, names: Sequence[str]) -> list[int]:
    return [
        pid
        for pid, words in processes(directory).items()
        if any(f"guest={name}" in word for word in words for name in names)
    ]


async def test_clones(make_world: MakeWorld) -> None:
    """Two clones run beside the original; one is saved, goes back, and stands alone in the end."""
    forward = ("-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22", "-device", "virtio-net-pci,netdev=net0")
    world = await make_world(memory=64 * MIB, append="rate=100 dirty=10", extra_args=forward)
    orch = world.orch
    point = await world.create("p")
    await world.check_runs()
    made = await orch.clone(NAME, "p", "copy", CloneOptions(count=2))
    assert [(each.name, each.state) for each in made] == [
        ("copy-1", DomainState.RUNNING),
        ("copy-2", DomainState.RUNNING),
    ]
    ports = [port.port for each in made for port in each.ports]
    assert len(set(ports)) == 2
    assert all(map(listens, ports))
    one, two = (copy_of(world, each.name) for each in made)
    for each in (one, two, world):
        await each.check_consistent()
    with pytest.raises(TargetExists, match="copy-2"):
        await orch.clone(NAME, "p", "copy-2")
    with pytest.raises(Refused, match="pinned: its images are read by copy-1, copy-2"):
        await orch.delete(NAME, "p")

    await orch.create("copy-1", DomainSnapshot("q"), CreateFlag.LIVE)
    await one.check_runs()
    await orch.revert("copy-1", "q")
    await one.check_consistent()
    await orch.destroy("copy-2")
    with pytest.raises(Refused, match="is a clone"):
        await orch.undefine("copy-2")
    await orch.undefine("copy-2", discard=True)
    assert not (world.root / "copy-2").exists()
    await orch.delete("copy-1", "q")
    await orch.flatten("copy-1")
    await orch.delete(NAME, "p")
    assert not Path(point.snapshot.memory_file).exists()
    for each in (one, world):
        await each.check_consistent()
    await orch.destroy("copy-1")
    await orch.undefine("copy-1", discard=True)
    assert not (world.root / "copy-1").exists()
    assert not qemus(world.directory, ["copy-1", "copy-2"])


FUZZ = Path(__file__).parents[2] / "scripts/examples/fuzz-with-pool"


async def test_a_pool_as_the_example_has_it(make_world: MakeWorld) -> None:
    """Fresh clones one after the other, by a program of its own; the original does not notice."""
    world = await make_world(memory=64 * MIB, append="rate=100 dirty=10")
    await world.create("p")
    environment = os.environ | {"SNAPORCH_ROOT": str(world.root), "SNAPORCH_QEMU_IMG": world.qemu.img}
    command = [sys.executable, str(FUZZ), NAME, "p", "4", "sh", "-c", 'test -d "$SNAPORCH_ROOT/$SNAPORCH_DOMAIN"']
    done = await trio.run_process(command, env=environment, capture_stdout=True)
    said = done.stdout.decode()
    assert "4 rounds, " in said
    assert "0 finding(s)" in said
    await world.check_runs()
    assert [info.name for info in await world.orch.domains()] == [NAME]
    assert not qemus(world.directory, ["guest-pool-"])
