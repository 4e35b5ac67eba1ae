"""What the service consists of, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import attrs
import structlog
import trio

from snaporch.batch.schedule import Scheduler
from snaporch.drivers.local.confine import Confinement
from snaporch.model.record import Event
from snaporch.orchestrator import Orchestrator
from snaporch.service.config import Config, owner_ids
from snaporch.service.feed import Feed
from snaporch.service.jobs import Jobs
from snaporch.service.metrics import Metrics
from snaporch.service.quiet import Quiet
from snaporch.service.roles import TOKENS, Caller, Tokens

PLANS = "plans"

_audit = structlog.get_logger("snaporch.audit")


@attrs.define(eq=False)
class Service:
    """Everything that answers a request.

    Attributes:
        orchestrator: does the work.
        config: what it was told; replaced by `reload`.
        jobs: what was asked for.
        feed: what happened.
        quiet: whether a guest stands.
        tokens: who may come in.
        metrics: what Prometheus is told.
        nursery: for what runs beside all requests: schedules, watchdogs.
        scheduler: runs plans when they are due; None where there is no directory of them.
        streams: followers at present.
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

    @property
    def confinement(self) -> Confinement:
        """Where paths in requests may lead, and images after them."""
        return Confinement(
            str(self.orchestrator.root), lambda: self.config.directories, lambda: owner_ids(self.config.owners)
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
        metrics = Metrics(orchestrator, jobs)
        tokens = Tokens(orchestrator.root / TOKENS)
        with ExitStack() as stack:
            for hear in (quiet.hear, jobs.hear, tell):  # in this order: a guest stands before it is told
                stack.enter_context(orchestrator.broadcast.tapped(hear))
            nursery.start_soon(metrics.run)
            scheduler = Scheduler(orchestrator, Path(config.plans or orchestrator.root / PLANS))
            scheduled = scheduler.directory.is_dir()
            if scheduled:
                await nursery.start(scheduler.run)
            chosen = scheduler if scheduled else None
            service = Service(orchestrator, config, jobs, feed, quiet, tokens, metrics, nursery, chosen)
            orchestrator.confine(service.confinement)
            yield service
            nursery.cancel_scope.cancel()
