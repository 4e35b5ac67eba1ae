"""The JSON documents that the command line prints with ``--json``, and the service answers with: all of them.

The names in these documents are a contract with scripts: they are added to, never changed
(docs/reference/versions.md). Those that are a record in full have the record's own format number; the others have
`FORMAT`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from snaporch.model.convert import converter
from snaporch.model.domain import DiskStatus, DomainInfo
from snaporch.model.finding import Finding, Unreadable
from snaporch.model.merge import MergePlan
from snaporch.model.record import (
    CloneRecord,
    GivenUp,
    OperationRecord,
    Outcome,
    RevertRecord,
    SnapshotRecord,
    VerifyReport,
)
from snaporch.model.way import WayBack

FORMAT = 1


def created(record: SnapshotRecord) -> dict[str, Any]:
    """Return what ``create`` answers."""
    memory, timings = record.memory, record.timings
    return {
        "format": FORMAT,
        "domain": record.domain,
        "name": record.name,
        "outcome": record.outcome,
        "parent": record.parent,
        "domain_state": record.domain_state,
        "kind": record.kind,
        "strategy": record.strategy,
        "reason": record.reason,
        "point": record.point,
        "pause_seconds": timings.pause,
        "total_seconds": timings.total,
        "memory_file": memory.path if memory else None,
        "memory_bytes": memory.size if memory else None,
        "memory_checksum": memory.checksum if memory else None,
        **way_back(record.way_back),
        "disks": [
            {
                "target": disk.disk.target,
                "frozen": disk.disk.path,
                "active": disk.external_sn.path if disk.external_sn else disk.disk.path,
                "inside": None if disk.external else disk.name,
            }
            for disk in record.snapshot.disks
        ],
        "phases": timings.phases,
        "expected": record.expected,
        "expires": record.expires,
    }


def disk(status: DiskStatus) -> dict[str, Any]:
    """Return one disk of a domain."""
    return {
        "target": status.target,
        "active": status.active,
        "format": status.format,
        "readonly": status.readonly,
        "virtual_size": status.virtual_size,
        "chain": status.chain,
    }


def domain(info: DomainInfo) -> dict[str, Any]:
    """Return what ``domain show`` answers."""
    return {
        "format": FORMAT,
        "name": info.name,
        "state": info.state,
        "current": info.current,
        "pid": info.pid,
        "driver": info.driver,
        "tags": info.tags,
        "max_depth": info.max_depth or None,
        "disks": [disk(status) for status in info.disks],
        "problem": info.problem or None,
        "records": info.records,
        "origin": {"domain": info.origin.domain, "name": info.origin.name} if info.origin else None,
        **way_back(info.way_back),
        "clock_behind_seconds": info.clock_behind_seconds,
        "generation": info.generation or None,
    }


def domains(infos: Sequence[DomainInfo], unreadable: Iterable[Unreadable] = ()) -> list[dict[str, Any]]:
    """Return what ``domain list`` answers; what cannot be read comes last, with the reason."""
    lost = [{"format": FORMAT, "name": each.name, "state": None, "unreadable": each.reason} for each in unreadable]
    return [domain(info) for info in infos] + lost


def way_back(back: WayBack | None) -> dict[str, Any]:
    """Return how a domain would go back to a point of it, for what answers that among other things."""
    return {"way_back": back.way if back else None, "way_back_reason": (back.reason if back else "") or None}


def created_group(records: Sequence[SnapshotRecord]) -> dict[str, Any]:
    """Return what ``create --group`` answers: what ``create`` answers of each member."""
    pauses = [record.timings.pause for record in records if record.timings.pause is not None]
    document = of_group(records[0].name, [created(record) for record in records])
    return document | {"pause_seconds": max(pauses, default=None)}


def of_group(name: str, members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a verb answers of a group: what it answers of each member."""
    return {"format": FORMAT, "name": name, "outcome": Outcome.COMPLETE, "members": members}


def reverted(record: RevertRecord, info: DomainInfo, saved: str) -> dict[str, Any]:
    """Return what ``revert`` answers."""
    return {
        "format": FORMAT,
        "domain": record.domain,
        "name": record.name,
        "outcome": record.outcome,
        "way": record.way,
        "lazy": record.lazy,
        "lazy_reason": record.lazy_reason or None,
        "state": info.state,
        "current": info.current,
        "saved": saved or None,
        "disks": [disk(status) for status in info.disks],
        "outage_seconds": record.outage_seconds,
        "total_seconds": record.total_seconds,
        "clock_behind_seconds": record.clock_behind_seconds,
        "problems": record.problems,
    }


