"""The converters between snaporch's values and JSON or TOML: one set of hooks for all of them.

- `converter` writes everything, and reads what is stored. Unknown keys are errors.
- `strict` reads what people and clients write: definitions, plans, settings, bodies. Beyond that, nothing is taken
  for what it is not: a string is no number, and ``"false"`` is not true.
- `lenient` reads what a service answers, which may be newer and say more.

Versioned classes (`snaporch.model.formats`) carry the number of their format wherever they are written.
"""

from __future__ import annotations

import difflib
import enum
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs
import cattrs
from cattrs.errors import AttributeValidationNote
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn
from cattrs.preconf.json import JsonConverter, make_converter

from snaporch.errors import InvalidInput, UnreadableRecord
from snaporch.model.domain import DomainDefinition, faults
from snaporch.model.formats import FORMATS, KEY, NewerFormat
from snaporch.model.limits import MOST_ITEMS
from snaporch.model.units import Seconds, Size, parse_duration, parse_rate, parse_size

T = TypeVar("T")

MOST_NAMED = 20  # mistakes that one error names
MOST_KEY = 64  # characters of a key in it


def _make(*, unknown_keys: bool = False) -> JsonConverter:
    """Return a converter that writes and reads versioned classes with their numbers."""
    made = make_converter(forbid_extra_keys=not unknown_keys)

    def writer(class_: Any) -> Callable[[Any], dict[str, Any]]:
        number, write = FORMATS[class_].number, make_dict_unstructure_fn(class_, made)
        return lambda value: {KEY: number} | write(value)

    def reader(class_: Any) -> Callable[[Any, Any], Any]:
        known = FORMATS[class_]
        read = make_dict_structure_fn(class_, made, _cattrs_forbid_extra_keys=not unknown_keys)

        def structure(document: Any, _: Any) -> Any:
            if not isinstance(document, dict):
                raise TypeError("not an object")
            return read(known.current(document), class_)

        return structure

    made.register_unstructure_hook_factory(FORMATS.__contains__, writer)
    made.register_structure_hook_factory(FORMATS.__contains__, reader)
    return made


# What JSON can say and no file name, database or terminal takes: NUL, and halves of characters.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
}


def _only(kind: Any) -> Callable[[Any, Any], Any]:
    """Return a hook that takes a value of a simple kind as it is, or not at all."""

    def structure(value: Any, _: Any) -> Any:
        whole_for_float = kind is float and type(value) is int
        if (type(value) is kind and (kind is not float or math.isfinite(value))) or whole_for_float:
            if kind is str and _NO_TEXT.search(value):
                raise InvalidInput(f"{value!r:.60} has characters that are not valid in text")
            return kind(value)
        raise InvalidInput(f"{value!r:.60} is not {_KINDS[kind]}")

    return structure


def _choice(value: Any, kind: type[enum.StrEnum]) -> enum.StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise InvalidInput(f"{value!r:.60} is none of {', '.join(kind)}") from None


def _is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) in {tuple, frozenset}


def _from_list(kind: Any) -> Any:
    """Return a hook that takes an array only: a string, too, is a sequence."""
    origin, item = typing.get_origin(kind), typing.get_args(kind)[0]
    what = "a list of strings" if item is str else "a list"
    items = cast("Any", types.GenericAlias(list, (item,)))

    def structure(value: Any, _: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) > MOST_ITEMS:
            raise InvalidInput(f"{len(value):,} items are more than {MOST_ITEMS:,}")
        if not isinstance(value, list | tuple) or (
            item is str and not all(isinstance(each, str) for each in value)
        ):
            raise InvalidInput(f"{value!r:.60} is not {what}")
        return origin(strict.structure(value, items))

    return structure


def _make_strict() -> JsonConverter:
    made = _make()
    made.register_structure_hook_factory(_is_sequence, _from_list)
    for kind in _KINDS:
        made.register_structure_hook(kind, _only(kind))
    made.register_structure_hook(enum.StrEnum, _choice)  # else it would be left a string, and never the member
    made.register_structure_hook(Seconds, lambda value, _: Seconds(parse_duration(value)))
    made.register_structure_hook(Size, lambda value, _: Size(parse_rate(value)))
    made.register_structure_hook(DomainDefinition, _definition(made.get_structure_hook(DomainDefinition)))
    return made


