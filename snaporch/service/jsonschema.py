"""JSON Schema of attrs classes, as the converter writes and reads them."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

import attrs

from snaporch.model.formats import FORMATS, KEY

_SIMPLE: dict[Any, dict[str, Any]] = {
    Any: {},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    type(None): {"type": "null"},
}


@attrs.define
class Schemas:
    """Gathers the schemas of classes under their names; a class is referred to by that name everywhere.

    Attributes:
        components: by class name.
    """

    components: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    def of(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type.

        Raises:
            TypeError: there is none.
        """
        if kind in _SIMPLE:
            return dict(_SIMPLE[kind])
        if attrs.has(kind) or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            if kind.__name__ not in self.components:
                self.components[kind.__name__] = {}  # it may refer to itself
                self.components[kind.__name__] = self._class(kind)
            return {"$ref": f"#/components/schemas/{kind.__name__}"}
        return self._generic(typing.get_origin(kind), typing.get_args(kind))

    def _generic(self, origin: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
        if origin in {types.UnionType, typing.Union}:
            return {"anyOf": [self.of(each) for each in arguments]}
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if isinstance(origin, type) and issubclass(origin, Collection):
            if origin is tuple and arguments[-1] is not ...:
                items: dict[str, Any] = {"prefixItems": [self.of(each) for each in arguments], "items": False}
                return {"type": "array", "minItems": len(arguments)} | items
            return {"type": "array", "items": self.of(arguments[0])}
        raise TypeError(f"there is no schema for {origin} of {arguments}")

    def _class(self, kind: Any) -> dict[str, Any]:
        about = {"title": kind.__name__, "description": (kind.__doc__ or "").strip().split("\n")[0]}
        if issubclass(kind, enum.Enum):
            return about | {"type": "string", "enum": [each.value for each in kind]}
        fields = attrs.fields(attrs.resolve_types(kind))
        required = [field.name for field in fields if field.default is attrs.NOTHING]
        properties = {field.name: self.of(field.type) for field in fields}
        if kind in FORMATS:
            number = {"type": "integer", "minimum": 1, "maximum": FORMATS[kind].number}
            properties = {KEY: number} | properties
        end = {"required": required} if required else {}
        return about | {"type": "object", "properties": properties, "additionalProperties": False} | end