def cloned(records: Sequence[CloneRecord]) -> list[dict[str, Any]]:
    """Return what ``clone`` answers: the new domains."""
    return [
        {
            "format": FORMAT,
            "name": record.name,
            "state": record.state,
            "from": {"domain": record.domain, "name": record.snapshot},
            "ports": converter.unstructure(record.ports),
        }
        for record in records
    ]


def deleted(domain_name: str, name: str, plan: MergePlan, *, dry_run: bool) -> dict[str, Any]:
    """Return what ``delete`` answers; on a dry run, what it would do."""
    return {
        "format": FORMAT,
        "domain": domain_name,
        "name": name,
        "deleted": sorted(plan.doomed),
    } | _merges(plan, dry_run=dry_run)


def flattened(domain_name: str, name: str, plan: MergePlan, *, dry_run: bool) -> dict[str, Any]:
    """Return what ``flatten`` answers; on a dry run, what it would do."""
    return {"format": FORMAT, "domain": domain_name, "name": name or None} | _merges(plan, dry_run=dry_run)


def _merges(plan: MergePlan, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "outcome": None if dry_run else Outcome.COMPLETE,
        "bytes": plan.bytes,
        "steps": [
            {
                "kind": step.kind,
                "target": step.target,
                "top": step.top,
                "base": step.base,
                "bytes": step.bytes,
                "where": step.where,
            }
            for step in plan.steps
        ],
        "unlink": plan.unlink,
        "kept": [{"path": path, "reason": reason} for path, reason in plan.kept],
    }


def verified(report: VerifyReport) -> dict[str, Any]:
    """Return what ``verify`` answers of one snapshot."""
    return {
        "format": FORMAT,
        "domain": report.domain,
        "name": report.name,
        "ok": report.ok,
        "problems": report.problems,
        "booted": report.booted,
        "files": report.files,
        "boot": report.boot,
        "reason": report.reason or None,
    }


_LISTED = (
    "format",
    "id",
    "name",
    "parent",
    "memory",
    "domain_state",
    "creation_time",
    "current",
    "description",
    "strategy",
    "kind",
    "bytes",
    "deleting",
    "pinned",
    "group",
)


def listed(
    records: Sequence[SnapshotRecord], current: str | None, unreadable: Iterable[Unreadable] = ()
) -> list[dict[str, Any]]:
    """Return what ``list`` answers: oldest first; what cannot be read comes last, with the reason."""
    found = [
        {
            "format": FORMAT,
            "id": record.id,
            "name": record.name,
            "parent": record.parent,
            "memory": record.snapshot.memory,
            "domain_state": record.domain_state,
            "creation_time": record.snapshot.creation_time,
            "current": record.name == current,
            "description": record.snapshot.description,
            "strategy": record.strategy,
            "kind": record.kind,
            "bytes": record.size,
            "deleting": record.deleting,
            "pinned": record.pinned,
            "group": record.group.members if record.group else None,
            "expires": record.expires,
        }
        for record in records
    ]
    none = dict.fromkeys(_LISTED) | {"format": FORMAT}
    return found + [none | {"name": each.name, "unreadable": each.reason} for each in unreadable]


def shown(record: SnapshotRecord, current: str | None) -> dict[str, Any]:
    """Return what ``show`` answers: the record in full."""
    full: dict[str, Any] = converter.unstructure(record)
    return {"name": record.name, "current": record.name == current, "bytes": record.size} | full


def tree(records: Sequence[SnapshotRecord], current: str | None) -> list[dict[str, Any]]:
    """Return what ``tree`` answers: all snapshots, oldest first, each with the name and the id of its parent."""
    ids = {record.name: record.id for record in records}
    return [
        {
            "format": FORMAT,
            "id": record.id,
            "name": record.name,
            "parent": record.parent,
            "parent_id": ids.get(record.parent or "") or None,
            "current": record.name == current,
            "memory": record.snapshot.memory,
            "kind": record.kind,
            "creation_time": record.snapshot.creation_time,
            "bytes": record.size,
        }
        for record in records
    ]


def operation(record: OperationRecord) -> dict[str, Any]:
    """Return one entry of ``operations``; without an outcome it runs, or was cut short."""
    full: dict[str, Any] = converter.unstructure(record)
    del full["notes"]  # for recovery only
    return full | {"outcome": record.state if record.state in set(Outcome) else None}


def given_up(found: GivenUp) -> dict[str, Any]:
    """Return the document of ``operations give-up``."""
    entry: dict[str, Any] = converter.unstructure(found)
    return entry


def finding(found: Finding) -> dict[str, Any]:
    """Return one entry of ``fsck``."""
    entry: dict[str, Any] = converter.unstructure(found)
    return entry
