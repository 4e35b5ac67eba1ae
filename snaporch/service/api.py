"""Everything that can be asked: one table, from which the application and OpenAPI are made; and what answers it.

A handler gets a `Call` and returns a value that the converter makes JSON of, or a response. It checks nothing about
who asks: the table says what that takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import attrs
import trio
from starlette.responses import Response

from snaporch.batch.schedule import ScheduleInfo
from snaporch.convert import dumps, loads
from snaporch.errors import InvalidInput, NotFound
from snaporch.images.merge import MergePlan
from snaporch.models import (
    CreateFlag,
    DeleteFlag,
    DomainDefinition,
    DomainInfo,
    DomainRecord,
    Estimate,
    Finding,
    OperationRecord,
    RevertFlag,
    SnapshotRecord,
    Strategy,
    joined,
)
from snaporch.service import shapes
from snaporch.service.confine import check_definition, check_snapshot, confined
from snaporch.service.jobs import BEGIN_SECONDS, Job, Work, past
from snaporch.service.keys import keep, kept
from snaporch.service.roles import Caller, Role
from snaporch.service.service import Service
from snaporch.service.shapes import OperationStatus, flags_of

PAGE, MOST = 100, 1_000
WAIT_SECONDS = 3_600.0  # the longest that a request waits for an operation
ACCEPTED = 202


@attrs.frozen
class Call:
    """A request.

    Attributes:
        service: the service.
        caller: who asks.
        path: the parts of the URL that have names.
        query: the parameters after the question mark.
        body: what was sent, structured; None where the table says that there is none.
        key: the idempotency key, or nothing.
        request: tells this request from another one under the same key.
    """

    service: Service
    caller: Caller
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any = None
    key: str = ""
    request: str = ""

    @property
    def domain(self) -> str:
        """The domain in the URL."""
        return self.path["domain"]

    @property
    def name(self) -> str:
        """The snapshot in the URL."""
        return self.path["name"]

    def number(self, name: str, default: float, most: float) -> float:
        """Return a parameter that is a number; given without one it is `most`.

        Raises:
            InvalidInput: it is none, or is out of range.
        """
        text = self.query.get(name)
        if text is None:
            return default
        if text in {"", "true"}:
            return most
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= most:
            raise InvalidInput(f"{name}: {text!r} is not a number from 0 to {most:g}")
        return number


Handler = Callable[[Call], Awaitable[Any]]


@attrs.frozen
class Route:
    """A row of the table.

    Attributes:
        method: GET, POST, PUT or DELETE.
        path: with the names of its parts in braces.
        role: what it takes; None: anybody may ask.
        handler: answers.
        body: the class of the body; None: there is none.
        answer: the class of the answer; None: it is not JSON, or has no class.
        page: the answer is a page of those.
        status: of the answer.
        query: names of parameters.
    """

    method: str
    path: str
    role: Role | None
    handler: Handler
    body: Any = None
    answer: Any = None
    page: bool = False
    status: int = 200
    query: tuple[str, ...] = ()


def _page(call: Call, items: tuple[Any, ...], key: Callable[[Any], str]) -> shapes.Page:
    """Return the part of a list that was asked for; a cursor is the key of the last item before it."""
    limit = _limit(call)
    begin = 0
    if (after := call.query.get("after")) is not None:
        keys = [key(item) for item in items]
        if after not in keys:
            raise _no_cursor(after)
        begin = keys.index(after) + 1
    part = items[begin : begin + limit]
    more = begin + limit < len(items)
    return shapes.Page(part, key(part[-1]) if more else None)


def _json_page(items: Sequence[str], following: str | None) -> Response:
    """Return a page whose items are JSON already."""
    return Response(
        f'{{"items":[{",".join(items)}],"next":{json.dumps(following)}}}', media_type="application/json"
    )


def _limit(call: Call) -> int:
    return int(call.number("limit", PAGE, MOST)) or PAGE


def _no_cursor(after: str | None) -> InvalidInput:
    return InvalidInput(f"after: {after!r} is none of the list, or no longer; begin without it")


# --- domains ------------------------------------------------------------------------------------------------


async def domains(call: Call) -> shapes.Page:
    """List all domains, by name."""
    return _page(call, await call.service.orchestrator.domains(), lambda info: info.name)


async def domain(call: Call) -> DomainInfo:
    """Show a domain as it is this moment."""
    return await call.service.orchestrator.domain_info(call.domain)


async def define(call: Call) -> DomainRecord:
    """Make a domain known, or replace the definition of one that is inactive."""
    check_definition(call.body, call.service.directories, local=call.caller.local)
    return await call.service.orchestrator.define(call.body)


async def undefine(call: Call) -> None:
    """Forget an inactive domain that has no snapshots; its images stay."""
    await call.service.orchestrator.undefine(call.domain)


async def attach(call: Call) -> DomainInfo:
    """Take charge of a domain that something else started."""
    confined(call.body.socket, call.service.directories, "socket")
    return await call.service.orchestrator.attach(call.domain, call.body.socket, driver=call.body.driver)


async def start(call: Call) -> DomainInfo:
    """Start an inactive domain."""
    return await call.service.orchestrator.start(call.domain, paused=call.body.paused)


async def shutdown(call: Call) -> DomainInfo:
    """Ask the guest to power off, and wait until it has."""
    return await call.service.orchestrator.shutdown(call.domain, timeout=call.body.timeout)


async def destroy(call: Call) -> DomainInfo:
    """End a domain at once, as pulling the plug does."""
    return await call.service.orchestrator.destroy(call.domain)


async def pause(call: Call) -> DomainInfo:
    """Stop the CPUs of a running domain."""
    return await call.service.orchestrator.pause(call.domain)


async def resume(call: Call) -> DomainInfo:
    """Let the CPUs of a paused domain run."""
    return await call.service.orchestrator.resume(call.domain)


async def tag(call: Call) -> DomainInfo:
    """Give a domain these tags, in place of those that it has."""
    return await call.service.orchestrator.tag(call.domain, call.body.tags)


# --- snapshots ----------------------------------------------------------------------------------------------


async def snapshots(call: Call) -> Response:
    """List the snapshots of a domain, oldest first."""
    catalog, limit, after = call.service.orchestrator.catalog, _limit(call), call.query.get("after")
    await catalog.domain(call.domain)
    rows = await catalog.snapshots_after(call.domain, after, limit + 1)
    if rows is None:
        raise _no_cursor(after)
    part = rows[:limit]
    return _json_page([_snapshot(text) for _, text in part], part[-1][0] if len(rows) > limit else None)


@lru_cache(maxsize=1_000)
def _snapshot(text: str) -> str:
    """Return a record as it is told: what was written by an older version has all that is told today, too."""
    return dumps(loads(text, SnapshotRecord))


async def snapshot(call: Call) -> SnapshotRecord:
    """Show one snapshot."""
    return await call.service.orchestrator.show(call.domain, call.name)


async def intact(call: Call) -> dict[str, bool]:
    """Say whether a snapshot's files are what was saved, as far as is quickly seen."""
    return {"intact": await call.service.orchestrator.intact(call.domain, call.name)}


