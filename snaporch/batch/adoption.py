"""What a plan's batches have taken becomes another plan's."""

from __future__ import annotations

from contextlib import AsyncExitStack

from snaporch.batch import store
from snaporch.batch.runner import plan_lock
from snaporch.errors import InvalidInput, NotFound
from snaporch.model.names import check_name
from snaporch.orchestrator import Orchestrator, catalog_of


async def adopt(orch: Orchestrator, old: str, new: str) -> int:
    """Give what batches of a plan have taken to another plan: its retention is about it from now on.

    Returns:
        How many batches there were.

    Raises:
        InvalidInput: a name is none, or both are the same.
        NotFound: there is no batch of the old one.
        Busy: one of the two runs.
    """
    for name in (old, new):
        check_name(name, "plan")
    if old == new:
        raise InvalidInput(f"{old} has its snapshots already: name another plan")
    async with AsyncExitStack() as stack:
        for name in sorted((old, new)):
            await stack.enter_async_context(plan_lock(orch, name))
        if not (count := await store.adopt(catalog_of(orch), old, new)):
            raise NotFound(f"no batch of a plan {old!r}; `snaporch batch list` lists all")
    return count
