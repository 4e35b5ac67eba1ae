"""Retention of one domain: what the policy gives up is deleted, all in one operation."""

from __future__ import annotations

from collections.abc import Mapping

from snaporch.batch import store
from snaporch.batch.plan import Plan, Retention
from snaporch.batch.retention import Candidate, Verdict, plan_retention
from snaporch.batch.store import ItemRecord
from snaporch.orchestrator import Orchestrator


async def prune(
    orch: Orchestrator,
    policy: Retention,
    domain: str,
    *,
    taken: Mapping[str, ItemRecord] | None = None,
    now: float,
    dry_run: bool = False,
) -> Verdict:
    """Delete what a policy does not keep of a domain's snapshots; what lies between two that stay is merged once.

    A snapshot counts as good when its files are there and nothing has touched them, and when no batch among `taken`
    found it damaged.

    Args:
        orch: the orchestrator.
        policy: what stays.
        domain: the domain's name.
        taken: what a plan's batches have taken, by the snapshot's name: unless the policy is about everything, only
            these are looked at. None: all are.
        now: seconds since the epoch.
        dry_run: only decide.

    Raises:
        SnaporchError: as `Orchestrator.delete`.
    """
    mine = taken or {}
    candidates = []
    for record in await orch.list(domain):
        if record.name in mine or policy.everything or taken is None:
            found_good = record.name not in mine or mine[record.name].verified is not False
            good = found_good and not record.deleting and await orch.intact(domain, record.name)
            candidates.append(Candidate(record.name, record.point, record.size, good, record.pinned))
    verdict = plan_retention(candidates, policy, now)
    if verdict.delete and not dry_run:
        await orch.delete(domain, tuple(verdict.delete))
    return verdict


async def prune_by_plan(
    orch: Orchestrator, plan: Plan, item: str, domain: str, *, now: float, dry_run: bool = False
) -> Verdict:
    """As `prune`, of a domain that a plan takes by itself or in a group; without a retention nothing goes.

    Args:
        orch: the orchestrator.
        plan: the plan.
        item: under which name it takes the domain.
        domain: the domain's name.
        now: seconds since the epoch.
        dry_run: only decide.

    Raises:
        SnaporchError: as `Orchestrator.delete`.
    """
    if plan.retention is None:
        return Verdict()
    taken = await store.taken_by(orch.catalog, plan.name, item)
    return await prune(orch, plan.retention, domain, taken=taken, now=now, dry_run=dry_run)
