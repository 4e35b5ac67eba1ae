"""A memory stream inside the simulated hypervisor: it goes on whether or not anybody looks.

`Migration.advance` replays what has happened since the last look; it is called before anything else about the
machine is read or changed, so within its time the guest's CPUs change by its own doing only.

BACKGROUND: arming reads all of RAM at `arm_rate`; at its end the point is taken, and from then on RAM is sent.
Everything else is one algorithm, the real one: pass after pass sends what was dirtied during the last; when the
rest fits into the downtime limit (a guest that stands still dirties nothing) the guest is stopped, *there* the
point is taken, and the rest is sent. The guest stays stopped.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import attrs

from snaporch.drivers.simulated.files import MemoryFile
from snaporch.drivers.simulated.guest import Guest

PAGE = 4096  # a rest this small is always sent at once: passes cannot become ever shorter
# Instants that a float cannot tell apart at the age that a simulation reaches; no pass is this short.
SAME = 1e-9
_POLLS = 16  # looks per RAM's worth of bytes: how finely ENOSPC and progress are seen


class Phase(enum.StrEnum):
    """Where a stream is."""

    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@attrs.define(eq=False)
class Migration:
    """One memory stream.

    Attributes:
        guest: whose memory.
        file: where to.
        ram: bytes of RAM.
        versions: what the file is bound to.
        background: the algorithm, see above.
        cursor: the instant up to which everything has been replayed; at first, that of the start.
        bandwidth: bytes a second.
        arming: seconds to arm.
        limit: bytes that may be left when the guest is stopped.
        phase: where it is.
        error: why it failed.
        sent: bytes so far.
        taken: the instant of the point, once it has been taken.
        stopped: the guest was running and was stopped at the point.
    """

    guest: Guest
    file: MemoryFile
    ram: int
    versions: Mapping[str, str]
    background: bool
    cursor: float
    bandwidth: float
    arming: float
    limit: float
    phase: Phase = Phase.ACTIVE
    error: Exception | None = None
    sent: float = 0.0
    taken: float | None = None
    stopped: bool = False
    _left: float = attrs.field(default=attrs.Factory(lambda self: float(self.ram), takes_self=True))
    _dirty: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it is still to go on."""
        return self.phase is Phase.ACTIVE

    @property
    def total(self) -> int:
        """Bytes sent and known to be left."""
        return round(self.sent + self._left)

    def next_look(self) -> float:
        """Return the instant at which something can be new."""
        if self.background and self.taken is None:
            return self.cursor + self.arming
        return self.cursor + min(self._left, self.ram / _POLLS) / self.bandwidth

    def advance(self, now: float) -> None:
        """Replay everything up to `now`."""
        while self.active:
            arming = self.background and self.taken is None
            end = self.cursor + (self.arming if arming else self._left / self.bandwidth)
            until = end if (over := end <= now + SAME) else now
            if arming:
                self._arm(until)
            else:
                self._send(until)
            if not over or not self.active:
                return
            if arming:
                self._take()
            elif self.taken is not None:
                self._complete()
            else:
                self._next_pass()

    def _arm(self, until: float) -> None:
        self.arming -= until - self.cursor
        self.cursor = until

    def _send(self, until: float) -> None:
        seconds = until - self.cursor
        if self.taken is None and self.guest.runs:
            self._dirty = min(self.ram, self._dirty + self.guest.model.dirty_rate * seconds)
        size = min(self._left, seconds * self.bandwidth)
        self.sent, self._left, self.cursor = self.sent + size, self._left - size, until
        try:
            self.file.grow(round(self.sent) - self.file.size)
        except OSError as error:
            self.fail(error)

    def _next_pass(self) -> None:
        """Begin to send what was dirtied meanwhile, with the guest stopped when that is little enough."""
        self._left, self._dirty = self._dirty, 0.0
        if self._left <= max(self.limit, PAGE):
            self.stopped = self.guest.runs
            if self.stopped:
                self.guest.stop(self.cursor)
            self._take()

    def _take(self) -> None:
        self.taken = self.cursor
        self.file.number, self.file.torn = self.guest.ticks_at(self.cursor), self.guest.torn
        self.file.frozen = self.guest.frozen

    def _complete(self) -> None:
        self.phase = Phase.COMPLETED
        self.file.ram, self.file.versions, self.file.complete = self.ram, self.versions, True

    def fail(self, error: Exception) -> None:
        """End the stream with an error; the guest goes on if it was stopped for it."""
        self._give_up(Phase.FAILED)
        self.error = error

    def cancel(self) -> None:
        """End the stream, if it has not ended; the guest goes on if it was stopped for it."""
        if self.active:
            self._give_up(Phase.CANCELLED)

    def _give_up(self, phase: Phase) -> None:
        self.phase = phase
        if self.stopped:
            self.guest.start(self.cursor)
