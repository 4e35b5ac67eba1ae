"""Numbers and texts have a range: what is beyond it is a mistake, or meant to do harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from snaporch.errors import InvalidInput

MOST_BYTES = 2**60  # a second, or in all
MOST_SECONDS = 1e9  # about thirty years
MOST_TEXT = 64 * 1024
MOST_ITEMS = 10_000
MOST_CLONES = 1_000  # by one operation
SHUTDOWN_SECONDS = 60.0  # for a guest to power off by itself, unless another time is given

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def within(least: float, most: float) -> Check:
    """Return an attrs validator of a number, or None, from `least` to `most`."""

    def check(_: Any, attribute: attrs.Attribute[Any], value: float | None) -> None:
        if value is not None and not least <= value <= most:
            raise InvalidInput(f"{attribute.name}: {value!r:.40} is not between {least:,} and {most:,}")

    return check


def no_longer_than(most: int) -> Check:
    """Return an attrs validator of a text or a collection."""

    def check(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if len(value) > most:
            raise InvalidInput(f"{attribute.name}: {len(value):,} is more than {most:,}")

    return check


LONGEST_SOCKET = 107
"""Bytes of a unix socket's path: sizeof(sockaddr_un.sun_path), without the final NUL."""