def _definition(read: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a hook that names wrong types and wrong values of a definition all at once, each with its place."""

    def structure(document: Any, _: Any) -> Any:
        wrong = list(_faults(document)) if isinstance(document, dict) else []
        if wrong and isinstance(document.get("memory"), str):  # that is said already
            document = {key: value for key, value in document.items() if key != "memory"}
        try:
            found = read(document, DomainDefinition)
            if not wrong:
                return found
        except cattrs.ClassValidationError as error:
            wrong = [*(each for each in error.exceptions if not (wrong and _said_by_the_class(each))), *wrong]
        except InvalidInput:
            if not wrong:
                raise
        raise cattrs.ClassValidationError("a definition", wrong, DomainDefinition)

    return structure


def _said_by_the_class(error: Exception) -> bool:
    """Return whether it is what a definition says of its own values: of no place, and said before with one."""
    return isinstance(error, InvalidInput) and not hasattr(error, "__notes__")


def _faults(document: dict[str, Any]) -> Iterator[Exception]:
    for key, words in faults(document):
        error = InvalidInput(words)
        error.add_note(AttributeValidationNote("in a definition", key, str))
        yield error


converter = _make()
strict = _make_strict()
lenient = _make(unknown_keys=True)


def load_definition(path: Path) -> DomainDefinition:
    """Read a domain definition; relative paths in it are relative to the file.

    Raises:
        InvalidInput: it cannot be read, is not TOML, has an unknown key or a wrong value.
    """
    return definition_from(read_toml(path), path.absolute().parent, str(path))


def definition_from(data: dict[str, Any], base: Path, where: str = "definition") -> DomainDefinition:
    """Structure a definition; see `load_definition`."""
    if isinstance(size := data.get("memory"), str):
        with suppress(InvalidInput):  # it is named with everything else that is wrong
            data = data | {"memory": parse_size(size)}
    definition = structured(data, DomainDefinition, where)

    def absolute(text: str) -> str:
        return os.path.normpath(base / text) if text else ""

    return attrs.evolve(
        definition,
        disks=tuple(attrs.evolve(disk, path=absolute(disk.path)) for disk in definition.disks),
        kernel=absolute(definition.kernel),
        initrd=absolute(definition.initrd),
        serial=absolute(definition.serial),
        nvram=attrs.evolve(definition.nvram, path=absolute(definition.nvram.path)) if definition.nvram else None,
    )


def dumps(value: Any) -> str:
    """Return `value`, any attrs instance or collection of them, as one JSON document."""
    return json.dumps(converter.unstructure(value))


def loads(text: str, type_: type[T]) -> T:
    """Return what `dumps` made, by this snaporch or an earlier one, as a `type_`.

    Raises:
        UnreadableRecord: it is not that, or a newer snaporch has written it.
    """
    try:
        return converter.structure(json.loads(text), type_)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a stored document, it is one that cannot be read
        words = _in_words(error, type_) if isinstance(error, ValueError) else ""
        raise UnreadableRecord(words or "; ".join(cattrs.transform_error(error, "record", _in_words))) from None


def structured(data: Any, kind: type[T], where: str) -> T:
    """Return what people or clients have written as a `kind`, strictly.

    Raises:
        InvalidInput: it is none; every place that is wrong is named, as ``what @ where.table.key``.
    """
    try:
        return strict.structure(data, kind)
    except (cattrs.BaseValidationError, InvalidInput, TypeError, ValueError, AttributeError) as error:
        said = _some(cattrs.transform_error(error, where, _in_words))
    wrong = InvalidInput("; ".join(said))
    if len(said) > 1:
        wrong.faults = said
    raise wrong


def _some(words: Sequence[str]) -> tuple[str, ...]:
    """Return the first of many mistakes: whoever sends a thousand does not read them."""
    more = [f"and {len(words) - MOST_NAMED:,} more"] if len(words) > MOST_NAMED else []
    return (*words[:MOST_NAMED], *more)


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file says.

    Raises:
        InvalidInput: it cannot be read, or is not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise InvalidInput(f"{path}: {error}") from None


def _in_words(error: BaseException, type_: Any) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)]
        keys = sorted(error.extra_fields)
        return "; ".join(
            _some([*(_unknown(key[:MOST_KEY], known) for key in keys[:MOST_NAMED]), *keys[MOST_NAMED:]])
        )
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, InvalidInput | NewerFormat):
        return str(error)
    return f"not a table, or a value of the wrong kind ({getattr(type_, '__name__', type_)})"


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")
