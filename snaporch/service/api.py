"""Everything that can be asked: one table, from which the application and OpenAPI are made; and what answers it.

A handler gets a `Call` and returns a value that the converter makes JSON of, or a response. It checks nothing about
who asks: the table says what that takes.
"""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from functools import lru_cache
from typing import Any

import trio
from starlette.responses import Response

from snaporch.batch.schedule import ScheduleInfo
from snaporch.catalog.changes import Changes, newest
from snaporch.catalog.changes import changes as changes_after
from snaporch.catalog.reading import in_turns
from snaporch.engine.run import name_next
from snaporch.errors import Forbidden, InvalidInput, OperationFailed, UnreadableRecord
from snaporch.model import documents
from snaporch.model.convert import dumps, loads
from snaporch.model.domain import Discovered, DomainDefinition, DomainInfo, DomainRecord
from snaporch.model.finding import Unreadable
from snaporch.model.merge import MergePlan
from snaporch.model.names import new_id
from snaporch.model.record import Estimate, GivenUp, SnapshotRecord, SyncReport
from snaporch.model.request import Strategy
from snaporch.orchestrator import catalog_of
from snaporch.service import shapes
from snaporch.service.call import Call, Route, json_page, limit_of, no_cursor
from snaporch.service.confine import check_definition, check_path
from snaporch.service.operations import (
    WAIT_SECONDS,
    cancel,
    clone,
    create,
    create_group,
    delete,
    delete_group,
    flatten,
    fsck,
    give_up,
    operation,
    operations,
    plan_delete,
    plan_delete_group,
    plan_flatten,
    recover,
    revert,
    revert_group,
    verify,
)
from snaporch.service.roles import Role
from snaporch.service.shapes import OperationStatus

# --- domains ------------------------------------------------------------------------------------------------


async def domains(call: Call) -> shapes.Page:
    """List all domains, by name."""
    limit, after = limit_of(call), call.query.get("after", "")
    found = await call.service.orchestrator.domains(after, limit + 1)
    return shapes.Page(found[:limit], found[limit - 1].name if len(found) > limit else None)


async def domain(call: Call) -> DomainInfo:
    """Show a domain as it is this moment."""
    return await call.service.orchestrator.domain_info(call.domain)


async def define(call: Call) -> DomainRecord:
    """Make a domain known, or replace the definition of one that is inactive."""
    await check_definition(call.body, call.service.confinement, local=call.caller.local)
    return await call.service.orchestrator.define(call.body)


async def undefine(call: Call) -> None:
    """Forget an inactive domain that has no snapshots; its images stay, unless `discard` is said of a clone."""
    if (discard := call.query.get("discard", "false")) not in {"true", "false"}:
        raise InvalidInput(f"discard: {discard!r:.60} is neither true nor false")
    await call.service.orchestrator.undefine(call.domain, discard=discard == "true")


async def attach(call: Call) -> DomainInfo:
    """Take charge of a domain that something else started."""
    body = call.body
    if (body.uri or body.of or not body.socket) and not call.caller.local:
        raise Forbidden(
            "a manager of guests (libvirt, Xen) has guests whose images may be anywhere, and a URI can name a "
            "program to run: they are accepted over the unix socket only"
        )
    if body.socket:
        await check_path(call.service.confinement, body.socket, call.domain, "socket")
    return await call.service.orchestrator.attach(
        call.domain, body.socket, driver=body.driver, uri=body.uri, of=body.of, records=body.records
    )


async def sync(call: Call) -> SyncReport:
    """Bring the list of snapshots that a domain's manager has and snaporch's into agreement."""
    return await call.service.orchestrator.sync(call.domain, records=call.body.records)


async def discover(call: Call) -> tuple[Discovered, ...]:
    """List what could be attached to, and what stands in the way."""
    return await call.service.orchestrator.discover(call.query.get("driver", ""))


async def start(call: Call) -> DomainInfo:
    """Start an inactive domain."""
    return await call.service.orchestrator.start(call.domain, paused=call.body.paused)


