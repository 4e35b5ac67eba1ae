"""Runs a plan to its end, also from where it was interrupted. Read downwards.

    run_batch   begins a batch, or goes on with the plan's last one; one at a time of a plan
    take        workers take items one by one, as many at once as the limits let them
    undo        when the plan says so: deletes the snapshots that were taken
    prune       retention, of the domains that were taken

If a batch is interrupted (a signal, SIGKILL, a crash of the host), the next `run_batch` of the plan goes on: the
snapshot of an interrupted item is complete, or does not exist. `Orchestrator.create` and `recover` guarantee this,
and the record (`snaporch.batch.store`) says under which name to look.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import attrs
import stamina
import structlog
import trio

from snaporch.batch import store
from snaporch.batch.plan import Check, OnFailure, Plan
from snaporch.batch.prune import prune_by_plan
from snaporch.batch.report import write_reports
from snaporch.batch.select import Item
from snaporch.batch.slots import Slots
from snaporch.batch.store import BatchRecord, End, ItemRecord, Stage
from snaporch.batch.timing import until_closed, until_open
from snaporch.catalog import Catalog, domain_lock
from snaporch.errors import (
    Busy,
    HypervisorError,
    NotEnoughSpace,
    NotFound,
    OperationFailed,
    OtherSnapshot,
    SnaporchError,
    Stranded,
)
from snaporch.model.record import SnapshotRecord
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DomainSnapshot
from snaporch.operations.bandwidth import SharedBandwidth
from snaporch.operations.hooks import HookFailed, run_hooks
from snaporch.orchestrator import Orchestrator, catalog_of

_log = structlog.get_logger("snaporch")

LONGEST_WAIT = 300.0  # between two attempts
BUSY_WAIT, LONGEST_BUSY_WAIT = 1.0, 30.0  # between looks whether a domain is busy still

Now = Callable[[], float]
Tell = Callable[[ItemRecord], None]


def _quiet(record: ItemRecord) -> None:
    """Tell nobody."""


def worth_another_try(error: BaseException) -> bool:
    """Return whether what failed may go well the next time; what was refused would be refused again."""
    return isinstance(error, Busy | OperationFailed | HypervisorError) and not isinstance(error, HookFailed)


@attrs.define
class Runner:
    """One run of a batch.

    Attributes:
        orch: the orchestrator.
        plan: what is done.
        batch: where it is.
        now: seconds since the epoch.
        tell: called with each item that has come to an end.
        min_free: bytes that are to stay free where the root is, whatever the plan says.
        slots: who is next.
        why: nothing else is begun, because of this.
    """

    orch: Orchestrator
    plan: Plan
    batch: BatchRecord
    now: Now = time.time
    tell: Tell = _quiet
    min_free: int = 0
    slots: Slots = attrs.field(default=attrs.Factory(lambda self: Slots(self.plan.limits), takes_self=True))
    why: str = ""
    _bandwidth: SharedBandwidth | None = None
    _records: dict[str, ItemRecord] = attrs.field(factory=dict)
    _running: dict[str, ItemRecord] = attrs.field(factory=dict)
    _expected: dict[str, int] = attrs.field(factory=dict)
    _read: int = -1
    _reading: trio.Lock = attrs.field(factory=trio.Lock)
    _idle: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _closes: float = float("inf")

    def __attrs_post_init__(self) -> None:
        if self.plan.limits.bandwidth:
            self._bandwidth = SharedBandwidth(self.plan.limits.bandwidth)

    @property
    def catalog(self) -> Catalog:
        """Where the record is."""
        return catalog_of(self.orch)

    async def save(self, **changes: Any) -> None:
        """Write down where the batch is."""
        self.batch = attrs.evolve(self.batch, **changes)  # at once: another task may note something meanwhile
        await store.save(self.catalog, self.batch)

    async def note(self, problem: str) -> None:
        """Write down what went wrong beside the items."""
        await self.save(problems=(*self.batch.problems, problem))

    async def run(self) -> None:
        """Go through the stages that are left."""
        await self.save(runs=self.batch.runs + 1)
        if self.batch.stage is Stage.TAKING and await self._prepare():
            await self.take()
        if self.why:
            await store.skip_the_rest(self.catalog, self.batch.id, self.why)
        if self.batch.stage is Stage.TAKING:
            undo = self.plan.on_failure is OnFailure.UNDO_ALL and await self._failures()
            await self.save(stage=Stage.UNDOING if undo else Stage.PRUNING)
        if self.batch.stage is Stage.UNDOING:
            await self.undo()
        elif self.plan.retention is not None:
            await self.prune()
        await self._end()

    async def _prepare(self) -> bool:
        if not self.batch.prepared:
            try:
                await run_hooks(self.plan.hooks.before, self._variables())
            except HookFailed as error:
                self.why = str(error)
                await self.note(self.why)
                return False
            await self.save(prepared=True)
        return True

    async def _failures(self) -> int:
        found = await store.counts(self.catalog, self.batch.id)
        return found.get(End.FAILED, 0) + found.get(End.STRANDED, 0)

    # --- taking -----------------------------------------------------------------------------------------------

    async def take(self) -> None:
        """Take every item that waits still."""
        if window := self.plan.limits.window:
            where = window.opens, window.closes, window.zone
            await trio.sleep(until_open(*where, self.now()))
            self._closes = self.now() + until_closed(*where, self.now())
        deadline = self.plan.limits.deadline
        with self._scope, trio.move_on_after(float("inf") if deadline is None else deadline) as in_time:
            await self._refill()
            async with trio.open_nursery() as nursery:
                for _ in range(min(self.plan.limits.per_host, len(self.slots))):
                    nursery.start_soon(self._work)
        if in_time.cancelled_caught:
            self.why = f"the deadline of {deadline:g} s ran out"
        await self._look_after()

    async def _look_after(self) -> None:
        """Note which of the items that were cut short are there nevertheless: a create may just have committed."""
        for record in tuple(self._running.values()):
            if (found := await self._left(record)) is not None:
                done = attrs.evolve(_with(record, found), end=End.DONE, ended=self.now())
                await store.save_item(self.catalog, done)
                self.tell(done)

    async def _work(self) -> None:
        while (item := await self._next()) is not None:
            record = attrs.evolve(self._records.pop(item.name), begun=self.now())
            self._running[item.name] = record
            await self._one(record)
            del self._running[item.name]
            self._expected.pop(item.name, None)
            self.slots.give_back(item)
            self._idle.unpark()
        self._idle.unpark_all()

    async def _next(self) -> Item | None:
        """Return the next item, with its slot, as soon as there is one for it; None when there are no more."""
        while True:
            if self.now() >= self._closes and not self.why:
                self.why = "the window has closed"
            if self.why:
                return None
            await self._refill()
            if (item := self.slots.take()) is not None:
                self._idle.unpark()  # there may be one for somebody else too
                return item
            if not len(self.slots):
                return None
            await self._idle.park()

    async def _refill(self) -> None:
        """Have some items at hand, and no more than that in memory."""
        async with self._reading:
            if len(self.slots) < store.PAGE // 2 and self._read >= -1:
                found = await store.page(self.catalog, self.batch.id, self._read, End.WAITING)
                for record in found:
                    self._records[record.item.name] = record
                    self.slots.add(record.item)
                self._read = found[-1].position if len(found) == store.PAGE else -2

    async def _one(self, record: ItemRecord) -> None:
        """Take one item, and write down how it went."""
        variables = self._variables(record)
        try:
            record = await self._attempts(record)
            record = await self._verified(record)
            await run_hooks(self.plan.hooks.after_each, variables)
            record = attrs.evolve(record, end=End.DONE)
        except _ItemFailed as failed:
            record = attrs.evolve(failed.record, end=_end(failed.error), error=str(failed.error))
        except (SnaporchError, OSError) as error:
            record = attrs.evolve(record, end=_end(error), error=str(error))
        record = attrs.evolve(record, ended=self.now())
        with trio.CancelScope(shield=True):
            await store.save_item(self.catalog, record)
        self.tell(record)
        if record.end is not End.DONE:
            await self._failed(record, variables)

    async def _failed(self, record: ItemRecord, variables: dict[str, str]) -> None:
        if self.plan.on_failure is not OnFailure.CONTINUE:
            self.why = self.why or f"{record.item.name} failed"
        if self.plan.on_failure is OnFailure.UNDO_ALL:
            self._scope.cancel()
        try:
            await run_hooks(self.plan.hooks.failed_each, {**variables, "ERROR": record.error})
        except HookFailed as error:
            await self._note_of(record, error)

    async def _note_of(self, record: ItemRecord, error: Exception) -> None:
        """Write down what went wrong with an item beside its snapshot."""
        record = attrs.evolve(record, problems=(*record.problems, str(error)))
        await store.save_item(self.catalog, record)
        self.tell(record)

    async def _attempts(self, record: ItemRecord) -> ItemRecord:
        """Return the record of an item that was taken, after as many attempts as it may have."""
        if self.batch.runs > 1 and (found := await self._left(record)) is not None:
            return _with(record, found)
        retries = self.plan.retries
        async for attempt in stamina.retry_context(
            on=worth_another_try,
            attempts=retries.attempts,
            timeout=None,
            wait_initial=retries.wait,
            wait_max=LONGEST_WAIT,
            wait_jitter=retries.wait / 4,
        ):
            with attempt:
                record = attrs.evolve(record, attempts=attempt.num)
                try:
                    await run_hooks(self.plan.hooks.before_each, self._variables(record))
                    return _with(record, await self._when_free(record))
                except SnaporchError as error:
                    if attempt.num == retries.attempts or not worth_another_try(error):
                        raise _ItemFailed(record, error) from error
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _left(self, record: ItemRecord) -> Sequence[SnapshotRecord] | None:
        """Return the snapshots that a run which was cut short has left: of a group those of all, or none."""
        for domain in record.item.members:
            await self.orch.recover(domain=domain)
        try:
            return tuple([await self.orch.show(domain, record.snapshot) for domain in record.item.members])
        except NotFound:
            return None

    async def _when_free(self, record: ItemRecord) -> Sequence[SnapshotRecord]:
        """Take an item; while something else is done on it, again and again: in the window, and for a while."""
        until, wait = min(self._closes, self.now() + self.plan.retries.busy), BUSY_WAIT
        while True:
            try:
                return await self._create(record)
            except Busy:
                if self.why or self.now() + wait > until:
                    raise
            await trio.sleep(wait)
            wait = min(2 * wait, LONGEST_BUSY_WAIT)

    async def _create(self, record: ItemRecord) -> Sequence[SnapshotRecord]:
        members, how = record.item.members, self.plan.snapshot
        active = any([await self.orch.is_active(domain) for domain in members])
        memory, live = how.memory and active, how.memory and active and how.live
        await self._check_room(record.item, memory=memory)
        flags = CreateFlag.LIVE if live else CreateFlag(0)
        flags |= CreateFlag.QUIESCE if how.quiesce and active else CreateFlag(0)
        strategy = how.strategy if live else Strategy.AUTO  # to name one is to ask for LIVE
        options = CreateOptions(strategy=strategy, max_seconds=how.max_seconds, on_timeout=how.on_timeout)
        snapshot = DomainSnapshot(record.snapshot, how.description, memory=memory)
        return await self.orch.create_group(members, snapshot, flags, options, bandwidth=self._bandwidth)

    async def _check_room(self, item: Item, *, memory: bool) -> None:
        """Refuse to begin what, with all that runs, is expected to leave less free than is to stay.

        Raises:
            NotEnoughSpace: `needed` is what they take and what is to stay free.
        """
        if stay := max(self.min_free, self.plan.limits.min_free):
            self._expected[item.name], free = await self.orch.room_for(item.members, memory=memory)
            if (needed := stay + sum(self._expected.values())) > free:
                raise NotEnoughSpace(needed, free, f"{self.orch.root}, where {stay:,} are to stay free (min_free)")

    async def _verified(self, record: ItemRecord) -> ItemRecord:
        if self.plan.snapshot.verify is Check.NONE:
            return record
        boot = self.plan.snapshot.verify is Check.BOOT
        reports = [
            await self.orch.verify(domain, record.snapshot, boot=boot, ids=record.ids)
            for domain in record.item.members
        ]
        problems = [f"{report.domain}: {problem}" for report in reports for problem in report.problems]
        record = attrs.evolve(record, verified=all(report.ok for report in reports))
        if not record.verified:
            raise _ItemFailed(record, OperationFailed(f"damaged: {'; '.join(problems)}"))
        return record

    def _variables(self, record: ItemRecord | None = None) -> dict[str, str]:
        found = {"PLAN": self.plan.name, "BATCH": self.batch.id, "SNAPSHOT": self.batch.snapshot}
        found |= {"ROOT": str(self.orch.root), "STAGE": str(self.batch.stage)}
        return found if record is None else found | {"DOMAIN": " ".join(record.item.members)}

    # --- afterwards -------------------------------------------------------------------------------------------

    async def undo(self) -> None:
        """Delete what was taken."""

        async def one(record: ItemRecord) -> None:
            await self._delete(record.item.members, record.snapshot, record.ids)
            end = End.UNDONE if record.end is End.DONE else record.end
            await store.save_item(self.catalog, attrs.evolve(record, end=end, taken=False))

        await self._each_taken(one)

    async def _delete(self, domains: Sequence[str], name: str, ids: Collection[str]) -> None:
        for domain in domains:
            await self.orch.recover(domain=domain)
        try:
            await self.orch.delete_group(domains, name, ids=ids)
        except (NotFound, OtherSnapshot):
            return  # by the run that was cut short, or by somebody else

    async def prune(self) -> None:
        """Delete what retention does not keep, of the domains that were taken."""

        async def one(record: ItemRecord) -> None:
            item = record.item
            verdicts = await prune_by_plan(self.orch, self.plan, item.name, item.members, now=self.now())
            if deleted := tuple(name for verdict in verdicts.values() for name in verdict.delete):
                await store.save_item(self.catalog, attrs.evolve(record, deleted=(*record.deleted, *deleted)))

        await self._each_taken(one)

    async def _each_taken(self, work: Callable[[ItemRecord], Awaitable[None]]) -> None:
        """Do something with every item that was taken, as many at once as the limit for the host says."""
        limit = trio.CapacityLimiter(self.plan.limits.per_host)

        async def one(record: ItemRecord) -> None:
            try:
                await work(record)
            except (SnaporchError, OSError) as error:
                await self._note_of(record, error)
            finally:
                limit.release_on_behalf_of(record.position)

        async with trio.open_nursery() as nursery, aclosing(self._taken()) as taken:
            async for record in taken:
                await limit.acquire_on_behalf_of(record.position)
                nursery.start_soon(one, record)

    async def _taken(self) -> AsyncGenerator[ItemRecord, None]:
        async for record in store.items(self.catalog, self.batch.id):
            if record.taken:
                yield record

    async def _end(self) -> None:
        """Come to the end: the last hooks, and what there is to say."""
        try:
            await run_hooks(self.plan.hooks.after, self._variables())
        except HookFailed as error:
            await self.note(str(error))
        counts = await store.counts(self.catalog, self.batch.id)
        deleted, troubled = await store.lengths(self.catalog, self.batch.id)
        well = not self.batch.problems and not troubled
        stage = Stage.COMPLETE if set(counts) == {End.DONE} and well else Stage.FAILED
        if self.batch.stage is Stage.UNDOING and well:
            stage = Stage.UNDONE
        await self.save(stage=stage, ended=self.now(), counts=counts, deleted=deleted, troubled=troubled)
        try:
            await write_reports(self.catalog, self.batch, self.plan.report)
        except (SnaporchError, OSError) as error:
            await self.note(f"no report: {error}")


class _ItemFailed(Exception):
    """An item failed: with what is known of it by then."""

    def __init__(self, record: ItemRecord, error: Exception) -> None:
        super().__init__(str(error))
        self.record = record
        self.error = error


def _end(error: Exception) -> End:
    return End.STRANDED if isinstance(error, Stranded) else End.FAILED


def _with(record: ItemRecord, made: Sequence[SnapshotRecord]) -> ItemRecord:
    pauses = [each.timings.pause for each in made if each.timings.pause is not None]
    size = sum(each.memory_size for each in made)
    ids = tuple(each.id for each in made)
    return attrs.evolve(record, taken=True, pause=max(pauses, default=None), bytes=size, ids=ids)


def plan_lock(orch: Orchestrator, name: str) -> AbstractAsyncContextManager[object]:
    """Hold a plan: it runs once at a time."""
    return domain_lock(orch.root / "locks", f"batch {name}", "", f"batch {name}")


async def run_batch(
    orch: Orchestrator,
    plan: Plan,
    *,
    anew: bool = False,
    due: float = 0.0,
    now: Now = time.time,
    tell: Tell = _quiet,
    took: store.Took = store.took,
    min_free: int = 0,
) -> BatchRecord:
    """Run a plan, or go on with its last batch where that was cut short.

    What is gone on with has the items and the snapshots' name that it began with; all else is as the plan is now.
    Cancelled, it rolls back what it is just doing, and can be gone on with.

    Args:
        orch: the orchestrator.
        plan: what is done.
        anew: begin another batch even where one was cut short; that one is then over.
        due: when the plan's schedule had it due.
        now: the time, in seconds since the epoch.
        tell: called with each item that has come to an end.
        took: says how long a domain is expected to take.
        min_free: bytes that are to stay free where the root is; the plan may say more.

    Returns:
        The batch, which has ended; how each item did is in `snaporch.batch.store.items`.

    Raises:
        NotFound: a domain that the plan names is not there.
        Busy: the plan runs already.
    """
    async with plan_lock(orch, plan.name):
        batch = await store.unfinished(catalog_of(orch), plan.name)
        if batch is not None and anew:
            await store.skip_the_rest(catalog_of(orch), batch.id, "abandoned")
            await store.save(catalog_of(orch), attrs.evolve(batch, stage=Stage.ABANDONED, ended=now()))
            batch = None
        if batch is None:
            batch = await store.begin(catalog_of(orch), str(orch.root), plan, now=now(), due=due, took=took)
        else:
            _log.info("going on with a batch that was interrupted", plan=plan.name, batch=batch.id)
        runner = Runner(orch, plan, batch, now, tell, min_free)
        await runner.run()
        return runner.batch
