"""A disk of a simulated guest, and one that is about to go over to another image."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from snaporch.drivers.simulated.files import Image


@attrs.define(eq=False)
class Drive:
    """A disk of a running domain: the image it is on, and the name of that image's block node."""

    target: str
    image: Image
    node: str
    readonly: bool = False


@attrs.define(eq=False)
class Pivot:
    """A disk that is about to go over from the first image of `run`, where it is active, to the last.

    Both hold the same by then; the first may have been removed.

    Attributes:
        noted: the disk is to go over.
    """

    drive: Drive
    run: Sequence[Image]
    noted: bool = False

    @property
    def top(self) -> str:
        """The path of the upper image."""
        return self.run[0].path
