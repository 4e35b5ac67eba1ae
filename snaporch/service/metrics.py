"""Metrics for Prometheus: pauses of guests, times and outcomes of operations, and what runs and waits.

1. Nothing is measured here. When an operation has ended, its figures are taken from the journal and the catalog.
2. Hearing of an event costs next to nothing: it may come while a guest is paused. Looking things up is for later.
3. Counters begin with the service, as Prometheus expects; gauges say what is so when they are asked for.

docs/reference/metrics.md says what each is for; the files under contrib/ use them, and a test compares the names.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from math import inf
from pathlib import Path

import attrs
import structlog
import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from snaporch.batch.schedule import ScheduleInfo
from snaporch.engine.states import State
from snaporch.errors import NotFound, SnaporchError
from snaporch.model.record import Event, EventKind, OperationKind, SnapshotRecord
from snaporch.orchestrator import Orchestrator, catalog_of
from snaporch.service.jobs import QUEUED, Jobs
from snaporch.service.webhooks import Alert
from snaporch.service.worse import WHAT, worse

PAUSE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOTAL_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

_BLOCK = 512  # of st_blocks

_log = structlog.get_logger("snaporch.service")

_ENDS = frozenset({State.COMPLETE, State.ROLLED_BACK, State.STRANDED, "refused", "failed"})


class Figures:
    """The metrics themselves, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        outcome, strategy = ("kind", "outcome"), ("kind", "strategy")
        self.operations = counter("snaporch_operations", "Operations that have ended", outcome)
        self.seconds = histogram("snaporch_operation_seconds", "What it took", strategy, buckets=TOTAL_BUCKETS)
        self.pause = histogram(
            "snaporch_pause_seconds", "How long a guest was paused", ("strategy",), buckets=PAUSE_BUCKETS
        )
        self.moved = counter("snaporch_bytes", "Memory saved by creates, images merged by deletes", ("kind",))
        self.stranded = gauge("snaporch_operations_stranded", "Operations that wait for `snaporch recover`")
        self.running = gauge("snaporch_operations_running", "Operations that run")
        self.queued = gauge("snaporch_operations_queued", "Operations that wait for others")
        self.newest = gauge("snaporch_last_snapshot_timestamp_seconds", "The newest point", ("domain",))
        self.succeeded = gauge(
            "snaporch_plan_last_success_timestamp_seconds",
            "When a plan last took every snapshot; 0: never",
            ("plan",),
        )
        self.failed = gauge("snaporch_plan_failed_items", "What failed in a plan's last batch, or 1", ("plan",))
        self.overdue = gauge(
            "snaporch_plan_overdue", "1 where a plan should have succeeded, and has not", ("plan",)
        )
        self.dropped = gauge("snaporch_plan_dropped_runs", "Times that came while it still ran", ("plan",))
        self.bytes = gauge("snaporch_domain_bytes", "What a domain's files in the root take", ("domain",))
        self.worse = gauge(
            "snaporch_domain_worse", "1 where the newest checkpoint is worse than the last", ("domain", "what")
        )
        self.free = gauge("snaporch_root_free_bytes", "Free on the file system of the root")
        self.followers = gauge("snaporch_followers", "Clients that follow events")
        Info("snaporch_build", "Which snaporch this is", registry=registry).info({"version": version("snaporch")})
        ProcessCollector(registry=registry)