async def pin(call: Call) -> SnapshotRecord:
    """Let no retention delete a snapshot, or let it again."""
    return await call.service.orchestrator.pin(call.domain, call.name, pinned=call.body.pinned)


async def tree(call: Call) -> list[Any]:
    """Show the snapshots of a domain as a tree."""
    from snaporch.cli import output  # noqa: PLC0415 - its documents are the contract

    records = await call.service.orchestrator.list(call.domain)
    return output.branches(records, await call.service.orchestrator.current(call.domain))


# --- operations ---------------------------------------------------------------------------------------------


async def create(call: Call) -> OperationStatus:
    """Take a snapshot of a domain."""
    asked: shapes.Create = call.body
    check_snapshot(asked.snapshot, call.service.directories)
    flags = flags_of(CreateFlag, asked.flags)

    async def work() -> SnapshotRecord:
        return await call.service.orchestrator.create(call.domain, asked.snapshot, flags, asked.options)

    return await _begin(call, "create", call.domain, asked.snapshot.name, work, waits=asked.options.wait)


async def create_group(call: Call) -> OperationStatus:
    """Take a snapshot of each of several domains, all at one point."""
    asked: shapes.CreateGroup = call.body
    check_snapshot(asked.snapshot, call.service.directories)
    flags = flags_of(CreateFlag, asked.flags)

    async def work() -> tuple[SnapshotRecord, ...]:
        orchestrator = call.service.orchestrator
        return await orchestrator.create_group(asked.domains, asked.snapshot, flags, asked.options)

    group, waits = joined(asked.domains), asked.options.wait
    return await _begin(call, "create", group, asked.snapshot.name, work, waits=waits)


async def revert(call: Call) -> OperationStatus:
    """Take a domain back to a snapshot."""
    asked: shapes.Revert = call.body
    flags = flags_of(RevertFlag, asked.flags)

    async def work() -> SnapshotRecord:
        orchestrator = call.service.orchestrator
        return await orchestrator.revert(call.domain, call.name, flags, save_current=asked.save_current)

    return await _begin(call, "revert", call.domain, call.name, work)


