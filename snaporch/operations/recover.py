"""Recover: finishes or undoes operations that a crash of snaporch has interrupted.

The journal's row says in which state the operation was, what it may have made (its plan) and what it had found out
(its notes); `snaporch.engine.replay` says whether to finish or undo it. The steps and compensations, the same ones
that an operation runs, ask the hypervisor and the file system what really exists. They are idempotent, so recovery
too may be interrupted and run again.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import attrs
import trio

from snaporch.catalog import Change
from snaporch.engine.context import Context
from snaporch.engine.replay import Action, after_create, after_revert
from snaporch.engine.run import Operation
from snaporch.engine.states import OperationState, State
from snaporch.engine.steps import ROLLBACK_CREATE, create_phases
from snaporch.engine.verdict import COMPLETE, LOAD, UNDONE
from snaporch.engine.ways import WAYS
from snaporch.errors import (
    Busy,
    ConnectionGone,
    OperationFailed,
    OutcomeUnknown,
    Refused,
    SnaporchError,
    Stranded,
    UnreadableRecord,
    leaves,
)
from snaporch.model.convert import loads
from snaporch.model.domain import DomainRecord, DomainState, Handle
from snaporch.model.record import OperationKind, OperationRecord
from snaporch.model.way import Way
from snaporch.operations.clone import undo_clones
from snaporch.operations.create import Participant, commit
from snaporch.operations.create_plan import CreatePlan
from snaporch.operations.create_undo import Held
from snaporch.operations.delete import finish_delete
from snaporch.operations.flatten import finish_flatten
from snaporch.operations.keeping import Kept
from snaporch.operations.made import recover_made
from snaporch.operations.merging import MergeJournal
from snaporch.operations.revert import Reverter, clean_up
from snaporch.operations.revert import commit as commit_revert
from snaporch.operations.revert_plan import RevertPlan
from snaporch.operations.trial import Trial


async def recover(
    context: Context, *, domain: str | None = None, patience: float = float("inf")
) -> tuple[OperationRecord, ...]:
    """Go on with or undo every operation that was cut short, and return how each ended.

    Operations that still run, here or in another process, are left alone.

    Args:
        context: the orchestrator's.
        domain: only what was done to this one.
        patience: seconds to wait for a memory stream that is still going; one that takes longer is left as it is,
            for the next time.

    Raises:
        Stranded: one could not be undone; the others were dealt with.
        UnreadableRecord: the record of one cannot be read; likewise.
    """
    ended: list[OperationRecord] = []
    failure: SnaporchError | None = None
    for record, plan in await context.catalog.unfinished(domain):
        operation = recalled(record)
        mended = False
        try:
            async with context.locked(operation):
                with trio.move_on_after(patience if record.kind is OperationKind.CREATE else float("inf")) as scope:
                    await _RECOVER[record.kind](context, operation, plan)
            if scope.cancelled_caught:
                continue
            mended = True
        except Busy:
            continue
        except SnaporchError as error:
            if mended := record.kind is OperationKind.VERIFY:
                await _end_look(context, operation, plan, str(error))
            else:
                failure = error
        ended.append(operation.record(ended=mended))
    for each in await context.catalog.unfinished_unreadable(domain):
        failure = UnreadableRecord(
            f"operation {each.name} on {each.domain} was interrupted, and its record is unreadable: {each.reason}; "
            "nothing can be begun on top of it: use the snaporch that wrote it"
        )
    await context.tell_what_is_untold(domain)
    if failure is not None:
        raise failure
    return tuple(ended)


async def reconnected(context: Context, domain: str, error: Stranded) -> OperationRecord:
    """Return how an operation ended after all that could only not be undone as its connection was lost.

    A guard ends the connection of a snaporch that is stopped, where its QEMU has no other for the guard.

    Raises:
        Stranded: `error`, where that is not so, or another, where it still cannot be undone.
    """
    causes = leaves(error.__cause__ or error)
    if any(isinstance(e, ConnectionGone) or (isinstance(e, OutcomeUnknown) and not e.seconds) for e in causes):
        for record in await recover(context, domain=domain):
            if record.id == error.operation:
                return record
    raise error


async def sweep(context: Context, record: DomainRecord, *, end: bool) -> tuple[Handle, ...]:
    """Return the machines that were launched for a domain and are not its machine; to be used under its lock.

    A start that is killed leaves one when nobody knows it yet.

    Args:
        context: the orchestrator's.
        record: the domain's.
        end: end them, and remove their directories.
    """
    driver, found = context.driver(record), []
    for directory in sorted(Path(context.directory(record.name)).glob("run-*")):
        handle = await driver.find(directory)
        if handle is not None and handle == record.handle:
            continue
        if handle is not None:
            found.append(handle)
        if end:
            await driver.end(handle, directory)
    return tuple(found)


async def _end_look(context: Context, operation: Operation, text: str, why: str) -> None:
    """End a verify that left something which cannot be removed: it has changed nothing, so it blocks nothing.

    What it has made is the domain's own from now on: `fsck` tells of it, and removes it when that is possible.
    """
    plans = loads(text, tuple[RevertPlan, ...])
    made = {plan.domain.name: tuple(d.path for d in plan.disks if d.target in plan.frozen) for plan in plans}
    await context.catalog.write(Change(files=made, operation=operation.record(ended=True, error=why)))


def recalled(record: OperationRecord) -> Operation:
    """Return an operation that was cut short, as its row in the journal has it."""
    return Operation(
        record.kind,
        record.domains,
        record.subject,
        id=record.id,
        begun=record.begun,
        clock=trio.current_time() - max(0.0, time.time() - record.begun),
        machine=OperationState(State(record.state)),
        phases=dict(record.phases),
        notes=dict(record.notes),
    )


async def _create(context: Context, operation: Operation, text: str) -> None:
    async with AsyncExitStack() as stack:
        participants = []
        for plan in loads(text, tuple[CreatePlan, ...]):
            if plan.inside:
                await _await_inside(context, plan.domain.name)
            record, machine = await stack.enter_async_context(context.machine_of(plan.domain.name))
            made = set(plan.files)
            await context.driver(record).storage.release(made | {point.base.active for point in plan.inside})
            participant = Participant(
                attrs.evolve(plan, domain=attrs.evolve(plan.domain, handle=record.handle)),
                operation,
                context,
                context.driver(record),
                machine,
                made=made,
            )
            if record.name in operation.notes:
                participant.held = loads(operation.notes[record.name], Held)
            participants.append(participant)
        await _complete_or_undo(context, operation, participants)


async def _await_inside(context: Context, domain: str) -> None:
    """Wait while a hypervisor finishes a command of the snaporch that was killed: it may not answer meanwhile."""
    record = await context.catalog.domain(domain)
    if record.handle is not None:
        await context.driver(record).await_inside(record.handle, domain)


async def _complete_or_undo(context: Context, operation: Operation, participants: list[Participant]) -> None:
    plan, state = participants[0].plan, operation.machine.state
    phases = create_phases(plan.order, quiesce=plan.quiesce)
    goes_on = after_create(plan.order, state, quiesce=plan.quiesce) is Action.GO_ON
    if not goes_on or not all([await each.is_whole() for each in participants]):
        await context.engine.undo(operation, phases, ROLLBACK_CREATE, participants)
        return
    with suppress(OperationFailed, Refused):  # undone, then; that it is not is another error
        await context.engine.go_on(
            operation, phases, ROLLBACK_CREATE, participants, commit=partial(commit, participants)
        )


async def _revert(context: Context, operation: Operation, text: str) -> None:
    plans = loads(text, tuple[RevertPlan, ...])
    way = plans[0].way
    async with AsyncExitStack() as stack:
        reverters = [await _reverter(context, operation, plan, stack) for plan in plans]
        commit, finish = partial(commit_revert, reverters), partial(clean_up, reverters)
        phases, rollback = WAYS[way].phases, WAYS[way].rollback
        action = after_revert(operation.machine.state, way)
        verdict = context.verdict(operation.id)
        if way in {Way.BESIDE, Way.LAZY} and action is Action.UNDO and await verdict.decide(UNDONE) == COMPLETE:
            action = Action.GO_ON  # snaporch died before the catalog knew
        if action is Action.GO_ON and WAYS[way].same_process and await verdict.decide(LOAD) != LOAD:
            action = Action.UNDO  # snaporch died before the load began, and the guard has let the guest run on
        if action is Action.GO_ON and not all([await each.can_go_on() for each in reverters]):
            action = Action.UNDO  # that had begun, and snaporch died in it: no row says so
        if action is Action.TIDY_UP:
            await context.engine.tidy_up(operation, finish)
        elif action is Action.GO_ON:
            with suppress(OperationFailed, Refused):  # undone, then
                await context.engine.go_on(operation, phases, rollback, reverters, commit=commit, finish=finish)
        else:
            await context.engine.undo(operation, phases, rollback, reverters)
        for each in reverters:
            await each.verdict.forget()


async def _reverter(
    context: Context, operation: Operation, plan: RevertPlan, stack: AsyncExitStack
) -> Reverter | Trial:
    name = plan.domain.name
    if WAYS[plan.way].same_process:
        await _await_inside(context, name)
    record, machine = await stack.enter_async_context(context.machine_of(name, hung_is_none=True))
    driver = context.driver(record)
    made = {disk.path for disk in plan.disks if disk.target in plan.frozen}
    await driver.storage.release({disk.path for disk in plan.disks})
    if plan.way is Way.VERIFY:
        trial = Trial(plan, operation, context, driver, None)
        await trial.find()
        return trial
    # A guest that had been stopped to load a point, and runs: its guard, which lets nothing else run, has done it.
    loaded = False
    if WAYS[plan.way].same_process and plan.was is DomainState.RUNNING and machine is not None:
        loaded = await machine.state() is DomainState.RUNNING
    new = await driver.find(plan.run_directory)
    reverter = Reverter(plan, operation, context, driver, machine, new=new, made=made, loaded=loaded)
    if name in operation.notes:
        reverter.kept = loads(operation.notes[name], Kept)
    return reverter


async def _merges(context: Context, operation: Operation, text: str) -> None:
    journal = loads(text, MergeJournal)
    for each in (journal, *journal.then):
        record = await context.catalog.domain(each.domain)
        images = {disk.path for disk in record.disks} | await context.catalog.own_files(record.name)
        await context.driver(record).storage.release(images)
    finish = finish_delete if operation.kind is OperationKind.DELETE else finish_flatten
    await finish(context, operation, journal)


_RECOVER = {
    OperationKind.CREATE: _create,
    OperationKind.REVERT: _revert,
    OperationKind.VERIFY: _revert,
    OperationKind.CLONE: undo_clones,
    OperationKind.DELETE: _merges,
    OperationKind.FLATTEN: _merges,
    OperationKind.EXPORT: recover_made,
    OperationKind.IMPORT: recover_made,
}
