"""The operations that clients have asked for: queued, running, ended.

1. A job is the service's, not the request's: a client that goes away ends nothing.
2. No more than `running` jobs run at once and `queued` wait for that; what comes beyond is refused.
3. A job has the id of its operation before it begins: the client is given this id.
4. A job that has ended stays for a while, so that clients can ask for it; the journal keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import attrs
import structlog
import trio

from snaporch.engine.run import name_next
from snaporch.engine.states import State
from snaporch.errors import (
    Busy,
    Left,
    NotFound,
    OperationFailed,
    Refused,
    SnaporchError,
    Stranded,
    Unavailable,
    exhausted,
    leaves,
)
from snaporch.model.convert import converter, dumps
from snaporch.model.names import new_id
from snaporch.model.record import Event, EventKind, OperationKind, OperationRecord
from snaporch.service.keys import check_same
from snaporch.service.problems import problem
from snaporch.service.shapes import OperationStatus

KEPT = 1_000  # jobs that have ended
RESULTS = 100  # of them with what they came to: that of a create names the whole chain under its disks
QUEUED = "queued"  # the state of a job that has not begun
BEGIN_SECONDS = 5.0  # a refusal that takes longer to find is told by the operation

_log = structlog.get_logger("snaporch.service")

_OUTCOMES: tuple[tuple[type[SnaporchError], str], ...] = (
    (Stranded, "stranded"),
    (Left, "left"),
    (OperationFailed, "rolled-back"),
    (Refused, "refused"),
    (NotFound, "refused"),
    (Busy, "refused"),
)

Work = Callable[[], Awaitable[Any]]


@attrs.define(eq=False)
class Job:
    """One operation that was asked for.

    Attributes:
        kind: what it does.
        domains: the names of the domains that it works on; none: all.
        subject: the snapshot's name.
        by: who asked.
        work: does it.
        waits: it may wait for another operation on its domain.
        final: its status as JSON, where that is known for good.
        farewell: called when it has ended, before anybody is told.
    """

    kind: OperationKind
    domains: tuple[str, ...]
    subject: str
    by: str
    work: Work
    waits: bool = False
    id: str = attrs.field(factory=new_id)
    begun: float = attrs.field(factory=time.time)
    ended: float | None = None
    state: str = QUEUED
    done: int = 0
    total: int = 0
    result: Any = None
    error: SnaporchError | None = None
    final: str | None = None
    farewell: Callable[[], Awaitable[None]] | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    under_way: trio.Event = attrs.field(factory=trio.Event)
    over: trio.Event = attrs.field(factory=trio.Event)

    @property
    def who(self) -> str:
        """The names of the domains, for people."""
        return ", ".join(self.domains)

    @property
    def outcome(self) -> str | None:
        """How it ended."""
        if self.ended is None:
            return None
        if self.error is None:
            return "complete"
        return next((name for kind, name in _OUTCOMES if isinstance(self.error, kind)), "failed")

    def status(self, record: OperationRecord | None = None) -> OperationStatus:
        """Return what is told of it; `record` is what the journal has."""
        return OperationStatus(
            id=self.id,
            kind=self.kind,
            domains=self.domains,
            subject=self.subject or (record.subject if record else ""),
            state=self.state,
            begun=self.begun,
            ended=self.ended,
            outcome=self.outcome,
            phases=record.phases if record else {},
            done=self.done,
            total=self.total,
            by=self.by,
            journaled=record is not None,
            result=converter.unstructure(self.result),
            error=problem(self.error) if self.error else None,
        )

    def as_json(self, record: OperationRecord | None) -> str:
        """Return `status` as JSON, made once where nothing of it changes any more."""
        if self.final is not None:
            return self.final
        text = dumps(self.status(record))
        if self.ended is not None and record is not None and record.ended is not None:
            self.final = text
        return text


def past(record: OperationRecord) -> OperationStatus:
    """Return what is told of an operation that only the journal knows."""
    known = record.state if record.state in {State.COMPLETE, State.ROLLED_BACK, State.STRANDED} else None
    error = SnaporchError(record.error) if record.error else None
    return OperationStatus(
        record.id,
        record.kind,
        record.domains,
        record.subject,
        record.state,
        record.begun,
        record.ended,
        known,
        record.phases,
        journaled=True,
        error=problem(error) if error else None,
    )


def _failure(job: Job, error: BaseException) -> SnaporchError:
    found = [leaf for leaf in leaves(error) if isinstance(leaf, Exception)]
    for kind in (Stranded, SnaporchError):
        for leaf in found:
            if isinstance(leaf, kind):
                return leaf
    if found and (known := exhausted(found[0])):
        return known
    _log.error("a defect in snaporch", operation=job.id, exc_info=error)
    words = f"{type(found[0]).__name__}: {found[0]}" if found else type(error).__name__
    return SnaporchError(f"{words}: a defect in snaporch; the service's log shows where")


@attrs.define(eq=False)
class Jobs:
    """All of them.

    Attributes:
        nursery: runs them.
        tell: is told of a job that is queued or has ended without a word of the engine.
        running: how many run at once.
        queued: how many wait for that.
        closing: nothing is taken any more.
    """

    nursery: trio.Nursery
    tell: Callable[[Event], None]
    queued: int
    limiter: trio.CapacityLimiter
    closing: bool = False
    _jobs: dict[str, Job] = attrs.field(factory=dict)
    _keys: dict[tuple[str, str], tuple[str, Job]] = attrs.field(factory=dict)

    def hear(self, event: Event) -> None:
        """Take note of what the engine says of a job."""
        if (job := self._jobs.get(event.operation)) is not None:
            job.state = event.state
            if event.kind is EventKind.PROGRESS:
                job.done, job.total = event.done, event.total
            job.under_way.set()

    def active(self) -> Iterable[Job]:
        """Yield the jobs that have not ended."""
        return (job for job in tuple(self._jobs.values()) if job.ended is None)

    def all(self) -> tuple[Job, ...]:
        """Return all that are known, oldest first."""
        return tuple(self._jobs.values())

    def get(self, identifier: str) -> Job | None:
        """Return a job by its id."""
        return self._jobs.get(identifier)

    def known(self, by: str, key: str, request: str) -> Job | None:
        """Return the job that a caller's idempotency key stands for.

        Args:
            by: who asks.
            key: the key.
            request: what is asked.

        Raises:
            InvalidInput: the key was used for something else.
        """
        if (by, key) not in self._keys:
            return None
        first, job = self._keys[by, key]
        check_same(key, first, request)
        return job

    def submit(self, job: Job, *, key: str = "", request: str = "", own: bool = False) -> Job:
        """Take a job; returns at once.

        Args:
            job: the job.
            key: the idempotency key that it was sent with.
            request: what was asked.
            own: root asks, or the service itself: others' jobs are no reason to refuse it.

        Raises:
            Unavailable: the service stops, or its queue is full.
            Busy: another job is on the domain.
        """
        if self.closing:
            raise Unavailable("the service is stopping; try again when it has started again")
        others = list(self.active())
        if len(others) >= self.queued + int(self.limiter.total_tokens) and not own:
            raise Unavailable(f"{len(others)} operations run or wait, which is as many as may; try again later")
        for other in others:
            if set(other.domains) & set(job.domains) and not job.waits:
                raise Busy(job.who, other.id, f"{other.kind} {other.subject}".strip())
        self._jobs[job.id] = job
        if key:
            self._keys[job.by, key] = request, job
        self._forget()
        self.nursery.start_soon(self._run, job)
        return job

    def _forget(self) -> None:
        over = [job for job in self._jobs.values() if job.ended is not None]
        for job in over[: max(0, len(over) - KEPT)]:
            del self._jobs[job.id]
            self._keys = {key: value for key, value in self._keys.items() if value[1] is not job}
        for job in over[-KEPT:-RESULTS]:
            job.result = job.final = None

    async def _run(self, job: Job) -> None:
        self._say(job, QUEUED)
        with job.scope:
            try:
                async with self.limiter:
                    job.state = "running"
                    name_next(job.id)
                    structlog.contextvars.bind_contextvars(operation=job.id)
                    job.result = await job.work()
            except Exception as error:  # noqa: BLE001 - whatever it is belongs to who asked, not to the service
                job.error = _failure(job, error)
        if job.scope.cancelled_caught:
            what = f"{job.kind} {job.subject} of {job.who}".replace("  ", " ")
            job.error = OperationFailed(f"{what} was cancelled; everything is as it was before")
        job.ended = time.time()
        if job.state in {QUEUED, "running"}:  # the engine had nothing to say
            self._say(job, str(job.outcome))
        await self._keep(job)
        job.under_way.set()
        job.over.set()
        _log.info(
            "operation ended",
            operation=job.id,
            kind=job.kind,
            domains=job.domains,
            subject=job.subject,
            outcome=job.outcome,
            by=job.by,
            seconds=round(job.ended - job.begun, 3),
        )

    async def _keep(self, job: Job) -> None:
        """Note the answer for clients that ask again; a failure to note it is logged."""
        if job.farewell is not None:
            with trio.CancelScope(shield=True):
                try:
                    await job.farewell()
                except SnaporchError as error:
                    _log.warning("an answer was not kept", operation=job.id, error=str(error))

    def _say(self, job: Job, state: str) -> None:
        text = str(job.error) if job.error else f"{job.kind} {job.subject}".strip()
        self.tell(Event(job.id, job.domains, EventKind.STATE, time.time(), state, text=text))
        job.state = state
