"""QEMU's command line, word by word: the table of its options, and what is inside of one; no I/O.

An option that is not in the table is not understood, and a command line with one is refused: the next word might be
its value or not, and nobody knows what a second process with it would do. The tests compare the table with QEMUs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs

from snaporch.errors import Unsupported

_FLAGS = """
S daemonize enable-kvm enable-sync-profile full-screen help h jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet
no-reboot no-shutdown no-user-config nodefaults nographic old-param only-migratable perfmap portrait preconfig s
semihosting singlestep snapshot usb version win2k-hack xen-attach xen-domid-restrict async-teardown audio-help
"""
_VALUED = """
D L M accel acpitable action add-fd append audio audiodev bios blockdev boot cdrom chardev chroot compat cpu d
debugcon device dfilter display drive dtb dump-vmstate echr fda fdb fsdev fw_cfg gdb global hda hdb hdc hdd icount
incoming initrd iscsi k kernel loadvm m machine mem-path mon monitor msg mtdblock name net netdev nic numa object
option-rom overcommit parallel pflash pidfile plugin prom-env qmp qmp-pretty qtest qtest-log readconfig rotate rtc
run-with runas sandbox sd seed semihosting-config serial set shim smbios smp spice tpmdev trace usbdevice uuid vga
virtfs vnc watchdog-action xen-domid
"""
FLAGS = frozenset(_FLAGS.split())
"""Options without a value."""
VALUED = frozenset(_VALUED.split())
"""Options with one."""

# The sections of a file for -readconfig that become options of another name (system/vl.c, qemu_parse_config_group).
_SECTIONS = {"smp-opts": "smp", "boot-opts": "boot", "memory": "m"}
_TRUE = frozenset({"on", "yes", "true", "y"})


@attrs.frozen
class Option:
    """One option of a command line; `value` is None for a flag."""

    name: str
    value: str | None = None

    def words(self) -> tuple[str, ...]:
        """Return it as it is written on a command line."""
        return (f"-{self.name}",) if self.value is None else (f"-{self.name}", self.value)

    @property
    def text(self) -> str:
        """Return it for people, without what may be secret or long."""
        value = re.sub(r"((?:password|data|secret)\"?[=:]\s*\"?)[^,\"}]*", r"\1…", self.value or "")
        return f"-{self.name} {value}".strip()


def parse(argv: Sequence[str]) -> Iterator[Option]:
    """Yield the options after the emulator's name; a bare word is QEMU's short form of ``-hda``.

    Raises:
        Unsupported: an option is not known, or lacks its value.
    """
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            yield Option("hda", word)
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name in FLAGS:
            yield Option(name)
        elif name in VALUED:
            value = next(words, None)
            if value is None:
                raise Unsupported(f"QEMU's command line ends after -{name}, which needs a value")
            yield Option(name, value)
        else:
            raise Unsupported(
                f"QEMU's command line has the option -{name}, which is not known here: "
                "a second process like it cannot be started"
            )


@attrs.frozen
class Keys:
    """A value ``a=b,c=d``: pairs in their order, the same key perhaps several times; the last counts."""

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, implied: str = "") -> Keys:
        """Read a value; ``,,`` is a comma. A bare first word is of the key `implied`; others say on or off."""
        pairs = []
        for number, item in enumerate(_split(text)):
            key, equals, value = item.partition("=")
            if equals:
                pairs.append((key, value))
            elif number == 0 and implied:
                pairs.append((implied, key))
            elif key.startswith("no"):
                pairs.append((key[2:], "off"))
            else:
                pairs.append((key, "on"))
        return cls(tuple(pairs))

    def __contains__(self, key: str) -> bool:
        return any(name == key for name, _ in self.pairs)

    def get(self, key: str, default: str = "") -> str:
        """Return a key's value."""
        return next((value for name, value in reversed(self.pairs) if name == key), default)

    def all(self, key: str) -> list[str]:
        """Return all values of a key."""
        return [value for name, value in self.pairs if name == key]

    def is_on(self, key: str, *, default: bool = False) -> bool:
        """Return a key's truth, as QEMU sees it."""
        return self.get(key, "on" if default else "off") in _TRUE

    def having(self, **values: str) -> Keys:
        """Return it with these values; underscores are dashes."""
        new = {key.replace("_", "-"): value for key, value in values.items()}
        return Keys((*self.without(new.__contains__).pairs, *new.items()))

    def without(self, unwanted: Callable[[str], bool]) -> Keys:
        """Return it without some keys."""
        return Keys(tuple(pair for pair in self.pairs if not unwanted(pair[0])))

    def text(self) -> str:
        """Return it as QEMU reads it."""
        return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in self.pairs)


