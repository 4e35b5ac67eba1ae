"""From a domain definition to QEMU's command line; no I/O.

Every value goes to QEMU as JSON or as an argument of its own: a path may hold commas, spaces or quotes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import xxhash

from snaporch.model.domain import NVRAM, DomainDefinition
from snaporch.model.rfc import DeviceDisk


def blockdev(disk: DeviceDisk, node: str, *, device: bool = False) -> str:
    """Return the ``-blockdev`` argument that opens a disk's image, a file or a block device, under a node name."""
    options = {
        "driver": disk.format,
        "node-name": node,
        "read-only": disk.readonly,
        "discard": "unmap",
        "file": {
            "driver": "host_device" if device else "file",
            "filename": disk.path,
            "read-only": disk.readonly,
        },
    }
    return json.dumps(options)


def control_arguments(fds: Sequence[int], pidfile: str) -> list[str]:
    """Return the arguments for one QMP monitor on each of the listening sockets `fds`, and a file of QEMU's id.

    QEMU writes that file itself: a process is found by it even when its launch was cut short. One that cannot, as
    it runs as another user, has a mark on its command line instead (`mark`).
    """
    arguments = ["-pidfile", pidfile] if pidfile else []
    for number, fd in enumerate(fds):
        arguments += ["-chardev", f"socket,id=snaporch{number},fd={fd},server=on,wait=off"]
        arguments += ["-mon", f"chardev=snaporch{number},mode=control"]
    return arguments


def mark(directory: str) -> list[str]:
    """Return arguments that do nothing, and by which the process that was launched with a directory is known."""
    return ["-chardev", f"null,id=snaporch-{xxhash.xxh3_64_hexdigest(directory.encode())}"]


AGENT_PORT = "org.qemu.guest_agent.0"  # the name that the agent in the guest looks for


def _agent_arguments(fd: int) -> list[str]:
    """Return the arguments for a serial port of the guest's that is connected to the listening socket `fd`."""
    return [
        "-chardev",
        f"socket,id=snaporch-agent,fd={fd},server=on,wait=off",
        "-device",
        "virtio-serial-pci,id=snaporch-serial",
        "-device",
        f"virtserialport,bus=snaporch-serial.0,chardev=snaporch-agent,name={AGENT_PORT}",
    ]


def _tpm_arguments(fd: int) -> list[str]:
    """Return the arguments for a TPM whose swtpm is at the other end of the socket `fd`."""
    return [
        "-chardev",
        f"socket,id=snaporch-tpm-socket,fd={fd}",
        "-tpmdev",
        "emulator,id=snaporch-tpm-backend,chardev=snaporch-tpm-socket",
        "-device",
        "tpm-crb,id=snaporch-tpm,tpmdev=snaporch-tpm-backend",
    ]


def _escaped(text: str) -> str:
    """Escape a value of a comma-separated option."""
    return text.replace(",", ",,")


def _machine_arguments(type_: str, firmware: str) -> list[str]:
    """Return the arguments for a machine type, and for a firmware in place of QEMU's own."""
    machine, arguments = [type_] if type_ else [], []
    if firmware:
        code = {"driver": "file", "filename": firmware, "read-only": True}
        options = {"driver": "raw", "node-name": "snaporch-firmware", "read-only": True, "file": code}
        arguments = ["-blockdev", json.dumps(options)]
        machine += ["pflash0=snaporch-firmware", f"pflash1={NVRAM}-image"]
    return [*arguments, *(["-machine", ",".join(machine)] if machine else [])]


def command_line(
    definition: DomainDefinition,
    disks: Sequence[DeviceDisk],
    *,
    accel: str,
    fds: Sequence[int],
    pidfile: str,
    incoming: bool,
    agent: int | None = None,
    generation: str = "",
    firmware: str = "",
    tpm: int | None = None,
    devices: Collection[str] = (),
) -> list[str]:
    """Return the arguments after the emulator's name; the CPUs are stopped at first.

    The same definition gives the same devices at the same addresses, whichever images the disks are on: what a
    memory stream is loaded into must be the machine that it came from.
    """
    d = definition
    arguments = [
        "-name",
        f"guest={_escaped(d.name)}",
        "-nodefaults",
        "-display",
        "none",
        "-vga",
        "none",
        "-S",
    ]
    arguments += ["-accel", accel, "-m", f"{d.memory // 1024}k", "-smp", str(d.vcpus)]
    arguments += _machine_arguments(d.machine, firmware)
    for option in ("kernel", "initrd", "append"):
        if value := getattr(d, option):
            arguments += [f"-{option}", value]
    if d.serial:
        # append=on: a reverted guest goes on in the same file, and QEMU would truncate it.
        arguments += [
            "-chardev",
            f"file,id=serial0,path={_escaped(d.serial)},append=on",
            "-serial",
            "chardev:serial0",
        ]
    for disk in disks:
        arguments += ["-blockdev", blockdev(disk, f"{disk.target}-image", device=disk.path in devices)]
        if not firmware or disk.target != NVRAM:
            arguments += ["-device", f"virtio-blk-pci,id={disk.target},drive={disk.target}-image"]
    if generation:
        arguments += ["-device", f"vmgenid,id=snaporch-genid,guid={generation}"]
    if tpm is not None:
        arguments += _tpm_arguments(tpm)
    if agent is not None:
        arguments += _agent_arguments(agent)
    arguments += control_arguments(fds, pidfile)
    if incoming:
        arguments += ["-incoming", "defer"]
    return [*arguments, *d.extra_args]
