"""How a call travels from snaporch to the simulated host and back, with all that can happen on the way.

A call goes through these points, in this order:

1.  `SimulatedHost.on_call`;
2.  a checkpoint: a cancelled call has had no effect if it is cancelled here;
3.  faults that come before the effect; whether the process is there and answers;
4.  the effect, at once: *from here on cancellation does not take it back*, as with a command that has been sent;
5.  `SimulatedHost.on_effect`, and a checkpoint: cancelled here, the effect is there and the caller does not know;
6.  the time that it takes;
7.  faults that come after the effect.

A process that dies before 4 gives ConnectionGone, later OutcomeUnknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import trio

from snaporch.drivers.simulated.faults import Fault
from snaporch.drivers.simulated.host import SimulatedHost
from snaporch.drivers.simulated.migration import SAME
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.errors import ConnectionGone, OutcomeUnknown

if TYPE_CHECKING:
    from snaporch.drivers.simulated.guard import SimulatedGuard

T = TypeVar("T")


class SimulatedKill(BaseException):
    """The process that the driver belongs to was killed by `SimulatedDriver.die`.

    Not an Exception: nothing that a program does about errors happens in one that got SIGKILL.
    """


class Client:
    """One process of snaporch, as the host sees it; a driver and all that it opens share one."""

    def __init__(self, host: SimulatedHost) -> None:
        self.host = host
        self.killed = False
        self.works = trio.Event()
        self.works.set()
        self.guards: set[SimulatedGuard] = set()

    def check_alive(self) -> None:
        """Raise SimulatedKill when the program no longer runs."""
        if self.killed:
            raise SimulatedKill

    async def check_works(self) -> None:
        """Wait while the program is stopped, as `SimulatedDriver.stop` has it.

        What is cancelled meanwhile gets its turn only when the program goes on.
        """
        self.check_alive()
        with trio.CancelScope(shield=True):
            await self.works.wait()
        self.check_alive()

    async def call(
        self,
        at: str,
        label: str,
        effect: Callable[[], T],
        seconds: float = 0.0,
        process: SimulatedProcess | None = None,
    ) -> T:
        """Go through all points and return what `effect` does."""
        faults = await self.enter(at, label, process)
        result = effect()
        await self.leave(at, label, seconds, process, faults)
        return result

    async def enter(self, at: str, label: str, process: SimulatedProcess | None = None) -> list[Fault]:
        """Go through points 1 to 3; return the faults that are for point 7."""
        await self.check_works()
        self.host.on_call(at, label)
        await trio.lowlevel.checkpoint()
        self.check_alive()
        faults = self.host.faults.take(at, label)
        for fault in faults:
            if not fault.after:
                await self._strike(fault, label, process)
        if process is not None:
            await self.reach(at, label, process)
        return [fault for fault in faults if fault.after]

    async def reach(self, at: str, label: str, process: SimulatedProcess) -> None:
        """Raise when a process is gone or does not answer; else bring it up to date."""
        process.settle()
        if process.hung:
            seconds = self.host.speed.answer_deadline
            await self.wait(seconds, process)
            if not process.ended:
                raise OutcomeUnknown(label, at, seconds)
        if process.ended:
            raise ConnectionGone(f"{label}: its process ({process.pid}) is gone: {process.ended}")

    async def leave(
        self, at: str, label: str, seconds: float, process: SimulatedProcess | None, faults: list[Fault]
    ) -> None:
        """Go through points 5 to 7."""
        self.host.on_effect(at, label)
        await trio.lowlevel.checkpoint()
        await self.wait(seconds, process)
        for fault in faults:
            await self._strike(fault, label, process)
        if process is not None and process.ended:
            raise OutcomeUnknown(label, at, None)

    async def wait(self, seconds: float, process: SimulatedProcess | None = None) -> None:
        """Let time pass, no longer than the process lives."""
        if process is None:
            await trio.sleep(seconds)
        else:
            end = self.host.now() + seconds
            while (left := end - process.settle()) > SAME and not process.ended:
                with trio.move_on_after(max(SAME, min(left, process.guest.off_at() - self.host.now()))):
                    await process.changed.wait()
        await self.check_works()

    async def _strike(self, fault: Fault, label: str, process: SimulatedProcess | None) -> None:
        if fault.hang is not None:
            await self.wait(fault.hang, process)
        if fault.crash or fault.power_off:
            why = "the guest powered off" if fault.power_off else "it crashed"
            for victim in [process] if process is not None else self.host.running(fault.domain):
                victim.settle()
                victim.end(why)
        if (error := fault.raised(label)) is not None:
            raise error
