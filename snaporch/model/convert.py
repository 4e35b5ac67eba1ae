"""The one converter between snaporch's values and JSON or TOML.

Unknown keys are errors with the place in them: a typing error in a definition must not silently do nothing.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import attrs
import cattrs
from cattrs.preconf.json import make_converter

from snaporch.errors import InvalidInput
from snaporch.model.domain import DomainDefinition

T = TypeVar("T")

converter = make_converter(forbid_extra_keys=True)

_UNITS = {
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
    if unit not in _UNITS or not digits.strip().isdecimal():
        raise InvalidInput(f"{value!r} is not a size; write for example 1073741824, 512MiB or 1GiB")
    return int(digits) * _UNITS[unit]


def load_definition(path: Path) -> DomainDefinition:
    """Read a domain definition; relative paths in it are relative to the file.

    Raises:
        InvalidInput: it cannot be read, is not TOML, has an unknown key or a wrong value.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path}: {error}") from None
    return definition_from(data, path.absolute().parent, str(path))


def definition_from(data: dict[str, Any], base: Path, where: str = "definition") -> DomainDefinition:
    """Structure a definition; see `load_definition`."""
    if "memory" in data:
        data = data | {"memory": parse_size(data["memory"])}
    try:
        definition = converter.structure(data, DomainDefinition)
    except (cattrs.BaseValidationError, cattrs.ForbiddenExtraKeysError, TypeError, ValueError) as error:
        problems = "; ".join(cattrs.transform_error(error, path=where))
        raise InvalidInput(problems) from None

    def absolute(text: str) -> str:
        return os.path.normpath(base / text) if text else ""

    return attrs.evolve(
        definition,
        disks=tuple(attrs.evolve(disk, path=absolute(disk.path)) for disk in definition.disks),
        kernel=absolute(definition.kernel),
        initrd=absolute(definition.initrd),
        serial=absolute(definition.serial),
    )


def dumps(value: Any) -> str:
    """Return `value`, any attrs instance or collection of them, as one JSON document."""
    return json.dumps(converter.unstructure(value))


def loads(text: str, type_: type[T]) -> T:
    """Return what `dumps` made, as a `type_`."""
    return converter.structure(json.loads(text), type_)
