"""Runs plans when they are due: every one in a directory that has a schedule. No HTTP, and no process of its own.

Rules:

1. A plan never runs twice at once. A time that comes while the plan runs is dropped.
2. All times that came while no scheduler ran count as one. The plan then runs at once, or not at all, as
   `Schedule.missed` says. The catalog has the last batch that was due; times before the plan file was written do
   not count.
3. A scheduled batch that was interrupted, with the service or the host, goes on at once.
4. The directory is looked at again and again: new, changed and removed plans need no restart. An invalid plan is
   reported, and the others go on.
5. What lies ahead of the clock was noted while it was wrong, and counts as now: no plan waits for years to pass.

Time is what `now` says; it is waited for on Trio's clock, in short pieces: a clock may be set, a host may sleep.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import NoReturn

import attrs
import structlog
import trio

from snaporch.batch import store
from snaporch.batch.plan import Missed, Plan, load_plan
from snaporch.batch.runner import run_batch
from snaporch.batch.store import Stage
from snaporch.drivers.local.look import looked_at
from snaporch.errors import InvalidInput, Refused, SnaporchError, leaves
from snaporch.model.formats import versioned
from snaporch.orchestrator import Orchestrator, catalog_of

_log = structlog.get_logger("snaporch")

LOOK_SECONDS = 30.0
SET_BACK_SECONDS = 3_600.0  # a clock that goes back by less has its plans wait for so long
MANY = 1_000  # times that came while a plan ran: no more of them are counted

Stamp = tuple[int, int, int]
Due = tuple[float, float]
"""When by the expression, and when with the jitter, in seconds since the epoch."""


@versioned("schedule")
@attrs.frozen
class ScheduleInfo:
    """A plan of the directory, for people and programs.

    Attributes:
        plan: its name; of a file that is no plan, the file's.
        file: its path.
        cron: the expression; empty where it has none, or makes no sense.
        zone: where the expression holds.
        next: when it will run, with the jitter, in seconds since the epoch; None when it never will.
        running: it runs now.
        batch: the id of its last batch here.
        outcome: how that ended.
        error: why the file is no plan, or why the last batch could not run.
        failed: of the last batch, which items failed, and why; the first ten.
        succeeded: when a batch of the plan last took every snapshot, in seconds since the epoch; 0: none has.
        overdue: it should have taken every snapshot since, and has not; or it never will, as it has no schedule, or
            is no plan.
        dropped: how many times came while it still ran, and were dropped, since the scheduler has begun.
    """

    plan: str
    file: str
    cron: str = ""
    zone: str = ""
    next: float | None = None
    running: bool = False
    batch: str = ""
    outcome: str = ""
    error: str = ""
    failed: tuple[str, ...] = ()
    succeeded: float = 0.0
    overdue: bool = False
    dropped: int = 0


@attrs.define
class _Entry:
    """A file of the directory."""

    path: Path
    stamp: Stamp
    plan: Plan | None = None
    due: Due | None = None
    running: bool = False
    batch: str = ""
    outcome: str = ""
    error: str = ""
    failed: tuple[str, ...] = ()
    since: float = 0.0
    succeeded: float = 0.0
    dropped: int = 0

    def overdue(self, now: float) -> bool:
        """Return whether a time has passed without success; while it runs, whether another one has, too."""
        if self.plan is None or self.plan.cron is None:
            return True
        times = [at for _, at in islice(self.plan.cron.after(max(self.since, self.succeeded)), 2)]
        return not times or times[-1 if self.running else 0] <= now

    def info(self, now: float) -> ScheduleInfo:
        schedule = self.plan.schedule if self.plan else None
        return ScheduleInfo(
            plan=self.plan.name if self.plan else self.path.stem,
            file=str(self.path),
            cron=schedule.cron if schedule else "",
            zone=schedule.zone if schedule else "",
            next=self.due[1] if self.due and not self.running else None,
            running=self.running,
            batch=self.batch,
            outcome=self.outcome,
            error=self.error,
            failed=self.failed,
            succeeded=self.succeeded,
            overdue=self.overdue(now),
            dropped=self.dropped,
        )


def _stamps(directory: Path) -> Mapping[Path, Stamp]:
    """Return the plans of a directory, and by what a change of each is seen."""
    found = {}
    for entry in sorted(os.listdir(directory)):
        path = directory / entry
        if path.suffix != ".toml":
            continue
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue  # it has just gone, or leads nowhere
        except OSError as error:
            found[path] = 0, 0, error.errno or 0
        else:
            found[path] = status.st_mtime_ns, status.st_size, status.st_ino
    return found


def names_in(directory: Path) -> frozenset[str]:
    """Return the names of the plans in a directory; where a file is no plan, what the file is called.

    Raises:
        InvalidInput: there is no such directory.
    """
    try:
        paths = tuple(_stamps(directory))
    except OSError as error:
        raise InvalidInput(f"{directory} cannot be read: {error.strerror}") from None
    found = set()
    for path in paths:
        try:
            found.add(load_plan(path).name)
        except InvalidInput:
            found.add(path.stem)
    return frozenset(found)


def _nobody(plan: str, why: str) -> None:
    """Tell nobody."""


@attrs.define
class Scheduler:
    """Runs the plans of one directory when they are due; `run` does, for as long as it is not cancelled.

    Attributes:
        orch: the orchestrator.
        directory: of plans, ``*.toml``.
        now: seconds since the epoch.
        look_every: seconds after which the directory is looked at again.
        min_free: returns the bytes that every plan is to leave free where the root is.
        failed: is told of a plan, by name and why, that has not done all.
    """

    orch: Orchestrator
    directory: Path
    now: Callable[[], float] = time.time
    look_every: float = LOOK_SECONDS
    min_free: Callable[[], int] = int
    failed: Callable[[str, str], None] = _nobody
    _entries: dict[Path, _Entry] = attrs.field(factory=dict)
    _said: str = ""
    _seen: float = 0.0
    _wake: trio.Event = attrs.field(factory=trio.Event)

    def schedules(self) -> tuple[ScheduleInfo, ...]:
        """Return what there is in the directory, as it was last seen."""
        now = self.now()
        return tuple(entry.info(now) for entry in self._entries.values())

    async def run(  # noqa: ASYNC114 - that `run` is to be started is no rule for all that are called so
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Run plans when they are due. Cancelled, it rolls back what they are just doing; the next run goes on.

        Raises:
            InvalidInput: there is no such directory.
        """
        if not self.directory.is_dir():
            raise InvalidInput(f"{self.directory} is no directory; it is to hold plans with a schedule")
        async with trio.open_nursery() as nursery:
            await self._look()
            task_status.started()
            while True:
                self._wake = trio.Event()
                for entry in self._due():
                    entry.running = True
                    nursery.start_soon(self._run, entry)
                with trio.move_on_after(self._idle()):
                    await self._wake.wait()
                await self._look()
                await self._check_clock()

    def _due(self) -> Iterator[_Entry]:
        now = self.now()
        return (e for e in self._entries.values() if e.due is not None and not e.running and e.due[1] <= now)

    def _idle(self) -> float:
        """Return how long there is nothing to do."""
        times = [entry.due[1] for entry in self._entries.values() if entry.due is not None and not entry.running]
        return max(0.0, min([self.look_every, *(at - self.now() for at in times)]))

    async def _check_clock(self) -> None:
        """Find out anew when plans are due, where the clock has been set back."""
        before, self._seen = self._seen, self.now()
        if self._seen > before - SET_BACK_SECONDS:
            return
        _log.warning("the clock was set back: plans are due as it says now", seconds=round(before - self._seen))
        try:
            for entry in self._entries.values():
                if entry.plan is not None and not entry.running:
                    entry.since = min(entry.since, self._seen)
                    entry.succeeded = await self._succeeded(entry.plan)
                    entry.due = await self._first(entry.plan, entry.since)
        except SnaporchError as error:
            _log.warning("plans are due as they were", error=str(error))
            self._seen = before  # and so it is tried again

    async def _succeeded(self, plan: Plan) -> float:
        return await store.last_success(catalog_of(self.orch), plan.name, self.now())

    # --- the directory ----------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Take up what is new or has changed, and let go of what is gone."""
        try:
            stamps = await looked_at(str(self.directory / "*"), partial(_stamps, self.directory))
        except (OSError, Refused) as error:
            self._say_once(f"{self.directory} cannot be read: {getattr(error, 'strerror', None) or error}")
            return
        self._said = ""
        for path in [path for path, e in self._entries.items() if stamps.get(path) != e.stamp and not e.running]:
            del self._entries[path]
        for path, stamp in stamps.items():
            if path not in self._entries:
                self._entries[path] = entry = _Entry(path, stamp)
                await self._take_up(entry)

    def _say_once(self, what: str) -> None:
        if what != self._said:
            _log.error("plans are as they were last seen", error=what)
        self._said = what

    async def _take_up(self, entry: _Entry) -> None:
        try:
            if not entry.stamp[0]:
                raise InvalidInput(f"{entry.path} cannot be read: {os.strerror(entry.stamp[2])}")
            plan = await looked_at(str(entry.path), partial(load_plan, entry.path))
            if any(other.plan and other.plan.name == plan.name for other in self._entries.values()):
                raise InvalidInput(f"{entry.path}: another file here is plan {plan.name} already")
            entry.since = min(entry.stamp[0] / 1e9, self.now())
            entry.succeeded = await self._succeeded(plan)
            entry.plan = plan
            entry.due = await self._first(plan, entry.since)
        except (SnaporchError, OSError) as error:
            entry.error = str(error)
            _log.warning("not a plan that can be scheduled", file=str(entry.path), error=entry.error)

    async def _first(self, plan: Plan, written: float) -> Due | None:
        """Return when a plan is due that has just been seen for the first time: also in the past."""
        if plan.schedule is None:
            return None
        cut = await store.unfinished(catalog_of(self.orch), plan.name)
        if cut is not None and cut.due:
            return cut.due, self.now()
        last = await store.last_due(catalog_of(self.orch), plan.name)
        since = max(written, last.due, last.ended or 0.0) if last else written
        due = _after(plan, min(since, self.now()))
        if due is not None and due[1] <= self.now() and plan.schedule.missed is Missed.SKIP:
            _log.warning("a run was missed and is skipped", plan=plan.name, due=due[0])
            return _after(plan, self.now())
        return due

    # --- one plan ---------------------------------------------------------------------------------------------

    async def _run(self, entry: _Entry) -> None:
        """Run a plan that is due, and find out when it is so next."""
        if entry.plan is None or entry.due is None:
            raise AssertionError("what is due has a plan")
        name, due, began, batch = entry.plan.name, entry.due[0], self.now(), None
        _log.info("a plan is due", plan=name, due=due)
        try:
            batch = await run_batch(self.orch, entry.plan, due=due, now=self.now, min_free=self.min_free())
            entry.batch, entry.outcome, entry.error = batch.id, str(batch.stage), ""
            entry.failed = await store.failures(catalog_of(self.orch), batch.id)
            entry.succeeded = await self._succeeded(entry.plan)
            if batch.stage is not Stage.COMPLETE or batch.problems:
                reasons = [*entry.failed, *batch.problems]
                _log.warning("a plan has not done all", plan=name, batch=batch.id, stage=batch.stage, why=reasons)
                self.failed(name, "; ".join(reasons) or str(batch.stage))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other plans go on
            entry.error = "; ".join(str(leaf) or type(leaf).__name__ for leaf in leaves(error))
            _log.warning("a plan could not run", plan=name, error=entry.error)
            self.failed(name, entry.error)
            await self._keep(store.could_not_run(catalog_of(self.orch), entry.plan, due, self.now(), entry.error))
        now = self.now()
        times = takewhile(lambda due: due[1] <= now, entry.plan.cron_after(max(began, due)))
        if count := sum(1 for _ in islice(times, MANY)):
            entry.dropped += count
            _log.warning("runs of a plan were dropped: it still ran", plan=name, count=count)
            if batch is not None:
                words = f"{count} run(s) that came due meanwhile were dropped"
                noted = attrs.evolve(batch, problems=(*batch.problems, words))
                await self._keep(store.save(catalog_of(self.orch), noted))
        # Not from what was due: a cron expression that came due meanwhile has had its run.
        entry.due, entry.running = _after(entry.plan, max(now, due) if due < now + SET_BACK_SECONDS else now), False
        self._wake.set()

    @staticmethod
    async def _keep(writing: Awaitable[None]) -> None:
        """Write down what `batch list` and `batch show` are to say."""
        try:
            await writing
        except SnaporchError as error:  # the disk is full, say: the log has it
            _log.warning("what became of a run was not written down", error=str(error))


def _after(plan: Plan, instant: float) -> Due | None:
    """Return when a plan is due after an instant; None when it never is."""
    return next(plan.cron_after(instant), None)
