"""The simulated guest: a counter, and how long everything takes.

A guest ticks `GuestModel.rate` times a second while its CPUs run. Each tick adds one to a number in RAM and writes
it to every writable disk, in one instant. So whatever belongs to one point holds the same number everywhere, and
anything else (disks switched at another time, memory taken later) does not: by default a microsecond shows.
Nothing ticks by itself: the number is computed from the clock when somebody looks, whatever the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs


@attrs.frozen
class GuestModel:
    """What kind of guest it is.

    Attributes:
        rate: ticks a second.
        dirty_rate: bytes of RAM a second that are written to; what a precopy has to send again.
        disk_rate: bytes a second that each of its disks grows by; 0: it writes to the same place over and over.
        acpi: it obeys a request to power off.
        agent: a guest agent runs in it.
        background_blocker: why its RAM cannot be write-protected, if so.
    """

    rate: float = 1e6
    dirty_rate: float = 50e6
    disk_rate: float = 0.0
    acpi: bool = True
    agent: bool = False
    background_blocker: str = ""


@attrs.frozen
class SimulatedSpeed:
    """How long things take: seconds, or bytes a second.

    An operation has its effect when it is sent and answers after its time; merges and waits have it at the end.

    Attributes:
        query: anything that only asks the hypervisor.
        pause: as `resume`, `switch`: the command of that name.
        resume: see `pause`.
        switch: see `pause`.
        node: to open or close an overlay.
        merge: of images, beside moving the bytes at `disk_bandwidth`.
        stream: to prepare a stream, to begin it, and to abort it, each.
        arm_rate: at which RAM is read and write-protected for BACKGROUND.
        bandwidth: of a memory stream, in bytes a second; a smaller one of `StreamPlan` holds instead.
        downtime_limit: a precopy stops the guest when the rest can be sent in this time.
        load_bandwidth: at which a memory file is loaded.
        disk_bandwidth: at which images are merged.
        checksum_bandwidth: at which a file is read.
        fsync: of one file.
        overlay: to make one.
        launch: until a new process answers.
        connect: to connect.
        quit: until a process that was ended is gone.
        power_off: until a guest that was asked to is off, in time that its CPUs run.
        connect_deadline: after which a connection is given up that nothing answers.
        answer_deadline: after which the outcome of a command is unknown.
    """

    query: float = 0.0002
    pause: float = 0.001
    resume: float = 0.001
    switch: float = 0.001
    node: float = 0.001
    merge: float = 0.01
    stream: float = 0.0005
    arm_rate: float = 100 * 2**30
    bandwidth: float = 1e9
    downtime_limit: float = 0.3
    load_bandwidth: float = 4e9
    disk_bandwidth: float = 1e9
    checksum_bandwidth: float = 4e9
    fsync: float = 0.005
    overlay: float = 0.005
    launch: float = 0.1
    connect: float = 0.001
    quit: float = 0.01
    power_off: float = 2.0
    connect_deadline: float = 10.0
    answer_deadline: float = 30.0

    def merge_seconds(self, size: int, bandwidth: float = 0, *, writes: float = 0.0) -> float:
        """Return how long it takes to merge so many bytes, with a limit on it, while so many a second are added."""
        left = min(bandwidth or math.inf, self.disk_bandwidth) - writes
        return self.merge + (size / left if left > 0 else math.inf)


@attrs.define(eq=False)
class Guest:
    """A guest's RAM and CPUs.

    `ticks` and `running` are for everybody; what is given an instant is for the simulator, which calls it in the
    order of time.

    Attributes:
        model: its kind.
        torn: targets of disks that did not hold RAM's number when RAM was loaded (or, at a boot, the highest number
            of all disks): proof of a point that was none. It stays with the guest, and with what is saved of it.
        loaded: there is something in RAM; false while it waits for its memory file.
        stopped: when the CPUs stopped last, as the count of all stops and starts then, and the instant.
        started: likewise.
        frozen: its file systems are frozen: it runs and comes no further, as every tick writes to its disks.
        held: what it writes to a disk is held up, to the same effect.
    """

    model: GuestModel
    look: Callable[[], float]
    torn: frozenset[str] = frozenset()
    loaded: bool = True
    stopped: tuple[int, float] = (0, 0.0)
    started: tuple[int, float] = (0, 0.0)
    frozen: bool = False
    held: bool = False
    _base: int = 0
    _run: float = 0.0
    _since: float | None = None
    _off: float = math.inf

    @property
    def ticks(self) -> int:
        """RAM's number now; after the end of its process: the last."""
        return self.ticks_at(self.look())

    @property
    def running(self) -> bool:
        """Whether the CPUs run now."""
        self.look()
        return self.runs

    @property
    def runs(self) -> bool:
        """As `running`, at the instant that has been looked at."""
        return self._since is not None

    @property
    def changes(self) -> int:
        """How often the CPUs stopped or started."""
        return max(self.stopped[0], self.started[0])

    @property
    def _goes_on_since(self) -> float:
        """Since when it has been coming further; infinite while it does not."""
        return math.inf if self._since is None or self.frozen or self.held else self._since

    def run_time(self, at: float) -> float:
        """Return the seconds that the CPUs have run since RAM was loaded, or got anywhere by running."""
        return self._run + max(0.0, at - self._goes_on_since)

    def ticks_at(self, at: float) -> int:
        """Return RAM's number at an instant since the last change."""
        return self._base + math.floor(self.run_time(at) * self.model.rate)

    def freeze(self, at: float) -> None:
        """Let its file systems be frozen."""
        self._run, self.frozen = self.run_time(at), True

    def thaw(self, at: float) -> None:
        """Let them be thawed, while the CPUs run."""
        self._since, self.frozen = at, False

    def hold(self, at: float) -> None:
        """Hold up what it writes."""
        self._run, self.held = self.run_time(at), True

    def let_go(self, at: float) -> None:
        """Hold it up no more."""
        self.held = False
        if self.runs:
            self._since = at

    def put(self, number: int, torn: frozenset[str], *, frozen: bool = False) -> None:
        """Fill RAM; the CPUs stand still."""
        self.frozen = frozen
        self._base, self._run, self._since = number, 0.0, None
        self.torn, self.loaded, self._off = torn, True, math.inf

    def start(self, at: float) -> None:
        """Let the CPUs run."""
        self._since = at
        self.started = (self.changes + 1, at)

    def stop(self, at: float) -> None:
        """Stop the CPUs."""
        self._run, self._since = self.run_time(at), None
        self.stopped = (self.changes + 1, at)

    def ask_off(self, at: float, seconds: float) -> None:
        """Request a power off, which takes the guest some seconds of running."""
        if self.model.acpi:
            self._off = min(self._off, self.run_time(at) + seconds)

    def off_at(self) -> float:
        """Return when the guest will have powered off, as things are: never, while it stands still."""
        return self._goes_on_since + (self._off - self._run)
