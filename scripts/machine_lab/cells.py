"""The table of machines: each is a function that is given a lab."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from machine_lab.lab import Lab

Build = Callable[[Lab], Sequence[object]]


@attrs.frozen
class Cell:
    """A machine.

    Attributes:
        name: a short word.
        group: what it is an example of.
        run: takes it from attach to revert.
    """

    name: str
    group: str
    run: Callable[[Lab], None]


CELLS: dict[str, Cell] = {}


def cell(group: str) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
    """Put a function into the table, under its name."""

    def added(run: Callable[[Lab], None]) -> Callable[[Lab], None]:
        name = run.__name__.replace("_", "-")
        CELLS[name] = Cell(name, group, run)
        return run

    return added


def simple(group: str, name: str, build: Build, **flow: Any) -> None:
    """Put a machine into the table that a command line says all of."""

    def run(lab: Lab) -> None:
        lab.start(build(lab))
        lab.flow(**flow)

    CELLS[name] = Cell(name, group, run)


def blockdev(**options: Any) -> list[str]:
    """Return a -blockdev in JSON; dashes are written as underscores."""
    return ["-blockdev", json.dumps({key.replace("_", "-"): value for key, value in options.items()})]


def device(driver: str, **options: Any) -> list[str]:
    """Return a -device in JSON."""
    return ["-device", json.dumps({"driver": driver} | {k.replace("_", "-"): v for k, v in options.items()})]
