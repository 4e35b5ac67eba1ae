"""Plans a delete: which images merge, which way, in which order, and what goes. No I/O.

Rule: what a remaining point, an active image or a pinned image reads never changes.
Rule: nothing is written to that a pinned image reads, and no file is unlinked that snaporch did not make.

When the doomed snapshots have given up their points, surplus images (see `snaporch.images.chain`) go like this:

- Nothing is backed by it: it is unlinked, and then perhaps its backing as well.
- Two or more images are backed by it: it stays as an unnamed *link*. To merge it would be to copy it.
- One image is backed by it: the two become one. Such images come in *runs*, base first: ``n1 ← n2 ← … ← nm``, where
  n1 … n(m-1) are surplus with one child each and nm, the *top*, is held or a link. The file that remains, the
  *survivor*, has the backing of n1, and what was backed by nm is backed by it. Everything over the survivor is
  *committed* down into it in one step, then everything under it is *streamed* up into it in another.

Why that is the least: all images of a run but its survivor vanish, so what is in them must be moved at least once.
No order of pairwise merges moves less than the sum of their `allocated`, and those two steps move each just once.
So the largest image is the best survivor. Runs share no image, and a merge changes neither who holds an image of
another run nor how many children that has, so the sum over all runs is the least as well.

An image of the user's that is not pinned is the domain's own original disk: writable, but not ours to unlink. In a
run it is always the survivor: the disk comes back to where the user had it. Two originals in a run, or virtual
sizes between which a guest could come to see what an overlay hides, split the run (`_split`).

Why a commit is safe: the survivor's only reader is the next image of its run, up to the top, which is what is
committed. A hypervisor has either the whole run open or none of it (its chains are closed downwards, and the only
child of an open image that is not active is open), so no commit ever goes into an image that it reads
through another branch; an open run is merged by the hypervisor, any other by qemu-img.

Commit before stream: clusters that the commit brought into the survivor need not be streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import attrs

from snaporch.errors import Unsupported
from snaporch.images.chain import Copies, Graph, Image
from snaporch.model.merge import MergeKind, MergePlan, MergeStep, Where

# --- runs ---------------------------------------------------------------------------------------------------------


def _extents(run: Iterable[Image], below: int) -> Iterator[int]:
    """Yield, for each beginning of a run that may become one image, the bytes that this moves.

    Args:
        run: images, base first.
        below: virtual size of the image under it, 0 when there is none.
    """
    total = largest = 0
    first = previous = original = None
    for image in run:
        first, previous = first or image, previous or image
        # Beyond its own end an image reads as zeros, whatever is under it. Were it to grow by a commit, or its
        # child to come to lie on what is under it, that could show through.
        hides = below > first.virtual_size != image.virtual_size
        if previous.virtual_size > image.virtual_size or hides or (original and image.original):
            return
        total, largest = total + image.allocated, max(largest, image.allocated)
        original, previous = original or (image if image.original else None), image
        yield total - (original.allocated if original else largest)


def _split(run: Sequence[Image], below: int) -> list[Sequence[Image]]:
    """Return a run in pieces, each to become one image: the fewest pieces, and of these the fewest bytes."""
    if sum(1 for _ in _extents(run, below)) == len(run):
        return [run]  # nearly always: pieces would be more, and together move no less
    # best[n]: (pieces, bytes, where the last piece begins) for the first n images.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for start in range(len(run)):
        pieces, moved, _ = best[start]
        for end, extent in enumerate(_extents(islice(run, start, None), below), start + 1):
            candidate = (pieces + 1, moved + extent, start)
            if end == len(best):
                best.append(candidate)
            best[end] = min(best[end], candidate)
        below = run[start].virtual_size
    result, end = [], len(run)
    while end:
        start = best[end][2]
        result.append(run[start:end])
        end = start
    return result[::-1]


def _survivor(piece: Sequence[Image]) -> int:
    """Return the index of the image that remains: of equals the uppermost, for then fewer paths change."""
    indices = range(len(piece))
    return max(indices, key=lambda index: (piece[index].original, piece[index].allocated, index))


# --- planning -----------------------------------------------------------------------------------------------------


_NOT_OURS = "it is not snaporch's"
_UNDER_NOT_OURS = "what is backed by it is not snaporch's"
_OUTRUN = "the guest writes faster than it merges with what is backed by it; it merges another time"
_APART = "it and what is backed by it differ in size, or both are the user's"


@attrs.define
class _Planner:
    """A plan in the making.

    Attributes:
        graph: as it is when the doomed have given up their points.
        children: by path, what is backed by it and is not unlinked; paths as they were.
        left: what stays though nobody holds it: files not ours to unlink that nothing reads, and their chains.
        outrun: what cannot be merged with what is backed by it.
        last: by path as it was, the last step at that image or under it; no images inside runs.
        renamed: tops that were committed, each with what is in its place.
        changed: images whose files are changed, by their paths as they were.
        unlink: images that have been merged away, base first.
    """

    graph: Graph
    children: dict[str, tuple[str, ...]]
    outrun: frozenset[str]
    left: set[str] = attrs.field(factory=set)
    steps: list[MergeStep] = attrs.field(factory=list)
    unlink: list[str] = attrs.field(factory=list)
    kept: list[tuple[str, str]] = attrs.field(factory=list)
    last: dict[str, int] = attrs.field(factory=dict)
    renamed: dict[str, str] = attrs.field(factory=dict)
    changed: set[str] = attrs.field(factory=set)

    def surplus(self, path: str) -> bool:
        """Return whether the image is there only for what is backed by it."""
        stays = path in self.graph.held or path in self.graph.pins or path in self.left
        return not stays and path not in self.outrun

    def prune(self) -> list[str]:
        """Give up what nothing is backed by; return it, the uppermost first."""
        gone: dict[str, None] = {}
        count = {path: len(above) for path, above in self.children.items()}
        for path in reversed(self.graph.order):
            image = self.graph.images[path]
            if count[path] == 0 and path not in self.graph.held:
                if image.own and path not in self.graph.pins:
                    gone[path] = None
                    if image.backing is not None:
                        count[image.backing] -= 1
                    continue
                self.left.add(path)
                self.kept.append((path, self.graph.pins.get(path, _NOT_OURS)))
            if path in self.left and image.backing is not None:
                self.left.add(image.backing)
        self.children = {path: tuple(p for p in above if p not in gone) for path, above in self.children.items()}
        return list(gone)

    def visit(self, path: str) -> None:
        """Plan the run whose top is at `path`; there is none inside a run."""
        if self.surplus(path) and len(self.children[path]) == 1:
            return
        self._note(path)
        run = self._run(path)
        under = run[0].backing
        below = self.graph.images[under].virtual_size if under is not None else 0
        for piece in _split(run, below):
            self._merge(piece)
            if piece[-1] is not run[-1]:
                self.kept.append((piece[-1].path, _APART))

    def _note(self, path: str) -> None:
        """Say why an image stays that nobody holds; a template of the user's is no news."""
        image, above = self.graph.images[path], len(self.children[path])
        if path in self.graph.held or not above or not (image.own or image.original):
            return
        reason = self.graph.pins.get(path, _OUTRUN if path in self.outrun else _UNDER_NOT_OURS)
        if self.surplus(path):
            reason = f"{above} images are backed by it; it merges when one is left"
        self.kept.append((path, reason))

    def _run(self, path: str) -> list[Image]:
        """Return the run that ends at `path`, base first."""
        run = [self.graph.images[path]]
        while (under := run[-1].backing) is not None and self.surplus(under) and len(self.children[under]) == 1:
            run.append(self.graph.images[under])
        return run[::-1]

    def _survivor(self, piece: Sequence[Image]) -> int:
        """Return the index of the image that remains: the lowest one where the best one cannot be copied into."""
        index, end = _survivor(piece), piece[-1].path
        active = piece[index].path == end and end in self.graph.active.values()
        copies = self.graph.copies
        can = copies is Copies.INTO_ANY or (copies is Copies.INTO_ACTIVE and active)
        return index if can or end not in self.graph.opened or piece[index].original else 0

    def _merge(self, piece: Sequence[Image]) -> None:
        """Plan that the images of a piece become one."""
        index, top, under = self._survivor(piece), piece[-1].path, piece[0].backing
        survivor = piece[index]
        if under in self.last:
            self.last[top] = self.last[under]
        if over := piece[index + 1 :]:
            repoint = self.children[top]
            backing = piece[index - 1].path if index else self._now(under)
            base = survivor.path
            self._step(piece, over, kind=MergeKind.COMMIT, top=top, base=base, new_backing=backing, repoint=repoint)
            self.changed.update(repoint)
            self.renamed[top] = survivor.path
        if index:
            top, base, backing = survivor.path, piece[0].path, self._now(under)
            self._step(piece, piece[:index], kind=MergeKind.STREAM, top=top, base=base, new_backing=backing)
        if len(piece) > 1:
            self.changed.add(survivor.path)
            self.unlink += [image.path for image in piece if image is not survivor]

    def _now(self, path: str | None) -> str | None:
        return path if path is None else self.renamed.get(path, path)

    def _step(
        self,
        piece: Sequence[Image],
        content: Sequence[Image],
        *,
        kind: MergeKind,
        top: str,
        base: str,
        new_backing: str | None,
        repoint: tuple[str, ...] = (),
    ) -> None:
        """Add a step, after the last one that writes to anything in its chain: a merge opens the whole chain."""
        end = piece[-1].path
        self.steps.append(
            MergeStep(
                kind=kind,
                target=self.graph.targets[end],
                top=top,
                base=base,
                new_backing=new_backing,
                bytes=sum(image.allocated for image in content),
                where=Where.of(end, self.graph.opened),
                active=top == self._now(end) and end in self.graph.active.values(),
                repoint=repoint,
                after=(self.last[end],) if end in self.last else (),
            )
        )
        self.last[end] = len(self.steps) - 1


