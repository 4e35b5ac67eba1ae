"""A domain's disks are what its hypervisor has, and nobody starts on what a snapshot holds: on real QEMUs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from snaporch.drivers.qmp import open_qmp
from snaporch.engine.states import State
from snaporch.errors import ConnectionGone, Refused, Unsupported
from snaporch.model.domain import DomainDefinition
from snaporch.model.record import EventKind
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DomainSnapshot, RevertFlag
from snaporch.model.way import Way
from snaporch.orchestrator import catalog_of
from tests.live.world import NAME, MakeWorld, Qemu, World, make_image

pytestmark = pytest.mark.live

Begin = Callable[..., Path]


@pytest.fixture
def begin(make_world: MakeWorld, tmp_path: Path, qemu: Qemu) -> Iterator[Begin]:  # noqa: ARG001 - ended before that
    """A function that starts a QEMU as others do, its CPUs stopped, and returns its control socket."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> Path:
        socket = tmp_path / f"qmp{len(started)}.sock"
        words = [qemu.emulator, "-nodefaults", "-display", "none", "-S", "-m", "16", *arguments]
        started.append(subprocess.Popen([*words, "-qmp", f"unix:{socket},server=on,wait=off"]))
        return socket

    yield start
    for process in started:
        process.kill()
        process.wait()


async def attach(world: World, name: str, socket: Path) -> None:
    with trio.fail_after(30):
        while not socket.exists():  # noqa: ASYNC110 - QEMU tells nobody
            await trio.sleep(0.02)
    with trio.fail_after(30):
        while True:
            try:
                await world.orch.attach(name, str(socket))
            except ConnectionGone:  # the socket is there before it is listened at
                await trio.sleep(0.05)
            else:
                return


async def test_a_drive_in_extra_args(make_world: MakeWorld, tmp_path: Path, qemu: Qemu) -> None:
    """Where define cannot see that a drive is written to, and would be in no snapshot, the start is refused."""
    extra = tmp_path / "extra.qcow2"
    make_image(qemu, extra)
    (tmp_path / "more.cfg").write_text(f'[drive "x"]\n  if = "virtio"\n  format = "qcow2"\n  file = "{extra}"\n')
    world = await make_world(start=False, extra_args=("-readconfig", f"{tmp_path}/more.cfg"))
    before = extra.read_bytes()
    with pytest.raises(Unsupported, match=rf"guest writes to {extra} .* Name it there under \[\[disks\]\]"):
        await world.orch.start(NAME)
    assert extra.read_bytes() == before
    assert (await world.orch.domain_info(NAME)).state == "inactive"


async def test_a_drive_in_extra_args_that_is_only_read(make_world: MakeWorld, tmp_path: Path, qemu: Qemu) -> None:
    """A drive that nobody writes to may be there."""
    extra = tmp_path / "extra.qcow2"
    make_image(qemu, extra)
    words = ("-drive", f"if=virtio,format=qcow2,readonly=on,file={extra}")
    world = await make_world(start=False, extra_args=words)
    await world.orch.start(NAME)
    record = await world.create("s1")
    assert set(record.images) == {"vda", "vdb"}


async def test_a_disk_that_was_plugged_in(make_world: MakeWorld, tmp_path: Path, qemu: Qemu) -> None:
    """No snapshot is taken that would lack a disk which the guest writes to, or that could not be gone back to."""
    extra = tmp_path / "extra.qcow2"
    make_image(qemu, extra)
    node = {"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": str(extra)}}
    world = await make_world(machine="pc")
    (socket,) = (world.root / NAME).glob("run-*/query.sock")
    async with open_qmp(str(socket), label="test", timeout=30) as qmp:
        await qmp.execute("blockdev-add", node)
        await qmp.execute("device_add", {"driver": "virtio-blk-pci", "drive": "x", "id": "vdz"})
    before = await world.everything()
    with pytest.raises(Unsupported, match=f"guest writes to {extra}"):
        await world.create("s1", even_if_no_way_back=True)
    assert await world.everything() == before
    await world.check_runs()