async def shutdown(call: Call) -> DomainInfo:
    """Ask the guest to power off, and wait until it has; the wait can be cancelled, as an operation."""
    asked: shapes.Shutdown = call.body
    identifier, waits = new_id(), call.service.waits
    if asked.ends_with_client:
        call.ends.set()
    with trio.CancelScope() as scope:
        waits[identifier] = scope
        try:
            name_next(identifier)
            return await call.service.orchestrator.shutdown(call.domain, timeout=asked.timeout)
        finally:
            del waits[identifier]
    raise OperationFailed(f"the client that shut {call.domain} down is gone; its guest was asked to power off")


async def destroy(call: Call) -> DomainInfo:
    """End a domain at once, as pulling the plug does."""
    return await call.service.orchestrator.destroy(call.domain)


async def pause(call: Call) -> DomainInfo:
    """Stop the CPUs of a running domain."""
    return await call.service.orchestrator.pause(call.domain)


async def resume(call: Call) -> DomainInfo:
    """Let the CPUs of a paused domain run."""
    return await call.service.orchestrator.resume(call.domain)


async def reset(call: Call) -> DomainInfo:
    """Boot the guest of a running domain anew, as the reset button does."""
    return await call.service.orchestrator.reset(call.domain)


async def screenshot(call: Call) -> shapes.Screenshot:
    """Take a picture of the screen of a running domain."""
    taken = await call.service.orchestrator.screenshot(call.domain)
    return shapes.Screenshot(b64encode(taken).decode())


async def tag(call: Call) -> DomainInfo:
    """Give a domain these tags, in place of those that it has."""
    return await call.service.orchestrator.tag(call.domain, call.body.tags)


# --- snapshots ----------------------------------------------------------------------------------------------


async def snapshots(call: Call) -> Response:
    """List the snapshots of a domain, oldest first."""
    catalog, limit, after = catalog_of(call.service.orchestrator), limit_of(call), call.query.get("after")
    await catalog.domain(call.domain)
    found = await catalog.snapshots_after(call.domain, after, limit)
    if found is None:
        raise no_cursor(after)
    rows, more = found
    told = await in_turns(
        _snapshot(text) if len(text) <= SHORT else _snapshot.__wrapped__(text) for _, text in rows
    )
    return json_page(told, rows[-1][0] if more else None)


@lru_cache(maxsize=1_000)
def _snapshot(text: str) -> tuple[str, ...]:
    """Return a record as it is told: what was written by an older version has all that is told today, too.

    One that cannot be read is nothing here; ``/v1/unreadable`` tells of it.
    """
    with suppress(UnreadableRecord):
        return (dumps(loads(text, SnapshotRecord)),)
    return ()


async def snapshot(call: Call) -> SnapshotRecord:
    """Show one snapshot."""
    return await call.service.orchestrator.show(call.domain, call.name)


async def intact(call: Call) -> dict[str, bool]:
    """Say whether a snapshot's files are what was saved, as far as is quickly seen."""
    return {"intact": await call.service.orchestrator.intact(call.domain, call.name)}


async def pin(call: Call) -> SnapshotRecord:
    """Let no retention delete a snapshot, or let it again."""
    return await call.service.orchestrator.pin(call.domain, call.name, pinned=call.body.pinned, ids=call.body.ids)


async def edit(call: Call) -> SnapshotRecord:
    """Give a snapshot another name, or another description; its files stay as they are."""
    asked: shapes.Edit = call.body
    return await call.service.orchestrator.edit(
        call.domain,
        call.name,
        new_name=asked.name,
        description=asked.description,
        expires_in=asked.expires_in,
        ids=asked.ids,
    )


async def tree(call: Call) -> list[Any]:
    """List the snapshots of a domain, oldest first, each with its parent."""
    records = await call.service.orchestrator.list(call.domain)
    return documents.tree(records, await call.service.orchestrator.current(call.domain))


