"""``snaporch prune``: retention by hand."""

from __future__ import annotations

import time

from snaporch.catalog.known import catalog_of
from snaporch.cli.session import Answer, Here
from snaporch.errors import InvalidInput


async def prune(
    *domains: str,
    last: int = 0,
    hourly: int = 0,
    daily: int = 0,
    weekly: int = 0,
    monthly: int = 0,
    within: str = "0s",
    max_bytes: str = "",
    pin: str = "",
    zone: str = "UTC",
    expired: bool = False,
    dry_run: bool = False,
    session: Here,
) -> Answer:
    """Delete the snapshots of domains that no rule keeps; of each domain in one operation.

    A snapshot stays if any rule keeps it. Pinned ones stay, and so does the newest good one. What has expired goes.

    Parameters
    ----------
    domains
        The domains; none is all.
    last
        Keep so many of the newest.
    hourly
        Of each of the last so many hours that have any, keep the newest.
    daily
        Likewise of days.
    weekly
        Likewise of weeks, which begin on Monday.
    monthly
        Likewise of months.
    within
        Keep all that are younger, for example 12h or 7d.
    max_bytes
        Of what is kept let the oldest go, until a domain's snapshots hold no more than this, for example 100GiB.
    pin
        Keep those whose names match this, for example 'golden*'.
    zone
        The time zone in which hours and days begin.
    expired
        Delete only what has expired (`create --expires`); without rules.
    dry_run
        Only say what would go.
    """
    session.only_reads = dry_run
    from snaporch.batch.plan import retention_from  # noqa: PLC0415 - other verbs do without it, and start sooner
    from snaporch.batch.prune import prune as prune_them  # noqa: PLC0415
    from snaporch.batch.prune import prune_expired  # noqa: PLC0415

    counts = {"last": last, "hourly": hourly, "daily": daily, "weekly": weekly, "monthly": monthly}
    sizes = {"max_bytes": max_bytes} if max_bytes else {}
    rules = {**counts, "within": within, "zone": zone, "pin": [pin] if pin else [], **sizes}
    if expired and (any(counts.values()) or within != "0s" or pin or sizes):
        raise InvalidInput("--expired, and rules: choose one; what has expired goes by rules, too")
    policy = None if expired else retention_from(rules)
    async with session.open_here() as orchestrator:
        names = domains or tuple(record.name for record in await catalog_of(orchestrator).domains())
        if policy is None:
            verdicts = await prune_expired(orchestrator, names, now=time.time(), dry_run=dry_run)
        else:
            verdicts = await prune_them(orchestrator, policy, names, now=time.time(), dry_run=dry_run)
    document = [{"domain": name, "keep": v.keep, "delete": v.delete} for name, v in verdicts.items()]
    did = "would delete" if dry_run else "deleted"
    lines = [f"{name}: {did} {each} ({why})" for name, v in verdicts.items() for each, why in v.delete.items()]
    lines += [f"{name}: {len(v.keep)} stay" for name, v in verdicts.items()]
    return Answer(document, lambda human: human.lines(lines))
