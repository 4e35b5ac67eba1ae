"""Bodies into values, strictly: a string is no number, and ``"false"`` is not true."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from cattrs.preconf.json import make_converter

T = TypeVar("T")

_converter = make_converter(forbid_extra_keys=True)


def _only(kind: type[T]) -> Any:
    def structure(value: Any, _: type[T]) -> T:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)  # type: ignore[call-arg]
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise TypeError(f"expected {kind.__name__}, not {value!r:.60}")
        return kind(value)  # type: ignore[call-arg]

    return structure


for _kind in (bool, int, float, str):
    _converter.register_structure_hook(_kind, _only(_kind))


def structured(data: Any, kind: type[T]) -> T:
    """Return JSON's data as a `kind`.

    Raises:
        cattrs.BaseValidationError: it is none.
    """
    value: T = _converter.structure(data, kind)
    return value
