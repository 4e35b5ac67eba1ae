"""QEMUs of this host that could be attached to, by what /proc says of them; nothing is connected to.

A QMP monitor has one client: whoever tries one may throw another program's command out. And no more than names and
sockets is told of a command line, in which there may be secrets.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from snaporch.drivers.local.process import command_line, process_of
from snaporch.drivers.qemu.hostside import unix_server
from snaporch.drivers.qemu.options import Keys, Option, parse
from snaporch.drivers.qemu.surroundings import foreign
from snaporch.errors import Unsupported
from snaporch.model.domain import Discovered

_PROGRAM = re.compile(r"qemu-system-\w+|qemu-kvm|kvm|qemu")
_LIBVIRT = re.compile(r"/libvirt/qemu/|machine-qemu")
_QMP = {"qmp", "qmp-pretty"}


def discover(known: Mapping[int, str]) -> tuple[Discovered, ...]:
    """Return the QEMUs of this host, by process id.

    Args:
        known: process ids of domains of this root, with the domains' names.
    """
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return tuple(found for pid in pids if (found := _look(pid, known.get(pid, ""))) is not None)


def _look(pid: int, domain: str) -> Discovered | None:
    try:
        argv, user = command_line(pid), os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None  # it is gone
    if not argv or not _PROGRAM.fullmatch(os.path.basename(argv[0])) or process_of(pid) is None:
        return None
    cwd = ""
    with suppress(OSError):
        cwd = os.readlink(f"/proc/{pid}/cwd")
    try:
        options = list(parse(argv))
    except Unsupported:  # what is not known may be a secret: it is not repeated
        why = "its command line has an option that is not known here"
        return Discovered("qemu", "", pid=pid, user=_user(user), domain=domain, blocker=why)
    name = next((Keys.parse(each.value or "", "guest").get("guest") for each in options if each.name == "name"), "")
    sockets = tuple(socket for socket in _sockets(options, cwd) if os.path.isabs(socket))
    why = "" if domain else _blocker(pid, options, sockets)
    return Discovered("qemu", name, pid=pid, user=_user(user), domain=domain, sockets=sockets, blocker=why)


def _sockets(options: list[Option], cwd: str) -> Iterator[str]:
    """Yield the unix sockets of QMP monitors."""
    monitors = [Keys.parse(each.value or "", "chardev") for each in options if each.name == "mon"]
    devices = {monitor.get("chardev") for monitor in monitors if monitor.get("mode") == "control"}
    devices |= {(each.value or "").removeprefix("chardev:") for each in options if each.name in _QMP}
    for option in options:
        of_a_monitor = option.name == "chardev" and Keys.parse(option.value or "", "backend").get("id") in devices
        if (option.name in _QMP or of_a_monitor) and (socket := unix_server(option, cwd)):
            yield socket


def _blocker(pid: int, options: list[Option], sockets: tuple[str, ...]) -> str:
    """Return what stands in the way of attaching to a QEMU, or an empty string."""
    if any(_LIBVIRT.search(option.value or "") for option in options) or _LIBVIRT.search(_groups(pid)):
        return "libvirt manages it: attach to it with --driver libvirt"
    if any(option.name == "mon" and "chardev=snaporch" in (option.value or "") for option in options):
        return "a snaporch has started it, with another root"
    if why := foreign(pid):
        return why
    return "" if sockets else "it has no QMP socket: start it with -qmp unix:SOCKET,server=on,wait=off"


def _groups(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cgroup").read_text()
    return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
