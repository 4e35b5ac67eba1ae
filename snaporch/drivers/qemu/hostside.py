"""What a QEMU's command line uses of the host, what a second process gets instead, and what it cannot get.

Logs go on in the same files, never cut. What one process alone can have (a port, a socket's path, a tap interface)
keeps a second one from coming up beside the first; a throw-away copy has a stand-in for it (see `isolation`). If
there is no stand-in, or no process can be started with an option again, the reason names the word of the command
line that prevents it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import attrs

from snaporch.drivers.qemu.options import Keys, Option, Tree
from snaporch.errors import Unsupported
from snaporch.model.limits import LONGEST_SOCKET

_DROPPED = frozenset({"S", "daemonize", "pidfile", "incoming", "loadvm", "D"})
# Options whose value is a character device in its old form: "unix:/path,server", "file:/path", "pty", …
_STREAMS = frozenset({"serial", "parallel", "monitor", "debugcon", "qmp", "qmp-pretty"})
_MONITORS = frozenset({"monitor", "qmp", "qmp-pretty", "gdb", "s", "mon"})
_REFUSED = {
    "snapshot": "its disks are temporary files that cannot be followed",
    "preconfig": "its machine is not built yet",
    "chroot": "it cannot open files any more",
    "xen-domid": "it serves a Xen domain",
    "xen-attach": "it serves a Xen domain",
    "qtest": "it is driven from outside, by qtest",
    "dump-vmstate": "it would only write a file and end",
    "semihosting": "the guest can reach files of the host",
    "semihosting-config": "the guest can reach files of the host",
    "add-fd": "it was started with inherited descriptors",
    "set": "it changes other options, in words that are not followed",
}
_DEVICES_OF_THE_HOST = {
    "vfio-pci": "a device of the host, whose state cannot be saved",
    "usb-host": "a device of the host, whose state cannot be saved",
    "vhost-user-blk-pci": "its disk is in another process, and no snapshot would hold it",
    "vhost-user-scsi-pci": "its disks are in another process, and no snapshot would hold them",
    "vhost-scsi-pci": "its disks are in the kernel, and no snapshot would hold them",
    "vhost-user-fs-pci": "a folder of the host, which another process serves",
}
_FD_KEYS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock_fd"})


@attrs.frozen
class Held:
    """Something of the host that one process alone can have.

    Attributes:
        what: in words, for example ``port 127.0.0.1:2222``.
        word: the option that says so.
        stand_in: what a trial has in its place; empty: there is nothing.
        again: a process that takes this one's place can have it, once this one is gone.
    """

    what: str
    word: str
    stand_in: str = "a private one"
    again: bool = True

    def __str__(self) -> str:
        return f"{self.what} ({self.word})"


# --- character devices ---------------------------------------------------------------------------------------


def _stream(text: str) -> Keys:
    """Return a character device in its old form as the keys of a -chardev (qemu_chr_parse_compat)."""
    text = text.removeprefix("mon:")
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return Keys((("backend", "socket"), *Keys.parse(rest, "path").pairs))
    if kind in {"tcp", "telnet", "websocket", "tn3270"}:
        address = Keys.parse(rest, "address")
        host, _, port = address.get("address").rpartition(":")
        return address.without(lambda key: key == "address").having(backend="socket", host=host, port=port)
    if kind == "udp":
        local = rest.partition("@")[2].rpartition(":")
        return Keys((("backend", "udp"), ("localaddr", local[0]), ("localport", local[2])))
    if kind in {"file", "pipe"}:
        return Keys((("backend", kind), ("path", rest)))
    if text.startswith("/dev/"):
        return Keys((("backend", "serial"), ("path", text)))
    return Keys((("backend", kind.partition(",")[0]),))


def character_device(option: Option) -> Keys | None:
    """Return the character device that an option makes, as the keys of a -chardev."""
    value = option.value or ""
    if option.name == "chardev":
        return Keys.parse(value, "backend")
    if option.name == "s":
        return _stream("tcp::1234,server=on")
    if option.name == "gdb":
        return _stream(f"{value},server=on")
    if option.name in _STREAMS and not value.startswith("chardev:"):
        return _stream(value)
    return None


def unix_server(option: Option, cwd: str) -> str | None:
    """Return the path of the unix socket that an option makes QEMU listen on."""
    device = character_device(option)
    if device is None or device.get("backend") != "socket" or not device.is_on("server"):
        return None
    path = device.get("path")
    return os.path.normpath(os.path.join(cwd, path)) if path else None


def is_pipe(option: Option) -> bool:
    """Return whether an option is a character device on a named pipe."""
    device = character_device(option)
    return device is not None and device.get("backend") == "pipe"


def _held_by_stream(device: Keys, option: Option, cwd: str) -> Iterator[Held]:
    backend, word = device.get("backend"), option.text
    if path := unix_server(option, cwd):
        yield Held(f"socket {path}", word)
    elif backend == "socket" and device.is_on("server") and "port" in device and "to" not in device:
        yield Held(f"port {device.get('host')}:{device.get('port')}", word, "one in a private network")
    elif backend == "udp" and device.get("localport"):
        yield Held(f"port {device.get('localaddr')}:{device.get('localport')}", word, "one in a private network")
    elif backend in {"pipe", "serial", "parallel", "tty", "parport"}:
        yield Held(f"{backend} {device.get('path')}", word, "none")
    if _FD_KEYS & {key for key, _ in device.pairs}:
        yield Held("an inherited descriptor", word, "none", again=False)


# --- networks, screens, devices ------------------------------------------------------------------------------


def _held_by_network(option: Option, cwd: str) -> Iterator[Held]:
    value, word = option.value or "", option.text
    tree = Tree.parse(value, "type")
    kind = tree.get("type")
    if _FD_KEYS & tree.options.keys() or _address(tree.options, "fd"):
        yield Held("an inherited descriptor", word, "an interface in a private network", again=False)
    if kind == "vhost-user":
        yield Held(f"the connection of {tree.get('chardev')} to the process behind it", word, "a user network")
    if kind == "tap" and tree.get("ifname"):
        yield Held(f"interface {tree.get('ifname')}", word, "one in a private network")
    for port in _forwards(value, tree):
        yield Held(f"port {port}", word, "one in a private network")
    if kind == "socket" and (port := tree.get("listen") or tree.get("udp")):
        yield Held(f"port {port}", word, "one in a private network")
    if kind in {"stream", "dgram"} and (kind == "dgram" or tree.get("server") in {"on", "true", "yes"}):
        address = tree.options.get("addr" if kind == "stream" else "local")
        if isinstance(address, dict) and address.get("type") == "inet":
            yield Held(f"port {address.get('host')}:{address.get('port')}", word, "one in a private network")
        elif isinstance(address, dict) and address.get("type") == "unix":
            path = os.path.normpath(os.path.join(cwd, str(address.get("path"))))
            yield Held(f"socket {path}", word)


def _address(options: dict[str, Any], kind: str) -> bool:
    return any(isinstance(each, dict) and each.get("type") == kind for each in options.values())


def _forwards(value: str, tree: Tree) -> list[str]:
    """Return what a user network forwards from the host."""
    if not tree.json:
        return Keys.parse(value, "type").all("hostfwd")
    found = tree.options.get("hostfwd", [])
    return [str(each.get("str", each) if isinstance(each, dict) else each) for each in found]


def _held_by_screen(option: Option, cwd: str) -> Iterator[Held]:
    keys = Keys.parse(option.value or "", "vnc" if option.name == "vnc" else "port")
    if option.name == "vnc":
        address = keys.get("vnc")
        if address.startswith("unix:"):
            yield Held(f"socket {os.path.join(cwd, address[5:])}", option.text)
        elif (display := address.rpartition(":")[2]).isdecimal() and "to" not in keys and not keys.is_on("reverse"):
            yield Held(f"port {5900 + int(display)}", option.text, "one in a private network")
        return
    for key in ("port", "tls-port"):
        if key in keys:
            yield Held(f"port {keys.get(key)}", option.text, "none")
    if keys.is_on("unix"):
        yield Held(f"socket {os.path.join(cwd, keys.get('addr'))}", option.text, "none")


def _held_by_device(option: Option) -> Iterator[Held]:
    tree = Tree.parse(option.value or "", "driver")
    if tree.get("driver").startswith("vhost-vsock") and (cid := tree.get("guest-cid")):
        yield Held(f"vsock address {cid}", option.text, "another address")
    if _FD_KEYS & tree.options.keys():
        yield Held("an inherited descriptor", option.text, "", again=False)


def holds(options: Iterable[Option], cwd: str, control: str) -> list[Held]:
    """Return what one process alone can have of all that options make QEMU take.

    Args:
        options: all of a command line.
        cwd: what relative paths are relative to.
        control: the socket that snaporch uses, which each process has in turn.
    """
    found: list[Held] = []
    tpm: dict[str, str] = {}
    for option in options:
        if (device := character_device(option)) is not None:
            if unix_server(option, cwd) != control:
                found += _held_by_stream(device, option, cwd)
            if option.name == "chardev":
                tpm[device.get("id")] = device.get("path")
        elif option.name in {"netdev", "nic", "net"}:
            found += _held_by_network(option, cwd)
        elif option.name in {"vnc", "spice"}:
            found += _held_by_screen(option, cwd)
        elif option.name == "device":
            found += _held_by_device(option)
        elif option.name == "tpmdev":
            tree = Tree.parse(option.value or "", "type")
            path = tpm.get(tree.get("chardev"), "")
            found.append(Held(f"the TPM at {path}", option.text, "", again=False))
        elif option.name == "drive" and Keys.parse(option.value or "", "file").is_on("copy-on-read"):
            found.append(
                Held("the right to write to its images (copy-on-read)", option.text, "a copy that does not")
            )
    return found


def named_files(words: Iterable[str]) -> set[str]:
    """Return the absolute paths in words of a command line, whatever they are for."""
    found: set[str] = set()
    for word in words:
        with suppress(Unsupported):  # QEMU says so
            options = Tree.parse(word, "driver").options if word.startswith("{") else {}
            found.update(path for path in _strings(options) if path.startswith("/"))
        for _, value in Keys.parse(word, "value").pairs:
            if (path := value.removeprefix("file:")).startswith("/"):
                found.add(path)
    return found


def _strings(options: Any) -> Iterator[str]:
    inner = options.values() if isinstance(options, dict) else options if isinstance(options, list) else ()
    yield from [options] if isinstance(options, str) else ()
    for each in inner:
        yield from _strings(each)


def shared_memory(options: Iterable[Option]) -> list[Held]:
    """Return the files that memory is shared by: a second process would load its memory over the first one's."""
    return [
        Held(f"the memory in {path}", option.text, "memory of its own")
        for option in options
        if option.name == "object" and (path := _shared_file(option.value or "", "/"))
    ]