def plan_delete(graph: Graph, doomed: Iterable[str], outrun: frozenset[str] = frozenset()) -> MergePlan:
    """Plan what becomes of the images when snapshots are deleted.

    Everything in the graph that is surplus is dealt with, links that earlier deletes have left included.

    Args:
        graph: with the snapshots in it.
        doomed: their names, as `snaporch.images.chain.doomed_by` returns them.
        outrun: images that a running guest would not let merge with what is backed by them; they stay as links.
    """
    names = frozenset(doomed)
    planner = _Planner(graph.without(names), dict(graph.children), outrun)
    graph = planner.graph
    dead = planner.prune()
    gone = set(dead)
    for path in graph.order:  # backings first: a step's paths are what the steps under it have left
        if path not in gone:
            planner.visit(path)
    unlink = (*dead, *reversed(planner.unlink))
    sealed = graph.below(point.path for point in graph.points)
    return MergePlan(
        doomed=names,
        steps=tuple(planner.steps),
        unlink=unlink,
        kept=tuple(planner.kept),
        bytes=sum(step.bytes for step in planner.steps),
        moved={old: new for old, new in planner.renamed.items() if old in graph.held},
        resealed=tuple(sorted((planner.changed & sealed).difference(unlink))),
    )


def plan_flatten(graph: Graph, tops: Iterable[str], depth: int, *, limit: int = 0) -> MergePlan:
    """Plan that at most `depth` images are in the chains of `tops`: the lowest stay, the others are copied up.

    Nothing is merged away, for what is copied may be held by others; what nobody needs afterwards is surplus.

    Args:
        graph: as it is.
        tops: images, each of another disk.
        depth: at least 1: then they are alone in their chains.
        limit: chains that are no longer than this stay as they are.

    Raises:
        Unsupported: an image may not be written to.
    """
    steps = []
    for top in tops:
        chain = list(graph.chain(top))
        if len(chain) <= max(depth, limit):
            continue
        if top in graph.pins:
            raise Unsupported(f"{top} must stay as it is: {graph.pins[top]}")
        copied, kept = chain[1 : len(chain) - depth + 1], chain[len(chain) - depth + 1 :]
        # What a short image hides would show again: block-stream, unlike `qemu-img rebase`, writes no zeros there.
        while kept and min(i.virtual_size for i in copied) < min(kept[0].virtual_size, chain[0].virtual_size):
            copied.append(kept.pop(0))
        steps.append(
            MergeStep(
                kind=MergeKind.STREAM,
                target=graph.targets[top],
                top=top,
                base=copied[-1].path,
                new_backing=kept[0].path if kept else None,
                bytes=sum(image.allocated for image in copied),
                where=Where.of(top, graph.opened),
                active=top in graph.active.values(),
            )
        )
    sealed = graph.below(point.path for point in graph.points)
    return MergePlan(
        steps=tuple(steps),
        bytes=sum(step.bytes for step in steps),
        resealed=tuple(sorted({step.top for step in steps} & sealed)),
    )


