"""Runs a plan on the simulated driver, at full scale: how long it would take, how large it would be, the pauses.

    survey      the sizes and speeds of each domain: from its last snapshots, or assumed
    rehearse    the same runner on simulated domains of those sizes and speeds, on a clock that jumps

Limits, order, window, deadline, retries and the shared bandwidth are those of the real run, as it is the same code.
What only the real run can show is left out: hooks, the guests' agents, retention, and two streams that slow each
other down more than they did when the last snapshots were taken.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import attrs
import trio
from trio.testing import MockClock

from snaporch.batch import store
from snaporch.batch.plan import Hooks, Plan, Reports
from snaporch.batch.runner import run_batch
from snaporch.batch.store import ItemRecord
from snaporch.batch.timeline import duration
from snaporch.catalog import Change
from snaporch.drivers.simulated import (
    GuestModel,
    SimulatedDriver,
    SimulatedHost,
    SimulatedSpeed,
    ThreadsHoldTime,
)
from snaporch.model.domain import DomainDefinition, DomainRecord
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeviceDisk
from snaporch.model.units import Size
from snaporch.operations.estimate import ASSUMED_ARM_RATE, ASSUMED_RATE, COMMANDS_SECONDS, LOOK_BACK, rate_of
from snaporch.orchestrator import Orchestrator, catalog_of, open_orchestrator

LEAST_RAM = 2**20
TOLD = 20  # of the items that would fail


@attrs.frozen
class Known:
    """What is known of a domain.

    Attributes:
        record: the catalog's.
        active: it has memory to take.
        size: bytes that a memory file of it will have.
        rate: bytes a second at which it is saved, all told; None when it never was.
        pause: seconds that its guest is paused; None as above.
        precopy: its memory went by precopy when it was last taken.
    """

    record: DomainRecord
    active: bool
    size: int
    rate: float | None = None
    pause: float | None = None
    precopy: bool = False


@attrs.frozen
class Survey:
    """What a rehearsal goes by.

    Attributes:
        domains: all that the plan is about.
        free: bytes that are free under the root.
        now: seconds since the epoch.
    """

    domains: tuple[Known, ...]
    free: int
    now: float

    @property
    def rate(self) -> float:
        """Bytes a second for domains that have no snapshot: as the others."""
        return median([d.rate for d in self.domains if d.rate] or [ASSUMED_RATE])


@attrs.frozen
class Forecast:
    """What a plan would do.

    Attributes:
        plan: its name.
        domains: how many it is about.
        known: of how many the sizes and speeds are those of their last snapshots; the others are taken to be full
            and as quick as these.
        starts_in: seconds until the first is begun: until the window opens.
        seconds: from then to the end.
        bytes: of memory that would be saved, in all.
        free: bytes that are free under the root now.
        pause_longest: seconds that a guest would be paused, at most.
        pause_median: likewise, in the middle.
        counts: how many would come to which end.
        failures: what would go wrong, by name; the first few.
        took: seconds that the rehearsal took.
    """

    plan: str
    domains: int
    known: int
    starts_in: float
    seconds: float
    bytes: int
    free: int
    pause_longest: float
    pause_median: float
    counts: dict[str, int]
    failures: dict[str, str]
    took: float


def lines(forecast: Forecast) -> Iterator[str]:
    """Yield what there is to say in short."""
    ends = ", ".join(f"{count} {end}" for end, count in forecast.counts.items())
    begins = f", which begins in {duration(forecast.starts_in)}" if forecast.starts_in >= 1 else ""
    yield f"{forecast.plan}: {ends}, in {duration(forecast.seconds)}{begins}"
    yield f"  space: {forecast.bytes / 2**30:.2f} GiB of memory; {forecast.free / 2**30:.2f} GiB are free"
    yield f"  pause: {duration(forecast.pause_median)} usually, {duration(forecast.pause_longest)} at most"
    known = f"{forecast.known} of {forecast.domains} domains go by their last snapshots, the others are assumed"
    yield f"  {known}; rehearsed in {duration(forecast.took)}"
    for name, error in forecast.failures.items():
        yield f"  {name}: {error}"


# --- survey -------------------------------------------------------------------------------------------------------


async def survey(orch: Orchestrator, plan: Plan, now: float) -> Survey:
    """Return what is known of a plan's domains.

    Raises:
        NotFound: a domain that the plan names is not there.
    """
    items = await store.select(catalog_of(orch), str(orch.root), plan)
    domains = [await _known(orch, name) for item in items for name in item.members]
    return Survey(tuple(domains), free_bytes(orch.root), now)


def free_bytes(directory: Path) -> int:
    """Return what is free on the file system of a directory."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


async def _known(orch: Orchestrator, name: str) -> Known:
    record, active = await catalog_of(orch).domain(name), await orch.is_active(name)
    taken = await catalog_of(orch).checkpoints(name, LOOK_BACK)
    if not taken:
        return Known(record, active, record.definition.memory)
    return Known(
        record,
        active,
        size=max(LEAST_RAM, round(median(each.bytes for each in taken))),
        rate=rate_of(taken),
        pause=median([each.pause for each in taken if each.pause is not None] or [0.0]),
        precopy=taken[-1].strategy is Strategy.PRECOPY,
    )


