"""The numbers of the formats of what is stored and served, and the way from an old one to the present one.

A class whose values are stored or served as JSON is marked with `versioned`. Wherever such a value is written, at
the top of a document or within another one, ``"format": N`` is written with it. Where one is read, a document of an
earlier format goes through the class's upcasters first, one number at a time. A document without a number is of
format 1, which is what snaporch 0.1 wrote.

When does the number change? When a reader of the present number would misunderstand the new document: a key is
renamed, removed, or means something else. Then a function from the last number to the next is added at the end of
the class's upcasters, and a document of the last format is added to tests/golden. A new key with a default does not
change the number: a reader that does not know the key refuses that document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

C = TypeVar("C", bound=type)

KEY = "format"

Upcast = Callable[[dict[str, Any]], dict[str, Any]]
"""Returns a document of the next format; it may change the one that it is given, which is a copy."""


class NewerFormat(ValueError):
    """A document is of a later format than this snaporch knows."""


@attrs.frozen
class Format:
    """How a class is written.

    Attributes:
        name: what its documents are called in errors and in the golden files.
        upcasts: the first makes format 2 of format 1, and so on.
    """

    name: str
    upcasts: tuple[Upcast, ...] = ()

    @property
    def number(self) -> int:
        """The present format."""
        return len(self.upcasts) + 1

    def current(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return a document's keys in the present format, without the number.

        Raises:
            NewerFormat: it is of a later one.
            ValueError: its number is none.
        """
        found = dict(document)
        number = found.pop(KEY, 1)
        if type(number) is not int or number < 1:
            raise ValueError(f"{number!r} is not the number of a format")
        if number > self.number:
            raise NewerFormat(
                f"a {self.name} of format {number} was written by a newer snaporch; this one knows formats up to "
                f"{self.number}: use the newer one"
            )
        for upcast in self.upcasts[number - 1 :]:
            found = upcast(found)
        return found


FORMATS: dict[type, Format] = {}
"""All versioned classes."""


def versioned(name: str, *upcasts: Upcast) -> Callable[[C], C]:
    """Mark an attrs class as one whose documents have a number: one more than it has upcasters."""

    def mark(class_: C) -> C:
        if KEY in attrs.fields_dict(class_):
            raise TypeError(f"{class_.__name__} has a field of the name {KEY}, which is the number's")
        FORMATS[class_] = Format(name, upcasts)
        return class_

    return mark
