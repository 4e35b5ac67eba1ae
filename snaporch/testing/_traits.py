"""Which checks are for whom: a driver passes those that need no more than the traits that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from snaporch.drivers.base import Trait
from snaporch.engine.steps import CREATE, Phase
from snaporch.model.request import Strategy
from snaporch.model.rfc import RevertFlag
from snaporch.operations.create_plan import order_of
from snaporch.testing._world import World

LIVE = frozenset([Trait.MEMORY_STREAMS, Trait.OVERLAYS])
"""What nearly all checks need: checkpoints of a running guest, in files of their own."""

NEEDS: Mapping[str, frozenset[Trait]] = {
    "check_cancelled_background": frozenset([Trait.BACKGROUND_STREAMS]),
    "check_broken_background": frozenset([Trait.BACKGROUND_STREAMS]),
    "check_cancelled_revert": frozenset([Trait.STARTS_BESIDE]),
    "check_internal": frozenset([Trait.POINTS_INSIDE, Trait.IMAGE_POINTS]),
    "check_internal_mixed": frozenset([Trait.POINTS_INSIDE, Trait.IMAGE_POINTS]),
    "check_internal_cancelled": frozenset([Trait.POINTS_INSIDE, Trait.IMAGE_POINTS]),
    "check_delete": frozenset([Trait.LIVE_MERGES, Trait.OFFLINE_MERGES]),
    "check_delete_inactive": frozenset([Trait.OFFLINE_MERGES]),
    "check_cancelled_delete": frozenset([Trait.LIVE_MERGES, Trait.OFFLINE_MERGES]),
    "check_clone": frozenset([Trait.CLONES, Trait.LIVE_MERGES]),
    "check_flatten": frozenset([Trait.LIVE_COPIES, Trait.OFFLINE_MERGES]),
}
"""What a check needs beside `LIVE`, by its name."""


def needs_of(name: str) -> frozenset[Trait]:
    """Return the traits that a check of this name needs."""
    return LIVE | NEEDS.get(name, frozenset())


async def _driver_traits(world: World) -> Collection[str]:
    info = await world.orchestrator.domain_info(world.domain)
    traits: Collection[str] = (await world.orchestrator.doctor())[info.driver]["traits"]
    return traits


async def in_its_place(world: World) -> RevertFlag:
    """Return FORCE where a running guest can be gone back only when it is ended first."""
    return RevertFlag(0) if Trait.STARTS_BESIDE in await _driver_traits(world) else RevertFlag.FORCE


async def phases_of(world: World, strategy: Strategy) -> tuple[Phase, ...]:
    """Return the phases of a create of the running guest by a strategy."""
    found = (await world.orchestrator.doctor(world.domain))[world.domain]
    return CREATE[order_of(strategy, stops_itself=found["stops_itself"])]
