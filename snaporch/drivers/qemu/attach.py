"""The command line of a QEMU that something else started, read and followed; no I/O.

To revert such a domain, a second QEMU is launched as the first was, with these changes and no others:

- each disk on the image it is to have, whether it was given as -blockdev (JSON or key=value, the file as a node of
  its own or inside), as -drive, or as -hda;
- the QMP socket that snaporch uses becomes a new one, which takes the old one's place once the old QEMU is gone;
- what says how the *first* one began goes (-S, -incoming, -loadvm), as does -daemonize and -pidfile;
- files that QEMU would truncate (-serial file:, -chardev file) are appended to.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from snaporch.drivers.qemu.command import AGENT_PORT, control_arguments
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.errors import Unsupported
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DeviceDisk

# QEMU's options without a value; all others have one (qemu-options.def).
_FLAGS = frozenset(
    [
        "S",
        "daemonize",
        "enable-kvm",
        "nodefaults",
        "no-user-config",
        "nographic",
        "no-reboot",
        "no-shutdown",
        "no-acpi",
        "no-hpet",
        "snapshot",
        "usb",
        "full-screen",
        "mem-prealloc",
        "only-migratable",
        "preconfig",
        "no-fd-bootchk",
        "win2k-hack",
        "singlestep",
        "portrait",
        "curses",
        "enable-sync-profile",
        "semihosting",
        "old-param",
    ]
)
_DROPPED = frozenset({"S", "daemonize", "pidfile", "incoming", "loadvm"})
_SERVER = re.compile(r"(?:^|,)(?:server=on|server=yes|server)(?:,|$)")


@attrs.frozen
class Option:
    """One option of a command line; `value` is None for a flag."""

    name: str
    value: str | None = None

    def words(self) -> tuple[str, ...]:
        """Return it as it stands on a command line."""
        return (f"-{self.name}",) if self.value is None else (f"-{self.name}", self.value)


def parse(argv: Sequence[str]) -> Iterator[Option]:
    """Yield the options after the emulator's name; a bare word is QEMU's short form of ``-hda``."""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            yield Option("hda", word)
            continue
        name = word.lstrip("-")
        yield Option(name) if name in _FLAGS else Option(name, next(words, ""))


def split_keys(text: str, implied: str = "") -> dict[str, str]:
    """Return ``a=b,c=d`` as a mapping; ``,,`` is a comma in a value, a bare first word is the key `implied`."""
    keys: dict[str, str] = {}
    for number, item in enumerate(re.split(r"(?<!,),(?:(?=,,)|(?!,))", text.replace(",,", "\0"))):
        key, equals, value = item.replace("\0", ",").partition("=")
        if equals:
            keys[key] = value
        elif number == 0 and implied:
            keys[implied] = key
        else:
            keys[key] = "on"
    return keys


def join_keys(keys: Mapping[str, str]) -> str:
    """Undo `split_keys`."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in keys.items())


def _block_options(text: str) -> dict[str, Any]:
    """Return a -blockdev value as the nested object that QEMU makes of it."""
    if text.startswith("{"):
        found: dict[str, Any] = json.loads(text)
        return found
    nested: dict[str, Any] = {}
    for key, value in split_keys(text, "driver").items():
        *outer, last = key.split(".")
        place = nested
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = {"on": True, "off": False}.get(value, value)
    return nested


def _filename(options: Mapping[str, Any]) -> str | None:
    """Return the file that a -blockdev opens by itself (not through another node)."""
    inner = options.get("file")
    found = inner.get("filename") if isinstance(inner, dict) else options.get("filename")
    return str(found) if found is not None else None


