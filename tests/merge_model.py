"""A model of images with their contents: carries plans out, checks what they promise, and tries all others."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

import attrs

from snaporch.images.chain import Graph, Image
from snaporch.images.merge import apply, plan_delete
from snaporch.model.domain import DomainRecord, DomainState
from snaporch.model.merge import MergePlan, MergeStep
from snaporch.model.record import SnapshotRecord
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeviceDisk, DiskSnapshot, DomainSnapshot

# --- the model ----------------------------------------------------------------------------------------------------


@attrs.define
class Contents:
    """Images with what is in them: by path, cluster to value. Simpler than QEMU, and less careful.

    A commit or stream moves allocated clusters and sets pointers; it does not, as QEMU does, write zeros where a
    layer is shorter than the one under it. So a plan that is right here is right there.
    """

    images: dict[str, Image] = attrs.field(factory=dict)
    data: dict[str, dict[int, str]] = attrs.field(factory=dict)

    def add(self, path: str, **rest: object) -> None:
        """Add an empty image."""
        self.images[path] = Image(path, **rest)  # type: ignore[arg-type]
        self.data[path] = {}

    def measured(self) -> list[Image]:
        """Return all images, `allocated` being their clusters."""
        return [attrs.evolve(image, allocated=len(self.data[path])) for path, image in self.images.items()]

    def chain(self, path: str | None) -> Iterator[Image]:
        """Yield an image and what it is backed by."""
        while path is not None:
            yield self.images[path]
            path = self.images[path].backing

    def cluster(self, path: str, cluster: int) -> str:
        """Read through: beyond its end a layer reads as zeros, whatever is under it."""
        for image in self.chain(path):
            if cluster >= image.virtual_size:
                break
            if cluster in self.data[image.path]:
                return self.data[image.path][cluster]
        return "zero"

    def read(self, path: str) -> list[str]:
        """Return what a guest sees."""
        return [self.cluster(path, cluster) for cluster in range(self.images[path].virtual_size)]

    def between(self, top: str, base: str) -> list[str]:
        """Return the paths from `top` down to `base`."""
        paths = [image.path for image in self.chain(top)]
        return paths[: paths.index(base) + 1]

    def carry_out(self, step: MergeStep) -> int:
        """Carry out one merge; return how many clusters it moved."""
        paths = self.between(step.top, step.base)
        moved: dict[int, str] = {}
        sources = paths[:-1] if step.kind == "commit" else paths[1:]
        for path in reversed(sources):
            moved |= self.data[path]
        into, image = self.data[step.survivor], self.images[step.survivor]
        if step.kind == "commit":
            into |= moved
            size = max(image.virtual_size, self.images[step.top].virtual_size)
            assert image.backing == step.new_backing
            self.images[step.survivor] = attrs.evolve(image, virtual_size=size)
            above = {path for path, each in self.images.items() if each.backing == step.top}
            assert set(step.repoint) <= above
            for path in step.repoint:
                self.images[path] = attrs.evolve(self.images[path], backing=step.base)
        else:
            if step.new_backing is None:  # where there is nothing below, QEMU reads through what is
                moved = {cluster: self.cluster(paths[1], cluster) for cluster in moved}
            within = {cluster: value for cluster, value in moved.items() if cluster < image.virtual_size}
            moved = {cluster: value for cluster, value in within.items() if cluster not in into}
            into |= moved
            self.images[step.survivor] = attrs.evolve(image, backing=step.new_backing)
        return len(moved)


def any_order(plan: MergePlan, chance: random.Random) -> Iterator[MergeStep]:
    """Yield the steps in a random one of the orders that `after` allows."""
    waiting, done = dict(enumerate(plan.steps)), set[int]()
    while waiting:
        index = chance.choice([i for i, step in waiting.items() if done.issuperset(step.after)])
        yield waiting.pop(index)
        done.add(index)


def check(graph: Graph, contents: Contents, plan: MergePlan, chance: random.Random) -> None:
    """Carry a plan out, and check all that a delete promises."""
    after = apply(graph, plan)
    remaining = graph.without(plan.doomed)
    before = {path: contents.read(path) for path in (*remaining.held, *remaining.pins)}
    pinned = {path: (contents.images[path], dict(contents.data[path])) for path in remaining.pins}
    was = {path: (image.backing, dict(contents.data[path])) for path, image in contents.images.items()}
    active = set(graph.active.values())
    for step in any_order(plan, chance):
        touched = contents.between(step.top, step.base)
        assert (step.where == "live") is any(path in graph.opened for path in touched)
        assert (step.where == "live") is all(path in graph.opened for path in touched)
        assert step.active is (step.top in active)
        if step.kind == "commit":
            active = {step.base if path == step.top else path for path in active}
        assert graph.images[step.survivor].own or graph.images[step.survivor].original
        _check_readers(remaining, contents, plan, step)
        assert contents.carry_out(step) <= step.bytes
        for path, content in before.items():  # after every step, not only at the end: it may be cut short here
            assert contents.read(path) == content
    assert plan.moved.keys() <= remaining.held
    for path in plan.unlink:
        assert graph.images[path].own
        assert all(image.backing != path for image in contents.images.values()), "unlinked under something"
        del contents.images[path], contents.data[path]
    for path, content in before.items():
        assert contents.read(plan.moved.get(path, path)) == content
    for path, (image, data) in pinned.items():
        assert (contents.images[path], contents.data[path]) == (image, data)
    changed = {
        path for path in contents.images if (contents.images[path].backing, contents.data[path]) != was[path]
    }
    sealed = after.below(point.path for point in after.points)
    assert changed & sealed <= set(plan.resealed) <= sealed
    assert {p: (i.backing, i.virtual_size) for p, i in after.images.items()} == {
        p: (i.backing, i.virtual_size) for p, i in contents.images.items() if p in graph.images
    }
    assert not plan_delete(after, ()).steps, "one plan leaves nothing to merge"
    _check_kept(after, plan)


def check_flat(graph: Graph, contents: Contents, plan: MergePlan, tops: Iterable[str], depth: int) -> None:
    """Carry a flatten out, and check all that it promises."""
    before = {path: contents.read(path) for path in contents.images}
    pinned = {path: (contents.images[path], dict(contents.data[path])) for path in graph.pins}
    for step in plan.steps:
        touched = contents.between(step.top, step.base)
        assert (step.where == "live") is all(path in graph.opened for path in touched)
        assert contents.carry_out(step) <= step.bytes
        assert {path: contents.read(path) for path in contents.images} == before
    for top in tops:
        assert len(list(contents.chain(top))) <= max(depth, 1)
    for path, (image, data) in pinned.items():
        assert (contents.images[path], contents.data[path]) == (image, data)
    after = apply(graph, plan)
    assert {p: i.backing for p, i in after.images.items()} == {p: contents.images[p].backing for p in graph.images}


def _check_readers(remaining: Graph, contents: Contents, plan: MergePlan, step: MergeStep) -> None:
    """Nothing that is needed reads an image that is committed into, but through what is committed."""
    if step.kind == "commit":
        for path in remaining.held - set(plan.unlink) - set(plan.moved):
            chain = [image.path for image in contents.chain(path)]
            assert step.base not in chain or step.top in chain
        assert step.base not in remaining.held
        assert step.base not in remaining.pins


def _check_kept(after: Graph, plan: MergePlan) -> None:
    """Whatever of snaporch's stays and is held by nobody has its reason in the plan."""
    unheld = {path for path, image in after.images.items() if image.own and path not in after.held}
    survivors = {step.survivor for step in plan.steps} | set(plan.moved.values())
    assert unheld - survivors <= {path for path, _ in plan.kept}


