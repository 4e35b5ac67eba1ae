"""Machines as people start them, their CPUs stopped: what could not come back as it was is refused, untouched."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import pytest

from snaporch.catalog import Change
from snaporch.drivers.qemu.surroundings import untrusted
from snaporch.drivers.qmp import open_qmp
from snaporch.drivers.qmp.run_states import GONE, RUN_STATES
from snaporch.errors import ConnectionGone, Refused, Unsupported
from snaporch.model.record import Boot
from snaporch.model.request import CreateOptions
from snaporch.model.rfc import CreateFlag, DomainSnapshot, RevertFlag
from snaporch.model.way import Way, WayBack
from snaporch.orchestrator import catalog_of
from tests.live.lab import NAME, Lab, lab

pytestmark = pytest.mark.live

__all__ = ["lab"]  # the fixture


def blockdev(**options: object) -> tuple[str, str]:
    """Return a -blockdev in JSON; dashes are written as underscores."""
    return "-blockdev", json.dumps({key.replace("_", "-"): value for key, value in options.items()})


def node(driver: str, path: str, **more: object) -> tuple[str, ...]:
    """Return a -blockdev with a file inside, and a device on it."""
    file = {"driver": "file", "filename": path}
    return *blockdev(driver=driver, node_name="n0", file=file, **more), "-device", "virtio-blk-pci,drive=n0,id=vda"


def libvirt(lab: Lab) -> tuple[str, ...]:
    """As libvirt writes a chain: each file and each layer a node, and the last one cut off with a null."""
    base = lab.image("base.qcow2")
    top = lab.image("top.qcow2", base=base)
    return (
        *blockdev(driver="file", filename=base, node_name="libvirt-2-storage", read_only=True),
        *blockdev(driver="qcow2", file="libvirt-2-storage", node_name="libvirt-2", read_only=True, backing=None),
        *blockdev(driver="file", filename=top, node_name="libvirt-1-storage", auto_read_only=True, discard="unmap"),
        *blockdev(driver="qcow2", file="libvirt-1-storage", node_name="libvirt-1", backing="libvirt-2"),
        *("-device", json.dumps({"driver": "virtio-blk-pci", "drive": "libvirt-1", "id": "vda", "bootindex": 1})),
    )


def configured(lab: Lab) -> tuple[str, ...]:
    """All in a file."""
    text = f'[drive "d0"]\n  if = "virtio"\n  file = "{lab.image("a.qcow2")}"\n[memory]\n  size = "48"\n'
    (lab.place / "vm.cfg").write_text(text)
    return "-readconfig", "vm.cfg"


TYPED = "driver=qcow2,node-name=n0,detect-zeroes=on,l2-cache-size=1048576,file.driver=file,file.locking=off"

# Command lines that a machine comes back with.
STYLES: dict[str, Callable[[Lab], Sequence[str]]] = {
    "libvirt": libvirt,
    "backing null": lambda lab: node("qcow2", lab.image("a.qcow2"), backing=None),
    "raw without a layer": lambda lab: (
        *("-blockdev", f"driver=file,node-name=n0,filename={lab.image('a.raw', 'raw')}"),
        *("-device", "virtio-blk-pci,drive=n0"),
    ),
    "key=value": lambda lab: (
        *("-blockdev", f"{TYPED},file.filename={lab.image('a.qcow2')}"),
        *("-device", "virtio-blk-pci,drive=n0"),
    ),
    "cdrom": lambda lab: (
        *("-cdrom", lab.image("x.iso", "raw")),
        *("-drive", f"driver=qcow2,if=virtio,file={lab.image('a.qcow2')}"),
    ),
    "dotted": lambda lab: (
        *("-drive", f"if=none,id=d0,driver=qcow2,file.driver=file,file.filename={lab.image('a.qcow2')}"),
        *("-device", "virtio-blk-pci,drive=d0"),
    ),
    "prefix, relative": lambda lab: ("-drive", f"if=virtio,file=file:{Path(lab.image('a.qcow2')).name}"),
    "short": lambda lab: ("-hda", lab.image("a.qcow2"), "-hdb", lab.image("b,1.qcow2")),
    "configured": configured,
}


@pytest.mark.parametrize("style", STYLES)
async def test_a_machine_that_comes_back(lab: Lab, style: str) -> None:
    await lab.start(*STYLES[style](lab), machine="pc" if style == "short" else "q35")
    await lab.check_goes_back()


async def test_media(lab: Lab) -> None:
    """A medium that was changed since the start is the one of the point; one that was taken out is out."""
    first, second = lab.image("one.iso", "raw"), lab.image("two.iso", "raw")
    await lab.start(*("-drive", f"if=none,id=cd,media=cdrom,file={first}", "-device", "ide-cd,drive=cd,id=cd0"))
    await lab.attach()
    for command, image in (("blockdev-change-medium", second), ("eject", "")):
        async with open_qmp(lab.socket, label=NAME) as qmp:
            await qmp.execute(command, {"id": "cd0"} | ({"filename": image} if image else {"force": True}))
        before = await lab.shape()
        name = f"c-{command}"
        await lab.create(name)
        await lab.revert(name)
        assert [disk.chain for disk in (await lab.shape()).disks] == [disk.chain for disk in before.disks]


async def test_pretty(lab: Lab) -> None:
    """A monitor that writes for people."""
    pretty = ("-qmp-pretty", f"unix:{lab.socket},server=on,wait=off")
    await lab.start("-drive", f"if=virtio,file={lab.image('a.qcow2')}", *pretty, qmp=False)
    await lab.check_goes_back()


async def test_logs_are_appended_to(lab: Lab) -> None:
    """In whichever way they are written."""
    logs = {name: lab.place / f"{name}.log" for name in ("serial", "debug", "chardev")}
    await lab.start(
        *("-serial", f"file:{logs['serial']}", "-debugcon", f"file:{logs['debug']}"),
        *("-chardev", f"null,id=c1,logfile={logs['chardev']}", "-device", "isa-serial,chardev=c1,index=1"),
    )
    for path in logs.values():
        path.write_text("before\n")
    await lab.check_goes_back()
    assert {path.read_text() for path in logs.values()} == {"before\n"}


async def test_the_pidfile_names_the_process_that_is_there(lab: Lab) -> None:
    """Else whoever ends the guest by it would end another process some day."""
    pidfile = lab.place / "vm.pid"
    await lab.start("-pidfile", pidfile.name, "-drive", f"if=virtio,file={lab.image('a.qcow2')}")
    await lab.check_goes_back()
    assert int(pidfile.read_text()) == (await lab.orch.domain_info(NAME)).pid


async def test_its_socket_is_gone(lab: Lab) -> None:
    """A cleaner has removed it, or another process listens there: that is said, and what to do; nothing is sent."""
    await lab.start("-drive", f"if=virtio,file={lab.image('a.qcow2')}")
    await lab.attach()
    kept = lab.socket.with_name("kept")
    lab.socket.rename(kept)
    with pytest.raises(ConnectionGone, match=r"socket .* was removed.*Shut its guest down from inside"):
        await lab.create()
    (info,) = await lab.orch.domains()
    assert "was removed" in info.problem
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(lab.socket))
        another.listen()
        with pytest.raises(ConnectionGone, match=rf"but of process {os.getpid()}"):
            await lab.create()
    kept.rename(lab.socket)
    await lab.create()


async def test_shared_memory(lab: Lab) -> None:
    """A file that the memory is shared by is the running guest's alone; a new one takes its name with its place."""
    path = lab.place / "ram"
    memory = f"memory-backend-file,id=m0,size=32M,share=on,mem-path={path}"
    await lab.start("-object", memory, machine="q35,memory-backend=m0")
    await lab.attach()
    await lab.create()
    inode = path.stat().st_ino
    await lab.orch.verify(NAME, "c1")
    assert path.stat().st_ino == inode
    await lab.revert()
    assert path.stat().st_ino != inode
    assert sorted(each.name for each in lab.place.glob("ram*")) == ["ram"]


