"""JSON Schema of attrs classes, as the converter writes and reads them; no I/O."""

from __future__ import annotations

import enum
import inspect
import re
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
    """Makes the schemas of types. What a class's docstring says of its attributes is in their descriptions.

    Attributes:
        simple: the schemas of types that are not to be looked into.
        inline: a class is put where it is used; otherwise it is referred to there, by its name in `components`.
        null: that something may be left out is said as null; otherwise, as in TOML, it is not said.
        components: the classes that are referred to, by name.
    """

    simple: Mapping[Any, dict[str, Any]] = attrs.field(factory=dict)
    inline: bool = False
    null: bool = True
    components: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    def of(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type.

        Raises:
            TypeError: there is none.
        """
        if (known := {**_SIMPLE, **self.simple}.get(kind)) is not None:
            return dict(known)
        if attrs.has(kind) or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            if self.inline:
                return self._class(kind)
            if kind.__name__ not in self.components:
                self.components[kind.__name__] = {}  # it may refer to itself
                self.components[kind.__name__] = self._class(kind)
            return {"$ref": f"#/components/schemas/{kind.__name__}"}
        return self._generic(typing.get_origin(kind), typing.get_args(kind))

    def _generic(self, origin: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
        if origin in {types.UnionType, typing.Union}:
            kinds = [each for each in arguments if self.null or each is not type(None)]
            return {"anyOf": [self.of(each) for each in kinds]} if len(kinds) > 1 else self.of(kinds[0])
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
        fields, texts = attrs.fields(attrs.resolve_types(kind)), _attribute_texts(kind)
        required = [field.name for field in fields if field.default is attrs.NOTHING]
        properties = {field.name: self.of(field.type) | texts.get(field.name, {}) for field in fields}
        if kind in FORMATS:
            properties = {KEY: _number(FORMATS[kind].number)} | properties
        end = {"required": required} if required else {}
        return about | {"type": "object", "properties": properties, "additionalProperties": False} | end


def _number(newest: int) -> dict[str, Any]:
    about = "the number of the format that the rest is of; 1 by default"
    return {"type": "integer", "minimum": 1, "maximum": newest, "description": about}


def _attribute_texts(kind: type) -> dict[str, dict[str, Any]]:
    """Return, as descriptions, what the docstring of a class says of its attributes."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: {"description": " ".join(text.split())} for name, text in found}
