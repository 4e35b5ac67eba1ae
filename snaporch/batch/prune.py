"""Retention: deletes the snapshots that the policy does not keep, a domain or a group in one operation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs

from snaporch.batch import store
from snaporch.batch.plan import Plan, Retention
from snaporch.batch.retention import Candidate, Verdict, plan_retention
from snaporch.batch.store import ItemRecord
from snaporch.errors import NotFound, Refused
from snaporch.model.names import in_order
from snaporch.model.record import SnapshotRecord
from snaporch.operations.group import siblings
from snaporch.orchestrator import Orchestrator, catalog_of


async def prune(
    orch: Orchestrator,
    policy: Retention,
    domains: Sequence[str],
    *,
    taken: Mapping[str, ItemRecord] | None = None,
    now: float,
    dry_run: bool = False,
) -> dict[str, Verdict]:
    """Delete what a policy does not keep of these domains' snapshots; what is between two that stay is merged once.

    A snapshot counts as good when its files are there and nothing has touched them, and when no batch among `taken`
    found it damaged. A group's go all or stay: so they do where one of them is kept, or is of a domain that is not
    looked at.

    Args:
        orch: the orchestrator.
        policy: what stays.
        domains: the domains' names.
        taken: what a plan's batches have taken, by the snapshot's name: unless the policy is about everything, only
            these are looked at, and what reverts have saved. None: all are.
        now: seconds since the epoch.
        dry_run: only decide.

    Returns:
        What becomes of each domain's snapshots.

    Raises:
        SnaporchError: as `Orchestrator.retire`. What can go is gone, though it is raised for another snapshot.
    """
    known = {domain: {record.name: record for record in await orch.list(domain)} for domain in domains}
    found = {domain: await _verdict(orch, policy, known[domain].values(), taken, now) for domain in domains}
    return await _carry_out(orch, known, found, dry_run=dry_run)


async def prune_expired(
    orch: Orchestrator, domains: Sequence[str], *, now: float, dry_run: bool = False
) -> dict[str, Verdict]:
    """As `prune`, but only what has expired goes, whoever has taken it.

    A group's snapshots go together, so the domains of its other members are looked at, too.
    """
    known, found = dict[str, dict[str, SnapshotRecord]](), dict[str, Verdict]()
    left = list(domains)
    while left:
        if (domain := left.pop()) in known:
            continue
        known[domain] = {record.name: record for record in await orch.list(domain)}
        kept = await orch.clones(domain)
        there = [_candidate(record, kept, good=True) for record in known[domain].values()]
        gone = {each.name: "expired" for each in there if each.has_expired(now)}
        stays = {each.name: "pinned" if each.pinned else "not expired" for each in reversed(there)}
        found[domain] = Verdict({name: why for name, why in stays.items() if name not in gone}, gone)
        for name in gone:
            left += [other.domain for other in await siblings(catalog_of(orch), known[domain][name])]
    return await _carry_out(orch, known, found, dry_run=dry_run)


async def _carry_out(
    orch: Orchestrator,
    known: Mapping[str, Mapping[str, SnapshotRecord]],
    found: Mapping[str, Verdict],
    *,
    dry_run: bool,
) -> dict[str, Verdict]:
    verdicts, going = {}, dict[tuple[str, ...], dict[str, None]]()
    for domain, verdict in found.items():
        verdicts[domain] = verdict
        for name in verdict.delete:
            record = known[domain][name]
            others = [each.domain for each in await siblings(catalog_of(orch), record)]
            if keeper := next((each for each in others if name not in found.get(each, Verdict()).delete), None):
                verdicts[domain] = _kept(verdicts[domain], name, f"one point with that of {keeper}, which stays")
            else:
                going.setdefault(in_order([domain, *others]), {})[name] = None
    refused: Refused | None = None
    for together, names in going.items() if not dry_run else ():
        records = [known[domain][name] for domain in together for name in names]
        refused = await _delete(orch, records) or refused
    if refused is not None:
        raise refused
    return verdicts


async def _delete(orch: Orchestrator, records: Sequence[SnapshotRecord]) -> Refused | None:
    """Delete snapshots as one; where that is refused, each by its name that can go. Return why one cannot."""
    names = dict.fromkeys(record.name for record in records)
    try:
        await orch.retire(records)
    except (Refused, NotFound) as error:
        if len(names) == 1:
            return error if isinstance(error, Refused) else None  # it is gone: somebody was quicker
    else:
        return None
    refused = None
    for name in names:
        refused = await _delete(orch, [each for each in records if each.name == name]) or refused
    return refused


async def _verdict(
    orch: Orchestrator,
    policy: Retention,
    known: Collection[SnapshotRecord],
    taken: Mapping[str, ItemRecord] | None,
    now: float,
) -> Verdict:
    candidates = []
    named = {record.name: (record, (taken or {}).get(record.name)) for record in known}
    mine = {name: item for name, (record, item) in named.items() if item is not None and _is(record, item)}
    domains = {record.domain for record in known}
    pinned = {name for domain in domains for name in await orch.clones(domain)}
    for record in known:
        if record.name in mine or policy.everything or taken is None or record.saved_by_revert:
            found_good = record.name not in mine or mine[record.name].verified is not False
            good = found_good and not record.deleting and await orch.intact(record.domain, record.name)
            candidates.append(_candidate(record, pinned, good=good))
    return plan_retention(candidates, policy, now)


def _candidate(record: SnapshotRecord, pinned: Collection[str], *, good: bool) -> Candidate:
    stays = record.pinned or record.name in pinned
    return Candidate(record.name, record.point, record.size, good, stays, record.expires)


def _is(record: SnapshotRecord, item: ItemRecord) -> bool:
    """Return whether a snapshot is the one that a batch has taken, and not another one of its name."""
    return not item.ids or record.id in item.ids


def _kept(verdict: Verdict, name: str, why: str) -> Verdict:
    """Return a verdict that keeps one snapshot more."""
    delete = {each: reason for each, reason in verdict.delete.items() if each != name}
    return attrs.evolve(verdict, keep=verdict.keep | {name: why}, delete=delete)


async def prune_by_plan(
    orch: Orchestrator, plan: Plan, item: str, domains: Sequence[str], *, now: float, dry_run: bool = False
) -> dict[str, Verdict]:
    """As `prune`, of the domains that a plan takes as one item; without a retention nothing goes.

    Args:
        orch: the orchestrator.
        plan: the plan.
        item: under which name it takes them.
        domains: the domains' names.
        now: seconds since the epoch.
        dry_run: only decide.

    Raises:
        SnaporchError: as `prune`.
    """
    if plan.retention is None:
        return {}
    taken = await store.taken_by(catalog_of(orch), plan.name, item)
    return await prune(orch, plan.retention, domains, taken=taken, now=now, dry_run=dry_run)