async def clones(call: Call) -> dict[str, list[str]]:
    """List, by name, the snapshots of a domain that clones need, each with the clones' names."""
    found = await call.service.orchestrator.clones(call.domain)
    return {name: list(names) for name, names in found.items()}


async def depth(call: Call) -> DomainInfo:
    """Keep a domain's chains at so many images or fewer."""
    return await call.service.orchestrator.limit_depth(call.domain, call.body.depth)


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
    """Say what this host, and a domain, can do, and what prevents the rest; for a viewer nothing is measured."""
    measure = call.caller.role is not None and call.caller.role >= Role.OPERATOR
    measure = measure and call.query.get("measure") != "false"
    return await call.service.orchestrator.doctor(call.query.get("domain"), measure=measure)


async def unreadable(call: Call) -> tuple[Unreadable, ...]:
    """List what there is, of one domain or all, whose record cannot be read, with the reason."""
    return await call.service.orchestrator.unreadable(call.query.get("domain"), call.query.get("kind"))


async def schedules(call: Call) -> tuple[ScheduleInfo, ...]:
    """List the plans of the service's directory: when each runs next, and how its last batch ended."""
    await trio.lowlevel.checkpoint()
    return call.service.scheduler.schedules() if call.service.scheduler else ()


async def changes(call: Call) -> Changes:
    """List what has changed in the catalog after a revision, oldest first; with `wait`, as soon as it has."""
    catalog = catalog_of(call.service.orchestrator)
    if call.query.get("after") == "now":
        return Changes((), await newest(catalog))
    after = int(call.number("after", 0, MOST_REVISIONS))
    wait, limit = call.number("wait", 0, WAIT_SECONDS), limit_of(call)
    with trio.move_on_after(wait):
        while await newest(catalog) == after and not call.service.feed.draining:  # noqa: ASYNC110 - see below
            await trio.sleep(LOOK_SECONDS)  # other processes change it, too
    async with call.service.a_turn(call.caller):
        return await changes_after(catalog, after, limit)


async def whoami(call: Call) -> dict[str, str | None]:
    """Say who asks, as the service sees it."""
    await trio.lowlevel.checkpoint()
    role = call.caller.role
    return {"name": call.caller.name, "role": role.name.lower() if role else None}


LOOK_SECONDS = 0.25
SHORT = 16_384  # characters of a record that is kept as it is told
MOST_REVISIONS = 2.0**53

