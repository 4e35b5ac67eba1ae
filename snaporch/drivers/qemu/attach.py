"""The command line of a QEMU that something else started, read and followed; no I/O but a look at paths.

To revert such a domain a second QEMU is launched as the first was, with these changes and no others:

- each disk is on the image that it is to have (`snaporch.drivers.qemu.blocks`);
- logs are appended to, and what one process alone can have is the new one's own (`snaporch.drivers.qemu.hostside`);
- the QMP socket that snaporch uses becomes a new one, which takes the old one's place once the old QEMU is gone;
- what says how the *first* one began goes (-S, -incoming, -loadvm), as does -daemonize and -pidfile.

A command line with anything that is not understood is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

from snaporch.drivers.qemu import hostside, isolation
from snaporch.drivers.qemu.blocks import Blocks
from snaporch.drivers.qemu.command import AGENT_PORT, control_arguments
from snaporch.drivers.qemu.options import Keys, Option, Tree, parse
from snaporch.errors import Unsupported
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DeviceDisk

if TYPE_CHECKING:  # its package brings the event loop
    from snaporch.drivers.qmp.process import QemuProcess


@attrs.frozen
class Relaunch:
    """How the next process is started.

    Attributes:
        argv: its command line.
        renames: files that it makes under another name, and the names that they take with its place.
        private_network: it is to be started in a network namespace of its own.
        environment: variables that are set for the new process.
    """

    argv: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    private_network: bool = False
    environment: dict[str, str] = attrs.field(factory=dict)


def relaunch(
    process: QemuProcess,
    launched: Iterable[DeviceDisk],
    disks: Iterable[DeviceDisk],
    *,
    fds: Sequence[int],
    pidfile: str,
    incoming: bool,
    isolated: bool = False,
    suffix: str = ".run-00000000000",
    mark: Sequence[str] = (),
) -> Relaunch:
    """Return how a QEMU like `process` is started, its disks on `disks`, CPUs stopped.

    Args:
        process: what is followed.
        launched: the disks as its command line has them.
        disks: the disks as the new one is to have them, by target; others are to have no medium.
        fds: listening sockets for the new one's monitors.
        pidfile: where the new one writes its process id; empty: it cannot.
        incoming: memory will be loaded into it.
        isolated: it is a throw-away copy.
        suffix: of the names of files that the new one has in place of the old one's.
        mark: further arguments, of a process that runs as another user: it listens at the QMP socket itself, too,
            and snaporch uses another one, which that user does not get at.

    Raises:
        Unsupported: the command line cannot be followed.
    """
    options = list(parse(process.argv))
    if why := hostside.refusal(options):
        raise Unsupported(why)
    if mark:
        options = [kept for option in options if (kept := hostside.as_it_is(option)) is not None]
    blocks = Blocks(options, process.cwd)
    blocks.put_on(launched, disks)
    moved = [option for group in blocks.rewritten() for option in group]
    followed = hostside.follow(moved, process.cwd, process.socket, suffix, listens=bool(mark) and not isolated)
    chosen, renames = list(followed.options), followed.renames
    if isolated:
        chosen, renames = [*isolation.isolate(chosen), Option("display", "none")], ()
    words = [process.argv[0], *(word for option in chosen for word in option.words())]
    words += ["-S", *control_arguments(fds, pidfile), *mark, *(["-incoming", "defer"] if incoming else [])]
    return Relaunch(tuple(words), renames, isolated and isolation.wants_network(chosen))


def isolated_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return QEMU arguments with network, character devices, monitors and displays cut off, the devices kept."""
    return tuple(word for option in isolation.isolate(parse(("", *arguments))) for word in option.words())


def isolated_definition(definition: DomainDefinition) -> DomainDefinition:
    """Return a definition for a throw-away copy; the guest sees the same devices."""
    return attrs.evolve(
        definition,
        serial="/dev/null" if definition.serial else "",
        extra_args=isolated_arguments(definition.extra_args),
    )


