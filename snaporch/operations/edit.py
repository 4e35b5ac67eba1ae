"""Another name, or another description, for a snapshot: nothing of its files changes, only what the catalog says.

A point inside an image keeps the name that it has there, which the record says.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import attrs

from snaporch.catalog import Change
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import InvalidInput, TargetExists, Unsupported
from snaporch.model.limits import MOST_SECONDS
from snaporch.model.names import check_name
from snaporch.model.record import OperationKind, SnapshotRecord
from snaporch.operations.group import check_ids, siblings


async def edit(
    context: Context,
    domain: str,
    name: str,
    *,
    new_name: str = "",
    description: str | None = None,
    expires_in: float | None = None,
    ids: Collection[str] = (),
) -> SnapshotRecord:
    """See `Orchestrator.edit`."""
    if not new_name and description is None and expires_in is None:
        raise InvalidInput(f"edit {domain} {name}: nothing is to change; give --name, --description or --expires")
    if expires_in is not None and not 0 <= expires_in <= MOST_SECONDS:
        raise InvalidInput(f"edit {domain} {name}: it may expire in up to {MOST_SECONDS:,.0f} seconds from now")
    new_name = check_name(new_name or name)
    async with context.locked(Operation(OperationKind.EDIT, domain, name)):
        record = await context.catalog.snapshot(domain, name)
        check_ids([record], ids)
        told = record.snapshot.description if description is None else description
        edited = attrs.evolve(record, snapshot=attrs.evolve(record.snapshot, name=new_name, description=told))
        if expires_in is not None:
            edited = attrs.evolve(edited, expires=time.time() + expires_in if expires_in else None)
        change = Change(updated=(edited,))
        if new_name != name:
            await _check_free(context, record, new_name)
            change = await _renamed(context, record, edited)
        await context.catalog.write(change)
    return edited


async def _check_free(context: Context, record: SnapshotRecord, new_name: str) -> None:
    """Refuse a name that is taken, and to give one to a part of a group: a group's snapshots have one name.

    Raises:
        TargetExists: there is a snapshot of that name.
        Unsupported: others of its group are there.
    """
    domain, name = record.domain, record.name
    if await context.catalog.has_snapshot(domain, new_name):
        raise TargetExists(f"{domain} has a snapshot {new_name!r} already; choose another name")
    if others := [each.domain for each in await siblings(context.catalog, record)]:
        raise Unsupported(
            f"{name} of {domain} is one point with that of {', '.join(others)}: a group's snapshots have one name, "
            "so one of them cannot be renamed alone; --description can be changed"
        )


async def _renamed(context: Context, record: SnapshotRecord, edited: SnapshotRecord) -> Change:
    """Return what names the snapshot, with its new name: itself, its children, its domain where it is current."""
    domain = await context.catalog.domain(record.domain)
    known = await context.catalog.snapshots(record.domain)
    children = (attrs.evolve(each, parent=edited.name) for each in known if each.parent == record.name)
    return Change(
        domains=(attrs.evolve(domain, current=edited.name),) if domain.current == record.name else (),
        updated=(edited, *children),
        renamed=((record.domain, record.name, edited.name),),
    )