class _Rewriter:
    """Follows one command line with its disks on other images."""

    def __init__(self, process: QemuProcess, launched: Iterable[DeviceDisk], disks: Iterable[DeviceDisk]) -> None:
        self._process = process
        new = {disk.target: disk for disk in disks}
        self._new = {os.path.realpath(disk.path): new[disk.target] for disk in launched if disk.target in new}
        self._file_nodes: dict[str, DeviceDisk] = {}  # protocol nodes whose file was replaced
        self._missing = set(self._new)

    def _replacement(self, path: str | None) -> DeviceDisk | None:
        if path is None:
            return None
        real = os.path.realpath(os.path.join(self._process.cwd, path))
        self._missing.discard(real)
        return self._new.get(real)

    def blockdev(self, text: str) -> str:
        """Rewrite one -blockdev; file nodes must come before the format nodes that use them, as for QEMU."""
        options = _block_options(text)
        disk = self._replacement(_filename(options))
        if disk is None:
            disk = self._file_nodes.get(str(options.get("file")))
            if disk is None:
                return text
            return json.dumps(options | {"driver": disk.format})
        if isinstance(options.get("file"), dict):
            return json.dumps(options | {"driver": disk.format, "file": options["file"] | {"filename": disk.path}})
        self._file_nodes[str(options.get("node-name"))] = disk
        return json.dumps(options | {"filename": disk.path})

    def drive(self, text: str) -> str:
        """Rewrite one -drive."""
        keys = split_keys(text, "file")
        disk = self._replacement(keys.get("file"))
        return text if disk is None else join_keys(keys | {"file": disk.path, "format": disk.format})

    def hda(self, letter: str, path: str) -> tuple[Option, ...]:
        """Rewrite -hda to -hdd."""
        disk = self._replacement(path)
        if disk is None:
            return (Option(f"hd{letter}", path),)
        keys = {"file": disk.path, "format": disk.format, "index": str("abcd".index(letter)), "media": "disk"}
        return (Option("drive", join_keys(keys)),)

    def option(self, option: Option) -> tuple[Option, ...]:  # noqa: PLR0911 - one a kind of option
        """Return what stands for an option in the new command line."""
        name, value = option.name, option.value or ""
        if name in _DROPPED or self._is_our_monitor(option):
            return ()
        match name:
            case "blockdev":
                return (Option(name, self.blockdev(value)),)
            case "drive":
                return (Option(name, self.drive(value)),)
            case "hda" | "hdb" | "hdc" | "hdd":
                return self.hda(name[-1], value)
            case "serial" | "parallel" if value.startswith("file:"):
                identity = f"snaporch-{name}-{abs(hash(value)) % 10**6}"
                path = value.removeprefix("file:").replace(",", ",,")
                return (
                    Option("chardev", f"file,id={identity},path={path},append=on"),
                    Option(name, f"chardev:{identity}"),
                )
            case "chardev" if value.startswith("file,") and "append=" not in value:
                return (Option(name, f"{value},append=on"),)
            case _:
                return (option,)

    def _is_our_monitor(self, option: Option) -> bool:
        return option.name == "qmp" and unix_server(option, self._process.cwd) == self._process.socket

    def check(self) -> None:
        """Raise Unsupported when a disk was not found: the new QEMU would write to an image it must not touch."""
        if self._missing:
            raise Unsupported(f"cannot see in QEMU's command line how it opened {', '.join(sorted(self._missing))}")


def unix_server(option: Option, cwd: str) -> str | None:
    """Return the path of the unix socket that an option makes QEMU listen on."""
    value = option.value or ""
    if option.name == "chardev":
        keys = split_keys(value, "backend")
        listens = keys.get("backend") == "socket" and keys.get("server", "off") in {"on", "yes"}
        path = keys.get("path") if listens else None
    else:
        head, _, rest = value.partition(",")
        path = head.removeprefix("unix:") if head.startswith("unix:") and _SERVER.search(rest) else None
    return os.path.normpath(os.path.join(cwd, path)) if path else None


