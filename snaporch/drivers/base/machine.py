"""What every machine can do, its memory streams, and the guard of its pauses."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

from snaporch.drivers.base.values import Capabilities, GuestVerb, PauseNote, Progress, Trait
from snaporch.images.kinds import Traced
from snaporch.model.domain import DiskStatus, DomainState, MachineShape
from snaporch.model.record import FileRecord


class Stream(abc.ABC):
    """One memory stream of a machine, from its preparation to its sealed file."""

    @abc.abstractmethod
    async def open(self) -> None:
        """Make everything ready for writing to the memory file, which exists; the guest notices nothing."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Begin; with BACKGROUND the point is taken after this and before `armed` returns."""

    async def start_early(self, seconds: float) -> bool:
        """Begin a BACKGROUND stream while the guest runs, and stop the guest so many seconds later.

        For machines with the trait LATE_STOPS.

        Returns:
            Whether the point is still to be taken, with a guest that stays paused. If not, it is to be done anew:
            the stream is ended and open once more, and the guest runs.
        """
        raise NotImplementedError

    def setup_seconds(self) -> float | None:
        """Return what the hypervisor had to do before it took the point; known when `armed` has returned."""
        return None

    @abc.abstractmethod
    async def armed(self) -> None:
        """Return when the point is complete, whatever the guest does from now on (BACKGROUND only)."""

    @abc.abstractmethod
    async def finished(self, progress: Progress) -> None:
        """Return when all memory has left the hypervisor."""

    @abc.abstractmethod
    async def limit(self, bandwidth: int) -> None:
        """Limit the stream to so many bytes a second, 0 for no limit; call it only while `finished` runs.

        A stream that was adopted after a crash of snaporch may keep its earlier limit.
        """

    async def hold(self, seconds: float) -> None:  # noqa: B027 - only where a stream takes CPUs from the guests
        """Let a BACKGROUND stream take next to nothing for so long; with 0, let it go on."""

    @abc.abstractmethod
    async def seal(self) -> FileRecord:
        """Put the hypervisor's settings back, and return the file's record once it is fsynced.

        May be called again, by recovery after a crash of snaporch, until `forget`.
        """

    @abc.abstractmethod
    async def forget(self) -> None:
        """Remove what `seal` needed: its answer is in the journal. Idempotent."""

    @abc.abstractmethod
    async def abort(self) -> None:
        """End the stream, whatever it is doing, and put the hypervisor's settings back.

        Idempotent; returns quietly when the process is gone.
        """


class Guard(abc.ABC):
    """Watches while a guest is paused by snaporch: if snaporch dies or is stopped meanwhile, it lets the guest run.

    It is a process of its own, does nothing as long as snaporch works, and leaves nothing behind but the verdict.
    """

    @abc.abstractmethod
    async def post(self) -> None:
        """Start the guard: until `dismiss`, the guest is never left paused because snaporch died."""

    @abc.abstractmethod
    def has_acted(self) -> bool:
        """Return whether it has let the guest run, as it has heard nothing from snaporch for a while."""

    @abc.abstractmethod
    async def dismiss(self) -> None:
        """Send it away. Idempotent; nothing happens where none was posted."""


class Machine(abc.ABC):
    """A connection to a running machine, which is one domain's. See `snaporch.drivers.base.traits` for the rest."""

    capabilities: Capabilities

    @property
    def traits(self) -> frozenset[Trait]:
        """The traits that this machine has."""
        return self.capabilities.traits

    @abc.abstractmethod
    async def state(self) -> DomainState:
        """Return RUNNING or PAUSED."""

    async def refusal(self, verb: GuestVerb) -> str:  # noqa: ARG002 - where there are only those two states
        """Return why a verb cannot be done while the guest is as it is now, with what to do, or an empty string."""
        return ""

    async def condition(self) -> str:
        """Return what the guest does, in the hypervisor's own word: more than `state` tells apart."""
        return str(await self.state())

    @abc.abstractmethod
    async def disks(self) -> tuple[DiskStatus, ...]:
        """Return every disk that has an image, in the guest's order."""

    async def shape(self) -> MachineShape:
        """Return what the machine is made of."""
        return MachineShape(self.capabilities.ram, 0, await self.disks())

    async def oddities(self) -> Mapping[str, Traced]:
        """Return, by target, what lies between a disk and a plain image: a snapshot cannot contain it."""
        return {}

    async def jobs_of_others(self, *, ending: bool = False) -> Sequence[str]:  # noqa: ARG002 - where there are none
        """Return, in words, what other programs have it do with its images: a backup, a mirror, a merge.

        Args:
            ending: the machine is to end: what it serves to others (an NBD export) ends, too.
        """
        return ()

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop the CPUs; on return no disk request is in flight."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Let the CPUs run; nothing happens when they do."""

    @abc.abstractmethod
    def guard(self, note: PauseNote) -> Guard:
        """Return a guard for this machine's guest, which runs; nothing happens before `Guard.post`."""

    @abc.abstractmethod
    def pause_times(self) -> tuple[float, float] | None:
        """Return when the last pause since `forget_pauses` began and ended: the hypervisor's own time stamps."""

    def run_times(self) -> tuple[float | None, float | None]:
        """Return when the guest first stopped and last ran on since `forget_pauses`, as far as it did.

        By the hypervisor's own time stamps; where it has none, neither is known.
        """
        return None, None

    @abc.abstractmethod
    def run_changes(self) -> int:
        """Return how often the guest was stopped or let run since `forget_pauses`, by snaporch or by others."""

    @abc.abstractmethod
    def forget_pauses(self) -> None:
        """Begin a new account of pauses."""

    @abc.abstractmethod
    async def shutdown(self) -> None:
        """Ask the guest to power off (ACPI); returns at once."""

    @abc.abstractmethod
    async def quit(self) -> None:
        """End the process, without asking the guest; returns when it is gone."""