def refusal(options: Iterable[Option]) -> str:
    """Return why no process like this one can be started at all, or an empty string."""
    for option in options:
        if why := _REFUSED.get(option.name):
            return f"QEMU was started with {option.text}: {why}"
        value = option.value or ""
        if option.name == "run-with" and "chroot" in Keys.parse(value):
            return f"QEMU was started with {option.text}: {_REFUSED['chroot']}"
        if option.name == "icount" and "rr" in Keys.parse(value, "shift"):
            return f"QEMU was started with {option.text}: what it records or replays cannot be gone back in"
        if option.name == "device":
            driver = Tree.parse(value, "driver").get("driver")
            if why := _DEVICES_OF_THE_HOST.get(driver) or _DEVICES_OF_THE_HOST.get(f"{driver}-pci"):
                return f"QEMU was started with {option.text}: {why}"
        if option.name == "tpmdev" and Tree.parse(value, "type").get("type") == "passthrough":
            return f"QEMU was started with {option.text}: the state of the host's TPM cannot be saved"
    return ""


def as_it_is(option: Option) -> Option | None:
    """Return an option of a process that has become another user by its command line, for one that is that user."""
    if option.name == "runas":
        return None
    if option.name != "run-with" or "user" not in (keys := Keys.parse(option.value or "")):
        return option
    kept = keys.without(lambda key: key == "user")
    return Option(option.name, kept.text()) if kept.pairs else None