def relaunch(
    process: QemuProcess,
    launched: Iterable[DeviceDisk],
    disks: Iterable[DeviceDisk],
    *,
    fds: Sequence[int],
    pidfile: str,
    incoming: bool,
) -> list[str]:
    """Return the command line for a QEMU like `process`, its disks on `disks`, CPUs stopped.

    Args:
        process: what is followed.
        launched: the disks as its command line has them.
        disks: the disks as the new one is to have them, by target.
        fds: listening sockets for the new one's monitors.
        pidfile: where the new one writes its process id.
        incoming: memory will be loaded into it.

    Raises:
        Unsupported: the command line cannot be followed.
    """
    rewriter = _Rewriter(process, launched, disks)
    words = [process.argv[0]]
    dropped_chardevs = set()
    options = list(parse(process.argv))
    for option in options:
        if option.name == "snapshot":
            raise Unsupported(
                "QEMU was started with -snapshot: its disks are temporary files that cannot be followed"
            )
        if option.name == "chardev" and unix_server(option, process.cwd) == process.socket:
            dropped_chardevs.add(split_keys(option.value or "", "backend").get("id", ""))
    for option in options:
        keys = split_keys(option.value or "", "chardev" if option.name == "mon" else "backend")
        if option.name == "mon" and keys.get("chardev") in dropped_chardevs:
            continue
        if option.name == "chardev" and keys.get("id") in dropped_chardevs:
            continue
        for new in rewriter.option(option):
            words += new.words()
    rewriter.check()
    words += ["-S", *control_arguments(fds, pidfile)]
    return words + (["-incoming", "defer"] if incoming else [])


def _isolated(option: Option) -> tuple[Option, ...]:  # noqa: PLR0911 - one a kind of option
    """Return an option with everything cut off that reaches outside the guest."""
    name, value = option.name, option.value or ""
    keys = split_keys(value, "type")
    match name:
        case "netdev":
            identity = json.loads(value)["id"] if value.startswith("{") else keys["id"]
            return (Option(name, f"user,id={identity},restrict=on"),)
        case "nic" if keys.get("type") != "none":
            kept = {key: keys[key] for key in ("id", "mac", "model") if key in keys}
            return (Option(name, join_keys({"type": "user", "restrict": "on"} | kept)),)
        case "net" if keys.get("type") not in {"nic", "none"}:
            return (Option(name, "user,restrict=on"),)
        case "chardev":
            return (Option(name, f"null,id={keys['id']}"),)
        case "serial" | "parallel" | "debugcon" if not value.startswith("chardev:"):
            return (Option(name, "null"),)
        case "monitor" | "qmp" | "vnc" | "spice" | "display" | "gdb":
            return ()
        case _:
            return (option,)


def isolated_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return QEMU arguments with network, character devices, monitors and displays cut off, the devices kept."""
    options = (new for option in parse(("", *arguments)) for new in _isolated(option))
    return tuple(word for option in options for word in option.words())


def isolated_definition(definition: DomainDefinition) -> DomainDefinition:
    """Return a definition for a throw-away copy; the guest sees the same devices."""
    return attrs.evolve(
        definition,
        serial="/dev/null" if definition.serial else "",
        extra_args=isolated_arguments(definition.extra_args),
    )


def isolated_process(process: QemuProcess) -> QemuProcess:
    """Return a process whose command line is that of a throw-away copy."""
    return attrs.evolve(process, argv=(process.argv[0], *isolated_arguments(process.argv[1:]), "-display", "none"))


def agent_socket(process: QemuProcess) -> str:
    """Return the unix socket of a process's channel to the guest agent, or an empty string."""
    options = list(parse(process.argv))
    ports = [_port(option.value or "") for option in options if option.name == "device"]
    channels = {port.get("chardev") for port in ports if port.get("name") == AGENT_PORT}
    for option in options:
        if option.name == "chardev" and split_keys(option.value or "", "backend").get("id") in channels:
            return unix_server(option, process.cwd) or ""
    return ""


def _port(text: str) -> dict[str, str]:
    """Return the keys of a -device."""
    return dict(json.loads(text)) if text.startswith("{") else split_keys(text, "driver")


def blocker(process: QemuProcess) -> str:
    """Return what a second QEMU like `process` would take from it, or an empty string.

    QEMU unlinks a unix socket's path before it listens there: a second one would silently steal it. Ports and locks
    need no looking for: they make the second one fail at its start, with the reason in its words.
    """
    for option in parse(process.argv):
        path = unix_server(option, process.cwd)
        if path is not None and path != process.socket:
            return f"both would listen on {path} (-{option.name})"
        if option.name == "add-fd" or ("fd=" in (option.value or "") and option.name in {"netdev", "chardev"}):
            return f"it was started with inherited descriptors (-{option.name} {option.value})"
    return ""
