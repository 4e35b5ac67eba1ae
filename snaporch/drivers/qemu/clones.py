"""What a clone's QEMU has in place of what one process alone can have of the host; no I/O.

Only what is understood is cloned: each option is in a table here or is refused by name. What is the original's own
(ports, sockets, logs, a vsock address) gets a counterpart; what the guest has in its memory (addresses, ids) stays
with the memory, and is new without. Firmware's variables are a disk, which has an overlay like any other.
"""

from __future__ import annotations

import os
import re
import secrets
import uuid
from collections.abc import Callable, Iterator
from typing import ClassVar

import attrs

from snaporch.drivers.base import Copied, Original, Place
from snaporch.drivers.qemu import hostside
from snaporch.drivers.qemu.options import Keys, Option, Tree, parse
from snaporch.errors import Unsupported
from snaporch.model.domain import DomainDefinition, ForwardedPort

FreePort = Callable[[str, str], int]
"""Returns a port that nobody listens at, of a protocol and an address of the host."""

# As they are: they are the guest's own, or are only read.
_WORDS = """
accel acpitable action append bios boot cdrom cpu d enable-kvm fw_cfg global icount initrd k kernel L m M machine
mem-prealloc mon msg no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config nodefaults numa
only-migratable option-rom overcommit rtc sandbox seed smp usb vga watchdog-action
"""
_KEPT = frozenset(_WORDS.split())
_DEFINED = """
name memory vcpus accel machine kernel initrd append serial emulator extra_args guest_agent disks driver clock
firmware genid tpm
"""
_FIELDS = frozenset(_DEFINED.split())
"""What is understood of a definition: something new in it has to be thought of here first."""
_DROPPED = frozenset({"name"})
_HARMLESS = frozenset({("display", "none"), *(("usbdevice", kind) for kind in ("tablet", "mouse", "keyboard"))})
_DRIVES = frozenset({"drive", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "mtdblock", "pflash", "sd", "blockdev"})
_OBJECTS = frozenset({"iothread", "memory-backend-ram", "rng-builtin", "rng-random", "throttle-group"})
_STREAMS = frozenset({"chardev", "serial", "parallel", "monitor", "qmp", "qmp-pretty"})
_PRIVATE_STREAMS = frozenset({"null", "ringbuf", "memory", "vc", "msmouse", "wctablet", "testdev", "pty", "none"})
_FORWARD = re.compile(r"(tcp|udp|):([^:]*):(\d+)-(.*)")
_NOT_TWICE = ("vfio", "vhost-user", "vhost-scsi", "vhost-vdpa", "usb-host", "usb-mtp", "ivshmem", "xen", "sev")
FIRST_VNC = 5900


def copied(original: Original, place: Place, free_port: FreePort) -> Copied:
    """Return how one clone is defined.

    Raises:
        Unsupported: the option that is not understood, or that cannot be there twice, is in the error.
    """
    if original.template is not None:
        raise Unsupported(
            f"{original.definition.name} was attached to: only domains that snaporch starts by a definition can "
            "be cloned"
        )
    copier = _Copier(original, place, free_port)
    for field in attrs.fields(DomainDefinition):
        if field.name not in _FIELDS and getattr(original.definition, field.name) != field.default:
            raise copier.refused(
                f"it is defined with {field.name}: what a clone is to have in its place is not known"
            )
    options = list(parse(("", *original.definition.extra_args)))
    if why := hostside.refusal(options):
        raise copier.refused(why)
    words = tuple(word for option in options for each in copier.option(option) for word in each.words())
    serial = copier.file("serial.log") if original.definition.serial else ""
    definition = attrs.evolve(
        original.definition,
        name=place.name,
        disks=place.disks,
        serial=serial,
        extra_args=words,
        genid="none" if original.definition.genid == "none" else "auto",  # a UUID would be the original's
    )
    return Copied(definition, ports=tuple(copier.ports), files=tuple(copier.files))


