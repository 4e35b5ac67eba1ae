"""Flatten: chains are shortened by copying up; no guest and no snapshot changes. Read downwards.

    flatten         plans, or refuses; copies, then merges what is left over, then removes files without readers
    finish_flatten  finishes or gives up one that was interrupted
    keep_short      the automatic flatten of a domain whose chains are longer than its limit
    chain_cost      measures what a chain costs

A flatten removes no snapshot, so it can be abandoned at any moment, by an error, a cancellation or a crash: what
has been copied stays, chains that are not short yet are as they were, and snapshots whose images were written to
are sealed anew. How images merge is in `snaporch.operations.merging`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import structlog
import trio

from snaporch.catalog import Change
from snaporch.drivers.base import ChainCosts, Storage, need
from snaporch.engine.context import Context
from snaporch.engine.replay import Action, after_flatten
from snaporch.engine.run import ROLLBACK_SECONDS, Operation
from snaporch.engine.states import Signal, State
from snaporch.errors import InvalidInput, OperationFailed, Refused, SnaporchError, Stranded
from snaporch.images.merge import apply, one_after_the_other, plan_delete, plan_flatten
from snaporch.model.convert import dumps
from snaporch.model.domain import DiskStatus, DomainRecord
from snaporch.model.merge import MergePlan
from snaporch.model.record import OperationKind
from snaporch.model.request import MergeOptions
from snaporch.operations.checks import check_space
from snaporch.operations.merging import MergeJournal, Merging, merging
from snaporch.operations.records import check_records

_log = structlog.get_logger("snaporch")

ON_ITS_BASE = 2  # images in a chain that the automatic one leaves: the base, which is often shared, is not copied


async def _tops(context: Context, domain: DomainRecord, name: str) -> tuple[str, ...]:
    """Return the images whose chains are to be short: a snapshot's, or those that the domain is on."""
    if name:
        snapshot = await context.catalog.snapshot(domain.name, name)
        return tuple(disk.disk.path for disk in snapshot.snapshot.disks)
    return tuple(disk.path for disk in domain.disks if not disk.readonly)


async def _copy(merges: Merging, tops: Iterable[str], depth: int, limit: int) -> MergePlan:
    """Copy, merge, remove, record."""
    graph, plan = await merges.look_and_claim(partial(plan_flatten, tops=tops, depth=depth, limit=limit))
    await merges.carry_out(graph, plan)
    plan = await merges.merge_surplus()
    operation = merges.operation
    operation.machine.send(Signal.COMMIT)
    gone = await _close(merges)
    return attrs.evolve(plan, unlink=gone)


async def _close(merges: Merging, signal: Signal = Signal.DONE, why: str = "") -> tuple[str, ...]:
    """Remove what nobody needs any more, and record that it is over; return what was removed."""
    operation = merges.operation
    gone = await merges.gone(merges.journal.unlink)
    with trio.CancelScope(shield=True):
        await merges.remove(gone)
        operation.machine.send(signal)
        change = Change(domains=(merges.record,), operation=operation.record(ended=True, error=why), gone=gone)
        await merges.context.catalog.write(change)
    merges.context.events.publish(operation.event(text=why))
    return gone


async def _give_up(context: Context, operation: Operation, journal: MergeJournal, why: str) -> None:
    """Leave everything whole as it is now.

    Raises:
        Stranded: not even that can be done now.
    """
    operation.machine.send(Signal.FAIL)
    try:
        with trio.CancelScope(deadline=trio.current_time() + ROLLBACK_SECONDS, shield=True) as scope:
            async with merging(context, operation, journal) as merges:
                await merges.seal_anew(journal.written)
                await _close(merges, Signal.UNDONE, why)
    except (SnaporchError, OSError, trio.TooSlowError) as error:
        raise await _stuck(context, operation, f"{why}; {error}") from error
    if scope.cancelled_caught:
        raise await _stuck(context, operation, f"{why}; nothing answers")


async def _stuck(context: Context, operation: Operation, why: str) -> Stranded:
    operation.machine.send(Signal.STUCK)
    with trio.CancelScope(shield=True):
        await context.catalog.write(Change(operation=operation.record(error=why)))
    context.events.publish(operation.event(text=why))
    remains = ("every snapshot is whole, what was left over is not tidied up",)
    return Stranded(f"flatten of {operation.who} failed: {why}", operation.id, remains)