async def revert_group(call: Call) -> OperationStatus:
    """Take several domains back to the point at which a snapshot was taken of all: all or none."""
    asked: shapes.RevertGroup = call.body
    flags = flags_of(RevertFlag, asked.flags)

    async def work() -> tuple[SnapshotRecord, ...]:
        orchestrator = call.service.orchestrator
        return await orchestrator.revert_group(asked.domains, asked.name, flags, save_current=asked.save_current)

    return await _begin(call, "revert", joined(asked.domains), asked.name, work)


async def verify(call: Call) -> OperationStatus:
    """Read every file of a snapshot in full and compare it with what was saved."""

    async def work() -> Any:
        return await call.service.orchestrator.verify(call.domain, call.name, boot=call.body.boot)

    return await _begin(call, "verify", call.domain, call.name, work)


async def delete(call: Call) -> OperationStatus:
    """Delete snapshots; what the guest and every other snapshot hold stays the same."""
    asked: shapes.Delete = call.body
    flags = flags_of(DeleteFlag, asked.flags)

    async def work() -> MergePlan:
        return await call.service.orchestrator.delete(call.domain, asked.names, flags, asked.options)

    return await _begin(call, "delete", call.domain, ", ".join(asked.names), work)


async def plan_delete(call: Call) -> MergePlan:
    """Say what a delete would merge where, and which files would go; nothing is touched."""
    asked: shapes.Delete = call.body
    flags = flags_of(DeleteFlag, asked.flags)
    return await call.service.orchestrator.delete(call.domain, asked.names, flags, dry_run=True)


async def delete_group(call: Call) -> OperationStatus:
    """Delete snapshots that were taken of several domains at one point, of all of them."""
    asked: shapes.DeleteGroup = call.body
    flags = flags_of(DeleteFlag, asked.flags)

    async def work() -> dict[str, MergePlan]:
        return await call.service.orchestrator.delete_group(asked.domains, asked.names, flags, asked.options)

    return await _begin(call, "delete", joined(asked.domains), ", ".join(asked.names), work)


async def plan_delete_group(call: Call) -> dict[str, MergePlan]:
    """Say, for each domain, what that would merge where, and which files would go; nothing is touched."""
    asked: shapes.DeleteGroup = call.body
    flags = flags_of(DeleteFlag, asked.flags)
    return await call.service.orchestrator.delete_group(asked.domains, asked.names, flags, dry_run=True)


async def flatten(call: Call) -> OperationStatus:
    """Shorten the chains of a domain, or of a snapshot, by copying up; nobody sees a difference."""
    asked: shapes.Flatten = call.body

    async def work() -> MergePlan:
        return await call.service.orchestrator.flatten(call.domain, asked.snapshot, asked.depth, asked.options)

    return await _begin(call, "flatten", call.domain, asked.snapshot, work)


async def plan_flatten(call: Call) -> MergePlan:
    """Say what a flatten would copy, and which files would go; nothing is touched."""
    asked: shapes.Flatten = call.body
    return await call.service.orchestrator.flatten(call.domain, asked.snapshot, asked.depth, dry_run=True)


async def depth(call: Call) -> DomainInfo:
    """Keep a domain's chains at so many images or fewer."""
    return await call.service.orchestrator.limit_depth(call.domain, call.body.depth)


async def recover(call: Call) -> OperationStatus:
    """Finish or undo what a crash left."""
    asked: shapes.Recover = call.body

    async def work() -> tuple[OperationRecord, ...]:
        patience = math.inf if asked.patience is None else asked.patience
        return await call.service.orchestrator.recover(domain=asked.domain, patience=patience)

    return await _begin(call, "recover", asked.domain or "", "", work)


async def fsck(call: Call) -> OperationStatus:
    """Compare catalog, files and running hypervisors."""
    asked: shapes.Fsck = call.body

    async def work() -> tuple[Finding, ...]:
        return await call.service.orchestrator.fsck(asked.domain, repair=asked.repair)

    return await _begin(call, "fsck", asked.domain or "", "", work)


