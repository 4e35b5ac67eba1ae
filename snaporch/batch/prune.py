"""Retention of one domain: what the policy gives up is deleted, all in one operation."""

from __future__ import annotations

from snaporch.batch import store
from snaporch.batch.plan import Plan
from snaporch.batch.retention import Candidate, Verdict, plan_retention
from snaporch.models import SnapshotRecord
from snaporch.orchestrator import Orchestrator


def _bytes(record: SnapshotRecord) -> int:
    frozen = sum(chain[0].size for chain in record.images.values() if chain)
    return frozen + (record.memory.size if record.memory else 0)


async def prune(orch: Orchestrator, plan: Plan, domain: str, *, now: float, dry_run: bool = False) -> Verdict:
    """Delete what a plan's retention does not keep of a domain's snapshots.

    A snapshot counts as good when its files are there and nothing has touched them, and when no batch of the plan
    found it damaged.

    Args:
        orch: the orchestrator.
        plan: with a policy; without, nothing goes.
        domain: the domain's name.
        now: seconds since the epoch.
        dry_run: only decide.

    Raises:
        SnaporchError: as `Orchestrator.delete`.
    """
    if plan.retention is None:
        return Verdict()
    mine = await store.taken_by(orch.catalog, plan.name, domain)
    candidates = []
    for record in await orch.list(domain):
        if record.name in mine or plan.retention.everything:
            found_good = record.name not in mine or mine[record.name].verified is not False
            good = found_good and not record.deleting and await orch.intact(domain, record.name)
            candidates.append(Candidate(record.name, record.point, _bytes(record), good, record.pinned))
    verdict = plan_retention(candidates, plan.retention, now)
    if verdict.delete and not dry_run:
        await orch.delete(domain, tuple(verdict.delete))
    return verdict
