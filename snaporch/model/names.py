"""The names that people give, and what they may be."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Iterable

from snaporch.errors import InvalidInput

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# A target becomes part of QEMU node names, which end at 31 characters: "sp-", `SHORT` of the operation's id, "-".
TARGET = re.compile(r"[A-Za-z][A-Za-z0-9]{0,15}")

_ADDRESS = re.compile(r"(unix|tcp|telnet|websocket|vsock|fd):.*|([\w.-]*|\[[0-9a-fA-F:.]+\]):\d+(,[^/]*)?")

UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def check_name(name: str, what: str = "snapshot") -> str:
    """Return `name` when it is a valid domain or snapshot name.

    Raises:
        InvalidInput: it is not.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a {what} name: 1 to 64 of letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )
    return name


def check_text(text: str, what: str) -> str:
    """Return `text` when it can be kept, shown and passed on.

    Raises:
        InvalidInput: it has bytes that are not UTF-8, or a NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{what}: {text!r} is not UTF-8, in which names and paths are kept: rename it") from None
    if "\0" in text:
        raise InvalidInput(f"{what}: {text!r} has a NUL in it, which no path has")
    return text


def check_socket(path: str) -> str:
    """Return `path` when it can be that of a unix socket.

    Raises:
        InvalidInput: it is an address of another kind, or as QEMU writes one.
    """
    if _ADDRESS.fullmatch(path):
        how = (
            "give its path alone"
            if path.startswith("unix:")
            else (
                "only there the kernel says which process is at the other end; give QEMU one more monitor "
                "(`-qmp unix:SOCKET,server=on,wait=off`) and attach to that"
            )
        )
        raise InvalidInput(f"--qmp {path}: a QEMU is attached to by the path of a unix socket: {how}")
    return path


def in_order(domains: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the domains of an operation, sorted: the order in which their locks are taken.

    Raises:
        InvalidInput: one is no domain's name, or is there twice; or there is none.
    """
    names = sorted(check_name(name, "domain") for name in domains)
    if not names or len(set(names)) < len(names):
        raise InvalidInput("a group is of one domain or more, each named once")
    return tuple(names)


def one_or_more(domains: str | Iterable[str]) -> tuple[str, ...]:
    """Return names as a tuple; a string is one name."""
    return (domains,) if isinstance(domains, str) else tuple(domains)


SHORT = 11
"""Characters of an operation's id that are part of the names of nodes and files: no two operations share them."""


def new_id() -> str:
    """Return a new id of an operation, a batch or a snapshot: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def new_uuid() -> str:
    """Return a new id of a domain: a random UUID."""
    return str(uuid.uuid4())


def short(identifier: str) -> str:
    """Return the part of an operation's id that names nodes and files."""
    return identifier[:SHORT]
