"""A world whose guest libvirt manages, for one test."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import libvirt
import trio

from snaporch.drivers.libvirt.driver import LibvirtDriver
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DeviceDisk
from snaporch.orchestrator import open_orchestrator
from tests.libvirt.lab import Libvirt
from tests.live.world import MIB, NAME, RAM_MIB, Qemu, World, make_image

MEMORY = 128 * MIB
GUEST = """\
<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='b'>{memory}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='{machine}'>hvm</type><kernel>{kernel}</kernel><cmdline>{append}</cmdline></os>
<features><acpi/></features>
{cpu}
<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}
<serial type='file'><source path='{log}' append='on'/><target port='0'/></serial>
{extra}
</devices></domain>"""
DISK = """\
<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>
<target dev='{target}' bus='virtio'/>{address}</disk>"""
PLAIN = "<controller type='usb' model='none'/><memballoon model='none'/><video><model type='none'/></video>"
CPU = "<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>"
# What the guest's disks are on with q35: where they still are what they were before virtio 1.0, which it speaks.
ON_THE_BUS = "<address type='pci' domain='0x0000' bus='0x00' slot='0x{slot:02x}' function='0x0'/>"


@attrs.define
class LibvirtWorld(World):
    """See World.

    Attributes:
        daemon: the libvirtd.
        theirs: the domain's name there.
    """

    daemon: Libvirt
    theirs: str

    def virsh(self, *words: str) -> str:
        """Run virsh on the domain: its name goes behind the first word."""
        return self.daemon.virsh(words[0], self.theirs, *words[1:])

    def libvirt_disks(self, *options: str) -> dict[str, str]:
        """Return the images that libvirt has the disks on, by target."""
        rows = self.virsh("domblklist", *options).splitlines()
        return {row.split()[0]: row.split()[1] for row in rows if row.strip()}


@asynccontextmanager
async def open_libvirt_world(
    directory: Path,
    daemon: Libvirt,
    qemu: Qemu,
    kernel: Path,
    *,
    append: str = "",
    extra: str = PLAIN,
    cpu: str = CPU,
    machine: str = "pc",
    attach: bool = True,
    transient: bool = False,
    memory: int = MEMORY,
) -> AsyncIterator[LibvirtWorld]:
    """Make a world, its guest defined and started by libvirt and attached to; none of it is left afterwards."""
    directory.mkdir()
    theirs = f"web-{uuid.uuid4().hex[:8]}"
    disks = tuple(DeviceDisk(target, str(directory / f"{target}.qcow2")) for target in ("vda", "vdb"))
    for disk in disks:
        make_image(qemu, Path(disk.path))
    log = directory / "serial.log"
    log.touch()
    xml = GUEST.format(
        name=theirs,
        uuid=uuid.uuid4(),
        memory=memory,
        machine=machine,
        kernel=kernel,
        append=f"rate=100 dirty=20 ram={RAM_MIB} {append}",
        cpu=cpu,
        disks="".join(
            DISK.format(
                target=d.target,
                path=d.path,
                format=d.format,
                address="" if machine == "pc" else ON_THE_BUS.format(slot=16 + number),
            )
            for number, d in enumerate(disks)
        ),
        log=log,
        extra=extra,
    )
    connection = libvirt.open(daemon.uri)
    domain = connection.createXML(xml) if transient else connection.defineXML(xml)
    root = directory / "root"
    root.mkdir(mode=0o700)
    definition = DomainDefinition(NAME, memory=memory, disks=disks, driver="libvirt")
    storage = LocalStorage(qemu.img)
    drivers = {"libvirt": LibvirtDriver(storage=storage), "qemu": QemuDriver(storage=storage)}
    try:
        async with open_orchestrator(root, drivers=drivers) as orch:
            world = LibvirtWorld(directory, qemu, orch, definition, log, daemon, theirs)
            if not transient:
                await trio.to_thread.run_sync(domain.create)
            await world.wait_report(lambda r: r.seq >= 2, since=0)
            if attach:
                await orch.attach(NAME, driver="libvirt", uri=daemon.uri, of=theirs)
            yield world
    finally:
        connection.close()
        _end(daemon, theirs)
        shutil.rmtree(directory, ignore_errors=True)


def _end(daemon: Libvirt, name: str) -> None:
    """End a domain and forget it, over a new connection: libvirtd may be another one by now."""
    connection = libvirt.open(daemon.uri)
    try:
        with suppress(libvirt.libvirtError):
            connection.lookupByName(name).destroy()
        with suppress(libvirt.libvirtError):
            flags = libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            connection.lookupByName(name).undefineFlags(flags)
    finally:
        connection.close()
