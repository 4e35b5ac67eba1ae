"""Measures the merge planner: how long it takes, how near the least its bytes are, how short it keeps chains.

    scripts/bench planner [--out FILE]

No images and no guest: graphs of them. The least that can be moved is found by trying every sequence of pairwise
merges (`tests/merge_model.py`); the suite compares the two on random graphs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import attrs

from snaporch.images.chain import Graph, Image, Point
from snaporch.images.merge import apply, plan_delete
from snaporch.model.merge import MergePlan

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.merge_model import least

SNAPSHOTS = 1000
ROUNDS = 20
LIMIT_MS = 100.0
LIVES = 2000  # snapshots that a domain has had
KEPT = 6  # of them at a time


# --- time ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "one chain": lambda n: n - 1,
    "every point branches": lambda n: (n - 1) // 2,
    "all over one base": lambda _: 0,
}
DOOMED = {
    "one": {f"s{SNAPSHOTS // 2}"},
    "every other one": {f"s{n}" for n in range(0, SNAPSHOTS, 2)},
    "all": {f"s{n}" for n in range(SNAPSHOTS)},
}


def times(shape: str, doomed: str) -> tuple[list[float], list[float]]:
    """Return the milliseconds that a graph and a plan of it took, each time: of our own CPU, and on the clock."""
    under = [None if n == 0 else f"/{SHAPES[shape](n)}" for n in range(SNAPSHOTS + 1)]
    images = [Image(f"/{n}", backing=below, allocated=n * 7919 % 1000) for n, below in enumerate(under)]
    points = [Point(f"s{n}", "vda", f"/{n}") for n in range(SNAPSHOTS)]
    used, clock = [], []
    for _ in range(ROUNDS):
        began = time.process_time(), time.perf_counter()
        plan_delete(Graph("web1", images, points, {"vda": f"/{SNAPSHOTS}"}, running=True), DOOMED[doomed])
        used.append(1000 * (time.process_time() - began[0]))
        clock.append(1000 * (time.perf_counter() - began[1]))
    return used, clock


def table_of_times() -> tuple[list[str], float]:
    """Return the rows, and the worst median."""
    head = "| tree | deleted | CPU median, ms | worst | clock median, ms | worst |"
    rows, worst = [head, "|---|---|--:|--:|--:|--:|"], 0.0
    for shape in SHAPES:
        for doomed in DOOMED:
            found = times(shape, doomed)
            worst = max(worst, statistics.median(found[0]))
            cells = [f"{statistics.median(each):.1f} | {max(each):.1f}" for each in found]
            rows.append(f"| {shape} | {doomed} | {' | '.join(cells)} |")
    return rows, worst


# --- bytes --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Shown:
    """A tree to show: images by name, each with what is under it and its MiB; the last is what the domain is on.

    Every image but the last is the frozen one of a snapshot of its name, if `held` does not say otherwise.
    """

    words: str
    images: tuple[tuple[str, str, int], ...]
    doomed: str

    def graph(self) -> Graph:
        """Return it."""
        images = [Image(name, backing=under or None, allocated=size) for name, under, size in self.images]
        points = [Point(name, "vda", name) for name, _, _ in self.images[:-1]]
        return Graph("web1", images, points, {"vda": self.images[-1][0]}, running=True)


TREES = (
    Shown("a small one over a large one", (("a", "", 900), ("b", "a", 20), ("now", "b", 300)), "b"),
    Shown("a large one under a small one", (("a", "", 900), ("b", "a", 500), ("now", "b", 3)), "b"),
    Shown("the base", (("a", "", 40), ("b", "a", 700), ("now", "b", 5)), "a"),
    Shown(
        "a run of four, its largest in the middle",
        (("a", "", 10), ("b", "a", 20), ("c", "b", 900), ("d", "c", 30), ("now", "d", 15)),
        "b c d",
    ),
    Shown("a branch that nobody is on", (("a", "", 80), ("b", "a", 70), ("c", "b", 60), ("now", "a", 9)), "b c"),
    Shown(
        "what two branches stand on",
        (("a", "", 80), ("b", "a", 70), ("c", "b", 60), ("d", "b", 50), ("now", "d", 9)),
        "b",
    ),
    Shown(
        "in two branches at once",
        (
            ("a", "", 80),
            ("b", "a", 7),
            ("c", "b", 60),
            ("d", "a", 50),
            ("e", "d", 4),
            ("f", "c", 8),
            ("now", "e", 9),
        ),
        "b d e",
    ),
    Shown(
        "all there are",
        (("a", "", 100), ("b", "a", 300), ("c", "b", 200), ("now", "c", 50)),
        "a b c",
    ),
)


def in_words(plan: MergePlan) -> str:
    """Return what merges, short."""
    words = [f"{s.top} ↓ {s.base}" if s.kind == "commit" else f"{s.top} ↑ {s.base}" for s in plan.steps]
    return ", ".join(words) or "nothing"


def table_of_bytes() -> tuple[list[str], int]:
    """Return the rows, and how many plans are the least."""
    rows = ["| tree, MiB in each | deleted | merges | moved, MiB | least |", "|---|---|---|--:|--:|"]
    right = 0
    for shown in TREES:
        graph, doomed = shown.graph(), shown.doomed.split()
        plan, (_, fewest) = plan_delete(graph, doomed), least(graph.without(doomed))
        right += plan.bytes == fewest
        tree = ", ".join(f"{name} {size}{f' on {under}' if under else ''}" for name, under, size in shown.images)
        rows.append(f"| {shown.words}: {tree} | {shown.doomed} | {in_words(plan)} | {plan.bytes} | {fewest} |")
    return rows, right


# --- depth --------------------------------------------------------------------------------------------------------


def lengths(back: float, seed: int) -> list[int]:
    """Take and delete snapshots, going back to one now and then; return the length of the chain each time."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    graph, found = Graph("web1", [Image("/0", own=False, original=True)], active={"vda": "/0"}), []
    for number in range(1, LIVES + 1):
        under, points = graph.active["vda"], graph.points
        if points and chance.random() < back:
            under = chance.choice(points).path
        else:
            points = (*points, Point(f"s{number}", "vda", under))
        images = {**graph.images, f"/{number}": Image(f"/{number}", backing=under, allocated=chance.randrange(99))}
        graph = attrs.evolve(graph, images=images, points=points, active={"vda": f"/{number}"})
        while len(graph.points) > KEPT:
            graph = apply(graph, plan_delete(graph, [chance.choice(graph.points).snapshot]))
        found.append(len(list(graph.chain(graph.active["vda"]))))
    return found


