"""Whether guests run under KVM is asked of a guest that does what an operating system does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from snaporch.drivers.qemu import kvm
from snaporch.model.domain import DomainState
from tests.live.world import MIB, MakeWorld, Qemu

pytestmark = pytest.mark.live


def test_the_code_is_that_of_its_source(tmp_path: Path) -> None:
    """The bytes of the boot sector are what its source is assembled to."""
    source, made, code = Path(kvm.__file__).with_name("probe.S"), tmp_path / "probe.o", tmp_path / "probe"
    subprocess.run(["as", "--64", source, "-o", made], check=True)
    subprocess.run(
        ["ld", "-m", "elf_x86_64", "-Ttext", "0x7c00", "--oformat", "binary", "-o", code, made], check=True
    )
    assert code.read_bytes() == kvm.CODE


async def test_it_comes_through(qemu: Qemu) -> None:
    """Where guests run for certain, it does."""
    assert not await kvm.probe(qemu.emulator, "tcg")


async def test_auto(make_world: MakeWorld) -> None:
    """Whatever `auto` takes on this host, a guest boots under it and counts."""
    world = await make_world(memory=64 * MIB, accel="auto")
    assert await world.state() is DomainState.RUNNING
    await world.check_runs()