# --- the rehearsal ------------------------------------------------------------------------------------------------


def _speed(known: Known, rate: float) -> SimulatedSpeed:
    arming = ASSUMED_ARM_RATE if known.pause is None else known.size / max(1e-5, known.pause - COMMANDS_SECONDS)
    return SimulatedSpeed(bandwidth=known.rate or rate, arm_rate=arming)


def _double(host: SimulatedHost, known: Known, rate: float) -> DomainRecord:
    """Return a simulated domain in a real one's place."""
    definition, disks = known.record.definition, known.record.disks
    for disk in disks:
        if disk.path not in host.disk.by_path:  # two domains may read the same image
            host.add_image(disk.path, format_=disk.format)
    host.speeds[definition.name] = _speed(known, rate)
    if known.precopy:  # what it sent again is in its size already
        host.models[definition.name] = GuestModel(background_blocker="as last time", dirty_rate=0.0)
    double = DomainDefinition(
        definition.name,
        memory=known.size,
        disks=tuple(DeviceDisk(d.target, d.path, d.format, d.readonly) for d in disks),
        driver="simulated",
    )
    return DomainRecord(double, handle=host.boot(double) if known.active else None, tags=known.record.tags)


def _rehearsed(plan: Plan) -> Plan:
    """Return the plan without what only the real run can show."""
    how = attrs.evolve(plan.snapshot, quiesce=False)
    limits = attrs.evolve(plan.limits, min_free=Size(0))  # the forecast says whether it fits
    return attrs.evolve(plan, snapshot=how, hooks=Hooks(), retention=None, schedule=None, limits=limits)


async def _run(plan: Plan, known: Survey, root: Path) -> Forecast:
    host = SimulatedHost()
    host.mount(str(root), known.free)
    rate = known.rate

    def now() -> float:
        return known.now + trio.current_time()

    async with open_orchestrator(root, drivers={"simulated": SimulatedDriver(host)}) as orch:
        await catalog_of(orch).write(Change(domains=tuple(_double(host, each, rate) for each in known.domains)))
        takes = {each.record.name: each.size / (each.rate or rate) * each.active for each in known.domains}
        batch = await run_batch(orch, _rehearsed(plan), now=now, took=lambda _, domain: takes[domain.name])
        tally = _Tally({d.record.name: d.pause for d in known.domains if d.precopy and d.pause is not None})
        async for record in store.items(catalog_of(orch), batch.id):
            tally.add(record)
    begun = tally.begun if tally.pauses or tally.bytes else batch.begun
    return Forecast(
        plan=plan.name,
        domains=len(known.domains),
        known=sum(each.rate is not None for each in known.domains),
        starts_in=max(0.0, begun - known.now),
        seconds=(batch.ended or begun) - begun,
        bytes=tally.bytes,
        free=known.free,
        pause_longest=max(tally.pauses, default=0.0),
        pause_median=median(tally.pauses or [0.0]),
        counts=batch.counts,
        failures=tally.failures,
        took=0.0,
    )


@attrs.define
class _Tally:
    """Adds up what items came to; a precopy's pause depends on the guest, and is taken to be what it was."""

    known: dict[str, float]
    begun: float = float("inf")
    bytes: int = 0
    pauses: list[float] = attrs.field(factory=list)
    failures: dict[str, str] = attrs.field(factory=dict)

    def add(self, record: ItemRecord) -> None:
        """Add one."""
        if record.begun:
            self.begun = min(self.begun, record.begun)
        self.bytes += record.bytes
        if record.pause is not None:
            self.pauses.append(self.known.get(record.item.name, record.pause))
        if record.error and len(self.failures) < TOLD:
            self.failures[record.item.name] = record.error


def _in_virtual_time(plan: Plan, known: Survey, root: Path) -> Forecast:
    clock = MockClock(autojump_threshold=0)
    return trio.run(_run, plan, known, root, clock=clock, instruments=[ThreadsHoldTime(clock)])


async def rehearse(orch: Orchestrator, plan: Plan, *, html: str = "") -> Forecast:
    """Run a plan on simulated domains, in another thread; nothing of the real ones is touched.

    Args:
        orch: the orchestrator, which knows the real domains.
        plan: what is rehearsed.
        html: where to put a page with the timeline; empty for none.

    Returns:
        What the plan would do now.

    Raises:
        NotFound: a domain that the plan names is not there, or it selects none.
        TargetExists: there is something else at `html`.
    """
    began = time.monotonic()
    known = await survey(orch, plan, time.time())
    rehearsed = attrs.evolve(plan, report=Reports(html=html))
    # Tens of thousands of small transactions that nobody will read again: not on a disk, if it can be helped.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a private directory is made in it
    with tempfile.TemporaryDirectory(prefix="snaporch-", dir=memory, ignore_cleanup_errors=True) as directory:
        work = partial(_in_virtual_time, rehearsed, known, Path(directory))
        forecast = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
    return attrs.evolve(forecast, took=time.monotonic() - began)