def pidfile(process: QemuProcess) -> str:
    """Return the file that a process was told to write its id to, or an empty string."""
    named = [option.value for option in parse(process.argv) if option.name == "pidfile" and option.value]
    return os.path.normpath(os.path.join(process.cwd, named[-1])) if named else ""


def agent_socket(process: QemuProcess) -> str:
    """Return the unix socket of a process's channel to the guest agent, or an empty string."""
    try:
        options = list(parse(process.argv))
    except Unsupported:
        return ""
    ports = [Tree.parse(option.value or "", "driver") for option in options if option.name == "device"]
    channels = {port.get("chardev") for port in ports if port.get("name") == AGENT_PORT}
    for option in options:
        if option.name == "chardev" and Keys.parse(option.value or "", "backend").get("id") in channels:
            return hostside.unix_server(option, process.cwd) or ""
    return ""


def held(process: QemuProcess) -> list[hostside.Held]:
    """Return what `process` has of the host that no other process can have beside it.

    Raises:
        Unsupported: its command line is not understood.
    """
    return hostside.holds(parse(process.argv), process.cwd, process.socket)


def held_by_definition(definition: DomainDefinition) -> list[hostside.Held]:
    """Return what a QEMU of a definition has of the host that no other process can have beside it.

    A named pipe is none of that: two can have it open, and who writes to it waits until the revert is over.

    Raises:
        Unsupported: its words are not understood.
    """
    options = list(parse(("", *definition.extra_args)))
    taken = [option for option in options if not hostside.is_pipe(option)]
    return [*hostside.holds(taken, "/", ""), *hostside.shared_memory(options)]


def written(words: Sequence[str]) -> dict[str, str]:
    """Return the files that a guest may write to by the drives of a command line, each with the drive's option."""
    try:
        drives = Blocks(list(parse(("", *words))), "/").drives
    except Unsupported:  # what is not understood is seen when the machine is there
        return {}
    return {drive.path: drive.text for drive in drives if drive.writes and drive.path and not drive.problem}


def no_way_back(
    process: QemuProcess, disks: Sequence[DeviceDisk], devices: Iterable[str], *, of_another: bool = False
) -> str:
    """Return why no QEMU like `process` can be started that could go back to a point of it, or an empty string.

    Args:
        process: it.
        disks: its disks; what is written to would be on other images.
        devices: what it has now (`MachineShape.devices`); empty: not known.
        of_another: it runs as another user.
    """
    moved = [
        disk if disk.readonly else attrs.evolve(disk, path=f"{disk.path}.new", format="qcow2") for disk in disks
    ]
    try:
        relaunch(process, disks, moved, fds=(), pidfile="", incoming=True, mark=("-S",) if of_another else ())
        options = list(parse(process.argv))
        taken = held(process)
    except Unsupported as error:
        return str(error)
    if lost := [each for each in taken if not each.again]:
        return f"no other process can have {lost[0]}"
    return _plugged(options, set(devices))


def changed_since(argv: Sequence[str], devices: Iterable[str]) -> str:
    """Return which device of a QEMU that snaporch has started has come or gone since, or an empty string."""
    try:
        return _plugged(parse(argv), set(devices))
    except Unsupported:  # words of the user's own, which start a QEMU again as they did this one
        return ""


def _plugged(options: Iterable[Option], devices: set[str]) -> str:
    """Return which device with a name has come or gone since the process was started."""
    trees = [Tree.parse(option.value or "", "driver") for option in options if option.name == "device"]
    asked = {tree.get("id") for tree in trees} - {""}
    there = {name for device in devices if not (name := device.partition(": ")[0]).startswith("device[")}
    if more := there - asked - {"debugcon"}:
        return f"device {min(more)} was plugged in since QEMU was started, and is not on its command line"
    if devices and (gone := asked - there):
        return f"device {min(gone)} was unplugged since QEMU was started, and is on its command line"
    return ""