def one_after_the_other(first: MergePlan, second: MergePlan) -> MergePlan:
    """Return both plans as one, the second being made of what `apply` says of the first."""
    offset = len(first.steps)
    last = tuple(range(offset))
    later = (attrs.evolve(s, after=tuple(i + offset for i in s.after) or last) for s in second.steps)
    return attrs.evolve(
        second,
        doomed=first.doomed | second.doomed,
        steps=(*first.steps, *later),
        unlink=(*first.unlink, *second.unlink),
        bytes=first.bytes + second.bytes,
        resealed=tuple(sorted({*first.resealed, *second.resealed} - {*second.unlink})),
    )


# --- what comes of it ---------------------------------------------------------------------------------------------


def apply(graph: Graph, plan: MergePlan) -> Graph:
    """Return the graph as it is when the plan has been carried out, `allocated` being the most that it can be."""
    images = dict(graph.images)
    for step in plan.steps:
        image, top = images[step.survivor], images[step.top]
        images[step.survivor] = attrs.evolve(
            image,
            allocated=image.allocated + step.bytes,
            virtual_size=max(image.virtual_size, top.virtual_size),
            backing=step.new_backing,
        )
        for path in step.repoint:
            images[path] = attrs.evolve(images[path], backing=step.base)
    for path in plan.unlink:
        del images[path]
    kept = (point for point in graph.points if point.snapshot not in plan.doomed)
    return attrs.evolve(
        graph,
        images=images,
        points=tuple(attrs.evolve(point, path=plan.moved.get(point.path, point.path)) for point in kept),
        active={target: plan.moved.get(path, path) for target, path in graph.active.items()},
    )


