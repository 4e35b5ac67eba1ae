"""How a domain goes back to a point; the table of what is done is in `snaporch.engine.steps`."""

from __future__ import annotations

import enum

import attrs


class Way(enum.StrEnum):
    """How a domain goes back to a point. The value is what the journal holds.

    A way to a point inside images says too what becomes of the process that has them open.
    """

    BESIDE = "beside"
    """The new guest is complete beside the old one before the old one is touched."""
    LAZY = "beside, lazy"
    """The same, but the new guest runs before its memory is there; the old process is kept, paused, until it is."""
    PROVEN = "proven"
    """A throw-away copy shows that the point loads; the old guest is kept in a file until the new one is there."""
    IN_PLACE = "in-place"
    """The hypervisor process that runs the guest loads the point itself."""
    DISPLACE = "displace"
    """With FORCE: the old guest is ended first, and cannot be brought back."""
    INACTIVE = "inactive"
    """No guest runs afterwards."""
    INSIDE = "inside"
    """The point is inside the images that the running guest is on, and is loaded by the same process."""
    INSIDE_INACTIVE = "inside, inactive"
    """The images go back in place; no process has them open."""
    INSIDE_DISPLACE = "inside, displace"
    """With FORCE: as before, once the process that has them open is ended."""
    VERIFY = "verify"
    """None: a throw-away copy that takes nobody's place."""
    CLONE = "clone"
    """None: a new domain, which takes nobody's place either."""
    NONE = "none"
    """There is none."""

    @property
    def word(self) -> str:
        """What users are told: nothing of when the memory is loaded, or what becomes of the process."""
        return self.partition(",")[0]


@attrs.frozen
class WayBack:
    """How a domain, as it is now, would go back to a point of it.

    Attributes:
        way: `BESIDE`, `PROVEN`, `IN_PLACE`, `DISPLACE` or `NONE`.
        reason: why not beside, in words; empty where it is.
    """

    way: Way
    reason: str = ""
