"""Sizes and durations, as people write them."""

from __future__ import annotations

import re
from typing import Any, NewType

from snaporch.errors import InvalidInput

Size = NewType("Size", int)
"""Bytes; in what people write also ``1GiB``."""
Seconds = NewType("Seconds", float)
"""In what people write also ``5min``."""

_BYTES = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
}


def parse_size(value: int | str) -> int:
    """Return bytes for ``1073741824`` or ``"1GiB"`` (K, M, G, KiB, MiB, GiB, TiB; all binary).

    Raises:
        InvalidInput: it is no size.
    """
    if isinstance(value, int):
        return value
    text = value.strip().upper()
    digits = text.rstrip("KMGTIB ")
    unit = text[len(digits) :].strip()
    if unit not in _BYTES or not digits.strip().isdecimal():
        raise InvalidInput(f"{value!r} is not a size; write for example 1073741824, 512MiB or 1GiB")
    return int(digits) * _BYTES[unit]


def parse_rate(value: Any) -> int:
    """Return bytes, or bytes a second: as `parse_size`, and with ``/s`` behind it if one likes.

    Raises:
        InvalidInput: it is no size.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidInput(f"{value!r} is not a size; write for example 1073741824, 512MiB or 1GiB")
    return parse_size(value.removesuffix("/s") if isinstance(value, str) else value)


_SECONDS = {"s": 1.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)")


def parse_duration(value: float | str) -> float:
    """Return seconds for ``90`` or ``"90s"``, ``"5min"``, ``"2h"``, ``"7d"``, ``"4w"``.

    Raises:
        InvalidInput: it is no duration.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise InvalidInput(f"{value!r} is not a duration; write for example 90, 90s, 5min, 2h, 7d or 4w")
    return float(found[1]) * _SECONDS[found[2]]