@attrs.define(eq=False)
class Metrics:
    """All of them: tell it what happens (`hear`), and let it `run`.

    Attributes:
        orchestrator: whose operations they are about.
        jobs: those that clients asked for.
        alert: is told what somebody should look at.
        schedules: returns the plans that have a schedule.
        registry: where they are; each service has its own.
        figures: they themselves.
    """

    orchestrator: Orchestrator
    jobs: Jobs
    alert: Callable[[Alert], None]
    schedules: Callable[[], Iterable[ScheduleInfo]] = tuple
    registry: CollectorRegistry = attrs.field(factory=CollectorRegistry)
    figures: Figures = attrs.field(default=attrs.Factory(lambda self: Figures(self.registry), takes_self=True))
    _begun: set[str] = attrs.field(factory=set)
    _known: set[str] = attrs.field(factory=set)
    _progress: dict[str, int] = attrs.field(factory=dict)
    # One entry for each operation that ends, taken out at once: it needs no limit.
    _ended: tuple[trio.MemorySendChannel[Event], trio.MemoryReceiveChannel[Event]] = attrs.field(
        factory=lambda: trio.open_memory_channel[Event](inf)
    )

    def __attrs_post_init__(self) -> None:
        self.figures.running.set_function(lambda: len(self._begun))
        self.figures.queued.set_function(lambda: sum(job.state == QUEUED for job in self.jobs.active()))

    def hear(self, event: Event) -> None:
        """Take note of what happens; returns at once."""
        if event.kind is EventKind.NOTE:
            return
        if event.kind is EventKind.PROGRESS:
            self._progress[event.operation] = event.total
        elif event.state in _ENDS:
            self._begun.discard(event.operation)
            self._ended[0].send_nowait(event)
        elif event.state != QUEUED:
            self._begun.add(event.operation)

    async def run(self) -> None:
        """Account for what has ended, for ever."""
        await self._domains()
        async for event in self._ended[1]:
            try:
                await self._account(event)
            except (SnaporchError, sqlite3.Error) as error:  # a figure that is missing ends no service
                _log.warning("not counted", operation=event.operation, error=str(error))

    async def _account(self, event: Event) -> None:
        moved = self._progress.pop(event.operation, 0)
        operation = await catalog_of(self.orchestrator).operation(event.operation) or self.jobs.get(event.operation)
        if operation is None:
            return
        self.figures.operations.labels(operation.kind, event.state).inc()
        for domain in filter(catalog_of(self.orchestrator).knows, operation.domains):
            await self._look_at(domain)
        if event.state != State.COMPLETE:
            return
        strategy = ""
        if operation.kind is OperationKind.CREATE:
            strategy, moved = await self._created(operation.id, operation.domains, operation.subject)
        self.figures.seconds.labels(operation.kind, strategy).observe(event.time - operation.begun)
        self.figures.moved.labels(operation.kind).inc(moved)

    async def _created(self, id_: str, domains: Sequence[str], name: str) -> tuple[str, int]:
        """Account for the snapshots of a create; return the strategy and the bytes of memory."""
        strategy, saved = "", 0
        for domain in domains:
            try:
                record = await self.orchestrator.show(domain, name)
            except NotFound:  # it is gone already
                continue
            strategy = record.strategy
            await self._compare(id_, domain, record)
            if record.timings.pause is not None:
                self.figures.pause.labels(strategy).observe(record.timings.pause)
            saved += record.memory.size if record.memory else 0
        return strategy, saved

    async def _look_at(self, domain: str) -> dict[str, str]:
        """Set what the catalog says of a domain's newest snapshots; return what is worse, in words."""
        catalog = catalog_of(self.orchestrator)
        self.figures.newest.labels(domain).set(await catalog.newest_point(domain))
        found = worse(await catalog.checkpoints(domain, 2))
        for what in WHAT:
            self.figures.worse.labels(domain, what).set(what in found)
        return found

    async def _compare(self, id_: str, domain: str, record: SnapshotRecord) -> None:
        """Tell of a checkpoint that is worse than the one before it."""
        for what, text in (await self._look_at(domain)).items():
            _log.warning("a domain's checkpoint is worse", domain=domain, snapshot=record.name, what=what, why=text)
            self.alert(Alert("domain-worse", domain, text))
            words = f"{record.name}: {text}"
            note = Event(id_, (domain,), EventKind.NOTE, time.time(), State.COMPLETE, text=words)
            self.orchestrator.broadcast.publish(note)

    async def _domains(self) -> None:
        """Bring what is told by domain up to date: some have come, and some are gone."""
        names = set(await catalog_of(self.orchestrator).domain_names())
        for name in names - self._known:
            await self._look_at(name)
        for name in self._known - names:
            self.figures.newest.remove(name)
            self.figures.worse.remove_by_labels({"domain": name})
        self._known = names
        self.figures.bytes.clear()
        for name, size in (await taken_by_domain(self.orchestrator.root, names)).items():
            self.figures.bytes.labels(name).set(size)

    def _plans(self) -> None:
        figures = self.figures
        for each in (figures.succeeded, figures.failed, figures.overdue, figures.dropped):
            each.clear()
        for plan in self.schedules():
            figures.succeeded.labels(plan.plan).set(plan.succeeded)
            figures.failed.labels(plan.plan).set(len(plan.failed) or bool(plan.error))
            figures.overdue.labels(plan.plan).set(plan.overdue)
            figures.dropped.labels(plan.plan).set(plan.dropped)

    async def text(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics as text and its media type, in a format that `accept` (of HTTP) has."""
        unfinished = await catalog_of(self.orchestrator).unfinished()
        status = os.statvfs(self.orchestrator.root)
        self.figures.free.set(status.f_bavail * status.f_frsize)
        self._plans()
        await self._domains()
        self.figures.stranded.set(sum(operation.state == State.STRANDED for operation, _ in unfinished))
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


async def taken_by_domain(root: Path, names: Collection[str]) -> dict[str, int]:
    """Return the bytes that what is in each domain's directory of the root takes on the disk."""

    def look() -> dict[str, int]:
        return {name: _taken(os.path.join(root, name)) for name in names}

    return await trio.to_thread.run_sync(look)


def _taken(directory: str) -> int:
    total = 0
    for place, _, files in os.walk(directory):
        for file in files:
            with suppress(OSError):  # it has just gone
                total += os.lstat(os.path.join(place, file)).st_blocks * _BLOCK
    return total