def snapshot_record(domain: DomainRecord, name: str, frozen: Mapping[str, DeviceDisk]) -> SnapshotRecord:
    """Return the record of a snapshot."""
    disks = tuple(DiskSnapshot(disk, name) for disk in frozen.values())
    return SnapshotRecord(
        domain=domain.name,
        snapshot=DomainSnapshot(name, memory=False, disks=disks),
        parent=domain.current,
        domain_state=DomainState.INACTIVE,
        strategy=Strategy.NONE,
        reason="",
        point=0,
        memory=None,
        images={},
        definition=domain.definition,
    )


# --- the least possible -------------------------------------------------------------------------------------------

State = frozenset[Image]


def least(graph: Graph) -> tuple[int, int]:
    """Return (files that stay, bytes moved) of the best of all sequences of pairwise merges, by trying them all."""
    images = dict(graph.images)
    fixed = graph.held | graph.pins.keys()
    while dead := [p for p, i in images.items() if i.own and p not in fixed and not _above(images.values(), p)]:
        del images[dead[0]]
    left = [p for p in images if p not in fixed and not _above(images.values(), p)]
    fixed |= graph.below(left)
    known: dict[State, tuple[int, int]] = {}

    def search(state: State) -> tuple[int, int]:
        if state not in known:
            ways = [(len(state), 0)]
            for moved, after in _pairs(state, fixed, graph.below(left) | graph.pins.keys()):
                files, more = search(after)
                ways.append((files, moved + more))
            known[state] = min(ways)
        return known[state]

    return search(frozenset(images.values()))


def _above(images: Iterable[Image], path: str) -> list[Image]:
    return [image for image in images if image.backing == path]


def _pairs(state: State, fixed: frozenset[str], still: frozenset[str]) -> Iterator[tuple[int, State]]:
    """Yield the bytes and the outcome of every merge of two images that is allowed; the upper one's name stays."""
    by_path = {image.path: image for image in state}
    for low in state:
        above = _above(state, low.path)
        if low.path in fixed or len(above) != 1 or above[0].path in still:
            continue
        high, below = above[0], by_path[low.backing].virtual_size if low.backing else 0
        if high.virtual_size < low.virtual_size or (below > low.virtual_size != high.virtual_size):
            continue
        total = low.allocated + high.allocated
        joined = attrs.evolve(high, backing=low.backing, allocated=total, original=low.original or high.original)
        rest = state - {low, high}
        if not high.original:
            yield high.allocated, rest | {joined}
        if not low.original:
            yield low.allocated, rest | {joined}