def _steps_in_words(plan: MergePlan) -> Iterator[str]:
    for number, step in enumerate(plan.steps, 1):
        down = step.kind is MergeKind.COMMIT
        way = f"{step.top} down into {step.base}" if down else f"{step.base} up into {step.top}"
        after = f", after {', '.join(str(index + 1) for index in step.after)}" if step.after else ""
        yield f"{number}. {step.target}: {step.kind} {way}: {step.bytes:,} bytes, {step.where}{after}"


def render(plan: MergePlan, title: str = "") -> list[str]:
    """Return a plan as a tree, line by line, for people; its title says what it deletes, if nothing else."""
    groups = (
        (f"merge: {plan.bytes:,} bytes", list(_steps_in_words(plan))),
        ("then at another path", [f"{old} → {new}" for old, new in plan.moved.items()]),
        ("unlink", list(plan.unlink)),
        ("keep", [f"{path}: {reason}" for path, reason in plan.kept]),
    )
    filled = [group for group in groups if group[1]]
    lines = [title or f"delete {', '.join(sorted(plan.doomed)) or 'nothing'}"]
    for group, rows in filled:
        last = group is filled[-1][0]
        lines.append(f"{'└' if last else '├'}── {group}")
        edge = "    " if last else "│   "
        lines += [f"{edge}{'└' if row is rows[-1] else '├'}── {row}" for row in rows]
    return lines