def _split(text: str) -> Iterator[str]:
    """Yield what is between single commas, doubled ones made one."""
    item, place = "", 0
    while place < len(text):
        if text[place] != ",":
            item += text[place]
        elif text[place + 1 : place + 2] == ",":
            item, place = item + ",", place + 1
        else:
            yield item
            item = ""
        place += 1
    yield item


@attrs.define
class Tree:
    """A value that is an object, of -blockdev, -device, -netdev or -object, in JSON or as ``a.b=c``.

    Attributes:
        options: the object; in the second form all that is in it are strings.
        json: whether it is written as JSON.
    """

    options: dict[str, Any]
    json: bool

    @classmethod
    def parse(cls, text: str, implied: str) -> Tree:
        """Read a value.

        Raises:
            Unsupported: it is none.
        """
        if text.startswith("{"):
            try:
                return cls(json.loads(text), json=True)
            except ValueError as error:
                raise Unsupported(f"QEMU's command line has an object that is no JSON: {error}") from None
        options: dict[str, Any] = {}
        for key, value in Keys.parse(text, implied).pairs:
            *outer, last = key.split(".")
            place = options
            for name in outer:
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    raise Unsupported(f"QEMU's command line has {key}=, and {name} is a value already")
            place[last] = value
        return cls(options, json=False)

    def text(self) -> str:
        """Return it as QEMU reads it."""
        return json.dumps(self.options) if self.json else Keys(tuple(_flat(self.options))).text()

    def get(self, key: str) -> str:
        """Return a value as a string; empty where there is none."""
        value = self.options.get(key, "")
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


def expand(options: Iterable[Option], read: Callable[[str], str]) -> Iterator[Option]:
    """Yield options with those of the files that -readconfig names in their place.

    Args:
        options: the command line's.
        read: returns what is in a file.

    Raises:
        Unsupported: a file is not understood.
    """
    for option in options:
        if option.name == "readconfig":
            yield from _configured(option.value or "", read(option.value or ""))
        else:
            yield option


def _configured(name: str, text: str) -> Iterator[Option]:
    section, pairs = None, list[tuple[str, str]]()
    for number, line in enumerate([*(line.strip() for line in text.splitlines()), "[end]"], 1):
        if not line or line.startswith("#"):
            continue
        if begins := re.fullmatch(r'\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]', line):
            if section is not None:
                yield _section_option(name, section, pairs)
            section, pairs = begins[1], [("id", begins[2])] if begins[2] is not None else []
        elif (pair := re.fullmatch(r'([\w.-]+)\s*=\s*"([^"]*)"', line)) and section is not None:
            pairs.append((pair[1], pair[2]))
        else:
            raise Unsupported(f"{name}, which QEMU was started with, is not understood: line {number}")


def _section_option(name: str, section: str, pairs: Sequence[tuple[str, str]]) -> Option:
    option = _SECTIONS.get(section, section)
    if option not in VALUED:
        raise Unsupported(
            f"{name}, which QEMU was started with, has a section {section!r}, which is not known here"
        )
    first = {"device": "driver", "object": "qom-type", "chardev": "backend", "netdev": "type"}.get(option)
    ordered = sorted(pairs, key=lambda pair: pair[0] != first)
    return Option(option, Keys(tuple(ordered)).text())