async def test_plugged_in(lab: Lab) -> None:
    """A device that was plugged in is not on the command line: that is known before a checkpoint is taken."""
    await lab.start(*("-drive", f"if=virtio,file={lab.image('a.qcow2')}"), memory="32,slots=2,maxmem=1G")
    await lab.attach()
    assert (await lab.orch.domain_info(NAME)).way_back == WayBack(Way.BESIDE)
    async with open_qmp(lab.socket, label=NAME) as qmp:
        await qmp.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m1", "size": 2**27})
        await qmp.execute("device_add", {"driver": "pc-dimm", "id": "dimm1", "memdev": "m1"})
    with pytest.raises(Unsupported, match=r"never go back.* dimm1 was plugged in.*--even-if-no-way-back"):
        await lab.create()
    await lab.orch.create(NAME, DomainSnapshot("c1"), options=CreateOptions(even_if_no_way_back=True))
    back = (await lab.orch.show(NAME, "c1")).way_back
    assert back is not None
    assert back.way is Way.NONE
    await lab.check_refused(r"167772160 bytes of memory, and has 33554432; device dimm1: pc-dimm is missing")


def tcp(option: str) -> Callable[[Lab], Sequence[str]]:
    """A function that returns an option with a port of this test's."""
    return lambda lab: option.replace("PORT", str(20000 + os.getpid() % 20000 + len(lab.qemu.version))).split()