def folders(options: Iterable[Option]) -> list[str]:
    """Return the folders of the host that the guest sees: they are in no snapshot."""
    shared = (Keys.parse(each.value or "", "fsdriver") for each in options if each.name in {"virtfs", "fsdev"})
    return [keys.get("path") for keys in shared if "path" in keys]


# --- the next process ----------------------------------------------------------------------------------------


@attrs.frozen
class Followed:
    """How a process that is to take the place of another is started.

    Attributes:
        options: what it is started with.
        renames: files that it makes under another name, and the names that they are to take with its place.
    """

    options: tuple[Option, ...]
    renames: tuple[tuple[str, str], ...] = ()


def follow(options: Sequence[Option], cwd: str, control: str, suffix: str, *, listens: bool = False) -> Followed:
    """Return how the next process is started: logs are appended to, what is one process's own is another's.

    Args:
        options: the command line, its disks on other images already.
        cwd: what relative paths are relative to.
        control: the socket that snaporch uses; its monitor is left out.
        suffix: of the names of files that the new process has in place of the old one's.
        listens: that monitor is not left out: the new process makes the socket itself, under another name at first.

    Raises:
        Unsupported: that name is longer than a socket's may be.
    """
    monitors = {
        Keys.parse(option.value or "", "backend").get("id")
        for option in options
        if option.name == "chardev" and unix_server(option, cwd) == control
    }
    found: list[Option] = []
    renames: list[tuple[str, str]] = []
    for number, option in enumerate(options):
        value = option.value or ""
        if listens and unix_server(option, cwd) == control:
            found += _listening(option, number, control + suffix)
            renames.append((control + suffix, control))
            continue
        if listens and option.name == "mon":
            found.append(option)
            continue
        if option.name in _DROPPED or unix_server(option, cwd) == control:
            continue
        if option.name == "mon" and Keys.parse(value, "chardev").get("chardev") in monitors:
            continue
        if option.name == "object" and (path := _shared_file(value, cwd)):
            tree = Tree.parse(value, "qom-type")
            tree.options["mem-path"] = path + suffix
            renames.append((path + suffix, path))
            found.append(Option("object", tree.text()))
            continue
        found += _appending(_of_its_own(option), number)
    return Followed(tuple(found), tuple(renames))


