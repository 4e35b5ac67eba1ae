"""What a host and a domain can do, what prevents the rest, and the cost of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from snaporch.drivers.base import DirtyRate, Machine, has, need
from snaporch.drivers.local.guard import SILENCE
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import InvalidInput, Refused, Unsupported
from snaporch.model.domain import DomainInfo, DomainRecord, DomainState
from snaporch.model.record import Estimate, OperationKind
from snaporch.model.request import Strategy
from snaporch.operations.estimate import LOOK_BACK, estimate
from snaporch.operations.flatten import chain_cost

_GUARD = {
    "a snaporch that dies": "a guest that it has paused runs on at once",
    "a snaporch that is stopped": f"a guest that it has paused runs on after {SILENCE} seconds",
    "a control group that is frozen": (
        "a guest that snaporch, in this group, has paused stays so until it is thawed: the guard is in it too"
    ),
}
_FORETOLD = (Strategy.BACKGROUND, Strategy.PRECOPY, Strategy.PAUSED)


async def foretell(context: Context, domain: str, strategy: Strategy) -> Estimate:
    """See `snaporch.Orchestrator.estimate`."""
    if strategy in {Strategy.AUTO, Strategy.NONE}:
        raise InvalidInput(f"{strategy} is no way to save memory: background, precopy, paused or internal")
    async with (
        context.locked(Operation(OperationKind.ESTIMATE, domain, "")),
        context.machine_of(domain) as (record, machine),
    ):
        if machine is None:
            raise Refused(f"{domain} is inactive: there is no memory to save")
        paused = strategy in {Strategy.PAUSED, Strategy.INTERNAL}  # nothing is written meanwhile
        return (await _estimates(context, record, machine, strategy, measure=not paused))[0]


async def _estimates(
    context: Context, record: DomainRecord, machine: Machine, *strategies: Strategy, measure: bool = True
) -> Sequence[Estimate]:
    earlier = await context.catalog.checkpoints(record.name, LOOK_BACK)
    running, dirty_rate = await machine.state() is DomainState.RUNNING, None
    if running and measure and has(machine, DirtyRate):
        dirty_rate = await need(machine, DirtyRate, record.name).dirty_rate()
    ram = machine.capabilities.ram
    found = [estimate(strategy, ram, earlier, dirty_rate=dirty_rate) for strategy in strategies]
    return found if running else [attrs.evolve(each, pause=None) for each in found]


async def _of_driver(context: Context, name: str) -> dict[str, Any]:
    try:
        driver = context.drivers[name]
    except Unsupported as error:
        return {"driver": str(error)}
    return await driver.doctor() | {"traits": sorted(driver.traits)}


async def doctor(context: Context, domain: DomainInfo | None, *, measure: bool) -> dict[str, Any]:
    """See `snaporch.Orchestrator.doctor`."""
    findings: dict[str, Any] = {name: await _of_driver(context, name) for name in context.drivers}
    findings["guard"] = dict(_GUARD)
    if domain is None:
        return findings
    found: dict[str, Any] = {"state": domain.state}
    look = context.machine_of if measure else context.seen
    async with (
        context.locked(Operation(OperationKind.DOCTOR, domain.name, ""), only_looks=not measure),
        look(domain.name) as (record, machine),
    ):
        storage = context.driver(record).storage
        found |= {f"chain of {disk.target}": await chain_cost(storage, disk) for disk in domain.disks}
        if machine is not None:
            found |= attrs.asdict(machine.capabilities) | {"traits": sorted(machine.traits)}
            for each in await _estimates(context, record, machine, *_FORETOLD, measure=measure):
                found[f"expected of {each.strategy}"] = attrs.asdict(each)
    return findings | {domain.name: found}
