"""How a QEMU process is started: sockets that it inherits, and the surroundings of the one that it is like."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs

from snaporch.drivers.base import Launch
from snaporch.drivers.local.as_user import User
from snaporch.drivers.local.sockets import address
from snaporch.drivers.qemu import attach, clones, launcher, surroundings
from snaporch.drivers.qemu.command import mark
from snaporch.drivers.qemu.surroundings import untrusted
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.errors import OtherMachine, Unsupported
from snaporch.model.domain import Handle

PID = "qemu.pid"


def user_of(template: Handle | None) -> User | None:
    """Return as whom the QEMU runs that a handle is of; None where there is none, or that is our user."""
    return surroundings.user_of(QemuProcess.of(template).surroundings) if template is not None else None


@contextmanager
def listening(directory: Path, *names: str) -> Iterator[list[int]]:
    """Yield listening sockets for QEMU to inherit: there before QEMU is, and their paths may be of any length."""
    with ExitStack() as stack:
        listeners = []
        for name in names:
            path = directory / name
            path.unlink(missing_ok=True)
            listeners.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            with address(str(path)) as where:
                listeners[-1].bind(where)
            path.chmod(0o600)
            listeners[-1].listen(8)
        yield [listener.fileno() for listener in listeners]


@contextmanager
def free_ports() -> Iterator[clones.FreePort]:
    """Yield what finds ports that nobody listens at, each another one."""
    with ExitStack() as held:

        def free_port(protocol: str, host: str) -> int:
            kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            found = held.enter_context(socket.socket(family, kind))
            try:
                found.bind((host.strip("[]"), 0))
            except OSError as error:
                raise Unsupported(f"no port can be had at {host}: {error.strerror}") from None
            return int(found.getsockname()[1])

        yield free_port


def spawn(command: attach.Relaunch, fds: list[int], log: Path) -> int:
    """Start a process in a session of its own, its words appended to `log`; return its id."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        command.argv[0],
        command.argv,
        os.environ | command.environment,
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds),  # onto itself: inherited, under its own number
        ],
    )


def check_user(launch: Launch, runs_as: User | None) -> None:
    """Refuse to start a process as another user than the domain's processes run as; None: as ours.

    Raises:
        OtherMachine: so it is.
    """
    if (user := user_of(launch.template)) != runs_as:
        as_whom = [each.name if each else User.ours().name for each in (user, runs_as)]
        raise OtherMachine(
            f"{launch.definition.name}: the snapshot's QEMU ran as {as_whom[0]}, and the domain's runs as "
            f"{as_whom[1]}, who does not own the same files"
        )


def like(template: QemuProcess, launch: Launch, fds: Sequence[int]) -> attach.Relaunch:
    """Return how a process like an attached one is started, in the surroundings that that one had.

    Args:
        template: that one.
        launch: what is launched.
        fds: sockets that it is given for its monitors.

    Raises:
        OtherMachine: none can be started.
    """
    user = user_of(launch.template)
    try:
        made = attach.relaunch(
            template,
            launch.definition.disks,
            launch.disks,
            fds=fds,
            pidfile=str(launch.directory / PID) if user is None else "",
            incoming=launch.incoming,
            isolated=launch.isolated,
            suffix=f".{launch.directory.name}",
            mark=mark(str(launch.directory)) if user is not None else (),
        )
    except Unsupported as error:
        raise OtherMachine(str(error)) from None
    wanted: dict[str, Any] = {"cwd": template.cwd}
    program = made.argv[0]
    if template.surroundings:
        wanted |= template.surroundings | {"cwd": template.cwd}
        program = template.surroundings["program"]
    else:  # attached to by an earlier version
        program = shutil.which(program) or program
    if not os.access(program, os.X_OK):
        raise OtherMachine(f"QEMU's program {program} is not there any more")
    if user is None and (why := untrusted(program)):  # else it is run as that user, who may run anything
        raise OtherMachine(why)
    wanted |= {"program": program, "private_network": made.private_network, "fds": fds}
    return attrs.evolve(
        made,
        argv=(sys.executable, "-I", "-S", launcher.__file__, *made.argv),
        environment={"SNAPORCH_SURROUNDINGS": json.dumps(wanted)},
    )