async def test_a_device_that_was_plugged_in(make_world: MakeWorld) -> None:
    """A checkpoint that no machine could load again is refused, and taken when that is asked for."""
    world = await make_world(machine="pc")
    (socket,) = (world.root / NAME).glob("run-*/query.sock")
    async with open_qmp(str(socket), label="test", timeout=30) as qmp:
        await qmp.execute("device_add", {"driver": "virtio-rng-pci", "id": "rng9"})
    with pytest.raises(Unsupported, match="could never go back to this checkpoint: device rng9 was plugged in"):
        await world.create("s1")
    await world.create("s1", even_if_no_way_back=True)
    await world.check_runs()


async def test_a_job_of_another_program(make_world: MakeWorld, begin: Begin, tmp_path: Path, qemu: Qemu) -> None:
    """While a mirror or a backup of somebody else's runs nothing is begun that would fail in the middle."""
    world = await make_world(start=False)
    for name in ("a.qcow2", "target.qcow2"):
        make_image(qemu, tmp_path / name)
    node = {"driver": "qcow2", "node-name": "n0", "file": {"driver": "file", "filename": f"{tmp_path}/a.qcow2"}}
    socket = begin("-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=n0,id=vda")
    await attach(world, "vm", socket)
    await world.orch.create("vm", DomainSnapshot("s0"))
    await world.orch.resume("vm")
    (disk,) = (await world.orch.domain_info("vm")).disks
    target = {"driver": "file", "filename": f"{tmp_path}/target.qcow2"}
    async with open_qmp(str(socket), label="test", timeout=30) as qmp:
        (block,) = [each for each in await qmp.execute("query-block") if each.get("qdev")]
        await qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "t", "file": target})
        job = {"job-id": "j1", "device": block["inserted"]["node-name"], "target": "t", "sync": "full", "speed": 1}
        await qmp.execute("blockdev-mirror", job)
    match = r"another program has .* work on its .* \(mirror j1\)"
    with pytest.raises(Refused, match=match):
        await world.orch.create("vm", DomainSnapshot("s1"))
    with pytest.raises(Refused, match=match):
        await world.orch.delete("vm", "s0")
    for flags in (RevertFlag(0), RevertFlag.RUNNING):  # its end would be the job's
        with pytest.raises(Refused, match=match):
            await world.orch.revert("vm", "s0", flags)
    async with open_qmp(str(socket), label="test", timeout=30) as qmp:
        await qmp.execute("job-cancel", {"id": "j1"})
        with trio.fail_after(30):
            while await qmp.execute("query-jobs"):  # noqa: ASYNC110 - events of jobs are none of this connection
                await trio.sleep(0.05)
    async with open_qmp(str(socket), label="test", timeout=30) as qmp:
        (block,) = [each for each in await qmp.execute("query-block") if each.get("qdev")]
        address = {"type": "unix", "data": {"path": f"{tmp_path}/nbd.sock"}}
        await qmp.execute("nbd-server-start", {"addr": address})
        await qmp.execute(
            "block-export-add", {"type": "nbd", "id": "x1", "node-name": block["inserted"]["node-name"]}
        )
    with pytest.raises(Refused, match=r"work on its images \(nbd export x1\)"):
        await world.orch.revert("vm", "s0")
    async with world.orch.events() as events:
        await world.orch.revert("vm", "s0", RevertFlag.FORCE)
        notes = []
        while (event := events.receive_nowait()).state != State.COMPLETE:
            notes += [event.text] if event.kind is EventKind.NOTE else []
    assert any("(nbd export x1): wait until" in note and "--force ends that" in note for note in notes)
    await world.orch.delete("vm", "s0")
    assert [each.active for each in (await world.orch.domain_info("vm")).disks] == [str(tmp_path / "a.qcow2")]
    assert disk.active != str(tmp_path / "a.qcow2")
    await world.orch.destroy("vm")


