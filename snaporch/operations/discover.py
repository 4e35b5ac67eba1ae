"""What could be attached to, of one driver or of all that can say it."""

from __future__ import annotations

from collections.abc import Sequence

from snaporch.drivers.base import Discovers, has, need
from snaporch.engine.context import Context
from snaporch.errors import HypervisorError, Refused
from snaporch.model.domain import Discovered


async def discover(context: Context, name: str) -> tuple[Discovered, ...]:
    """See `Orchestrator.discover`."""
    if name:
        return tuple(await _of(context, name))
    found = list[Discovered]()
    for each in context.drivers:
        try:
            if has(context.drivers[each], Discovers):
                found += await _of(context, each)
        except (Refused, HypervisorError) as error:
            found.append(Discovered(each, "", blocker=str(error)))
    return tuple(found)


async def _of(context: Context, name: str) -> Sequence[Discovered]:
    records = await context.catalog.domains()
    handles = {record.name: record.handle or record.template for record in records}
    known = {domain: handle for domain, handle in handles.items() if handle is not None and handle.driver == name}
    return await need(context.drivers[name], Discovers, name).discover(known)
