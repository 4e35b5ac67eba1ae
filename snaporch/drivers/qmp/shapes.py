"""The shapes of answers to commands, as far as snaporch reads them: any other shape is a clear error.

A hypervisor that a guest has taken over may answer anything. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snaporch.errors import ProtocolError

_NAMES = {str: "string", int: "whole number", bool: "truth value", list: "list", dict: "object"}

# A class: a value of it. A list: any number of such. A dict: an object with these keys, and others; those that end
# in a question mark may be missing.
_POINT = {"name": str}
_IMAGE: dict[str, Any] = {"filename": str, "virtual-size": int, "backing-image?": dict, "snapshots?": [_POINT]}
_NODE: dict[str, Any] = {"node-name?": str, "drv": str, "ro": bool, "image": _IMAGE, "active?": bool, "group?": str}
_SHAPES: dict[str, Any] = {
    "query-block": [{"device": str, "qdev?": str, "inserted?": _NODE}],
    "query-blockstats": [{"node-name?": str, "stats": {"wr_highest_offset": int}}],
    "query-chardev": [{"label": str, "filename": str, "frontend-open": bool}],
    "query-commands": [{"name": str}],
    "query-cpus-fast": [{}],
    "query-dirty-rate": {"status": str, "dirty-rate?": int},
    "query-jobs": [
        {"id": str, "status": str, "current-progress": int, "total-progress": int, "error?": str},
    ],
    "query-kvm": {"enabled": bool},
    "query-memory-size-summary": {"base-memory": int},
    "query-migrate": {
        "status?": str,
        "error-desc?": str,
        "ram?": {"transferred?": int, "total?": int, "remaining?": int},
    },
    "query-migrate-capabilities": [{"capability": str, "state": bool}],
    "query-migrate-parameters": {},
    "query-named-block-nodes": [_NODE],
    "query-status": {"status": str, "running": bool},
    "qom-get": str,
    "qom-list": [{"name": str, "type": str}],
}


def check_answer(label: str, command: str, value: Any) -> None:
    """Refuse an answer that is not of its command's shape.

    Raises:
        ProtocolError: so it is; the place is named.
    """
    if (shape := _SHAPES.get(command)) is not None and (where := _wrong(shape, value)) is not None:
        raise ProtocolError(f"{label}: QEMU answers {command} with what is no such answer{where}")


def _wrong(shape: Any, value: Any) -> str | None:
    """Return where a value is not of a shape; None where it is."""
    wanted: Any = shape if isinstance(shape, type) else type(shape)
    if type(value) is not wanted:
        return f": no {_NAMES[wanted]}"
    found: Iterator[tuple[str, str | None]] = iter(())
    if wanted is list and shape is not list:
        found = ((f"[{index}]", _wrong(shape[0], each)) for index, each in enumerate(value))
    elif wanted is dict and shape is not dict:
        found = ((f".{name.rstrip('?')}", _inner(name, inner, value)) for name, inner in shape.items())
    return next((f"{at}{where}" for at, where in found if where is not None), None)


def _inner(name: str, shape: Any, value: dict[str, Any]) -> str | None:
    key = name.rstrip("?")
    if key in value:
        return _wrong(shape, value[key])
    return ": missing" if key == name else None