async def test_started_again_on_a_frozen_image(world: World, begin: Begin) -> None:
    """A guest whose owner starts it by its old command line is refused, with what holds its image."""
    old = world.definition.disks[0].path
    await world.create("s1")
    await world.orch.destroy(NAME)
    socket = begin("-drive", f"if=virtio,format=qcow2,file={old}")
    with pytest.raises(Refused, match=rf"guest would write to {old} .*, which snapshot s1 of domain guest reads"):
        await attach(world, NAME, socket)
    with pytest.raises(Refused, match=r"which domain guest reads"):
        await attach(world, "other", socket)
    assert (await world.orch.verify(NAME, "s1")).ok


async def test_started_again_on_its_newest_images(world: World, begin: Begin) -> None:
    """A guest whose owner starts it on the images that `domain show` names is taken charge of again."""
    await world.create("s1")
    disks = (await world.orch.domain_info(NAME)).disks
    await world.orch.destroy(NAME)
    drives = [("-drive", f"if=virtio,format=qcow2,file={disk.active}") for disk in disks]
    await attach(world, NAME, begin(*(word for drive in drives for word in drive)))
    assert [disk.active for disk in (await world.orch.domain_info(NAME)).disks] == [disk.active for disk in disks]
    assert (await world.orch.verify(NAME, "s1")).ok


@pytest.mark.parametrize("how", ["other image", "rebased", "written to"])
async def test_started_again_on_something_else(
    world: World, begin: Begin, tmp_path: Path, qemu: Qemu, how: str
) -> None:
    """A guest whose owner starts it again without its newest data, or on a changed chain, is refused."""
    frozen = world.definition.disks[0].path
    await world.create("s1")
    (status,) = [disk for disk in (await world.orch.domain_info(NAME)).disks if disk.target == "vda"]
    await world.orch.destroy(NAME)
    drives = [
        f"if=virtio,format=qcow2,file={disk.path}" for disk in (await catalog_of(world.orch).domain(NAME)).disks
    ]
    other = tmp_path / "other.qcow2"
    make_image(qemu, other)
    if how == "other image":
        drives[0] = f"if=virtio,format=qcow2,file={other}"
    elif how == "rebased":
        words = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(other), status.active]
        subprocess.run([qemu.img, *words], check=True)
    else:
        subprocess.run([qemu.img, "commit", "-q", "-f", "qcow2", status.active], check=True)
    match = {
        "other image": rf"was left on {status.active} \(vda\), which holds the newest data",
        "rebased": rf"{status.active} was backed by {frozen} and is now backed by {other}",
        "written to": rf"{frozen}",
    }[how]
    with pytest.raises(Refused, match=match):
        await attach(world, NAME, begin(*(word for drive in drives for word in ("-drive", drive))))
    await world.orch.fsck(repair=True)
    assert Path(status.active).exists()


async def test_another_guest_at_its_socket(world: World, begin: Begin, tmp_path: Path, qemu: Qemu) -> None:
    """A QEMU that was started with the socket of one that still runs is not taken for that one."""
    make_image(qemu, tmp_path / "a.qcow2")
    first = begin("-drive", f"if=virtio,format=qcow2,file={tmp_path}/a.qcow2")
    await attach(world, "mine", first)
    second = begin()
    with trio.fail_after(30):
        while not second.exists():  # noqa: ASYNC110 - QEMU tells nobody
            await trio.sleep(0.02)
    os.rename(second, first)
    with pytest.raises(ConnectionGone, match=r"is no socket of its QEMU \(process \d+\) any more"):
        await world.orch.resume("mine")
    assert "is no socket of its QEMU" in (await world.orch.domain_info("mine")).problem


