"""A look at a QEMU that something else started: how it is attached to."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import attrs
import trio

from snaporch.drivers.local import filework, process
from snaporch.drivers.local.as_user import User, as_user
from snaporch.drivers.qemu import surroundings
from snaporch.drivers.qemu.options import expand, parse
from snaporch.drivers.qmp import open_qmp
from snaporch.drivers.qmp.blocks import image_file
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.drivers.qmp.run_states import GONE, RUN_STATES
from snaporch.errors import OperationFailed, Refused
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DeviceDisk


async def look(name: str, path: str, seconds: float) -> tuple[DomainDefinition, QemuProcess]:
    """Return how a domain that is attached to is defined, and its process.

    Args:
        name: the domain's.
        path: its QMP socket.
        seconds: for the connection, and for each command.

    Raises:
        Refused: the process cannot be managed, and why.
    """
    async with open_qmp(path, label=name, timeout=seconds) as qmp:
        pid = qmp.peer_pid
        found = process.process_of(pid) if pid else None
        if pid is None or found is None:
            raise Refused(f"{name}: the process at the other end of {path} cannot be seen")
        seen = surroundings.look(pid)
        argv, cwd = process.command_line(pid), os.readlink(f"/proc/{pid}/cwd")
        if why := surroundings.foreign(pid):
            raise Refused(f"{name}: QEMU (process {pid}) cannot be managed: {why}")
        if qmp.peer_uid not in {0, os.geteuid(), seen.uid}:
            # It listened as one user, and has become another since: as by a program that gives its caller rights.
            raise Refused(f"{name}: {path} was opened by another user than process {pid} runs as")
        if surroundings.look(pid).whose != seen.whose:  # what was seen of it is of two programs
            raise Refused(f"{name}: process {pid} has become another program, or another user's, meanwhile")
        known = attrs.asdict(seen)
        read = await _reader(name, surroundings.user_of(known))
        if "qemu" not in os.path.basename(argv[0]):
            # The kernel names whoever made the socket: a manager may have handed it to its QEMU.
            raise Refused(
                f"{name}: {path} was opened by {argv[0]}, which is no QEMU: attach to a socket of its own"
            )
        if "-daemonize" in argv:
            blocks = [block["inserted"] for block in await qmp.execute("query-block") if "inserted" in block]
            files = [image_file(block["image"]) for block in blocks]
            if relative := [file for file in files if not os.path.isabs(file)]:
                before = process.directory_before(pid, relative)
                if before is None:
                    raise Refused(f"{name}: cannot see where {relative[0]} is: start it with absolute paths")
                cwd = before
        made = QemuProcess(
            found,
            path,
            attached=True,
            argv=await trio.to_thread.run_sync(_expanded, argv, cwd, read),
            cwd=cwd,
            surroundings=known,
        )
        async with QemuMachine(qmp, made).opened() as machine:
            if await machine.condition() == GONE:
                raise Refused(f"{name}: {RUN_STATES[GONE].words}")
            disks = tuple(
                DeviceDisk(disk.target, disk.active, disk.format, disk.readonly) for disk in await machine.disks()
            )
            memory = machine.capabilities.ram
    return DomainDefinition(name=name, memory=memory, disks=disks, emulator=argv[0]), made


async def _reader(name: str, user: User | None) -> Callable[[str], str]:
    """Return what reads a file that a command line names, as whoever has started it.

    Raises:
        Refused: nothing can be done as that user.
    """
    if user is None:
        return filework.read_text
    try:
        await trio.to_thread.run_sync(as_user(user).call, filework.exists, "/")
    except OperationFailed as error:
        raise Refused(f"{name}: nothing can be done as {user.name}, as whom its QEMU runs: {error}") from None
    return partial(as_user(user).call, filework.read_text)


def _expanded(argv: tuple[str, ...], cwd: str, read: Callable[[str], str]) -> tuple[str, ...]:
    """Return a command line with what the files for -readconfig say in place of that."""
    try:
        options = list(expand(parse(argv), lambda name: read(os.path.join(cwd, name))))
    except (OSError, UnicodeDecodeError, OperationFailed) as error:
        raise Refused(f"a file that QEMU was started with cannot be read: {error}") from None
    return (argv[0], *(word for option in options for word in option.words()))
