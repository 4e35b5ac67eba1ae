"""What is begun by a request and goes on without it: answered as soon as it is under way, with its operation."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

import attrs
from starlette.responses import Response

from snaporch.catalog import Page
from snaporch.catalog.reading import in_turns
from snaporch.engine.states import State
from snaporch.errors import NotFound, OperationFailed, Stranded
from snaporch.model.convert import dumps
from snaporch.model.finding import Finding
from snaporch.model.merge import MergePlan
from snaporch.model.names import in_order
from snaporch.model.record import CloneRecord, GivenUp, OperationKind, OperationRecord, RevertRecord, SnapshotRecord
from snaporch.model.rfc import CreateFlag, DeleteFlag, RevertFlag
from snaporch.operations.clone import clone_names
from snaporch.orchestrator import catalog_of
from snaporch.service import shapes
from snaporch.service.call import Call, json_page, limit_of, no_cursor
from snaporch.service.confine import check_snapshot
from snaporch.service.jobs import BEGIN_SECONDS, Job, Work, past
from snaporch.service.keys import keep, keep_answer, kept
from snaporch.service.problems import MEDIA_TYPE, problem
from snaporch.service.shapes import OperationStatus, flags_of

FAR_FUTURE = 2.0**40
WAIT_SECONDS = 3_600.0  # the longest that a request waits for an operation


async def create(call: Call) -> OperationStatus | Response:
    """Take a snapshot of a domain."""
    asked: shapes.Create = call.body
    await check_snapshot(asked.snapshot, call.service.confinement, call.domain)
    flags = flags_of(CreateFlag, asked.flags)

    async def work() -> SnapshotRecord:
        return await call.service.orchestrator.create(call.domain, asked.snapshot, flags, asked.options)

    return await _begin(
        call, OperationKind.CREATE, (call.domain,), asked.snapshot.name, work, waits=asked.options.wait
    )


async def create_group(call: Call) -> OperationStatus | Response:
    """Take a snapshot of each of several domains, all at one point."""
    asked: shapes.CreateGroup = call.body
    for domain in asked.domains:
        await check_snapshot(asked.snapshot, call.service.confinement, domain)
    flags = flags_of(CreateFlag, asked.flags)

    async def work() -> tuple[SnapshotRecord, ...]:
        orchestrator = call.service.orchestrator
        return await orchestrator.create_group(asked.domains, asked.snapshot, flags, asked.options)

    group, waits = in_order(asked.domains), asked.options.wait
    return await _begin(call, OperationKind.CREATE, group, asked.snapshot.name, work, waits=waits)


async def revert(call: Call) -> OperationStatus | Response:
    """Take a domain back to a snapshot."""
    asked: shapes.Revert = call.body
    flags = flags_of(RevertFlag, asked.flags)

    async def work() -> RevertRecord:
        orchestrator = call.service.orchestrator
        return await orchestrator.revert(
            call.domain, call.name, flags, save_current=asked.save_current, ids=asked.ids
        )

    return await _begin(call, OperationKind.REVERT, (call.domain,), call.name, work)


async def revert_group(call: Call) -> OperationStatus | Response:
    """Take several domains back to the point at which a snapshot was taken of all: all or none."""
    asked: shapes.RevertGroup = call.body
    flags = flags_of(RevertFlag, asked.flags)

    async def work() -> tuple[RevertRecord, ...]:
        orchestrator = call.service.orchestrator
        return await orchestrator.revert_group(
            asked.domains, asked.name, flags, save_current=asked.save_current, ids=asked.ids
        )

    return await _begin(call, OperationKind.REVERT, in_order(asked.domains), asked.name, work)


async def verify(call: Call) -> OperationStatus | Response:
    """Read every file of a snapshot in full and compare it with what was saved."""

    async def work() -> Any:
        return await call.service.orchestrator.verify(
            call.domain, call.name, boot=call.body.boot, ids=call.body.ids
        )

    return await _begin(call, OperationKind.VERIFY, (call.domain,), call.name, work)


async def clone(call: Call) -> OperationStatus | Response:
    """Make new domains of a snapshot, on overlays over its images and with its memory: all or none."""
    asked: shapes.Clone = call.body
    names = clone_names(asked.new, asked.options.count)

    async def work() -> tuple[CloneRecord, ...]:
        orchestrator = call.service.orchestrator
        return await orchestrator.clone(call.domain, call.name, asked.new, asked.options, ids=asked.ids)

    domains = in_order({call.domain, *names})
    return await _begin(call, OperationKind.CLONE, domains, call.name, work, waits=asked.options.wait)


async def delete(call: Call) -> OperationStatus | Response:
    """Delete snapshots; what the guest and every other snapshot hold stays the same."""
    asked: shapes.Delete = call.body
    flags = flags_of(DeleteFlag, asked.flags)

    async def work() -> MergePlan:
        return await call.service.orchestrator.delete(call.domain, asked.names, flags, asked.options, ids=asked.ids)

    return await _begin(call, OperationKind.DELETE, (call.domain,), ", ".join(asked.names), work)


async def plan_delete(call: Call) -> MergePlan:
    """Say what a delete would merge where, and which files would go; nothing is touched."""
    asked: shapes.Delete = call.body
    flags = flags_of(DeleteFlag, asked.flags)
    return await call.service.orchestrator.delete(call.domain, asked.names, flags, ids=asked.ids, dry_run=True)


async def delete_group(call: Call) -> OperationStatus | Response:
    """Delete snapshots that were taken of several domains at one point, of all of them."""
    asked: shapes.DeleteGroup = call.body
    flags = flags_of(DeleteFlag, asked.flags)

    async def work() -> dict[str, MergePlan]:
        return await call.service.orchestrator.delete_group(
            asked.domains, asked.names, flags, asked.options, ids=asked.ids
        )

    return await _begin(call, OperationKind.DELETE, in_order(asked.domains), ", ".join(asked.names), work)


async def plan_delete_group(call: Call) -> dict[str, MergePlan]:
    """Say, for each domain, what that would merge where, and which files would go; nothing is touched."""
    asked: shapes.DeleteGroup = call.body
    flags = flags_of(DeleteFlag, asked.flags)
    return await call.service.orchestrator.delete_group(
        asked.domains, asked.names, flags, ids=asked.ids, dry_run=True
    )


async def flatten(call: Call) -> OperationStatus | Response:
    """Shorten the chains of a domain, or of a snapshot, by copying up; nobody sees a difference."""
    asked: shapes.Flatten = call.body

    async def work() -> MergePlan:
        return await call.service.orchestrator.flatten(call.domain, asked.snapshot, asked.depth, asked.options)

    return await _begin(call, OperationKind.FLATTEN, (call.domain,), asked.snapshot, work)


async def plan_flatten(call: Call) -> MergePlan:
    """Say what a flatten would copy, and which files would go; nothing is touched."""
    asked: shapes.Flatten = call.body
    return await call.service.orchestrator.flatten(call.domain, asked.snapshot, asked.depth, dry_run=True)


async def recover(call: Call) -> OperationStatus | Response:
    """Finish or undo what a crash left."""
    asked: shapes.Recover = call.body

    async def work() -> tuple[OperationRecord, ...]:
        patience = math.inf if asked.patience is None else asked.patience
        return await call.service.orchestrator.recover(domain=asked.domain, patience=patience)

    return await _begin(call, OperationKind.RECOVER, (asked.domain,) if asked.domain else (), "", work)


async def fsck(call: Call) -> OperationStatus | Response:
    """Compare catalog, files and running hypervisors."""
    asked: shapes.Fsck = call.body

    async def work() -> tuple[Finding, ...]:
        return await call.service.orchestrator.fsck(asked.domain, repair=asked.repair)

    return await _begin(call, OperationKind.FSCK, (asked.domain,) if asked.domain else (), "", work)


async def _begin(
    call: Call, kind: OperationKind, domains: tuple[str, ...], subject: str, work: Work, *, waits: bool = False
) -> OperationStatus | Response:
    """Take a job, or find the one that the key stands for; answer when it is under way, or as `wait` says.

    Raises:
        SnaporchError: it was refused; or, where that was waited for, it has failed.
    """
    wait = call.number("wait", BEGIN_SECONDS, WAIT_SECONDS)
    jobs, catalog, by = call.service.jobs, catalog_of(call.service.orchestrator), call.caller.name
    earlier = await kept(catalog, by, call.key, call.request) if call.key else None
    if earlier is not None and earlier.status:
        return Response(earlier.answer, earlier.status, media_type=_media_type(earlier.status))
    job = jobs.known(by, call.key, call.request) or jobs.get(earlier.operation if earlier else "")
    if job is None and earlier is not None and (record := await catalog.operation(earlier.operation)) is not None:
        return _told(record)
    if job is None:
        new = Job(kind, domains, subject, by, work, waits=waits)
        if call.key:
            new.work = partial(_kept_first, call, new.id, work)
        job = jobs.submit(new, key=call.key, request=call.request, own=call.caller.own)
    await call.wait_for(job.over if "wait" in call.query else job.under_way, wait)
    if job.error is not None:
        raise job.error
    return await _status(call, job)


async def _kept_first(call: Call, identifier: str, work: Work) -> Any:
    """Do a job whose request has a key: its id is kept before it begins, its answer when it has ended."""
    catalog = catalog_of(call.service.orchestrator)
    await keep(catalog, call.caller.name, call.key, call.request, identifier)
    job = call.service.jobs.get(identifier)
    if job is not None:
        job.farewell = partial(_keep_answer, call, job)
    return await work()


async def _keep_answer(call: Call, job: Job) -> None:
    status = job.error.http_status if job.error is not None else 200
    answer = dumps(problem(job.error) if job.error is not None else await _status(call, job))
    await keep_answer(catalog_of(call.service.orchestrator), job.id, status, answer)


def _media_type(status: int) -> str:
    return "application/json" if status < HTTPStatus.BAD_REQUEST else MEDIA_TYPE


def _told(record: OperationRecord) -> OperationStatus:
    """Return what is told of an operation that the journal knows; what has failed is raised, as it was before.

    Raises:
        OperationFailed: it was rolled back.
        Stranded: it is stranded.
    """
    if record.state == State.ROLLED_BACK:
        raise OperationFailed(record.error or f"{record.kind} {record.subject} was rolled back")
    if record.state == State.STRANDED:
        what = f"{record.kind} {record.subject} could be neither finished nor undone"
        raise Stranded(what, record.id, (record.error or "see `snaporch operations`",))
    return past(record)


async def _status(call: Call, job: Job) -> OperationStatus:
    return job.status(await catalog_of(call.service.orchestrator).operation(job.id))


async def operations(call: Call) -> Response:
    """List running and past operations, newest first."""
    wanted, catalog = call.query.get("domain"), catalog_of(call.service.orchestrator)
    if wanted is not None:
        await catalog.domain(wanted)
    limit, outcome = limit_of(call), call.query.get("outcome")
    since = call.number("since", 0.0, FAR_FUTURE) if "since" in call.query else None
    page = Page(limit + 1, await _position(call), wanted, since, outcome)
    known = call.service.jobs.all()  # whatever the journal has of them, they know more
    jobs = [job for job in known if _is_on(job, page)]
    records = await catalog.operations_page(attrs.evolve(page, but=tuple(job.id for job in known)))
    both: list[Job | OperationRecord] = [*jobs, *records]
    found = sorted(both, key=lambda each: (each.begun, each.id), reverse=True)
    part = found[:limit]
    lacking = [job.id for job in part if isinstance(job, Job) and job.final is None]
    journal = await catalog.operations_of(lacking) if lacking else {}
    items = await in_turns((_as_json(each, journal),) for each in part)
    return json_page(items, part[-1].id if len(found) > limit else None)


def _as_json(each: Job | OperationRecord, journal: Mapping[str, OperationRecord]) -> str:
    return each.as_json(journal.get(each.id)) if isinstance(each, Job) else dumps(past(each))


def _is_on(job: Job, page: Page) -> bool:
    """Return whether a job is one of those that a page is of."""
    return (
        page.domain in {None, *job.domains}
        and (page.before is None or (job.begun, job.id) < page.before)
        and (page.since is None or job.begun >= page.since)
        and page.has(job.outcome)
    )


async def _position(call: Call) -> tuple[float, str] | None:
    """Return where the page of operations begins: when the last one of the page before began, and its id."""
    if (after := call.query.get("after")) is None:
        return None
    last = call.service.jobs.get(after) or await catalog_of(call.service.orchestrator).operation(after)
    if last is None:
        raise no_cursor(after)
    return last.begun, last.id


async def operation(call: Call) -> OperationStatus:
    """Show an operation; with `wait`, when it has ended, or after that many seconds."""
    identifier = call.path["id"]
    if (job := call.service.jobs.get(identifier)) is not None:
        await call.wait_for(job.over, call.number("wait", 0, WAIT_SECONDS))
        async with call.service.a_turn(call.caller):
            return await _status(call, job)
    if (record := await catalog_of(call.service.orchestrator).operation(identifier)) is None:
        raise NotFound(f"there is no operation {identifier!r}; `snaporch operations` lists all")
    return past(record)


async def give_up(call: Call) -> GivenUp:
    """End an operation that cannot be mended; with `dry_run` only say what is kept and what is lost."""
    asked: shapes.GiveUp = call.body
    return await call.service.orchestrator.give_up(call.path["id"], dry_run=asked.dry_run)


async def cancel(call: Call) -> OperationStatus:
    """Cancel an operation: it rolls itself back. One that has ended stays as it is."""
    identifier = call.path["id"]
    if (scope := call.service.waits.get(identifier)) is not None:
        scope.cancel()
        return OperationStatus(identifier, OperationKind.SHUTDOWN, (), "", "cancelled", time.time(), time.time())
    if (job := call.service.jobs.get(identifier)) is None:
        raise NotFound(f"no operation {identifier!r} runs in this service")
    job.scope.cancel()
    return await operation(call)