def _listening(option: Option, number: int, path: str) -> tuple[Option, ...]:
    """Return an option whose monitor, or whose character device, listens at another path."""
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise Unsupported(
            f"{option.text}: another process cannot listen beside it, at a path of over {LONGEST_SOCKET} bytes"
        )
    device = character_device(option)
    if device is None:
        raise AssertionError("what listens is a character device")
    new = device.having(path=path)
    if option.name == "chardev":
        return (Option("chardev", new.text()),)
    name = f"snaporch-{option.name}-{number}"
    return Option("chardev", new.having(id=name).text()), Option(option.name, f"chardev:{name}")


def _shared_file(value: str, cwd: str) -> str:
    """Return the file that memory is shared by, or an empty string."""
    tree = Tree.parse(value, "qom-type")
    if tree.get("qom-type") != "memory-backend-file" or tree.get("share") not in {"on", "true", "yes"}:
        return ""
    path = os.path.join(cwd, tree.get("mem-path"))
    return "" if os.path.isdir(path) or path.startswith("/dev/dax") else path


def _of_its_own(option: Option) -> Option:
    """Return an option with another generation id than the last process had, where the machine has one."""
    if option.name != "device":
        return option
    tree = Tree.parse(option.value or "", "driver")
    if tree.get("driver") != "vmgenid":
        return option
    tree.options["guid"] = "auto"
    return Option("device", tree.text())


def _appending(option: Option, number: int) -> tuple[Option, ...]:
    """Return an option so that it appends to the logs that it writes."""
    device, value = character_device(option), option.value or ""
    if option.name == "trace":
        return (Option("trace", re.sub(r"(^|,)file=[^,]*", "", value)),)
    if device is None:
        return (option,)
    new = device
    if device.get("backend") == "file" and not device.is_on("append"):
        new = new.having(append="on")
    if "logfile" in device and not device.is_on("logappend"):
        new = new.having(logappend="on")
    if new == device:
        return (option,)
    if option.name == "chardev":
        return (Option("chardev", new.text()),)
    if option.name == "debugcon":  # what QEMU makes of it, with names of its own
        chardev = Option("chardev", new.having(id="debugcon").text())
        return chardev, Option("device", "isa-debugcon,id=debugcon,chardev=debugcon")
    name = f"snaporch-{option.name}-{number}"
    return Option("chardev", new.having(id=name).text()), Option(option.name, f"chardev:{name}")
