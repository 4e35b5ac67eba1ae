"""Runs the steps of an operation: the one place where states, journal and actors meet.

The tables in `snaporch.engine.steps` say what is done and what undoes it; actors (one a domain) do it. The engine
knows no hypervisor and no file. It guarantees:

1. The journal says what may have been touched before anything is. While a guest is paused for a LIVE point nothing
   is written: the row from before the pause covers all of the pause.
2. An operation that does not complete is rolled back, whatever ended it: an error, a cancellation, a deadline.
   Rolling back is shielded from cancellation and has a deadline of its own. The one exception is `leave`.
3. What could not be undone is in the `Stranded` error and in the journal; nothing is left out silently.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import attrs
import structlog
import trio

from snaporch.catalog import Catalog, Change
from snaporch.engine.actor import Actor
from snaporch.engine.events import Broadcast
from snaporch.engine.realtime import prompt
from snaporch.engine.replay import phases_begun, phases_left
from snaporch.engine.states import OperationState, Signal, State
from snaporch.engine.steps import Phase, Step, Undo, steps_of
from snaporch.errors import Left, OperationFailed, Refused, SnaporchError, Stranded, leaves
from snaporch.model.names import new_id, one_or_more, short
from snaporch.model.record import Event, EventKind, OperationKind, OperationRecord

T = TypeVar("T")

TIDY_SECONDS = 60.0
ROLLBACK_SECONDS = 300.0  # merging back what a busy guest wrote may take long; for ever it must not

_log = structlog.get_logger("snaporch")


_next_id: ContextVar[str] = ContextVar("snaporch_next_id", default="")


def next_id() -> str:
    """Return the id for an operation: a new one, or what `name_next` has said."""
    named = _next_id.get()
    _next_id.set("")
    return named or new_id()


def name_next(identifier: str) -> None:
    """Set the id of the next operation that this task begins; the client already has this id."""
    _next_id.set(identifier)


@attrs.define
class Operation:
    """One operation while it runs.

    Attributes:
        kind: what it does.
        domains: the names of the domains that it works on, in everybody's order (`snaporch.model.names.in_order`):
            they are locked so, and nobody waits for ever.
        subject: the snapshot's name.
        id: 32 hexadecimal digits.
        begun: by the host's clock.
        clock: the same instant by Trio's, which durations are taken from: the host's may be set meanwhile.
        machine: its state.
        phases: seconds each phase took, in order.
        notes: by domain, what its actor needs to go on after a crash of snaporch; each row of the journal carries
            it.
        moved: by domain, how many bytes are done, and of how many.
        claimed: images, by what they are, that it has claimed to write to (`snaporch.operations.claims`).
    """

    kind: OperationKind
    domains: tuple[str, ...] = attrs.field(converter=one_or_more)
    subject: str
    id: str = attrs.field(factory=next_id)
    begun: float = attrs.field(factory=time.time)
    clock: float = attrs.field(factory=trio.current_time)
    machine: OperationState = attrs.field(factory=OperationState)
    phases: dict[str, float] = attrs.field(factory=dict)
    notes: dict[str, str] = attrs.field(factory=dict)
    moved: dict[str, tuple[int, int]] = attrs.field(factory=dict)
    claimed: set[str] = attrs.field(factory=set)

    @property
    def short(self) -> str:
        """What of its id names nodes and files."""
        return short(self.id)

    @property
    def who(self) -> str:
        """The names of the domains, for people."""
        return ", ".join(self.domains)

    @property
    def what(self) -> str:
        """What it is, for people: ``create nightly``, or ``pause``, which has no subject."""
        return f"{self.kind} {self.subject}".strip()

    def record(self, *, ended: bool = False, error: str = "") -> OperationRecord:
        """Return what the catalog is to say of it now."""
        return OperationRecord(
            id=self.id,
            kind=self.kind,
            domains=self.domains,
            subject=self.subject,
            state=self.machine.state,
            begun=self.begun,
            ended=time.time() if ended else None,
            phases=dict(self.phases),
            error=error,
            notes={} if ended else dict(self.notes),
        )

    def event(self, kind: EventKind = EventKind.STATE, *, done: int = 0, total: int = 0, text: str = "") -> Event:
        """Return an event of this operation, now."""
        return Event(self.id, self.domains, kind, time.time(), self.machine.state, done, total, text)

    def progress(self, domain: str, done: int, total: int) -> Event:
        """Return an event of how far one domain is, which tells of all together."""
        self.moved[domain] = done, total
        done, total = (sum(column) for column in zip(*self.moved.values(), strict=True))
        return self.event(EventKind.PROGRESS, done=done, total=total)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Account the body's time to a phase."""
        began = trio.current_time()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + trio.current_time() - began


