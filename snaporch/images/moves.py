"""What a step of a merge reads, writes and moves. Pure."""

from __future__ import annotations

import attrs

from snaporch.images.chain import Graph
from snaporch.model.domain import DomainRecord
from snaporch.model.merge import MergeKind, MergePlan, MergeStep
from snaporch.model.rfc import DiskSnapshot


def moved_domain(record: DomainRecord, step: MergeStep, graph: Graph) -> DomainRecord:
    """Return a domain's record after a merge: a disk on what was committed is on what it went into."""
    active = dict(record.active)
    for disk in record.disks:
        if step.kind is MergeKind.COMMIT and disk.path == step.top:
            base = graph.images[step.base]
            active[disk.target] = attrs.evolve(disk, path=base.path, format=base.format)
    return attrs.evolve(record, active=active)


def touched(plan: MergePlan) -> set[str]:
    """Return the images that a plan writes to or removes; what is copied up from, the domain reads anyway."""
    commits = (step for step in plan.steps if step.kind is MergeKind.COMMIT)
    merged = {path for step in commits for path in (step.top, step.base)}
    return {*plan.unlink, *merged}.union(*map(written, plan.steps))


def read(step: MergeStep, graph: Graph) -> set[str]:
    """Return the images that a step reads."""
    below = [image.path for image in graph.chain(step.top)]
    return set(below[: below.index(step.base) + 1] if step.base in below else [step.top, step.base])


def written(step: MergeStep) -> set[str]:
    """Return the images that a step writes to."""
    return {step.survivor, *step.repoint}


def moved_disk(disk: DiskSnapshot, step: MergeStep, graph: Graph) -> DiskSnapshot:
    """Return a point's disk after a merge: what was committed is in what it went into."""
    if step.kind is not MergeKind.COMMIT or disk.disk.path != step.top:
        return disk
    image = graph.images[step.base]
    return attrs.evolve(disk, disk=attrs.evolve(disk.disk, path=image.path, format=image.format))