async def _begin(
    call: Call, kind: str, domain: str, subject: str, work: Work, *, waits: bool = False
) -> OperationStatus:
    """Take a job, or find the one that the key stands for; answer when it is under way, or as `wait` says.

    Raises:
        SnaporchError: it was refused; or, where that was waited for, it has failed.
    """
    wait = call.number("wait", BEGIN_SECONDS, WAIT_SECONDS)
    jobs, catalog, by = call.service.jobs, call.service.orchestrator.catalog, call.caller.name
    earlier = await kept(catalog, by, call.key, call.request) if call.key else None
    job = jobs.known(by, call.key, call.request) or jobs.get(earlier or "")
    if job is None and earlier is not None and (record := await catalog.operation(earlier)) is not None:
        return past(record)
    if job is None:
        new = Job(kind, domain, subject, by, work, waits=waits)
        if call.key:
            new.work = partial(_kept_first, call, new.id, work)
        job = jobs.submit(new, key=call.key, request=call.request)
    with trio.move_on_after(wait):
        await (job.over if "wait" in call.query else job.under_way).wait()
    if job.error is not None:
        raise job.error
    return await _status(call, job)


async def _kept_first(call: Call, identifier: str, work: Work) -> Any:
    await keep(call.service.orchestrator.catalog, call.caller.name, call.key, call.request, identifier)
    return await work()


async def _status(call: Call, job: Job) -> OperationStatus:
    return job.status(await call.service.orchestrator.catalog.operation(job.id))


async def operations(call: Call) -> Response:
    """List running and past operations, oldest first."""
    wanted, catalog = call.query.get("domain"), call.service.orchestrator.catalog
    if wanted is not None:
        await catalog.domain(wanted)
    limit = _limit(call)
    position = await _position(call)
    known = call.service.jobs.all()  # whatever the journal has of them, they know more
    jobs = [job for job in known if wanted in {None, *job.members} and (job.begun, job.id) > position]
    records = await catalog.operations_after(position, limit + 1, wanted, but=[job.id for job in known])
    both: list[Job | OperationRecord] = [*jobs, *records]
    found = sorted(both, key=lambda each: (each.begun, each.id))
    part = found[:limit]
    lacking = [job.id for job in part if isinstance(job, Job) and job.final is None]
    journal = await catalog.operations_of(lacking) if lacking else {}
    items = [each.as_json(journal.get(each.id)) if isinstance(each, Job) else dumps(past(each)) for each in part]
    return _json_page(items, part[-1].id if len(found) > limit else None)


async def _position(call: Call) -> tuple[float, str]:
    """Return where the page of operations begins: after when the last one before it began, and its id."""
    if (after := call.query.get("after")) is None:
        return -math.inf, ""
    last = call.service.jobs.get(after) or await call.service.orchestrator.catalog.operation(after)
    if last is None:
        raise _no_cursor(after)
    return last.begun, last.id


async def operation(call: Call) -> OperationStatus:
    """Show an operation; with `wait`, when it has ended, or after that many seconds."""
    identifier = call.path["id"]
    if (job := call.service.jobs.get(identifier)) is not None:
        with trio.move_on_after(call.number("wait", 0, WAIT_SECONDS)):
            await job.over.wait()
        return await _status(call, job)
    if (record := await call.service.orchestrator.catalog.operation(identifier)) is None:
        raise NotFound(f"there is no operation {identifier!r}; `snaporch operations` shows those that there are")
    return past(record)


async def cancel(call: Call) -> OperationStatus:
    """Cancel an operation: it rolls itself back. One that has ended stays as it is."""
    identifier = call.path["id"]
    if (job := call.service.jobs.get(identifier)) is None:
        raise NotFound(f"no operation {identifier!r} runs in this service")
    job.scope.cancel()
    return await operation(call)


# --- the rest -----------------------------------------------------------------------------------------------


async def estimate(call: Call) -> Estimate:
    """Predict what a checkpoint would take: its size, its time, the guest's pause."""
    name = call.query.get("strategy", Strategy.BACKGROUND)
    try:
        strategy = Strategy(name)
    except ValueError:
        raise InvalidInput(f"strategy: there is no {name!r}; background, precopy, paused or internal") from None
    return await call.service.orchestrator.estimate(call.domain, strategy)


async def doctor(call: Call) -> dict[str, Any]:
    """Say what this host, and a domain, can do, and what stands in the way."""
    return await call.service.orchestrator.doctor(call.query.get("domain"))


async def schedules(call: Call) -> tuple[ScheduleInfo, ...]:
    """List the plans of the service's directory: when each runs next, and how its last batch ended."""
    await trio.lowlevel.checkpoint()
    return call.service.scheduler.schedules() if call.service.scheduler else ()


async def whoami(call: Call) -> dict[str, str | None]:
    """Say who asks, as the service sees it."""
    await trio.lowlevel.checkpoint()
    role = call.caller.role
    return {"name": call.caller.name, "role": role.name.lower() if role else None}


