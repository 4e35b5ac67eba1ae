"""What the service consists of, put together."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import attrs
import structlog
import trio

from snaporch.batch.prune import prune_expired
from snaporch.batch.schedule import Scheduler
from snaporch.catalog.schema import images_behind
from snaporch.catalog.store import PRUNED_AT_ONCE
from snaporch.drivers.local.confine import Confinement
from snaporch.errors import SnaporchError, Unavailable
from snaporch.model.record import Event
from snaporch.orchestrator import Orchestrator, catalog_of
from snaporch.service.config import Config, owner_ids
from snaporch.service.feed import Feed
from snaporch.service.jobs import Jobs
from snaporch.service.metrics import Metrics
from snaporch.service.quiet import Quiet
from snaporch.service.roles import TOKENS, Caller, Tokens
from snaporch.service.webhooks import Alert, Webhooks

PLANS = "plans"
TURNS = 4  # of a caller's requests that take long; root's and our own user's are not counted
JOURNAL_EVERY_SECONDS = 3_600.0
EXPIRY_EVERY_SECONDS = 60.0
CLOCK_SECONDS = 3_600.0

_log = structlog.get_logger("snaporch.service")
_audit = structlog.get_logger("snaporch.audit")


@attrs.define(eq=False)
class Service:
    """Everything that answers a request.

    Attributes:
        orchestrator: does the work.
        config: what it was told; replaced by `reload`.
        jobs: what was asked for.
        feed: what happened.
        quiet: whether a guest is paused.
        tokens: who may come in.
        metrics: what Prometheus is told.
        nursery: for what runs beside all requests: schedules, watchdogs.
        scheduler: runs plans when they are due; None where there is no directory of them.
        streams: followers at present.
        waits: shutdowns that wait for their guests, by the ids of their operations.
    """

    orchestrator: Orchestrator
    config: Config
    jobs: Jobs
    feed: Feed
    quiet: Quiet
    tokens: Tokens
    metrics: Metrics
    nursery: trio.Nursery
    scheduler: Scheduler | None = None
    streams: int = 0
    waits: dict[str, trio.CancelScope] = attrs.field(factory=dict)
    _asking: Counter[str] = attrs.field(factory=Counter)
    _turns: dict[str, trio.CapacityLimiter] = attrs.field(factory=dict)

    @contextmanager
    def asking(self, caller: Caller, *, at_all_costs: bool = False) -> Iterator[None]:
        """Count a request among those of its caller while the body runs.

        Args:
            caller: who asks.
            at_all_costs: it has been counted and let in before: it only goes on.

        Raises:
            Unavailable: it has as many under way as one may have.
        """
        if self._asking[caller.name] >= self.config.per_user and not (caller.own or at_all_costs):
            raise Unavailable(
                f"{caller.name} has {self.config.per_user} requests under way, as many as one user may have; "
                "wait for some of them"
            )
        self._asking[caller.name] += 1
        try:
            yield
        finally:
            self._asking[caller.name] -= 1
            if not self._asking[caller.name]:
                del self._asking[caller.name]

    @asynccontextmanager
    async def a_turn(self, caller: Caller) -> AsyncIterator[None]:
        """Run the body beside few others of the same caller; nobody waits for those of another."""
        turns = nullcontext() if caller.own else self._turns.setdefault(caller.name, trio.CapacityLimiter(TURNS))
        async with turns:
            yield

    @property
    def confinement(self) -> Confinement:
        """Where paths in requests may lead, and images after them."""
        return Confinement(
            str(self.orchestrator.root),
            lambda: self.config.directories,
            lambda: owner_ids(self.config.owners),
            partial(images_behind, catalog_of(self.orchestrator).path, str(self.orchestrator.root)),
        )

    def reload(self, config: Config) -> None:
        """Go on with another configuration; what is open stays open."""
        self.config = config
        self.jobs.limiter.total_tokens = config.running
        self.jobs.queued = config.queued

    def audit(self, caller: Caller, what: str, status: int, **more: str | int | None) -> None:
        """Note who did what, or tried to."""
        _audit.info("audit", by=caller.name, what=what, status=status, **more)


@asynccontextmanager
async def open_service(orchestrator: Orchestrator, config: Config | None = None) -> AsyncIterator[Service]:
    """Open a service on an orchestrator; when the body ends, jobs that still run are cancelled, and roll back.

    `snaporch.service.stop` brings them to where they can be left before that.
    """
    config = config or Config()
    feed, quiet = Feed(), Quiet()

    def tell(event: Event) -> None:
        metrics.hear(event)
        feed.publish(event)

    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery, tell, config.queued, trio.CapacityLimiter(config.running))
        hooks = Webhooks(lambda: service.config.webhooks)
        metrics = Metrics(orchestrator, jobs, alert=hooks.tell)
        tokens = Tokens(orchestrator.root / TOKENS)
        with ExitStack() as stack:
            for hear in (quiet.hear, jobs.hear, tell, hooks.hear):  # in this order: `quiet` knows of a pause first
                stack.enter_context(orchestrator.broadcast.tapped(hear))
            service = Service(orchestrator, config, jobs, feed, quiet, tokens, metrics, nursery)
            orchestrator.confine(service.confinement)
            for task in (metrics.run, hooks.run):
                nursery.start_soon(task)
            for keep in (_keep_journal, _expire):
                nursery.start_soon(keep, orchestrator, quiet)
            scheduler = Scheduler(orchestrator, Path(config.plans or orchestrator.root / PLANS))
            scheduler.min_free = lambda: service.config.min_free
            scheduler.failed = lambda plan, why: hooks.tell(Alert("plan-failed", plan, why))
            metrics.schedules = hooks.schedules = scheduler.schedules
            if scheduler.directory.is_dir():
                await nursery.start(scheduler.run)
                service.scheduler = scheduler
            yield service
            nursery.cancel_scope.cancel()


async def _expire(orchestrator: Orchestrator, quiet: Quiet) -> None:
    """Delete snapshots that have expired, for ever; what is in the way is in the log, and is tried again.

    A clock that is set ahead makes nothing expire for an hour: there is time to set it right.
    """
    ahead, until = time.time() - time.monotonic(), -math.inf
    while True:
        before, ahead = ahead, time.time() - time.monotonic()
        if ahead - before > CLOCK_SECONDS:
            until = time.monotonic() + CLOCK_SECONDS
            _log.warning("the clock was set ahead: no snapshot expires for an hour", seconds=round(ahead - before))
        if time.monotonic() >= until:
            await _delete_expired(orchestrator, quiet)
        await trio.sleep(EXPIRY_EVERY_SECONDS)


async def _delete_expired(orchestrator: Orchestrator, quiet: Quiet) -> None:
    await quiet.wait()
    try:
        due = await catalog_of(orchestrator).domains_with_expired(time.time())
    except SnaporchError as error:
        _log.warning("it was not looked whether snapshots have expired", error=str(error))
        return
    for domain in due:
        try:
            await prune_expired(orchestrator, [domain], now=time.time())
        except (SnaporchError, OSError) as error:  # busy, say
            _log.warning("what has expired was not deleted", domain=domain, error=str(error))


async def _keep_journal(orchestrator: Orchestrator, quiet: Quiet) -> None:
    """Have the journal forget what is too old, for ever; not while a guest is paused."""
    while True:
        await trio.sleep(JOURNAL_EVERY_SECONDS)
        await quiet.wait()
        try:
            while await orchestrator.prune_journal() >= PRUNED_AT_ONCE:
                await quiet.wait()
        except SnaporchError as error:  # the disk is full, say: there is another time
            _log.warning("the journal was not shortened", error=str(error))
