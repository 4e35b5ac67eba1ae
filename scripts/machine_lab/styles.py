"""Command lines as managers and people write them, and disks on other controllers."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Sequence

from machine_lab.cells import blockdev, cell, device, simple
from machine_lab.lab import Lab

STYLE = "Command lines"
CONTROLLER = "Machines and controllers"


# --- libvirt ---


def libvirt_words(
    lab: Lab, disks: Sequence[str], *, monitor: Sequence[str] = (), extra: Sequence[str] = ()
) -> list[str]:
    """A command line as libvirt writes it."""
    memory = json.dumps({"qom-type": "memory-backend-ram", "id": "pc.ram", "size": 201326592})
    rng = json.dumps({"qom-type": "rng-random", "id": "objrng0", "filename": "/dev/urandom"})
    sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ours = ["-chardev", f"socket,id=charmonitor,path={lab.qmp},server=on,wait=off"]
    return [
        *("-name", "guest=vm,debug-threads=on", "-S"),
        *(
            "-machine",
            "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram",
            "-accel",
            "tcg",
            "-cpu",
            "max",
        ),
        *("-m", "size=196608k", "-object", memory, "-overcommit", "mem-lock=off"),
        *("-smp", "2,sockets=2,cores=1,threads=1", "-uuid", "c7a5fdbd-edaf-9455-926a-d65c16db1809"),
        *("-no-user-config", "-nodefaults", "-display", "none", *(monitor or ours)),
        *("-mon", "chardev=charmonitor,id=monitor,mode=control", "-rtc", "base=utc,driftfix=slew"),
        *("-no-shutdown", "-boot", "strict=on", *lab.tiny()),
        *device("pcie-root-port", port=8, chassis=1, id="pci.1", bus="pcie.0", multifunction=True, addr="0x2"),
        *device("pcie-root-port", port=9, chassis=2, id="pci.2", bus="pcie.0", addr="0x2.0x1"),
        *device("qemu-xhci", p2=15, p3=15, id="usb", bus="pci.1", addr="0x0"),
        *device("virtio-serial-pci", id="virtio-serial0", bus="pci.2", addr="0x0"),
        *disks,
        *extra,
        *("-chardev", f"file,id=charserial0,path={lab.log},append=on"),
        *device("isa-serial", chardev="charserial0", id="serial0", index=0),
        *("-audiodev", json.dumps({"id": "audio1", "driver": "none"})),
        *("-global", "ICH9-LPC.noreboot=off", "-watchdog-action", "reset"),
        *device("virtio-balloon-pci", id="balloon0", bus="pcie.0", addr="0x4"),
        *("-object", rng),
        *device("virtio-rng-pci", rng="objrng0", id="rng0", bus="pcie.0", addr="0x5"),
        *("-sandbox", sandbox, "-msg", "timestamp=on"),
    ]


def storage(number: int, path: str, **more: object) -> list[str]:
    """The node of a file."""
    node = f"libvirt-{number}-storage"
    return blockdev(driver="file", filename=path, node_name=node, auto_read_only=True, discard="unmap", **more)


def layer(number: int, driver: str, **more: object) -> list[str]:
    """The node of a format."""
    file = f"libvirt-{number}-storage"
    words = {"read_only": False, "discard": "unmap"} | more
    return blockdev(node_name=f"libvirt-{number}-format", driver=driver, file=file, **words)


def disk(node: str) -> list[str]:
    """The device on it."""
    return device("virtio-blk-pci", bus="pcie.0", addr="0x7", drive=node, id="virtio-disk0", bootindex=1)


def libvirt_flow(lab: Lab, words: Sequence[object], fds: Sequence[int] = ()) -> None:
    """Start it as libvirt does, its CPUs stopped at first."""
    lab.start(words, wait=False, fds=fds)
    lab.ask("cont")
    lab.up()
    lab.flow()


def plain(lab: Lab) -> list[str]:
    """One qcow2 disk."""
    return storage(1, lab.image("a.qcow2")) + layer(1, "qcow2") + disk("libvirt-1-format")


@cell(STYLE)
def s_libvirt_null(lab: Lab) -> None:
    disks = storage(1, lab.image("a.qcow2")) + layer(1, "qcow2", backing=None) + disk("libvirt-1-format")
    libvirt_flow(lab, libvirt_words(lab, disks))


@cell(STYLE)
def s_libvirt_chain(lab: Lab) -> None:
    base = lab.image("base.qcow2")
    disks = storage(2, base, read_only=True) + layer(2, "qcow2", read_only=True, backing=None)
    disks += storage(1, lab.image("top.qcow2", base="base.qcow2"))
    disks += layer(1, "qcow2", backing="libvirt-2-format") + disk("libvirt-1-format")
    libvirt_flow(lab, libvirt_words(lab, disks))


@cell(STYLE)
def s_libvirt_raw(lab: Lab) -> None:
    disks = storage(1, lab.image("a.raw", "raw")) + layer(1, "raw") + disk("libvirt-1-format")
    libvirt_flow(lab, libvirt_words(lab, disks))


@cell(STYLE)
def s_libvirt_raw_storage(lab: Lab) -> None:
    disks = storage(1, lab.image("a.raw", "raw")) + disk("libvirt-1-storage")
    libvirt_flow(lab, libvirt_words(lab, disks))


@cell(STYLE)
def s_libvirt_agent(lab: Lab) -> None:
    channel = ["-chardev", f"socket,id=charchannel0,path={lab.place}/ga.sock,server=on,wait=off"]
    port = {"bus": "virtio-serial0.0", "nr": 1, "chardev": "charchannel0", "name": "org.qemu.guest_agent.0"}
    channel += device("virtserialport", id="channel0", **port)
    libvirt_flow(lab, libvirt_words(lab, plain(lab), extra=channel))


def _listening(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(path)
    made.listen(1)
    return made


@cell(STYLE)
def s_libvirt_fdmon(lab: Lab) -> None:
    with _listening(str(lab.qmp)) as listening:
        number = listening.fileno()
        monitor = ["-chardev", f"socket,id=charmonitor,fd={number},server=on,wait=off"]
        libvirt_flow(lab, libvirt_words(lab, plain(lab), monitor=monitor), fds=(number,))


@cell(STYLE)
def s_libvirt_fdmon_plus_qmp(lab: Lab) -> None:
    with _listening(f"{lab.place}/mon.sock") as listening:
        number = listening.fileno()
        monitor = ["-chardev", f"socket,id=charmonitor,fd={number},server=on,wait=off"]
        more = ["-qmp", f"unix:{lab.qmp},server=on,wait=off"]
        libvirt_flow(lab, libvirt_words(lab, plain(lab), monitor=monitor) + more, fds=(number,))


@cell(STYLE)
def s_libvirt_jsonfd_nic(lab: Lab) -> None:
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"sptap%d" % (os.getpid() % 10**6), 0x1002 | 0x4000))
    network = ["-netdev", json.dumps({"type": "tap", "fd": str(tap), "id": "hostnet0"})]
    network += device("virtio-net-pci", netdev="hostnet0", id="net0", bus="pcie.0", addr="0x6")
    libvirt_flow(lab, libvirt_words(lab, plain(lab), extra=network), fds=(tap,))
    os.close(tap)


# --- Proxmox, quickemu, Packer, Incus ---


@cell(STYLE)
def s_pve(lab: Lab) -> None:
    place, image = lab.place, lab.image("vm-100-disk-0.qcow2")
    events = _listening(f"{place}/ev.sock")
    lab.cleanup.append(events.close)
    again = "reconnect=5" if lab.qemu.version == "7.2" else "reconnect-ms=5000"
    throttle = "throttling.bps-total=104857600,throttling.iops-total=1000"
    throttle += ",cache=none,aio=io_uring,detect-zeroes=on,discard=on"
    lab.start(
        [
            *("-name", "pve,debug-threads=on", "-no-shutdown"),
            *("-chardev", f"socket,id=qmp,path={lab.qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"socket,id=qmp-event,path={place}/ev.sock,{again}"),
            *("-mon", "chardev=qmp-event,mode=control", "-pidfile", f"{place}/100.pid", "-daemonize"),
            *(
                "-smbios",
                "type=1,uuid=c7a5fdbd-edaf-9455-926a-d65c16db1809",
                "-smp",
                "2,sockets=1,cores=2,maxcpus=2",
            ),
            *(
                "-nodefaults",
                "-vnc",
                f"unix:{place}/100.vnc,password=on",
                "-cpu",
                "max",
                "-accel",
                "tcg",
                "-m",
                "192",
            ),
            *(*lab.tiny(), "-serial", f"file:{lab.log}"),
            *("-device", "pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e"),
            *("-device", "piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2"),
            *("-device", "usb-tablet,id=tablet,bus=uhci.0,port=1", "-device", "VGA,id=vga,bus=pci.0,addr=0x2"),
            *("-device", "virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3"),
            *("-drive", "if=none,id=drive-ide2,media=cdrom,aio=io_uring"),
            *("-device", "ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2"),
            *("-device", "virtio-scsi-pci,id=scsihw0,bus=pci.0,addr=0x5", "-drive"),
            f"file={image},if=none,id=drive-scsi0,format=qcow2,{throttle}",
            *("-device", "virtio-blk-pci,drive=drive-scsi0,id=virtio0,bus=pci.0,addr=0xa"),
            *("-netdev", "type=user,id=net0,hostname=x"),
            *("-device", "virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0"),
            *("-machine", "type=pc,smm=off"),
        ]
    )

    def limits() -> object:
        blocks = lab.ask("query-block") or []
        return [
            (b["inserted"]["bps"], b["inserted"]["iops"], b["inserted"]["cache"]) for b in blocks if "inserted" in b
        ]

    before = limits()
    lab.flow()
    lab.check("throttle kept", good=limits() == before, words=str(limits()))
    written = (place / "100.pid").read_text().strip()
    lab.check("pidfile", good=written == str(lab.shown().get("pid")), words=f"the pidfile says {written}")


@cell(STYLE)
def s_pve9_throttle(lab: Lab) -> None:
    direct = {"direct": True, "no-flush": False}
    file = {
        "aio": "io_uring",
        "cache": direct,
        "driver": "file",
        "filename": lab.image("a.qcow2"),
        "node-name": "e0",
    }
    node = {"cache": direct, "driver": "qcow2", "file": file, "node-name": "f0"}
    lab.start(
        [
            *(*lab.base(), "-object", "throttle-group,id=throttle-drive-scsi0,x-bps-total=104857600"),
            *blockdev(driver="throttle", file=node, node_name="drive-scsi0", throttle_group="throttle-drive-scsi0"),
            *("-device", "virtio-blk-pci,drive=drive-scsi0,id=virtio0"),
        ]
    )
    lab.flow()


def quickemu(lab: Lab) -> list[object]:
    """As quickemu starts them."""
    place = lab.place
    return [
        *lab.base(machine="q35,smm=off,vmport=off"),
        *("-name", "q,process=q", "-pidfile", f"{place}/q.pid", "-rtc", "base=utc,clock=host"),
        *(
            "-device",
            "virtio-balloon",
            "-vga",
            "none",
            "-device",
            "virtio-vga",
            "-device",
            "qemu-xhci,id=spicepass",
        ),
        *("-device", "usb-ehci,id=input", "-device", "usb-kbd,bus=input.0", "-k", "en-us"),
        *("-device", "usb-tablet,bus=input.0", "-device", "virtio-net,netdev=nic"),
        *("-netdev", "user,hostname=q,hostfwd=tcp::22220-:22,id=nic"),
        *("-device", "virtio-rng-pci,rng=rng0", "-object", "rng-random,id=rng0,filename=/dev/urandom"),
        *("-device", "virtio-blk-pci,drive=SystemDisk"),
        *("-drive", f"id=SystemDisk,if=none,format=qcow2,file={lab.image('disk.qcow2')}"),
        *("-drive", f"media=cdrom,index=0,file={lab.image('x.iso', 'raw', '1M')}"),
        *("-monitor", f"unix:{place}/mon.sock,server,nowait"),
    ]


def packer(lab: Lab) -> list[object]:
    """As Packer starts them."""
    image = f"file={lab.image('p.qcow2')},if=virtio,cache=writeback,discard=ignore,format=qcow2"
    return [
        *("-machine", "type=pc,accel=tcg", "-name", "packer", "-netdev", "user,id=user.0,hostfwd=tcp::23213-:22"),
        *(
            "-device",
            "virtio-net,netdev=user.0",
            "-vnc",
            "127.0.0.1:47",
            "-boot",
            "once=d",
            "-m",
            "192M",
            "-smp",
            "1",
        ),
        *("-drive", image, "-cdrom", lab.image("x.iso", "raw", "1M"), *lab.tiny()),
        *("-serial", f"file:{lab.log}", "-qmp", f"unix:{lab.qmp},server,nowait"),
    ]


simple(STYLE, "s-quickemu", quickemu)
simple(STYLE, "s-packer", packer)


@cell(STYLE)
def s_readconfig(lab: Lab) -> None:
    text = f'[drive "d0"]\n  if = "none"\n  file = "{lab.image("a.qcow2")}"\n  format = "qcow2"\n'
    text += '[device "vda"]\n  driver = "virtio-blk-pci"\n  drive = "d0"\n'
    _configured(lab, text, ())


def _configured(lab: Lab, text: str, words: Sequence[str]) -> None:
    monitor = f'[chardev "mon"]\n  backend = "socket"\n  path = "{lab.qmp}"\n  server = "on"\n  wait = "off"\n'
    monitor += '[mon "m"]\n  chardev = "mon"\n  mode = "control"\n'
    (lab.place / "vm.cfg").write_text(text + monitor)
    lab.start([*lab.base(control=False), "-readconfig", f"{lab.place}/vm.cfg", *words])
    lab.flow()


@cell(STYLE)
def s_readconfig_net(lab: Lab) -> None:
    _configured(lab, "", lab.disks(lab.image("a.qcow2")))


# --- by hand ---

KEYS = "driver=qcow2,node-name=f0,{more},file.driver=file,file.filename={path}"


def _keyed(name: str, more: str) -> None:
    def build(lab: Lab) -> list[object]:
        words = KEYS.format(more=more, path=lab.image("a.qcow2"))
        return [*lab.base(), "-blockdev", words, "-device", "virtio-blk-pci,drive=f0"]

    simple(STYLE, name, build)


_keyed("s-blockdev-kv-enum", "detect-zeroes=on")
_keyed("s-blockdev-kv-int", "l2-cache-size=1048576")
_keyed("s-blockdev-kv-locking", "file.locking=off")
simple(
    STYLE,
    "s-hda",
    lambda lab: [
        *lab.base(lab.linux(("ata_piix", "sd_mod"), disks=2), machine="pc", nodefaults=False),
        *("-hda", lab.image("a.qcow2"), "-hdb", lab.image("b.qcow2")),
    ],
)
simple(
    STYLE,
    "s-hda-q35",
    lambda lab: [*lab.base(lab.linux(("ahci", "sd_mod")), nodefaults=False), "-hda", lab.image("a.qcow2")],
)
simple(
    STYLE,
    "s-bare",
    lambda lab: [
        *lab.base(lab.linux(("ata_piix", "sd_mod")), machine="pc", nodefaults=False),
        lab.image("a.qcow2"),
    ],
)


def _drive(name: str, words: str, *more: str, nodefaults: bool = True) -> None:
    def build(lab: Lab) -> list[object]:
        image = lab.image("a.qcow2")
        return [*lab.base(nodefaults=nodefaults), *more, "-drive", words.format(image=image, place=lab.place)]

    simple(STYLE, name, build)


_drive("s-drive-virtio", "if=virtio,file={image}", nodefaults=False)
_drive("s-drive-driver", "driver=qcow2,file={image},if=virtio")
_drive("s-file-prefix", "if=virtio,file=file:{image}")
_drive("s-snapshot", "if=virtio,file={image}", "-snapshot")
_drive("s-drive-snapshot", "if=virtio,file={image},snapshot=on")
_drive("s-drive-dotted", "if=virtio,driver=qcow2,file.driver=file,file.filename={image}")
_drive("s-gdb-flag", "if=virtio,file={image}", "-s")
_drive("s-gdb-daemon", "if=virtio,file={image}", "-gdb", "tcp::12345", "-daemonize")


def _medium(lab: Lab) -> str:
    return lab.image("x.iso", "raw", "1M")


simple(
    STYLE,
    "s-cdrom",
    lambda lab: [
        *(*lab.base(nodefaults=False), "-cdrom", _medium(lab)),
        *("-drive", f"if=virtio,file={lab.image('a.qcow2')}"),
    ],
)
simple(
    STYLE,
    "s-drive-cdrom",
    lambda lab: [
        *(*lab.base(nodefaults=False), "-drive", f"file={_medium(lab)},media=cdrom,index=2"),
        *("-drive", f"if=virtio,file={lab.image('a.qcow2')}"),
    ],
)
simple(
    STYLE,
    "s-device-json-drive",
    lambda lab: [
        *lab.base(),
        *blockdev(driver="qcow2", node_name="n0", file={"driver": "file", "filename": lab.image("a.qcow2")}),
        *device("virtio-blk-pci", drive="n0", id="vda"),
    ],
)
simple(
    STYLE,
    "s-blockdev-file-direct",
    lambda lab: [
        *(*lab.base(), "-blockdev", f"driver=file,node-name=n0,filename={lab.image('a.raw', 'raw')}"),
        *("-device", "virtio-blk-pci,drive=n0"),
    ],
)
simple(
    STYLE,
    "s-qmp-pretty",
    lambda lab: [
        *(*lab.base(control=False), "-qmp-pretty", f"unix:{lab.qmp},server=on,wait=off"),
        *lab.disks(lab.image("a.qcow2")),
    ],
)
simple(
    STYLE,
    "s-server-true",
    lambda lab: [
        *(*lab.base(), "-chardev", f"socket,id=c1,path={lab.place}/c1.sock,server=true,wait=false"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=c1", *lab.disks(lab.image("a.qcow2"))),
    ],
)


# --- machines and controllers ---


def two(lab: Lab, options: str = "") -> list[str]:
    """Two virtio disks."""
    return lab.disks(lab.image("a.qcow2"), lab.image("b.qcow2"), options=options)


simple(CONTROLLER, "m-q35-smp2", lambda lab: [*lab.base(smp="2"), *two(lab)], whole=True)
simple(CONTROLLER, "m-pc-smp4", lambda lab: [*lab.base(machine="pc", smp="4"), *two(lab)], whole=True)
simple(
    CONTROLLER,
    "m-q35-topo",
    lambda lab: [
        *lab.base(lab.linux(), smp="4,sockets=1,cores=2,threads=2,maxcpus=4"),
        *("-device", "pcie-root-port,id=rp1,slot=1", "-drive", f"if=none,id=d0,file={lab.image('a.qcow2')}"),
        *("-device", "virtio-blk-pci,drive=d0,bus=rp1"),
    ],
    whole=True,
)
simple(
    CONTROLLER,
    "d-blk-iothread",
    lambda lab: [
        *(*lab.base(), "-object", "iothread,id=io1"),
        *("-drive", f"if=none,id=d1,file={lab.image('a.qcow2')},cache=none,aio=native"),
        *("-device", "virtio-blk-pci,drive=d1,iothread=io1,num-queues=2"),
    ],
    whole=True,
)


def _on(
    name: str, modules: Sequence[str], controller: str, devices: Sequence[str], *, machine: str = "q35"
) -> None:
    """Disks on another controller: Linux has the drivers."""

    def build(lab: Lab) -> list[object]:
        words: list[object] = lab.base(lab.linux(modules, disks=len(devices)), machine=machine)
        for part in controller.split():
            words += ["-object" if part.startswith("iothread") else "-device", part]
        for number, each in enumerate(devices):
            image = lab.image(f"{number}.qcow2")
            words += ["-drive", f"if=none,id=d{number},file={image}", "-device", f"{each},drive=d{number}"]
        return words

    simple(CONTROLLER, name, build, whole=True)


_on("d-scsi", ("virtio_scsi", "sd_mod"), "virtio-scsi-pci,id=s0", ["scsi-hd,bus=s0.0"] * 2)
_on(
    "d-scsi-iothread",
    ("virtio_scsi", "sd_mod"),
    "iothread,id=io1 virtio-scsi-pci,id=s0,iothread=io1",
    ["scsi-hd,bus=s0.0"],
)
_on("d-two-scsi-ids", ("virtio_scsi", "sd_mod"), "virtio-scsi-pci,id=s0", ["scsi-hd,id=sdb", "scsi-hd,id=sda"])
_on("d-ahci", ("ahci", "sd_mod"), "", ["ide-hd,bus=ide.0", "ide-hd,bus=ide.1"])
_on("d-nvme", ("nvme",), "", ["nvme,serial=x"])
_on("d-usb", ("xhci_pci", "usb_storage", "sd_mod"), "qemu-xhci", ["usb-storage"])
_on("d-uas", ("xhci_pci", "uas", "sd_mod"), "qemu-xhci usb-uas,id=u", ["scsi-hd,bus=u.0"])
_on("d-mptsas", ("mptsas", "sd_mod"), "mptsas1068,id=u", ["scsi-hd,bus=u.0"])
simple(
    CONTROLLER,
    "d-ide-pc",
    lambda lab: [
        *lab.base(lab.linux(("ata_piix", "sd_mod"), disks=2), machine="pc"),
        *("-drive", f"file={lab.image('0.qcow2')},if=ide,index=0"),
        *("-drive", f"file={lab.image('1.qcow2')},if=ide,index=1,media=disk"),
    ],
    whole=True,
)