async def test_one_process_is_one_domain(world: World, begin: Begin, tmp_path: Path, qemu: Qemu) -> None:
    """A QEMU that is attached to already is not attached to under a second name."""
    make_image(qemu, tmp_path / "a.qcow2")
    socket = begin("-drive", f"if=virtio,format=qcow2,file={tmp_path}/a.qcow2")
    await attach(world, "mine", socket)
    with pytest.raises(Refused, match="that process is domain mine already"):
        await attach(world, "twice", socket)


async def test_memory_in_a_file(make_world: MakeWorld, tmp_path: Path) -> None:
    """A second guest would load its memory over that of the first: they are never there at one time."""
    backend = f"memory-backend-file,id=ram0,size=64M,mem-path={tmp_path}/ram,share=on"
    words = ("-object", backend, "-machine", "memory-backend=ram0")
    world = await make_world(memory=64 * 2**20, append="ram=16", extra_args=words)
    back = (await world.orch.domain_info(NAME)).way_back
    assert back is not None
    assert (back.way, back.reason) == (
        Way.PROVEN,
        f"both would have the memory in {tmp_path}/ram (-object {backend})",
    )
    await world.create("s1", Strategy.AUTO)
    await world.reports(2)
    assert (await world.orch.revert(NAME, "s1")).way == "proven"
    await world.check_runs()


_SLICE = "if=virtio,driver=raw,offset=1048576,size=1048576,file.driver=file,file.filename={d}/a.raw"
ODD = {
    "temporary": (("-drive", "if=virtio,format=qcow2,file={d}/a.qcow2,snapshot=on"), "a temporary file"),
    "slice": (("-drive", _SLICE), "it is a part of a file (offset=1048576, size=1048576)"),
}


@pytest.mark.parametrize("odd", ODD)
async def test_what_no_overlay_can_stand_for(
    make_world: MakeWorld, begin: Begin, tmp_path: Path, qemu: Qemu, odd: str
) -> None:
    """A snapshot of what is more than an image is refused when it is planned; nothing is made."""
    world, (words, why) = await make_world(start=False), ODD[odd]
    make_image(qemu, tmp_path / "a.qcow2")
    make_image(qemu, tmp_path / "a.raw", "raw")
    await attach(world, "odd", begin(*(word.format(d=tmp_path) for word in words)))
    with pytest.raises(Unsupported) as caught:
        await world.orch.create("odd", DomainSnapshot("s1"), options=CreateOptions(even_if_no_way_back=True))
    assert why in str(caught.value)
    assert not (world.root / "odd").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set up a block device")
async def test_a_block_device(make_world: MakeWorld, tmp_path: Path, qemu: Qemu) -> None:
    """A raw disk on a block device: taken, gone back to, and merged again, under a running guest."""
    back = tmp_path / "back.raw"
    make_image(qemu, back, "raw")
    losetup = subprocess.run(["losetup", "-f", "--show", str(back)], check=True, capture_output=True, text=True)
    loop = losetup.stdout.strip()
    try:
        world = await make_world(start=False, disks={})
        disk = DeviceDisk("vda", loop, "raw")
        definition = {f: getattr(world.definition, f) for f in ("machine", "accel", "kernel", "append", "serial")}
        await world.orch.define(DomainDefinition(NAME, emulator=qemu.emulator, disks=(disk,), **definition))
        await world.orch.start(NAME)
        await world.wait_report(lambda report: report.seq > 2 and report.errors == 0, since=0)
        record = await world.orch.create(NAME, DomainSnapshot("s1"), CreateFlag.LIVE)
        (sealed,) = record.images["vda"]
        assert (sealed.path, sealed.size) == (loop, back.stat().st_size)
        (status,) = (await world.orch.domain_info(NAME)).disks
        assert status.active.startswith(f"{world.root}/")
        await world.orch.revert(NAME, "s1")
        await world.reports(2)
        await world.orch.delete(NAME, "s1")
        (status,) = (await world.orch.domain_info(NAME)).disks
        assert status.active == loop
        await world.check_runs()
        await world.orch.destroy(NAME)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
