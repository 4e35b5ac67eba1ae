"""Checks of clones: domains of their own, from a point of another one, which notices nothing."""

from __future__ import annotations

from functools import partial

from snaporch.engine.states import State
from snaporch.errors import NotFound, Refused
from snaporch.model.domain import DomainState
from snaporch.model.request import CloneOptions
from snaporch.testing._support import bounded, cancelled_in, expect, raises, unchanged
from snaporch.testing._world import World


async def check_clone(world: World) -> None:
    """A clone runs on from the point beside the original; the point stays while it is read, and nothing is left."""
    orch, files = world.orchestrator, (await world.everything())["files"]
    first, _ = await bounded(world, "p")
    async with unchanged(world, "a clone that was cancelled"):
        call = partial(orch.clone, world.domain, "p", "copy", CloneOptions(count=2))
        expect(not await cancelled_in(world, State.LOADING, call), "it was complete before it was loaded")
    with raises(NotFound):
        await orch.domain_info("copy-1")
    (made,) = await orch.clone(world.domain, "p", "copy")
    expect(made.state is DomainState.RUNNING, f"the clone of a guest that ran is {made.state}")
    copy = world.of("copy")
    await copy.check_consistent()
    expect(await copy.number() >= first, "the clone does not go on from the point")
    await world.check_consistent()
    expect(await orch.clones(world.domain) == {"p": ("copy",)}, "it is not known what the clone needs")
    with raises(Refused):
        await orch.delete(world.domain, "p")
    await orch.destroy("copy")
    with raises(Refused):
        await orch.undefine("copy")
    await orch.undefine("copy", discard=True)
    await orch.delete(world.domain, "p")
    await world.check_consistent()
    expect((await world.everything())["files"] == files, "not all files of the clone are gone")
