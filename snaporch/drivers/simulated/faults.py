"""Faults to be injected, and the places where they can be.

A fault is found by the name of the call that it strikes, for example ``machine.switch``: face and method of
`snaporch.drivers.base`. Two kinds of places are inside of calls:

    stream.half             when half of RAM has been sent, while `Stream.finished` looks on
    machine.switch.TARGET   one disk inside the transaction of `Machine.switch`; all are undone
"""

from __future__ import annotations

import errno
import inspect

import attrs

from snaporch.drivers import base
from snaporch.drivers.simulated.files import os_error
from snaporch.errors import CommandRefused, Refused

_FACES: dict[str, tuple[type, ...]] = {
    "driver": (base.Driver, base.StartsBeside),
    "machine": (
        base.Machine,
        base.MemoryStreams,
        base.LoadsMemory,
        base.Overlays,
        base.LiveMerges,
        base.LiveCopies,
        base.PointsInside,
        base.GuestAgent,
        base.DirtyRate,
    ),
    "stream": (base.Stream,),
    "guard": (base.Guard,),
    "storage": (base.Storage, base.OfflineMerges, base.ImagePoints, base.ChainCosts),
}
# They wait for nothing and ask nobody, or are made of others: nothing can happen in them.
_SILENT = (
    {
        f"driver.{name}"
        for name in ("alive", "pid", "present", "restore", "take_place", "come_back", "forget", "overlay_place")
    }
    | {"machine.refusal"}
    | {
        f"machine.{name}"
        for name in ("pause_times", "run_times", "run_changes", "forget_pauses", "stream", "guard", "merge_back")
    }
)
_DISK = "machine.switch."

POINTS = frozenset(
    f"{face}.{name}"
    for face, classes in _FACES.items()
    for class_ in classes
    for name, value in vars(class_).items()
    if inspect.isfunction(value) and not name.startswith("_")
) - _SILENT | {"stream.half"}
"""Every place where a fault can strike, besides ``machine.switch.TARGET``."""


@attrs.define(eq=False)
class Fault:
    """What happens at one place; made by `FaultPlan.add`, which explains the fields.

    Attributes:
        seen: calls that matched since the fault was added.
        fired: how often it has struck.
    """

    at: str
    nth: int = 1
    times: float = 1
    error: Exception | None = None
    hang: float | None = None
    crash: bool = False
    power_off: bool = False
    after: bool = False
    domain: str | None = None
    seen: int = 0
    fired: int = 0

    def matches(self, at: str, domain: str) -> bool:
        """Return whether it is for this call; calls of `Storage` belong to no domain and always fit."""
        return at == self.at and (self.domain is None or not domain or domain == self.domain)

    def strikes(self) -> bool:
        """Count a call that matches and return whether it is to be struck."""
        self.seen += 1
        due = self.nth <= self.seen < self.nth + self.times
        self.fired += due
        return due

    def raised(self, label: str) -> Exception | None:
        """Return the error to raise, or None when the call goes on (after a hang, or beside a dead machine)."""
        if self.error is not None or self.hang is not None or self.crash or self.power_off:
            return self.error
        face = self.at.partition(".")[0]
        if face == "storage":
            return os_error(errno.EIO, "injected")
        if face == "driver":
            return Refused(f"{label}: injected fault at {self.at}")
        return CommandRefused(label, self.at, "GenericError", "injected fault")


@attrs.define(eq=False)
class FaultPlan:
    """The faults of a host."""

    faults: list[Fault] = attrs.field(factory=list)

    def add(
        self,
        at: str,
        *,
        nth: int = 1,
        times: float = 1,
        error: Exception | None = None,
        hang: float | None = None,
        crash: bool = False,
        power_off: bool = False,
        after: bool = False,
        domain: str | None = None,
    ) -> Fault:
        """Plan a fault and return it; its `fired` tells later whether it struck.

        With none of `error`, `hang`, `crash` and `power_off` the call raises what its face mostly does:
        CommandRefused (machine, stream), OSError EIO (storage), Refused (driver).

        Args:
            at: a name of `POINTS`, or ``machine.switch.TARGET``, which takes an `error` only.
            nth: the first call to strike, counted from now, beginning with 1.
            times: how many calls in a row; ``math.inf``: all from then on.
            error: raised by the call.
            hang: seconds before anything else happens; ``math.inf``: until the call is cancelled or the machine is
                gone.
            crash: the hypervisor process dies: RAM is lost, its disks hold what was written last. For a call of
                `Storage`: those of `domain`, else all.
            power_off: the guest powers off, at which its process ends.
            after: the call has its effect first, as with an answer that is lost.
            domain: only calls for this domain; None: all.

        Raises:
            ValueError: there is no such place: the fault would never strike.
        """
        if at not in POINTS and not at.startswith(_DISK):
            raise ValueError(f"{at!r} is no place for a fault: {', '.join(sorted(POINTS))}, {_DISK}TARGET")
        if after and at == "stream.half":
            raise ValueError(f"{at} has no effect of its own that the fault could come after")
        if at.startswith(_DISK) and (after or hang is not None or crash or power_off):
            raise ValueError(f"{at} is inside of a transaction: there can only be an error")
        fault = Fault(at, nth, times, error, hang, crash, power_off, after, domain)
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults."""
        self.faults.clear()

    def take(self, at: str, domain: str) -> list[Fault]:
        """Count a call and return the faults that strike it."""
        return [fault for fault in self.faults if fault.matches(at, domain) and fault.strikes()]