# What prevents a second process, and the word of the command line that is named for it.
HELD: dict[str, tuple[Callable[[Lab], Sequence[str]], Way, str]] = {
    "forwarded port": (
        tcp("-netdev user,id=n0,hostfwd=tcp:127.0.0.1:PORT-:22"),
        Way.PROVEN,
        r"port tcp:127\.0\.0\.1:\d+-:22 \(-netdev",
    ),
    "telnet": (tcp("-serial telnet:127.0.0.1:PORT,server,nowait"), Way.PROVEN, r"port 127\.0\.0\.1:\d+ \(-serial"),
    "monitor": (
        lambda _: ("-monitor", "unix:mon.sock,server,nowait"),
        Way.PROVEN,
        r"socket /.*/mon\.sock \(-monitor",
    ),
    "agent": (
        lambda _: ("-chardev", "socket,id=ga,path=ga.sock,server=true,wait=false"),
        Way.PROVEN,
        r"socket /.*/ga\.sock \(-chardev",
    ),
    "screen": (lambda _: ("-vnc", "unix:vnc.sock"), Way.PROVEN, r"socket /.*/vnc\.sock \(-vnc"),
    "snapshot": (
        lambda lab: ("-drive", f"if=virtio,snapshot=on,file={lab.image('a.qcow2')}"),
        Way.NONE,
        "it is on a temporary file",
    ),
    "offset": (
        lambda lab: node("raw", lab.image("a.raw", "raw"), offset=1048576),
        Way.NONE,
        r"vda.*it is a part of its file",
    ),
}


@pytest.mark.parametrize("what", HELD)
async def test_the_way_back(lab: Lab, what: str) -> None:
    """It is known when the machine is attached to; without one no checkpoint is taken."""
    words, way, reason = HELD[what]
    await lab.start(*words(lab))
    try:
        await lab.attach()
    except Refused as error:  # drives that nothing can be done with are no disks
        assert way is Way.NONE
        assert re.search(reason, str(error)) or "temporary" in str(error) or "slice" in str(error)  # noqa: PT017
        return
    back = (await lab.orch.domain_info(NAME)).way_back
    assert back is not None
    assert back.way is way
    assert re.search(reason, back.reason), back.reason
    if way is Way.NONE:
        with pytest.raises(Refused, match=r"never go back|part of a file|temporary"):
            await lab.create()


