"""Programs of the user's that are run at some moment: what they are; and durations."""

from __future__ import annotations

import re
from typing import NewType

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.convert import strict

Seconds = NewType("Seconds", float)

_UNITS = {"s": 1.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
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
    return float(found[1]) * _UNITS[found[2]]


@attrs.frozen
class Hook:
    """A program to run; no shell. It is told where it is by ``SNAPORCH_*`` variables.

    Attributes:
        command: the program and its arguments.
        deadline: it is ended after so long, and has then failed.
    """

    command: tuple[str, ...]
    deadline: Seconds = Seconds(60.0)

    def __attrs_post_init__(self) -> None:
        if not self.command or not self.command[0]:
            raise InvalidInput("command: give the program and its arguments, for example ['sync']")


@attrs.frozen
class RevertHook(Hook):
    """A program to run after a revert.

    Attributes:
        domains: only of domains whose names match one of these, for example ``web*``; none: of all.
    """

    domains: tuple[str, ...] = ()


@attrs.frozen
class RootHooks:
    """The programs of a root: its file ``hooks.toml``.

    Attributes:
        after_revert: for each domain that has gone back, in order, when the revert is complete.
    """

    after_revert: tuple[RevertHook, ...] = ()


strict.register_structure_hook(Seconds, lambda value, _: Seconds(parse_duration(value)))