_DOMAIN = "/v1/domains/{domain}"
_GROUPS = "/v1/groups"
_SNAPSHOT = "/v1/domains/{domain}/snapshots/{name}"
_PAGED = ("limit", "after")
_SOME = ("domain", "outcome", "since", *_PAGED)
V, O, A = Role.VIEWER, Role.OPERATOR, Role.ADMIN  # noqa: E741 - the width of a column

ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/domains", V, domains, answer=DomainInfo, page=True, query=_PAGED, long=True),
    Route("POST", "/v1/domains", A, define, DomainDefinition, DomainRecord),
    Route("GET", _DOMAIN, V, domain, answer=DomainInfo, long=True),
    Route("DELETE", _DOMAIN, A, undefine, status=204, query=("discard",)),
    Route("POST", f"{_DOMAIN}/attach", A, attach, shapes.Attach, DomainInfo),
    Route("POST", f"{_DOMAIN}/sync", A, sync, shapes.Sync, SyncReport),
    Route("POST", f"{_DOMAIN}/start", O, start, shapes.Start, DomainInfo),
    Route("POST", f"{_DOMAIN}/shutdown", O, shutdown, shapes.Shutdown, DomainInfo),
    Route("POST", f"{_DOMAIN}/destroy", O, destroy, answer=DomainInfo),
    Route("POST", f"{_DOMAIN}/pause", O, pause, answer=DomainInfo),
    Route("POST", f"{_DOMAIN}/resume", O, resume, answer=DomainInfo),
    Route("POST", f"{_DOMAIN}/reset", O, reset, answer=DomainInfo),
    Route("POST", f"{_DOMAIN}/screenshot", O, screenshot, answer=shapes.Screenshot),
    Route("PUT", f"{_DOMAIN}/tags", O, tag, shapes.Tags, DomainInfo),
    Route("GET", f"{_DOMAIN}/snapshots", V, snapshots, answer=SnapshotRecord, page=True, query=_PAGED, long=True),
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
    Route(
        "POST",
        f"{_GROUPS}/delete/plan",
        V,
        plan_delete_group,
        shapes.DeleteGroup,
        dict[str, MergePlan],
        only_reads=True,
        long=True,
    ),
    Route("GET", _SNAPSHOT, V, snapshot, answer=SnapshotRecord, long=True),
    Route("GET", f"{_SNAPSHOT}/intact", V, intact, answer=dict[str, bool], long=True),
    Route("PUT", f"{_SNAPSHOT}/pin", O, pin, shapes.Pin, SnapshotRecord),
    Route("POST", f"{_SNAPSHOT}/edit", O, edit, shapes.Edit, SnapshotRecord),
    Route("POST", f"{_SNAPSHOT}/revert", O, revert, shapes.Revert, OperationStatus, status=202, query=("wait",)),
    Route("POST", f"{_SNAPSHOT}/clone", O, clone, shapes.Clone, OperationStatus, status=202, query=("wait",)),
    Route("GET", f"{_DOMAIN}/clones", V, clones, answer=dict[str, list[str]], long=True),
    Route("POST", f"{_SNAPSHOT}/verify", O, verify, shapes.Verify, OperationStatus, status=202, query=("wait",)),
    Route("POST", f"{_DOMAIN}/delete", O, delete, shapes.Delete, OperationStatus, status=202, query=("wait",)),
    Route("POST", f"{_DOMAIN}/delete/plan", V, plan_delete, shapes.Delete, MergePlan, only_reads=True, long=True),
    Route("POST", f"{_DOMAIN}/flatten", O, flatten, shapes.Flatten, OperationStatus, status=202, query=("wait",)),
    Route(
        "POST", f"{_DOMAIN}/flatten/plan", V, plan_flatten, shapes.Flatten, MergePlan, only_reads=True, long=True
    ),
    Route("PUT", f"{_DOMAIN}/depth", O, depth, shapes.Depth, DomainInfo),
    Route("GET", f"{_DOMAIN}/tree", V, tree, answer=list[Any], long=True),
    Route("GET", f"{_DOMAIN}/estimate", O, estimate, answer=Estimate, query=("strategy",), long=True),
    Route(
        "GET",
        "/v1/operations",
        V,
        operations,
        answer=OperationStatus,
        page=True,
        query=_SOME,
        long=True,
    ),
    Route("GET", "/v1/operations/{id}", V, operation, answer=OperationStatus, query=("wait",)),
    Route("POST", "/v1/operations/{id}/cancel", O, cancel, answer=OperationStatus, status=202, query=("wait",)),
    Route("POST", "/v1/operations/{id}/give-up", A, give_up, shapes.GiveUp, GivenUp),
    Route("POST", "/v1/recover", A, recover, shapes.Recover, OperationStatus, status=202, query=("wait",)),
    Route("POST", "/v1/fsck", A, fsck, shapes.Fsck, OperationStatus, status=202, query=("wait",)),
    Route("GET", "/v1/unreadable", V, unreadable, answer=list[Unreadable], query=("domain", "kind"), long=True),
    Route("GET", "/v1/discover", A, discover, answer=list[Discovered], query=("driver",), long=True),
    Route("GET", "/v1/doctor", V, doctor, answer=dict[str, Any], query=("domain", "measure"), long=True),
    Route("GET", "/v1/schedules", V, schedules, answer=list[ScheduleInfo]),
    Route("GET", "/v1/changes", V, changes, answer=Changes, query=("after", "wait", "limit")),
    Route("GET", "/v1/whoami", V, whoami, answer=dict[str, str]),
)