async def test_what_nobody_else_can_have(lab: Lab) -> None:
    """An inherited descriptor is gone with the process that has it: not even with FORCE is that ended."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        network = json.dumps({"type": "socket", "id": "n0", "fd": str(theirs.fileno())})
        await lab.start("-netdev", network, "-device", "virtio-net-pci,netdev=n0", fds=(theirs.fileno(),))
    await lab.attach()
    with pytest.raises(Unsupported, match=r"no other process can have an inherited descriptor \(-netdev"):
        await lab.create()
    await lab.orch.create(NAME, DomainSnapshot("c1"), options=CreateOptions(even_if_no_way_back=True))
    for flags in (RevertFlag(0), RevertFlag.FORCE):
        await lab.check_refused("no other process can have an inherited descriptor", flags=flags)


def test_another_users(tmp_path: Path) -> None:
    """A program that somebody else could put another one in the place of is not run with our rights."""
    program = tmp_path / "qemu-mine"
    shutil.copy(shutil.which("true") or "/bin/true", program)
    os.chown(program, 65534, 65534)
    assert "could put another program" in untrusted(str(program))
    assert not untrusted("/bin/true")


async def test_every_run_state_is_known(lab: Lab) -> None:
    """In each of QEMU's run states it is decided what each verb does."""
    await lab.start()
    async with open_qmp(lab.socket, label=NAME) as qmp:
        schema = await qmp.execute("query-qmp-schema")
        info = next(each for each in schema if each["name"] == "query-status")
        status = next(each for each in schema if each["name"] == info["ret-type"])
        kind = next(member["type"] for member in status["members"] if member["name"] == "status")
        states = next(each["values"] for each in schema if each["name"] == kind)
    assert {*states, GONE} == RUN_STATES.keys()


async def test_a_machine_that_waits_for_memory(lab: Lab) -> None:
    """There is none to be saved, and none to go on with: refused, and it still waits."""
    await lab.start("-incoming", "defer")
    await lab.attach()
    with pytest.raises(Unsupported, match="waits for memory"):
        await lab.create()
    for verb in (lab.orch.resume, lab.orch.pause, lab.orch.shutdown):
        with pytest.raises(Unsupported, match="waits for memory"):
            await verb(NAME)
    async with open_qmp(lab.socket, label=NAME) as qmp:
        assert (await qmp.execute("query-status"))["status"] == "inmigrate"


async def test_what_is_no_machine(lab: Lab) -> None:
    """A machine that is not built yet, and a monitor for people: refused at attach, and nothing is left."""
    people = lab.place / "people.sock"
    await lab.start("-preconfig", "-monitor", f"unix:{people},server=on,wait=off")
    for place in (lab.socket, people):
        with pytest.raises(Refused, match="whose machine is built"):
            await lab.orch.attach(NAME, str(place))
    assert not await lab.orch.domains()


async def test_a_device_that_cannot_be_saved(lab: Lab) -> None:
    """QEMU knows it, so it is asked before anything is touched."""
    await lab.start(*("-drive", f"if=none,id=d,file={lab.image('a.qcow2')}", "-device", "nvme,serial=x,drive=d"))
    await lab.attach()
    with pytest.raises(Unsupported, match=r"cannot save its memory.*nvme"):
        await lab.create()
    assert [disk.chain for disk in (await lab.shape()).disks] == [(str(lab.place / "a.qcow2"),)]


@pytest.mark.parametrize(
    ("words", "boot", "reason"),
    [
        (
            ("-netdev", "tap,id=n0,ifname=IFNAME,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0"),
            Boot.RAN,
            "",
        ),
        (("-device", "virtio-net-pci"), Boot.RAN, ""),
    ],
)
async def test_a_copy_is_tried(lab: Lab, words: Sequence[str], boot: Boot, reason: str) -> None:
    """What keeps the copy from having what the guest has of the host has a stand-in."""
    interface = f"sp{os.getpid() % 10**6}-{len(lab.qemu.version)}"
    await lab.start(*(word.replace("IFNAME", interface) for word in words))
    await lab.attach()
    await lab.create()
    report = await lab.orch.verify(NAME, "c1", boot=True)
    assert (report.files, report.boot, report.ok) == ("good", boot, True), report
    assert reason in report.reason