_DOMAIN = "/v1/domains/{domain}"
_GROUPS = "/v1/groups"
_SNAPSHOT = "/v1/domains/{domain}/snapshots/{name}"
_PAGED = ("limit", "after")
V, O, A = Role.VIEWER, Role.OPERATOR, Role.ADMIN  # noqa: E741 - the width of a column

ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/domains", V, domains, answer=DomainInfo, page=True, query=_PAGED),
    Route("POST", "/v1/domains", A, define, DomainDefinition, DomainRecord),
    Route("GET", _DOMAIN, V, domain, answer=DomainInfo),
    Route("DELETE", _DOMAIN, A, undefine, status=204),
    Route("POST", f"{_DOMAIN}/attach", A, attach, shapes.Attach, DomainInfo),
    Route("POST", f"{_DOMAIN}/start", O, start, shapes.Start, DomainInfo),
    Route("POST", f"{_DOMAIN}/shutdown", O, shutdown, shapes.Shutdown, DomainInfo),
    Route("POST", f"{_DOMAIN}/destroy", O, destroy, answer=DomainInfo),
    Route("POST", f"{_DOMAIN}/pause", O, pause, answer=DomainInfo),
    Route("POST", f"{_DOMAIN}/resume", O, resume, answer=DomainInfo),
    Route("PUT", f"{_DOMAIN}/tags", O, tag, shapes.Tags, DomainInfo),
    Route("GET", f"{_DOMAIN}/snapshots", V, snapshots, answer=SnapshotRecord, page=True, query=_PAGED),
    Route("POST", f"{_DOMAIN}/snapshots", O, create, shapes.Create, OperationStatus, status=202, query=("wait",)),
    Route("POST", _GROUPS, O, create_group, shapes.CreateGroup, OperationStatus, status=202, query=("wait",)),
    Route(
        "POST",
        f"{_GROUPS}/revert",
        O,
        revert_group,
        shapes.RevertGroup,
        OperationStatus,
        status=202,
        query=("wait",),
    ),
    Route(
        "POST",
        f"{_GROUPS}/delete",
        O,
        delete_group,
        shapes.DeleteGroup,
        OperationStatus,
        status=202,
        query=("wait",),
    ),
    Route("POST", f"{_GROUPS}/delete/plan", V, plan_delete_group, shapes.DeleteGroup, dict[str, MergePlan]),
    Route("GET", _SNAPSHOT, V, snapshot, answer=SnapshotRecord),
    Route("GET", f"{_SNAPSHOT}/intact", V, intact, answer=dict[str, bool]),
    Route("PUT", f"{_SNAPSHOT}/pin", O, pin, shapes.Pin, SnapshotRecord),
    Route("POST", f"{_SNAPSHOT}/revert", O, revert, shapes.Revert, OperationStatus, status=202, query=("wait",)),
    Route("POST", f"{_SNAPSHOT}/verify", O, verify, shapes.Verify, OperationStatus, status=202, query=("wait",)),
    Route("POST", f"{_DOMAIN}/delete", O, delete, shapes.Delete, OperationStatus, status=202, query=("wait",)),
    Route("POST", f"{_DOMAIN}/delete/plan", V, plan_delete, shapes.Delete, MergePlan),
    Route("POST", f"{_DOMAIN}/flatten", O, flatten, shapes.Flatten, OperationStatus, status=202, query=("wait",)),
    Route("POST", f"{_DOMAIN}/flatten/plan", V, plan_flatten, shapes.Flatten, MergePlan),
    Route("PUT", f"{_DOMAIN}/depth", O, depth, shapes.Depth, DomainInfo),
    Route("GET", f"{_DOMAIN}/tree", V, tree, answer=list[Any]),
    Route("GET", f"{_DOMAIN}/estimate", O, estimate, answer=Estimate, query=("strategy",)),
    Route("GET", "/v1/operations", V, operations, answer=OperationStatus, page=True, query=("domain", *_PAGED)),
    Route("GET", "/v1/operations/{id}", V, operation, answer=OperationStatus, query=("wait",)),
    Route("POST", "/v1/operations/{id}/cancel", O, cancel, answer=OperationStatus, status=202, query=("wait",)),
    Route("POST", "/v1/recover", A, recover, shapes.Recover, OperationStatus, status=202, query=("wait",)),
    Route("POST", "/v1/fsck", A, fsck, shapes.Fsck, OperationStatus, status=202, query=("wait",)),
    Route("GET", "/v1/doctor", V, doctor, answer=dict[str, Any], query=("domain",)),
    Route("GET", "/v1/schedules", V, schedules, answer=list[ScheduleInfo]),
    Route("GET", "/v1/whoami", V, whoami, answer=dict[str, str]),
)