@attrs.define
class _Copier:
    """One clone's command line in the making."""

    original: Original
    place: Place
    free_port: FreePort
    ports: list[ForwardedPort] = attrs.field(factory=list)
    files: list[str] = attrs.field(factory=list)
    _number: int = 0

    def refused(self, why: str) -> Unsupported:
        """Return the error that says why there can be no clone."""
        return Unsupported(f"{self.original.definition.name} cannot be cloned: {why}")

    def _unknown(
        self, option: Option, why: str = "what a clone is to have in its place is not known"
    ) -> Unsupported:
        return self.refused(f"it is started with {option.text}: {why}")

    def file(self, name: str) -> str:
        """Return a file of the clone's own."""
        path = f"{self.place.directory}/{name}"
        while path in self.files:
            self._number += 1
            path = f"{self.place.directory}/{self._number}-{name}"
        self.files.append(path)
        return path

    def _port(self, protocol: str, host: str, was: int, to: str) -> int:
        port = self.free_port(protocol, host)
        self.ports.append(ForwardedPort(protocol, host, port, was, to))
        return port

    def option(self, option: Option) -> Iterator[Option]:
        """Yield what the clone has in an option's place."""
        name, value = option.name, option.value or ""
        if name in _KEPT or (name, value) in _HARMLESS:
            yield option
        elif name in _STREAMS:
            yield from self._stream(option)
        elif (change := self._CHANGES.get(name)) is not None:
            yield Option(name, change(self, option))
        elif name not in _DROPPED:
            raise self._unknown(option)

    # --- character devices ---

    def _stream(self, option: Option) -> Iterator[Option]:
        value = option.value or ""
        device = hostside.character_device(option)
        if device is None or value == "none":  # chardev:ID, which has an option of its own
            yield option
            return
        new = self._character_device(option, device)
        if new == device:
            yield option
        elif option.name == "chardev":
            yield Option("chardev", new.text())
        else:
            self._number += 1
            identity = f"snaporch-clone-{self._number}"
            yield Option("chardev", new.having(id=identity).text())
            yield Option(option.name, f"chardev:{identity}")

    def _character_device(self, option: Option, device: Keys) -> Keys:
        backend, new = device.get("backend"), device
        if (option.value or "").startswith("mon:"):
            raise self._unknown(option)
        if "logfile" in device:
            new = new.having(logfile=self.file(os.path.basename(device.get("logfile"))), logappend="on")
        if backend in _PRIVATE_STREAMS and not (backend == "pty" and "path" in device):
            return new
        if backend == "file" and "input-path" not in device:
            return new.having(path=self.file(os.path.basename(device.get("path"))), append="on")
        if backend == "socket" and device.is_on("server") and "fd" not in device:
            if "path" in device:
                return new.having(path=self.file(os.path.basename(device.get("path"))))
            if device.get("port").isdecimal() and "to" not in device:
                port = self._port(
                    "tcp", device.get("host"), int(device.get("port")), device.get("id") or option.name
                )
                return new.having(port=str(port))
        raise self._unknown(option)

    # --- networks ---

    def _network(self, option: Option) -> str:
        value = option.value or ""
        tree = Tree.parse(value, "type")
        kind = tree.get("type")
        if kind == "user":
            return self._user_network(option, tree)
        if kind in {"none", "hubport"}:
            return value
        if kind == "nic":
            return self._nic(Keys.parse(value, "type"), "macaddr")
        if held := hostside.holds([option], "/", ""):
            raise self._unknown(option, f"no two processes can have {held[0].what}")
        if kind in {"tap", "bridge"}:
            if self.original.memory and not self.original.keep_network:
                raise self._unknown(
                    option,
                    "a second guest with its addresses would be in this network; `--network keep` has it there",
                )
            return self._nic(Keys.parse(value, "type"), "mac") if option.name == "nic" else value
        raise self._unknown(option)

    def _user_network(self, option: Option, tree: Tree) -> str:
        odd = {"guestfwd", "smb", "restrict-to"} & tree.options.keys()
        if odd:
            raise self._unknown(option, f"both would use what {odd.pop()} names")
        if tree.json:
            forwards = tree.options.get("hostfwd", [])
            if not all(isinstance(each, dict) and "str" in each for each in forwards):
                raise self._unknown(option)
            made = [{"str": self._forward(option, str(each["str"]))} for each in forwards]
            tree.options |= {"hostfwd": made} if forwards else {}
            return tree.text()
        keys = Keys.parse(option.value or "", "type")
        pairs = tuple(
            (key, self._forward(option, value) if key == "hostfwd" else value) for key, value in keys.pairs
        )
        return self._nic(Keys(pairs), "mac") if option.name == "nic" else Keys(pairs).text()

    def _forward(self, option: Option, text: str) -> str:
        found = _FORWARD.fullmatch(text)
        if found is None:
            raise self._unknown(option, f"hostfwd={text} is not understood")
        protocol, host, port, to = found[1] or "tcp", found[2], int(found[3]), found[4]
        return f"{protocol}:{host}:{self._port(protocol, host, port, to)}-{to}"

    def _nic(self, keys: Keys, name: str) -> str:
        """Return a network card; without memory it has an address of its own."""
        return keys.text() if self.original.memory else keys.having(**{name: new_mac()}).text()

    # --- devices, objects, drives ---

    def _device(self, option: Option) -> str:
        tree = Tree.parse(option.value or "", "driver")
        driver = tree.get("driver")
        if driver.startswith(_NOT_TWICE):
            raise self._unknown(option, "it is the host's, or is shared")
        if driver == "vmgenid":
            tree.options["guid"] = "auto"
            return tree.text()
        if driver.startswith("tpm"):
            raise self._unknown(option, "its TPM's state is kept by a program of somebody else's")
        if driver.startswith("vhost-vsock"):
            address = 2**31 + secrets.randbelow(2**30)
            tree.options["guest-cid"] = address if tree.json else str(address)
            return tree.text()
        if "netdev" in tree.options and not self.original.memory:
            tree.options["mac"] = new_mac()
            return tree.text()
        return option.value or ""

    def _object(self, option: Option) -> str:
        tree = Tree.parse(option.value or "", "qom-type")
        kind = tree.get("qom-type")
        file_of_all = kind == "memory-backend-file" and tree.get("share") not in {"", "off", "false", "no"}
        private = kind in {"memory-backend-memfd", "memory-backend-file"} and not file_of_all
        if kind not in _OBJECTS and not private:
            raise self._unknown(option)
        return option.value or ""

    def _drive(self, option: Option) -> str:
        value = option.value or ""
        if option.name == "blockdev":
            kept = Tree.parse(value, "driver").get("read-only") in {"on", "true", "yes"}
        else:
            keys = Keys.parse(value, "file")
            kept = keys.get("media") == "cdrom" or keys.is_on("readonly") or keys.is_on("read-only")
            kept = kept and not keys.is_on("snapshot") and not keys.is_on("copy-on-read")
        if not kept:
            pflash = option.name == "pflash" or Keys.parse(value, "file").get("if") == "pflash"
            known = 'with `firmware = "uefi"` a clone has variables of its own'
            known = known if pflash else "name it in the definition under [[disks]]"
            raise self._unknown(option, f"both would write to it; {known}")
        return value

    def _screen(self, option: Option) -> str:
        value = option.value or ""
        keys = Keys.parse(value, "vnc")
        address = keys.get("vnc")
        host, _, display = address.rpartition(":")
        if address == "none":
            return value
        if address.startswith("unix:"):
            return keys.having(vnc=f"unix:{self.file(os.path.basename(address))}").text().removeprefix("vnc=")
        if not display.isdecimal() or {"to", "reverse", "websocket"} & {key for key, _ in keys.pairs}:
            raise self._unknown(option)
        port = self._port("tcp", host, FIRST_VNC + int(display), "vnc")
        rest = keys.without(lambda key: key == "vnc").text()
        return ",".join(filter(None, [f"{host}:{port - FIRST_VNC}", rest]))

    def _identity(self, option: Option) -> str:
        """Return a machine's id, which a guest with memory knows already."""
        value = option.value or ""
        if self.original.memory:
            return value
        if option.name == "uuid":
            return str(uuid.uuid4())
        keys = Keys.parse(value, "type")
        return keys.having(uuid=str(uuid.uuid4())).text() if "uuid" in keys else value

    def _sound(self, option: Option) -> str:
        if Tree.parse(option.value or "", "driver").get("driver") != "none":
            raise self._unknown(option)
        return option.value or ""

    def _log(self, option: Option) -> str:
        return self.file(os.path.basename(option.value or "log"))

    _CHANGES: ClassVar[dict[str, Callable[[_Copier, Option], str]]] = {
        **dict.fromkeys(("netdev", "nic", "net"), _network),
        **dict.fromkeys(_DRIVES, _drive),
        **dict.fromkeys(("uuid", "smbios"), _identity),
        "audiodev": _sound,
        "device": _device,
        "object": _object,
        "vnc": _screen,
        "D": _log,
    }


def new_mac() -> str:
    """Return a new address of a network card, of those that are for QEMU's guests."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
