"""The format of plans as a JSON schema, made from the classes of `snaporch.batch.plan`; no I/O.

``python -m snaporch.batch.schema`` prints it; docs/batch.schema.json holds it, and a test compares the two.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import sys
import types
import typing
from typing import Any

import attrs

from snaporch.batch.plan import Plan, Seconds, Size
from snaporch.model.formats import FORMATS, KEY
from snaporch.model.names import NAME

_TEXT: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    Seconds: {"type": ["number", "string"], "minimum": 0, "pattern": r"^\s*\d+(\.\d+)?\s*(s|min|h|d|w)\s*$"},
    Size: {
        "type": ["integer", "string"],
        "minimum": 0,
        "pattern": r"^\s*\d+\s*([KkMmGgTt]([Ii]?[Bb])?|[Bb])?(/s)?\s*$",
    },
}


def _attribute_texts(class_: type) -> dict[str, str]:
    """Return what the docstring of a class says of its attributes."""
    _, _, section = inspect.cleandoc(class_.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _of_type(type_: Any) -> dict[str, Any]:
    if type_ in _TEXT:
        return dict(_TEXT[type_])
    if typing.get_origin(type_) in {
        types.UnionType,
        typing.Union,
    }:  # every one here is with None, which TOML writes by leaving it out
        return _of_type(next(each for each in typing.get_args(type_) if each is not type(None)))
    if typing.get_origin(type_) is tuple:
        return {"type": "array", "items": _of_type(typing.get_args(type_)[0])}
    if typing.get_origin(type_) is dict:
        return {"type": "object", "additionalProperties": _of_type(typing.get_args(type_)[1])}
    if issubclass(type_, enum.StrEnum):
        return {"enum": [str(each) for each in type_]}
    return _of_class(type_)


def _of_class(class_: type) -> dict[str, Any]:
    texts, fields = _attribute_texts(class_), attrs.fields(attrs.resolve_types(class_))
    properties = {field.name: _of_type(field.type) | {"description": texts[field.name]} for field in fields}
    if class_ in FORMATS:
        number = {"type": "integer", "minimum": 1, "maximum": FORMATS[class_].number}
        properties |= {KEY: number | {"description": "the number of the format that the rest is of; 1 by default"}}
    required = [field.name for field in fields if field.default is attrs.NOTHING]
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def plan_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12)."""
    schema = _of_class(Plan)
    schema["properties"]["name"]["pattern"] = f"^{NAME.pattern}$"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "snaporch batch plan",
        "description": (inspect.getdoc(Plan) or "").partition("\n")[0],
    } | schema


def text() -> str:
    """Return the schema as it is published."""
    return json.dumps(plan_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