def _cause(error: BaseException) -> Exception | None:
    """Return the first real error in `error`; None where it is only cancellation, or Ctrl-C among others."""
    found = list(leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt | SystemExit) for leaf in found):
        return None
    return next((leaf for leaf in found if isinstance(leaf, Exception)), None)


class Changed(OperationFailed):
    """It was undone, but a guest does something else than before: its words say what."""


@attrs.define
class Engine:
    """Runs operations for one orchestrator.

    Attributes:
        catalog: where the journal is.
        events: where what happens is told.
        realtime: have real-time priority (`snaporch.engine.realtime`) and collect no garbage while a guest is
            paused.
    """

    catalog: Catalog
    events: Broadcast
    realtime: bool = False
    _leaving: bool = False
    _left: set[trio.CancelScope] = attrs.field(factory=set)

    def leave(self) -> None:
        """Leave every operation, from now on, as soon as it can go on without snaporch; the others run on.

        What is left is not rolled back: its row in the journal stays, and `recover` goes on with it.
        """
        self._leaving = True
        for scope in self._left:
            scope.cancel()

    async def _perform(self, operation: Operation, phase: Phase, actors: Sequence[Actor]) -> None:
        """Perform a phase.

        Raises:
            Left: it goes on without snaporch.
        """
        if not phase.goes_on:
            await perform(phase, actors)
            return
        with trio.CancelScope() as scope:
            self._left.add(scope)
            if self._leaving:
                scope.cancel()
            try:
                await perform(phase, actors)
            finally:
                self._left.discard(scope)
        if scope.cancelled_caught:
            what = f"{operation.what} of {operation.who}"
            raise Left(f"{what} goes on without snaporch, and is completed at the next start")

    async def run(
        self,
        operation: Operation,
        phases: Sequence[Phase],
        rollback: Sequence[Undo],
        actors: Sequence[Actor],
        *,
        plan: str,
        commit: Callable[[], Awaitable[Change]],
        finish: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Perform `phases`, then write what `commit` returns; or roll back.

        Args:
            operation: in state NEW.
            phases: a table of `snaporch.engine.steps`.
            rollback: its compensations.
            actors: the participants; they finish each phase together.
            plan: for the journal, what `recover` needs to know, as JSON.
            commit: called when all is done; what it returns makes the operation complete.
            finish: called after that: what is left to tidy up, and is tidied up by `recover` otherwise.

        Raises:
            OperationFailed: it was rolled back (Refused, when a step found a reason to refuse).
            Stranded: it could not be rolled back.
            Left: see `leave`; nothing was rolled back.
            trio.Cancelled: it was rolled back because of this.
        """
        begun: set[Step] = set()
        try:
            with ExitStack() as still:
                for phase in phases:
                    await self._enter(operation, phase.signal, quiet=phase.paused, plan=plan)
                    begun.update(phase.steps)
                    if not phase.paused:
                        still.close()
                    if phase.paused or phase.signal is Signal.PAUSE:
                        still.enter_context(_nothing_collected() if self.realtime else nullcontext())
                        still.enter_context(prompt() if self.realtime else nullcontext())
                    with operation.timed(operation.machine.state):
                        await self._perform(operation, phase, actors)
            await trio.lowlevel.checkpoint_if_cancelled()  # the last time that it can be
            await self._enter(operation, Signal.COMMIT, quiet=True)
            await self._commit(operation, commit, ended=finish is None)
        except Left:
            raise
        except BaseException as error:
            # It shields itself, with a deadline.
            await self._fail(operation, rollback, actors, begun, error)  # noqa: ASYNC102
            raise  # a cancellation or Ctrl-C, as it came
        if finish is not None:
            await self.tidy_up(operation, finish)

    async def go_on(
        self,
        operation: Operation,
        phases: Sequence[Phase],
        rollback: Sequence[Undo],
        actors: Sequence[Actor],
        *,
        commit: Callable[[], Awaitable[Change]],
        finish: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Complete an operation that was cut short in the state that it has: perform the phases left, and commit.

        A cancellation leaves it as it was cut short, to be gone on with another time. As for `commit` and `finish`,
        see `run`.

        Raises:
            OperationFailed: it could not be completed and was rolled back.
            Stranded: nor could it be rolled back.
        """
        begun = steps_of(phases)
        try:
            for phase in (left := phases_left(phases, operation.machine.state)):
                if phase is not left[0]:
                    await self._enter(operation, phase.signal)
                with operation.timed(operation.machine.state):
                    await perform(phase, actors)
            await trio.lowlevel.checkpoint_if_cancelled()
            if left:
                await self._enter(operation, Signal.COMMIT, quiet=True)
            await self._commit(operation, commit, ended=finish is None)
        except BaseException as error:
            if _cause(error) is not None:
                await self._fail(operation, rollback, actors, begun, error)  # noqa: ASYNC102 - it shields itself
            raise
        if finish is not None:
            await self.tidy_up(operation, finish)

    async def _commit(self, operation: Operation, commit: Callable[[], Awaitable[Change]], *, ended: bool) -> None:
        with trio.CancelScope(shield=True):  # from here on it is in the catalog or it is not
            change = await commit()
            operation.machine.send(Signal.DONE)
            await self.catalog.write(attrs.evolve(change, operation=operation.record(ended=ended)))
        self.events.publish(operation.event())

    async def _fail(
        self,
        operation: Operation,
        rollback: Sequence[Undo],
        actors: Sequence[Actor],
        begun: Collection[Step],
        error: BaseException,
    ) -> None:
        """Roll back; raise what is to be told of a failure, return when there is none but a cancellation."""
        operation.machine = OperationState(_before_commit(operation.machine.state))
        await self._roll_back(operation, rollback, actors, begun, error)
        if (cause := _cause(error)) is not None:
            raise _translated(operation, cause) from cause

    async def tidy_up(self, operation: Operation, finish: Callable[[], Awaitable[None]]) -> None:
        """Do what is left of a complete operation; what fails is left to `recover`."""
        with trio.CancelScope(shield=True):
            try:
                with trio.fail_after(TIDY_SECONDS):
                    await finish()
                await self.catalog.write(Change(operation=operation.record(ended=True)))
            except (SnaporchError, OSError, trio.TooSlowError) as error:
                _log.warning("complete, but not tidied up", operation=operation.id, error=str(error))

    async def undo(
        self, operation: Operation, phases: Sequence[Phase], rollback: Sequence[Undo], actors: Sequence[Actor]
    ) -> None:
        """Roll back an operation that was cut short in the state that it has.

        Raises:
            Stranded: it still cannot be undone.
        """
        begun = steps_of(phases_begun(phases, operation.machine.state))
        with suppress(Changed):  # the journal says so
            await self._roll_back(operation, rollback, actors, begun, OperationFailed("interrupted"))

    async def _enter(
        self, operation: Operation, signal: Signal, *, quiet: bool = False, plan: str | None = None
    ) -> None:
        """Change the state, first in the journal: with the plan when the operation is new.

        Args:
            operation: which.
            signal: what changes it.
            quiet: not in the journal: recovery does the same in this state as in the one before.
            plan: what `recover` needs to know.
        """
        before = operation.machine.state
        begins = before is State.NEW
        if operation.machine.send(signal) is before:
            return  # all rows and events would say the same again
        if not quiet:
            change = Change(operation=operation.record(), begins=begins, plan=plan if begins else None)
            await self.catalog.write(change)
        self.events.publish(operation.event())

    async def _roll_back(
        self,
        operation: Operation,
        rollback: Sequence[Undo],
        actors: Sequence[Actor],
        begun: Collection[Step],
        error: BaseException,
    ) -> None:
        if operation.machine.state is not State.ROLLING_BACK:  # where `recover` may find it
            operation.machine.send(Signal.FAIL)
        self.events.publish(operation.event())
        cause = _cause(error)
        why = str(cause) if cause else "cancelled"
        _log.info("rolling back", operation=operation.id, domains=operation.domains, why=why)
        remains: list[str] = []
        with trio.CancelScope(shield=True), operation.timed(operation.machine.state):
            with trio.move_on_after(ROLLBACK_SECONDS) as scope:
                for undo in rollback:
                    if undo.after & set(begun):
                        await _undo(undo, actors, remains)
                found = [words for actor in actors if (words := await actor.differs())] if not remains else []
            if scope.cancelled_caught:
                remains.append(f"rolling back took longer than {ROLLBACK_SECONDS:g} s")
        told = "; ".join((why, *found)) if not remains else why
        operation.machine.send(Signal.STUCK if remains else Signal.UNDONE)
        with trio.CancelScope(shield=True):
            try:
                await self.catalog.write(Change(operation=operation.record(ended=not remains, error=told)))
            except SnaporchError as failure:  # a full disk may be why we are here; `recover` finds nothing to undo
                _log.warning("cannot write to the catalog", operation=operation.id, error=str(failure))
        self.events.publish(operation.event(text=told))
        if remains:
            raise Stranded(f"{operation.what} failed: {why}", operation.id, tuple(remains)) from error
        if found:
            what = f"{operation.what} of {operation.who} failed: {why}"
            raise Changed(f"{what}; it was rolled back, but {'; '.join(found)}") from error


def _before_commit(state: State) -> State:
    """Return the state to fail from: an operation whose last write failed is not complete."""
    return State.COMMITTING if state is State.COMPLETE else state


def _translated(operation: Operation, cause: Exception) -> Exception:
    """Return the error to raise after a rollback."""
    if isinstance(cause, Refused | OperationFailed):
        return cause
    words = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    where = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
    what = f"{operation.what} of {operation.who} failed: {words}{where}"
    return OperationFailed(f"{what}; everything is as it was before")


async def _together(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all calls at once; a single one without a nursery: in the pause every task switch counts."""
    if len(calls) == 1:
        await calls[0]()
        return
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)


_standing = 0  # how many have asked that nothing be collected


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Keep Python's garbage collector off while a guest is paused: in a service it takes up to 100 ms."""
    global _standing  # noqa: PLW0603 - as the collector is the process's
    if not _standing and not gc.isenabled():
        yield  # the program does without
        return
    _standing += 1
    gc.disable()
    try:
        yield
    finally:
        _standing -= 1
        if not _standing:
            gc.enable()


async def perform(phase: Phase, actors: Sequence[Actor]) -> None:
    """Run one phase: every lane of every actor side by side, the steps of each lane in order."""

    async def walk(actor: Actor, steps: Sequence[Step], arguments: tuple[str, ...]) -> None:
        for step in steps:
            await actor.performing(step)(*arguments)

    await _together(
        [
            partial(walk, actor, steps, (key,) if key else ())
            for lane, steps in phase.lanes()
            for actor in actors
            for key in actor.keys(lane)
        ]
    )


async def _undo(undo: Undo, actors: Sequence[Actor], remains: list[str]) -> None:
    """Run one compensation for all actors; what fails is noted, and the others go on."""

    async def attempt(actor: Actor, arguments: tuple[str, ...]) -> None:
        try:
            await actor.performing(undo.step)(*arguments)
        except Exception as error:  # noqa: BLE001 - a bug in one compensation must not keep the others from running
            what = " ".join((undo.step.replace("_", " "), *arguments))
            remains.append(f"{actor.name}: cannot {what}: {str(error) or type(error).__name__}")

    await _together(
        [partial(attempt, actor, (key,) if key else ()) for actor in actors for key in actor.keys(undo.step.lane)]
    )
