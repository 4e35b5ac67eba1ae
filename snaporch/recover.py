"""Recover: what was cut short by a crash of ours is finished or undone.

The journal's row says in which state the operation was and, in its plan, everything that it may have made. What is
really there is asked of the hypervisor and the file system by the compensations themselves, the same ones that a
failing operation runs: they are idempotent, so recovery too may be cut short and run again.
"""

from __future__ import annotations

from snaporch.context import Context
from snaporch.convert import loads
from snaporch.create import Participant
from snaporch.delete import DeletePlan, finish_delete
from snaporch.engine import Operation
from snaporch.errors import Busy, SnaporchError
from snaporch.models import OperationRecord
from snaporch.planning import CreatePlan, RevertPlan
from snaporch.revert import Reverter
from snaporch.states import OperationState, State
from snaporch.steps import CREATE, REVERT, ROLLBACK_CREATE, ROLLBACK_REVERT, ROLLBACK_VERIFY, VERIFY
from snaporch.verify import Trial


async def recover(context: Context) -> tuple[OperationRecord, ...]:
    """Finish or undo every operation that was cut short, and return how each ended.

    Operations that still run, here or in another process, are left alone.

    Raises:
        Stranded: one could not be undone; the others were dealt with.
    """
    ended: list[OperationRecord] = []
    failure: SnaporchError | None = None
    for record, plan in await context.catalog.unfinished():
        operation = Operation(
            record.kind,
            record.domain,
            record.subject,
            id=record.id,
            begun=record.begun,
            machine=OperationState(State(record.state)),
            phases=dict(record.phases),
        )
        mended = False
        try:
            async with context.locked(operation):
                await _RECOVER[record.kind](context, operation, plan)
            mended = True
        except Busy:
            continue
        except SnaporchError as error:
            failure = error
        ended.append(operation.record(ended=mended))
    if failure is not None:
        raise failure
    return tuple(ended)


async def _create(context: Context, operation: Operation, text: str) -> None:
    plan = loads(text, CreatePlan)
    async with context.machine_of(operation.domain) as (record, machine):
        made = {overlay.path for overlay in plan.overlays} | ({plan.stream.path} if plan.stream else set())
        participant = Participant(plan, operation, context, context.driver(record), machine, known={}, made=made)
        await context.engine.undo(operation, CREATE[plan.strategy], ROLLBACK_CREATE, [participant])


async def _revert(context: Context, operation: Operation, text: str) -> None:
    plan = loads(text, RevertPlan)
    actor, phases, rollback = (
        (Trial, VERIFY, ROLLBACK_VERIFY) if plan.way == "verify" else (Reverter, REVERT[plan.way], ROLLBACK_REVERT)
    )
    async with context.machine_of(operation.domain, hung_is_none=True) as (record, machine):
        driver = context.driver(record)
        made = {disk.path for disk in plan.disks if disk.target in plan.frozen}
        reverter = actor(plan, context, driver, machine, new=await driver.find(plan.run_directory), made=made)
        if operation.machine.state is State.COMPLETE:
            await context.engine.tidy_up(operation, reverter.clean_up)
        else:
            await context.engine.undo(operation, phases, rollback, [reverter])


async def _delete(context: Context, operation: Operation, text: str) -> None:
    await finish_delete(context, operation, loads(text, DeletePlan))


_RECOVER = {"create": _create, "revert": _revert, "verify": _revert, "delete": _delete}
