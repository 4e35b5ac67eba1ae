"""Checks of QUIESCE: file systems are frozen around the point, and never for longer."""

from __future__ import annotations

from functools import partial

from snaporch.drivers.base import Trait
from snaporch.engine.states import State
from snaporch.engine.steps import QUIESCED
from snaporch.errors import Refused, Unsupported
from snaporch.model.domain import DomainState
from snaporch.model.record import SnapshotRecord
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DomainSnapshot
from snaporch.testing._support import (
    cancelled_in,
    check_back,
    check_same,
    expect,
    picture,
    raises,
    revert,
    state_of,
    states_of,
    unchanged,
)
from snaporch.testing._world import World

_FLAGS = {
    Strategy.NONE: CreateFlag.DISK_ONLY,
    Strategy.BACKGROUND: CreateFlag.LIVE,
    Strategy.PAUSED: CreateFlag(0),
}


async def _take(world: World, name: str, strategy: Strategy) -> SnapshotRecord:
    flags = _FLAGS[strategy] | CreateFlag.QUIESCE
    return await world.orchestrator.create(world.domain, DomainSnapshot(name), flags)


async def check_quiesce(world: World) -> None:
    """With QUIESCE file systems are frozen around the point and thawed again; without an agent it is refused."""
    if Trait.GUEST_AGENT not in (await world.orchestrator.doctor(world.domain))[world.domain]["traits"]:
        for strategy in _FLAGS:
            async with unchanged(world, "QUIESCE without an agent"):
                with raises(Unsupported):
                    await _take(world, "never", strategy)
        await world.check_consistent()
        return
    for strategy in _FLAGS:
        await _check_quiesced(world, strategy)
    async with unchanged(world, "QUIESCE for as long as a precopy"):
        with raises(Unsupported):
            options = CreateOptions(strategy=Strategy.PRECOPY)
            await world.orchestrator.create(world.domain, DomainSnapshot("x"), CreateFlag.QUIESCE, options)
    await world.orchestrator.pause(world.domain)
    async with unchanged(world, "QUIESCE of a paused guest"):
        with raises(Refused):
            await _take(world, "x", Strategy.NONE)


async def _check_quiesced(world: World, strategy: Strategy) -> None:
    first = await world.number()
    record = await _take(world, f"as-{strategy}", strategy)
    expect((record.strategy, record.quiesced) == (strategy, True), f"the record says {record.strategy}")
    expect(record.domain_state is DomainState.RUNNING, "the record says that the guest did not run")
    await world.go_on()  # not frozen
    await world.check_consistent()
    far = await world.number()
    if record.snapshot.memory:
        await check_back(world, record.name, first, far)
    await revert(world, record.name)
    expect(await state_of(world) is DomainState.RUNNING, "it does not run, as it did at the point")
    await world.check_consistent()
    for state in states_of(QUIESCED[strategy]):
        before = await picture(world)
        if await cancelled_in(world, state, partial(_take, world, f"{strategy}-{state}", strategy)):
            expect(state is State.COMMITTING, f"a create cancelled when {state} is complete")
        else:
            await check_same(world, before, f"{strategy} with QUIESCE, cancelled when {state}")
        await world.check_consistent()