async def test_a_copy_beside_a_guest_that_keeps_its_image_locked(lab: Lab) -> None:
    """Its directory is another one since its start, so that it cannot open the frozen image anew for reading."""
    lab.image("a.qcow2")
    await lab.start("-daemonize", "-drive", "if=virtio,file=a.qcow2")
    await lab.attach()
    await lab.orch.resume(NAME)
    await lab.orch.create(NAME, DomainSnapshot("c1"), CreateFlag.LIVE)
    report = await lab.orch.verify(NAME, "c1", boot=True)
    assert (report.files, report.boot, report.ok) == ("good", Boot.NOT_POSSIBLE, True), report
    assert "cannot run beside the guest" in report.reason


async def test_a_copy_that_cannot_be_tried(lab: Lab) -> None:
    """Its program is gone: that says nothing of the snapshot."""
    program = lab.place / "qemu-copy"
    await lab.start("-drive", f"if=virtio,file={lab.image('a.qcow2')}")
    await lab.attach()
    await lab.create()
    record = await catalog_of(lab.orch).snapshot(NAME, "c1")
    assert record.template is not None
    data = record.template.data | {"surroundings": record.template.data["surroundings"] | {"program": str(program)}}
    gone = attrs.evolve(record, template=attrs.evolve(record.template, data=data))
    await catalog_of(lab.orch).write(Change(updated=(gone,)))
    report = await lab.orch.verify(NAME, "c1", boot=True)
    assert (report.files, report.boot, report.ok, report.booted) == ("good", Boot.NOT_POSSIBLE, True, None)
    assert "not there any more" in report.reason
    for flags in (RevertFlag(0), RevertFlag.FORCE):
        await lab.check_refused("not there any more", flags=flags)


async def test_a_backup_program_at_work(lab: Lab) -> None:
    """A dirty bitmap that an overlay would not have, and a job that works on the disk: refused, untouched."""
    await lab.start(*node("qcow2", lab.image("a.qcow2")))
    await lab.attach()
    target = {"driver": "qcow2", "file": {"driver": "file", "filename": lab.image("t.qcow2")}, "node-name": "t0"}
    mirror = {"job-id": "j", "device": "n0", "target": "t0", "sync": "full"}
    before = await lab.shape()
    async with open_qmp(lab.socket, label=NAME) as qmp:
        await qmp.execute("block-dirty-bitmap-add", {"node": "n0", "name": "backup"})
    with pytest.raises(Unsupported, match=r"dirty bitmaps \(backup\)"):
        await lab.create()
    async with open_qmp(lab.socket, label=NAME) as qmp:
        await qmp.execute("block-dirty-bitmap-remove", {"node": "n0", "name": "backup"})
        await qmp.execute("blockdev-add", target)
        await qmp.execute("blockdev-mirror", mirror)
    with pytest.raises(Unsupported, match=r"another program has QEMU work on its disks \(mirror j\)"):
        await lab.create()
    assert await lab.shape() == before
    async with open_qmp(lab.socket, label=NAME) as qmp:
        await qmp.execute("job-cancel", {"id": "j"})
    await lab.create()


async def test_what_kills_this_qemu_is_not_asked_for(lab: Lab) -> None:
    """An NVDIMM without KVM: QEMU 10.0 dies of the question which of its pages are dirty; 7.2 saves it."""
    backend = f"memory-backend-file,id=nv0,size=16M,share=off,mem-path={lab.place}/nv"
    devices = ("-object", backend, "-device", "nvdimm,id=nvd0,memdev=nv0")
    await lab.start(*devices, machine="q35,nvdimm=on", memory="32M,slots=2,maxmem=1G")
    await lab.attach()
    if lab.qemu.old:
        await lab.create()
    else:
        with pytest.raises(Unsupported, match="dies when it saves"):
            await lab.create()
    assert (await lab.orch.domain_info(NAME)).pid is not None
