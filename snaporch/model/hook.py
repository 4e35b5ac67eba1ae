"""Programs of the user's that are run at some moment: what they are."""

from __future__ import annotations

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.units import Seconds


@attrs.frozen
class Hook:
    """A program to run; no shell. It is told where it is by ``SNAPORCH_*`` variables.

    Attributes:
        command: the program and its arguments.
        deadline: it is ended after so long, and has then failed.
    """

    command: tuple[str, ...]
    deadline: Seconds = Seconds(60.0)  # noqa: RUF009 - a number

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
