"""The names that people give, and what they may be; of several domains, all names in one word."""

from __future__ import annotations

import re
from collections.abc import Iterable

from snaporch.errors import InvalidInput

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# A target becomes part of QEMU node names, which end at 31 characters: "sp-" + 8 of the operation's id + "-".
TARGET = re.compile(r"[A-Za-z][A-Za-z0-9]{0,15}")


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


def joined(domains: Iterable[str]) -> str:
    """Return what an operation on these domains has as its domain: their names, sorted, joined by commas.

    Raises:
        InvalidInput: one is no domain's name, or is there twice; or there is none.
    """
    names = sorted(check_name(name, "domain") for name in domains)
    if not names or len(set(names)) < len(names):
        raise InvalidInput("a group is of one domain or more, each named once")
    return ",".join(names)


def members_of(domain: str) -> tuple[str, ...]:
    """Return the names that `joined` has joined."""
    return tuple(domain.split(","))
