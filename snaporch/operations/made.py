"""Operations that only make files, an export and an import: whatever ends them, the files are there or are gone.

The journal names the files before the first of them is made; recovery removes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import trio

from snaporch.catalog import Change
from snaporch.drivers.base import Driver
from snaporch.engine.context import Context
from snaporch.engine.run import ROLLBACK_SECONDS, Operation
from snaporch.engine.states import Signal, State
from snaporch.errors import OperationFailed, Refused, SnaporchError, Stranded
from snaporch.model.convert import dumps, loads
from snaporch.model.formats import versioned
from snaporch.operations.places import leave_nothing


@versioned("made-plan")
@attrs.frozen
class MadePlan:
    """What the journal holds of such an operation.

    Attributes:
        driver: the driver's name.
        files: what it makes, with paths that nothing else has.
        directory: of the process that it launches, or empty.
        tpm: the directory with the state of its TPM, or empty.
    """

    driver: str
    files: tuple[str, ...]
    directory: str = ""
    tpm: str = ""


@asynccontextmanager
async def making(context: Context, operation: Operation, plan: MadePlan) -> AsyncIterator[None]:
    """Journal an operation while the body makes the files of its plan; the body ends with `made`.

    Raises:
        Refused: what the body found wrong; everything is as it was.
        OperationFailed: the body failed; likewise.
        Stranded: and not even the files could be removed.
    """
    operation.machine.send(Signal.PREPARE)
    await context.catalog.write(Change(operation=operation.record(), begins=True, plan=dumps(plan)))
    operation.machine.send(Signal.STREAM)
    context.events.publish(operation.event())
    try:
        yield
    except (SnaporchError, OSError) as error:
        if operation.machine.state is State.COMPLETE:
            raise
        await unmake(context, operation, plan, str(error))  # noqa: ASYNC120 - it shields itself
        if isinstance(error, Refused):
            raise
        words = f"{operation.kind} {operation.subject} of {operation.who} failed: {error}; nothing is left of it"
        raise OperationFailed(words) from error
    except BaseException:
        if operation.machine.state is not State.COMPLETE:
            await unmake(context, operation, plan, "cancelled")  # noqa: ASYNC102 - it shields itself
        raise


async def made(context: Context, operation: Operation, change: Change) -> None:
    """Complete the operation, with everything else that the catalog is to know, in one transaction."""
    operation.machine.send(Signal.COMMIT)
    complete = attrs.evolve(operation.record(ended=True), state=State.COMPLETE)
    with trio.CancelScope(shield=True):
        await context.catalog.write(attrs.evolve(change, operation=complete))
        operation.machine.send(Signal.DONE)
    context.events.publish(operation.event())


async def unmake(context: Context, operation: Operation, plan: MadePlan, why: str) -> None:
    """Remove what an operation has made; also for recovery.

    Raises:
        Stranded: something cannot be removed.
    """
    operation.machine.send(Signal.FAIL)
    try:
        with trio.CancelScope(deadline=trio.current_time() + ROLLBACK_SECONDS, shield=True):
            driver = context.driver_of(operation.who, plan.driver)
            await _remove(context, operation, driver, plan)
            operation.machine.send(Signal.UNDONE)
            await context.catalog.write(Change(operation=operation.record(ended=True, error=why)))
    except (SnaporchError, OSError) as error:
        operation.machine.send(Signal.STUCK)
        with suppress(SnaporchError), trio.CancelScope(shield=True):
            await context.catalog.write(Change(operation=operation.record(error=f"{why}; {error}")))
        raise Stranded(f"{operation.kind} of {operation.who}: {why}", operation.id, (str(error),)) from error
    context.events.publish(operation.event(text=why))


async def _remove(context: Context, operation: Operation, driver: Driver, plan: MadePlan) -> None:
    if plan.directory:
        await driver.end(await driver.find(Path(plan.directory)), Path(plan.directory))
    if plan.tpm:
        await driver.remove_tpm(plan.tpm)
    await driver.storage.release(plan.files)
    for path in plan.files:
        await driver.storage.remove(path)
    for name in operation.domains:
        if not context.catalog.knows(name):
            await leave_nothing(context, name, driver)


async def recover_made(context: Context, operation: Operation, text: str) -> None:
    """Undo an export or an import that was cut short."""
    await unmake(context, operation, loads(text, MadePlan), "interrupted")
