"""Chooses the way a domain goes back: beside its old guest, if possible; see `snaporch.engine.ways`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import attrs

from snaporch.drivers.base import (
    TRAITS,
    Driver,
    Launch,
    LoadsLazily,
    Machine,
    MemoryStreams,
    Overlays,
    StartsBeside,
    has,
    need,
)
from snaporch.engine.context import Context
from snaporch.errors import Unsupported
from snaporch.model.domain import DomainState
from snaporch.model.names import short
from snaporch.model.request import Strategy
from snaporch.model.way import Way
from snaporch.operations.checks import STREAM_BYTES, check_ram, check_space
from snaporch.operations.create_plan import paused_stream
from snaporch.operations.estimate import LOOK_BACK, estimate
from snaporch.operations.revert_plan import RevertPlan


async def with_way(
    context: Context, driver: Driver, plan: RevertPlan, old: Machine | None, *, force: bool
) -> RevertPlan:
    """Return a plan with the way that can be gone.

    Raises:
        Refused: there is none.
    """
    if plan.way is Way.INSIDE and old is None:  # it does not answer, which only FORCE comes this far with
        return attrs.evolve(plan, way=Way.INSIDE_DISPLACE)
    if plan.way is not Way.BESIDE or plan.domain.handle is None:
        return plan
    if old is None:
        return attrs.evolve(plan, way=Way.DISPLACE, reason="the old process does not answer")
    launch = Launch(
        plan.snapshot.definition, plan.disks, plan.run_directory, template=plan.snapshot.template, tpm=plan.tpm
    )
    # A merge that failed may have left images open for writing, which would bar the new guest.
    await need(old, Overlays, plan.domain.name).settle_merges(
        {disk.target: disk.path for disk in plan.domain.disks}
    )
    blocker = await _beside_blocker(driver, launch)
    return await one_after_the_other(context, driver, plan, old, blocker, force=force) if blocker else plan


def with_lazy(driver: Driver, plan: RevertPlan) -> RevertPlan:
    """Return a plan by which the guest runs before its memory is there, or that says why it does not.

    Whether its machine can do that is found out when it is there.
    """
    why = ""
    if plan.way is not Way.BESIDE:
        why = plan.reason or f"its way back is {plan.way.word}"
    elif plan.snapshot.memory is None:
        why = "it has no memory that could be loaded"
    elif plan.state is not DomainState.RUNNING:
        why = "the guest is not to run"
    elif plan.tpm:  # QEMU itself, and not only the guest, waits for the pages of the TPM's buffers
        why = "it has a TPM"
    elif not has(driver, LoadsLazily):
        why = f"its hypervisor {TRAITS[LoadsLazily][1]}"
    return attrs.evolve(plan, eager=why) if why else attrs.evolve(plan, way=Way.LAZY)


async def _beside_blocker(driver: Driver, launch: Launch) -> str:
    if not has(driver, StartsBeside):
        return "its hypervisor runs one machine of a name"
    return await need(driver, StartsBeside, launch.definition.name).beside_blocker(launch)


async def one_after_the_other(
    context: Context, driver: Driver, plan: RevertPlan, old: Machine | None, why: str, *, force: bool
) -> RevertPlan:
    """Return the plan of a domain whose old guest has to be ended before the new one is there.

    Without FORCE what it holds is kept in a file meanwhile: how long that takes is said beforehand.

    Args:
        context: the orchestrator's.
        driver: the domain's.
        plan: as it was to be.
        old: the domain's machine; None when it is inactive or, with FORCE, does not answer.
        why: they cannot be there at one time.
        force: the old guest is given up.

    Raises:
        Unsupported: it cannot be kept.
        NotEnoughSpace: there is no room for that.
    """
    if plan.way is Way.LAZY:
        plan = attrs.evolve(plan, eager=why)
    if force:
        return attrs.evolve(plan, way=Way.DISPLACE, reason=why)
    if old is None:
        return attrs.evolve(plan, way=Way.PROVEN, reason=why)
    name, directory, can = plan.domain.name, os.path.dirname(plan.directory), old.capabilities
    blocker = can.memory_blocker if has(old, MemoryStreams) else "its memory cannot be streamed"
    if not (can.background and can.keeps_paused):
        blocker = blocker or can.ends_blocker
    if blocker:
        raise Unsupported(
            f"{name}: the new guest cannot be there beside the old one ({why}), "
            f"and the old one cannot be kept until it is: {blocker}"
        )
    await check_space([(driver.storage, directory, can.ram + STREAM_BYTES)])
    settings = await need(old, MemoryStreams, name).settings()
    return attrs.evolve(
        plan,
        way=Way.PROVEN,
        reason=why,
        keep=paused_stream(f"{directory}/{short(plan.operation)}.kept", plan.was, can, settings),
        expected=estimate(Strategy.PAUSED, can.ram, await context.catalog.checkpoints(name, LOOK_BACK)),
    )


async def check_room_for_proofs(copies: Iterable[tuple[Driver, RevertPlan]]) -> None:
    """Look whether the host has RAM for the throw-away copies, all at once.

    Raises:
        NotEnoughSpace: it has not.
    """
    needed: Counter[str] = Counter()
    drivers = {}
    for driver, plan in copies:
        if plan.way is Way.PROVEN:
            drivers[driver.name] = driver
            needed[driver.name] += plan.snapshot.definition.memory
    for name, size in needed.items():
        await check_ram(drivers[name], size)
