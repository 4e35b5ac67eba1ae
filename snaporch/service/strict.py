"""Bodies into values, strictly: a string is no number, and ``"false"`` is not true."""

from __future__ import annotations

import enum
import math
import types
import typing
from typing import Any, TypeVar, cast

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


def _sequence(kind: Any) -> bool:
    return typing.get_origin(kind) in {tuple, frozenset}


def _from_list(kind: Any) -> Any:
    """Return a hook that takes a JSON array only: a string, too, is a sequence."""
    origin, items = typing.get_origin(kind), cast("Any", types.GenericAlias(list, typing.get_args(kind)[:1]))

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise TypeError(f"expected an array, not {value!r:.60}")
        return origin(_converter.structure(value, items))

    return structure


_converter.register_structure_hook_factory(_sequence, _from_list)
for _kind in (bool, int, float, str):
    _converter.register_structure_hook(_kind, _only(_kind))
# Being a str, it would be left one: equal to the member, and never the member.
_converter.register_structure_hook(enum.StrEnum, lambda value, kind: kind(value))


def structured(data: Any, kind: type[T]) -> T:
    """Return JSON's data as a `kind`.

    Raises:
        cattrs.BaseValidationError: it is none.
    """
    if not isinstance(data, dict):
        raise TypeError(f"expected an object, not {data!r:.60}")
    value: T = _converter.structure(data, kind)
    return value