def table_of_lengths() -> list[str]:
    """Return the rows."""
    rows = ["| reverts among them | chain, images: median | longest | at the end |", "|--:|--:|--:|--:|"]
    for back in (0.0, 0.3, 0.6):
        found = lengths(back, seed=1)
        rows.append(f"| {back:.0%} | {statistics.median(found):g} | {max(found)} | {found[-1]} |")
    return rows


# --- the page -----------------------------------------------------------------------------------------------------


def page() -> tuple[str, bool]:
    """Return all of it, and whether all limits are kept."""
    took, worst = table_of_times()
    moved, right = table_of_bytes()
    kept, rows = "kept" if worst < LIMIT_MS else "NOT KEPT", "\n".join
    text = f"""# The merge planner

Written by `scripts/bench planner`: no images and no guest, graphs of them. `tests/test_merge.py` holds the planner
to the same two limits: on a thousand snapshots, and on random graphs of up to eight images.

## A thousand snapshots

Graph and plan, {ROUNDS} times each, on a host that had other work. The limit is {LIMIT_MS:g} ms: {kept},
at the worst {worst:.1f} ms of CPU in the median.

{rows(took)}

## Bytes moved

*Least* is the best of all sequences of pairwise merges, by trying them all. ↓ is a commit down into, ↑ a stream up
from, the image after it. As little as possible was moved in {right} of {len(TREES)}.

{rows(moved)}

## Length of the chain

A domain that has had {LIVES:,} snapshots, of which at most {KEPT} were kept at a time; which one goes is drawn. The
limit is twice the snapshots that remain, and two: {2 * (KEPT + 1)}.

{rows(table_of_lengths())}
"""
    return text, worst < LIMIT_MS and right == len(TREES)


def main() -> int:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write this page")
    options = parser.parse_args()
    text, good = page()
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
