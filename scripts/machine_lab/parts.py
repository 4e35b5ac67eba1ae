"""Memory, firmware, TPM, generation ids, devices, networks, serial ports and logs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from machine_lab.cells import CELLS, Cell, blockdev, cell, simple
from machine_lab.lab import Lab

MEMORY = "Memory"
FIRMWARE = "Firmware, TPM, generation id"
DEVICE = "Devices, networks, serial ports"
LOG = "Logs"
CODE, VARIABLES = (Path(f"/usr/share/OVMF/OVMF_{name}_4M.fd") for name in ("CODE", "VARS"))


# --- memory ---


def _memory(
    name: str, *words: str, size: str = "192", machine: str = "q35,memory-backend=m0", smp: str = "1"
) -> None:
    def build(lab: Lab) -> list[object]:
        more = [word.format(place=lab.place, id=lab.place.name) for word in words]
        if any("/dev/shm" in word for word in more):  # noqa: S108 - where people put it
            lab.cleanup.append(lambda: [path.unlink() for path in Path("/dev/shm").glob(f"{lab.place.name}*")])  # noqa: S108
        return [*lab.base(memory=size, machine=machine, smp=smp), *more, *lab.disks(lab.image("a.qcow2"))]

    simple(MEMORY, name, build)


FILE = "memory-backend-file,id=m0,size=192M"
_memory("mem-ram", "-object", "memory-backend-ram,id=m0,size=192M,prealloc=on")
_memory("mem-memfd-share", "-object", "memory-backend-memfd,id=m0,size=192M,share=on")
_memory("mem-file-shm", "-object", f"{FILE},share=on,mem-path=/dev/shm/{{id}}")
_memory("mem-file-disk", "-object", f"{FILE},share=on,mem-path={{place}}/ram")
_memory("mem-file-private", "-object", f"{FILE},share=off,mem-path={{place}}/ram")
_memory("mem-file-dir", "-object", f"{FILE},share=on,mem-path={{place}}")
_memory("mem-path-opt", "-mem-path", "/dev/shm", machine="q35")  # noqa: S108
_memory(
    "mem-numa2",
    *("-object", "memory-backend-ram,id=m0,size=96M", "-object", "memory-backend-ram,id=m1,size=96M"),
    *("-numa", "node,nodeid=0,cpus=0,memdev=m0", "-numa", "node,nodeid=1,cpus=1,memdev=m1"),
    machine="q35",
    smp="2",
)
SLOTS = "192M,slots=2,maxmem=1G"
_memory(
    "mem-dimm",
    *("-object", "memory-backend-ram,id=m1,size=128M", "-device", "pc-dimm,id=dimm1,memdev=m1"),
    size=SLOTS,
    machine="q35",
)
VIRTIO_MEM = "virtio-mem-pci,id=v0,memdev=vm0,requested-size=256M"
_memory(
    "mem-virtio-mem",
    *("-object", "memory-backend-ram,id=vm0,size=512M", "-device", VIRTIO_MEM),
    size="192M,maxmem=1G",
    machine="q35",
)
_memory(
    "mem-virtio-mem-shared",
    *("-object", "memory-backend-memfd,id=vm0,size=512M,share=on", "-device", VIRTIO_MEM),
    size="192M,maxmem=1G",
    machine="q35",
)
_memory(
    "mem-nvdimm",
    *("-object", "memory-backend-file,id=nv0,size=64M,share=on,mem-path={place}/nv"),
    *("-device", "nvdimm,id=nvd0,memdev=nv0"),
    size=SLOTS,
    machine="q35,nvdimm=on",
)
_memory(
    "mem-ivshmem",
    *("-object", "memory-backend-file,id=iv0,size=4M,share=on,mem-path=/dev/shm/{id}-iv"),
    *("-device", "ivshmem-plain,memdev=iv0"),
    machine="q35",
)


@cell(MEMORY)
def mem_hugepages(lab: Lab) -> None:
    pages, place = Path("/proc/sys/vm/nr_hugepages"), lab.place / "huge"
    before = pages.read_text()
    pages.write_text("100")  # the guest needs 96: a second one finds none
    lab.cleanup += [lambda: lab.sh("umount", "-l", place), lambda: pages.write_text(before)]
    place.mkdir()
    lab.sh("mount", "-t", "hugetlbfs", "none", place)
    memory = f"{FILE},mem-path={place},share=off,prealloc=on"
    words = ["-object", memory, *lab.disks(lab.image("a.qcow2"))]
    lab.start([*lab.base(machine="q35,memory-backend=m0"), *words])
    lab.flow()


@cell(MEMORY)
def mem_dimm_hotplug(lab: Lab) -> None:
    lab.start([*lab.base(memory=SLOTS), *lab.disks(lab.image("a.qcow2"))])
    lab.ask("object-add", **{"qom-type": "memory-backend-ram", "id": "h1", "size": 2**27})
    lab.ask("device_add", driver="pc-dimm", id="hd1", memdev="h1")
    lab.flow()


@cell(MEMORY)
def mem_balloon(lab: Lab) -> None:
    balloon = "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on"
    guest = lab.linux(("virtio_balloon",))
    lab.start([*lab.base(guest, memory="256"), "-device", balloon, *lab.disks(lab.image("a.qcow2"))])
    lab.ask("balloon", value=200 * 2**20)
    time.sleep(3)
    lab.flow()


# --- firmware ---


def _pflash(lab: Lab, kind: str = "raw") -> list[str]:
    variables = lab.place / f"vars.{kind}"
    lab.sh(lab.qemu.img, "convert", "-O", kind, VARIABLES, variables)
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={CODE}"),
        *("-drive", f"if=pflash,unit=1,format={kind},file={variables}"),
    ]


def _uefi(lab: Lab) -> list[str]:
    return lab.base(lab.linux(), memory="256")


simple(FIRMWARE, "uefi-raw", lambda lab: [*_uefi(lab), *_pflash(lab), *lab.disks(lab.image("a.qcow2"))], whole=True)
simple(
    FIRMWARE,
    "uefi-qcow2",
    lambda lab: [*_uefi(lab), *_pflash(lab, "qcow2"), *lab.disks(lab.image("a.qcow2"))],
    whole=True,
)
simple(
    FIRMWARE,
    "uefi-bios-opt",
    lambda lab: [*_uefi(lab), "-bios", "/usr/share/ovmf/OVMF.fd", *lab.disks(lab.image("a.qcow2"))],
)


@cell(FIRMWARE)
def uefi_pflash_opt(lab: Lab) -> None:
    firmware = lab.place / "OVMF.fd"
    shutil.copy("/usr/share/ovmf/OVMF.fd", firmware)
    lab.start([*_uefi(lab), "-pflash", firmware, *lab.disks(lab.image("a.qcow2"))])
    lab.flow()


@cell(FIRMWARE)
def uefi_blockdev(lab: Lab) -> None:
    variables = lab.place / "vars.fd"
    shutil.copy(VARIABLES, variables)
    words: list[object] = []
    for unit, (path, readonly) in enumerate([(CODE, True), (variables, False)]):
        node = f"libvirt-pflash{unit}"
        words += blockdev(driver="file", filename=str(path), node_name=f"{node}-storage", auto_read_only=True)
        words += blockdev(node_name=f"{node}-format", read_only=readonly, driver="raw", file=f"{node}-storage")
    machine = "q35,pflash0=libvirt-pflash0-format,pflash1=libvirt-pflash1-format"
    lab.start([*lab.base(lab.linux(), memory="256", machine=machine), *words, *lab.disks(lab.image("a.qcow2"))])
    lab.flow(whole=True)


@cell(FIRMWARE)
def uefi_defined(lab: Lab) -> None:
    if lab.define(_pflash(lab)):
        lab.flow(attached=True)


@cell(FIRMWARE)
def uefi_defined_left_out(lab: Lab) -> None:
    if lab.define(_pflash(lab)):
        lab.flow(attached=True, words=("--disk", "pflash1=none"))


def _tpm(lab: Lab, *options: str) -> list[str]:
    (lab.place / "tpm").mkdir()
    state, control = f"dir={lab.place}/tpm", f"type=unixio,path={lab.place}/tpm.sock"
    words = ["swtpm", "socket", "--tpm2", "--tpmstate", state, "--ctrl", control, *options]
    lab.beside(*words, "--flags", "startup-clear")
    chardev = f"socket,id=chrtpm,path={lab.place}/tpm.sock"
    return ["-chardev", chardev, "-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-tis,tpmdev=tpm0"]


def _with_tpm(lab: Lab, *options: str) -> list[object]:
    guest = lab.linux(("tpm_tis",), more="lab.tpm=1")
    return [*lab.base(guest), *_tpm(lab, *options), *lab.disks(lab.image("a.qcow2"))]


simple(FIRMWARE, "tpm-terminate", lambda lab: _with_tpm(lab, "--terminate"), whole=True)
simple(FIRMWARE, "tpm-stay", _with_tpm, whole=True)


@cell(FIRMWARE)
def tpm_defined(lab: Lab) -> None:
    if lab.define(_tpm(lab)):
        lab.flow(attached=True)


@cell(FIRMWARE)
def vmgenid_fixed(lab: Lab) -> None:
    _generation(lab, "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87")


@cell(FIRMWARE)
def vmgenid_auto(lab: Lab) -> None:
    _generation(lab, "auto")


def _generation(lab: Lab, guid: str) -> None:
    lab.start([*lab.base(), "-device", f"vmgenid,guid={guid},id=vg", *lab.disks(lab.image("a.qcow2"))])
    before = lab.ask("query-vm-generation-id")
    lab.flow(verify=False)
    if lab.steps[-1].what == "went back":
        after = lab.ask("query-vm-generation-id")
        lab.check("a new generation id", good=before != after, words=f"{before}, {after}")


# --- definitions ---


@cell("Definitions")
def def_plain(lab: Lab) -> None:
    if lab.define([]):
        lab.flow(attached=True, whole=True)


@cell("Definitions")
def def_extra_disk(lab: Lab) -> None:
    image = lab.image("x.qcow2")
    words = ["-drive", f"if=none,id=xd,file={image},format=qcow2", "-device", "virtio-blk-pci,drive=xd,id=xd"]
    if lab.define(words):
        lab.flow(attached=True)
        lab.run("domain", "destroy", "vm")
        since = len(lab.text())
        if lab.run("domain", "start", "vm") is not None:
            lab.check("cold start", good=lab.heard(60, since), words="it says nothing")


# --- devices ---


def _devices(
    name: str, build: Callable[[Lab], Sequence[str]], *, modules: Sequence[str] | None = None, more: str = ""
) -> None:
    def run(lab: Lab) -> list[object]:
        words = build(lab)
        guest = lab.tiny() if modules is None else lab.linux(modules, more=more)
        return [*lab.base(guest), *words, *lab.disks(lab.image("a.qcow2"))]

    simple(DEVICE, name, run)


def _folder(lab: Lab) -> list[str]:
    (lab.place / "share").mkdir()
    return ["-virtfs", f"local,path={lab.place}/share,mount_tag=host,security_model=none"]


_devices("dev-9p", _folder, modules=("9p", "9pnet_virtio"), more="lab.9p=1")
_devices("dev-9p-unmounted", _folder)


@cell(DEVICE)
def dev_virtiofs(lab: Lab) -> None:
    (lab.place / "share").mkdir()
    control = f"--socket-path={lab.place}/vfs.sock"
    lab.beside("/usr/lib/qemu/virtiofsd", control, "-o", f"source={lab.place}/share", "-o", "sandbox=chroot")
    guest = lab.linux(("virtiofs",), more="lab.virtiofs=1")
    _shared(
        lab,
        guest,
        ["-chardev", f"socket,id=vfs,path={lab.place}/vfs.sock"],
        "vhost-user-fs-pci,chardev=vfs,tag=host",
    )


def _shared(lab: Lab, guest: Sequence[str], words: Sequence[str], device: str) -> None:
    memory = "memory-backend-memfd,id=m0,size=192M,share=on"
    base = lab.base(guest, machine="q35,memory-backend=m0")
    lab.start([*base, "-object", memory, *words, "-device", device, *lab.disks(lab.image("a.qcow2"))])
    lab.flow()


@cell(DEVICE)
def dev_vhost_user_blk(lab: Lab) -> None:
    image = lab.image("vu.raw", "raw")
    address = f"addr.type=unix,addr.path={lab.place}/vu.sock,writable=on"
    lab.beside(
        *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image}"),
        *("--export", f"type=vhost-user-blk,id=e,node-name=f,{address}"),
    )
    words = ["-chardev", f"socket,id=vu,path={lab.place}/vu.sock"]
    _shared(lab, lab.linux(disks=2), words, "vhost-user-blk-pci,chardev=vu")


def _words(text: str) -> Callable[[Lab], Sequence[str]]:
    return lambda lab: text.format(place=lab.place, id=lab.place.name).split()


_devices("dev-virtio-gpu", _words("-device virtio-gpu-pci -vnc none"))
_devices("dev-spice-unix", _words("-device VGA -spice unix=on,addr={place}/spice.sock,disable-ticketing=on"))
_devices(
    "dev-qxl-spice",
    _words(
        "-device qxl-vga -spice port=25930,disable-ticketing=on,addr=127.0.0.1 -device virtio-serial-pci "
        "-chardev spicevmc,id=vdagent,name=vdagent -device virtserialport,chardev=vdagent,name=com.redhat.spice.0"
    ),
)
_devices("dev-vnc-port", _words("-device VGA -vnc 127.0.0.1:61"))
_devices("dev-vnc-to", _words("-device VGA -vnc 127.0.0.1:61,to=99"))
_devices("dev-vnc-unix", _words("-device VGA -vnc unix:{place}/vnc.sock"))
_devices(
    "dev-misc",
    _words(
        "-device qemu-xhci -device usb-tablet -device usb-kbd -device virtio-rng-pci -device i6300esb "
        "-audiodev none,id=a0 -device pvpanic -device intel-hda -device hda-duplex,audiodev=a0 "
        "-device virtio-keyboard-pci -device pvpanic-pci "
        "-device edu"
    ),
)
_devices(
    "dev-agent",
    _words(
        "-device virtio-serial-pci -chardev socket,id=ga,path={place}/ga.sock,server=on,wait=off "
        "-device virtserialport,chardev=ga,name=org.qemu.guest_agent.0"
    ),
)
_devices("dev-monitor-unix", _words("-monitor unix:{place}/mon.sock,server,nowait"))
_devices("dev-qmp-two", _words("-qmp unix:{place}/q2.sock,server=on,wait=off"))
_devices("net-user", _words("-netdev user,id=n0 -device virtio-net-pci,netdev=n0"))
_devices("net-nic", _words("-nic user,model=e1000"))
_devices(
    "net-hostfwd", _words("-netdev user,id=n0,hostfwd=tcp:127.0.0.1:22222-:22 -device virtio-net-pci,netdev=n0")
)
_devices(
    "net-socket-listen", _words("-netdev socket,id=n0,listen=127.0.0.1:22333 -device virtio-net-pci,netdev=n0")
)
_devices(
    "net-stream-unix",
    _words(
        "-netdev stream,id=n0,server=on,addr.type=unix,addr.path={place}/net.sock -device virtio-net-pci,netdev=n0"
    ),
)
_devices("net-mcast", _words("-netdev socket,id=n0,mcast=230.0.0.1:22444 -device virtio-net-pci,netdev=n0"))


@cell(DEVICE)
def net_tap_named(lab: Lab) -> None:
    name = f"sp{lab.place.name[-8:]}"
    lab.sh("ip", "tuntap", "add", name, "mode", "tap")
    lab.cleanup.append(lambda: lab.sh("ip", "link", "del", name))
    network = f"tap,id=n0,ifname={name},script=no,downscript=no"
    words = ["-netdev", network, "-device", "virtio-net-pci,netdev=n0", *lab.disks(lab.image("a.qcow2"))]
    lab.start([*lab.base(), *words])
    lab.flow()


@cell(DEVICE)
def net_tap_anon(lab: Lab) -> None:
    for name in ("up", "down"):
        script = lab.place / name
        script.write_text(f"#!/bin/sh\necho {name} $1 >> {lab.place}/interfaces\n")
        script.chmod(0o755)
    network = f"tap,id=n0,script={lab.place}/up,downscript={lab.place}/down"
    words = ["-netdev", network, "-device", "virtio-net-pci,netdev=n0", *lab.disks(lab.image("a.qcow2"))]
    lab.start([*lab.base(), *words])
    lab.flow()
    lab.notes.append("scripts: " + (lab.place / "interfaces").read_text().replace("\n", "; "))


_devices("ser-pty", _words("-serial pty"))
_devices("ser-telnet", _words("-serial telnet:127.0.0.1:24444,server,nowait"))
_devices("ser-unix", _words("-serial unix:{place}/ser.sock,server,nowait"))
_devices("ser-stdio", _words("-serial stdio"))
_devices("ser-mon-stdio", _words("-monitor stdio"))
_devices("ser-udp", _words("-serial udp:127.0.0.1:24555@127.0.0.1:24556"))


# --- logs ---


def _log(name: str, file: str, text: str) -> None:
    """A file that the machine writes: it is appended to, never cut."""

    def run(lab: Lab) -> None:
        lab.start([*lab.base(), *_words(text)(lab), *lab.disks(lab.image("a.qcow2"))])
        path = lab.place / file
        before = path.read_bytes()[:200] if path.exists() else b""
        if not before:
            path.write_bytes(before := b"before\n")
        lab.flow(verify=False)
        after = path.read_bytes() if path.exists() else b""
        lab.check(f"{file} kept", good=after.startswith(before), words=f"{len(before)} bytes, then {len(after)}")

    CELLS[name] = Cell(name, LOG, run)


_log("log-serial2", "s2.log", "-serial file:{place}/s2.log")
_log(
    "log-chardev-logfile",
    "x.log",
    "-chardev null,id=c1,logfile={place}/x.log -device virtio-serial-pci -device virtconsole,chardev=c1",
)
_log("log-debugcon", "dbg.log", "-debugcon file:{place}/dbg.log -global isa-debugcon.iobase=0x402")
_log("log-d", "q.log", "-D {place}/q.log -d guest_errors")
_log("log-chardev-json", "j.log", "-chardev file,path={place}/j.log,id=c1 -device isa-serial,chardev=c1,index=1")
_log(
    "log-filter-dump",
    "n.pcap",
    "-netdev user,id=n0 -device virtio-net-pci,netdev=n0 -object filter-dump,id=f0,netdev=n0,file={place}/n.pcap",
)