async def flatten(
    context: Context,
    domain: str,
    name: str,
    depth: int,
    options: MergeOptions,
    *,
    limit: int = 0,
    dry_run: bool = False,
) -> MergePlan:
    """Shorten chains; see `snaporch.Orchestrator.flatten`."""
    if depth < 1:
        raise InvalidInput("flatten: a chain has at least one image")
    operation = Operation(OperationKind.FLATTEN, domain, name)
    async with context.locked(operation, only_looks=dry_run):
        journal = MergeJournal(domain, options=options)
        async with merging(context, operation, journal, look_only=True, unlocked=dry_run) as merges:
            await check_records(context, merges.record)
            tops = await _tops(context, merges.record, name)
            shorten = partial(plan_flatten, tops=tops, depth=depth, limit=limit)
            if dry_run:
                graph = await merges.look()
                plan = shorten(graph)
            else:
                graph, plan = await merges.look_and_claim(shorten)
            storage = merges.driver.storage
            await check_space((storage, os.path.dirname(step.top), step.bytes) for step in plan.steps)
        if dry_run or not plan.steps:
            return one_after_the_other(plan, plan_delete(apply(graph, plan), ())) if plan.steps else plan
        operation.machine.send(Signal.PREPARE)
        operation.machine.send(Signal.MERGE)
        await context.catalog.write(Change(operation=operation.record(), begins=True, plan=dumps(journal)))
        context.events.publish(operation.event())
        try:
            async with merging(context, operation, journal) as merges:
                try:
                    return await _copy(merges, tops, depth, limit)
                finally:
                    journal = merges.journal
        except (SnaporchError, OSError, trio.TooSlowError) as error:
            await _give_up(context, operation, journal, str(error))  # noqa: ASYNC120 - it shields itself
            raise OperationFailed(
                f"flatten of {domain} failed: {error}; no guest and no snapshot has changed"
            ) from error
        except BaseException:
            if operation.machine.state is not State.COMPLETE:  # else a cancellation came just too late
                # It shields itself.
                await _give_up(context, operation, journal, "cancelled")  # noqa: ASYNC102
            raise


async def finish_flatten(context: Context, operation: Operation, journal: MergeJournal) -> None:
    """Give up a flatten that was cut short, or tidy up after it.

    Raises:
        Stranded: it still cannot be done.
    """
    if after_flatten(operation.machine.state) is Action.UNDO:
        await _give_up(context, operation, journal, "interrupted")
        return
    async with merging(context, operation, journal) as merges:
        await _close(merges)


async def keep_short(context: Context, domains: Iterable[str]) -> None:
    """Flatten the chains of domains that a create has made longer than they allow.

    Never raises: the create is committed. Failures are logged and listed in `operations`; a cancellation ends the
    flatten only, and the create's result is returned.
    """
    try:
        for domain in domains:
            if limit := await _outgrown(context, domain):
                await flatten(context, domain, "", ON_ITS_BASE, MergeOptions(), limit=limit)
    except (SnaporchError, OSError) as error:
        _log.warning("a chain stays long", error=str(error))
    except trio.Cancelled:  # noqa: ASYNC103, ASYNC104 - see above
        _log.warning("a chain stays long", error="cancelled")


async def _outgrown(context: Context, domain: str) -> int:
    """Return the limit of a domain that has a longer chain, else 0."""
    record = await context.catalog.domain(domain)
    storage = context.driver(record).storage
    for disk in record.disks if record.max_depth else ():
        if not disk.readonly and len(await storage.chain(disk.path, disk.format)) > record.max_depth:
            return record.max_depth
    return 0


async def chain_cost(storage: Storage, disk: DiskStatus) -> dict[str, Any]:
    """Return for `doctor` how many images a disk's chain has and, measured, what those over its base cost."""
    cost: dict[str, Any] = {"images": len(disk.chain)}
    with suppress(Refused):  # an image is missing, or the driver cannot tell
        links = await storage.chain(disk.active, disk.format)
        measure = need(storage, ChainCosts, disk.target)
        for what, link in (("", links[0]), ("_base_alone", links[-1])):
            found = await measure.read_cost(link.path, link.format)
            cost |= {f"open_ms{what}": round(1e3 * found.open_seconds, 1)}
            cost |= {f"read_us{what}": round(1e6 * found.read_seconds, 1)}
    return cost
