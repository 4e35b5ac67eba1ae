"""What becomes of images in a delete: shown trees, and random ones carried out on a model with all contents."""

from __future__ import annotations

import random
import time

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snaporch.errors import DamagedSnapshot, InvalidInput, NotFound, Unsupported
from snaporch.images.chain import Copies, Graph, Image, Point, doomed_by, graph_of, heir
from snaporch.images.merge import apply, plan_delete, plan_flatten, render
from snaporch.model.domain import DomainDefinition, DomainRecord
from snaporch.model.merge import MergeKind, MergePlan, Where
from snaporch.model.rfc import DeleteFlag, DeviceDisk
from tests.merge_model import Contents, check, least, snapshot_record

# --- random graphs ------------------------------------------------------------------------------------------------


@st.composite
def small_graphs(draw: st.DrawFn) -> Graph:
    """Graphs that are nastier than what operations make: several originals, odd sizes, pins anywhere."""
    count = draw(st.integers(1, 8))
    images = []
    for index in range(count):
        # Mostly one straight chain: that is where there is something to choose.
        under = draw(st.sampled_from([index - 1, index - 1, index - 1, index - 2])) if index else -1
        owner = draw(st.sampled_from(["own"] * 8 + ["original", "foreign"]))
        images.append(
            Image(
                f"/{index}",
                backing=f"/{under}" if under >= 0 else None,
                allocated=draw(st.integers(0, 9)),
                virtual_size=draw(st.sampled_from([8, 8, 8, 8, 7, 9])),
                own=owner == "own",
                original=owner == "original",
            )
        )
    paths = st.sampled_from([image.path for image in images])
    inside = draw(st.sampled_from([False] * 9 + [True]))
    points = [Point(f"s{n}", "vda", path, inside) for n, path in enumerate(draw(st.lists(paths, max_size=3)))]
    needed = dict.fromkeys(draw(st.sampled_from([[], [], [], [draw(paths)]])), "other")
    return Graph("a", images, tuple(points), {"vda": images[-1].path}, draw(st.booleans()), needed)


@settings(max_examples=150, deadline=None)
@given(small_graphs(), st.sets(st.sampled_from(["s0", "s1", "s2"])), st.randoms(use_true_random=False))
def test_any_small_graph_keeps_its_promises_and_moves_the_least(
    graph: Graph, doomed: set[str], chance: random.Random
) -> None:
    """As many files go as can, and by all sequences of pairwise merges no fewer bytes would have been moved."""
    data = {path: {c: f"{path} {c}" for c in range(image.allocated)} for path, image in graph.images.items()}
    data = {path: {c: v for c, v in d.items() if c < graph.images[path].virtual_size} for path, d in data.items()}
    contents = Contents(dict(graph.images), data)
    plan = plan_delete(graph, doomed)
    assert (len(apply(graph, plan).images), plan.bytes) == least(graph.without(doomed))
    check(graph, contents, plan, chance)


@settings(max_examples=100, deadline=None)
@given(
    small_graphs(),
    st.sets(st.sampled_from(["s0", "s1", "s2"])),
    st.sampled_from([Copies.INTO_ACTIVE, Copies.INTO_NONE]),
    st.randoms(use_true_random=False),
)
def test_where_nothing_is_copied_up_all_is_committed_down(
    graph: Graph, doomed: set[str], copies: Copies, chance: random.Random
) -> None:
    """Of a hypervisor that copies into active images only, or into none that is open; the user's own disk stays."""
    graph = attrs.evolve(graph, running=True, copies=copies)
    data = {path: {c: f"{path} {c}" for c in range(image.allocated)} for path, image in graph.images.items()}
    data = {path: {c: v for c, v in d.items() if c < graph.images[path].virtual_size} for path, d in data.items()}
    plan = plan_delete(graph, doomed)
    for step in plan.steps:
        if (step.kind, step.where) == (MergeKind.STREAM, Where.LIVE):
            can = copies is Copies.INTO_ACTIVE and step.active
            assert can or graph.images[step.top].original
    check(graph, Contents(dict(graph.images), data), plan, chance)


# --- shown trees --------------------------------------------------------------------------------------------------


def chain_of(*allocated: int, running: bool = False, own: bool = True) -> Graph:
    """Return a chain /0 ← /1 ← … of which the last is active and every other one the point of a snapshot."""
    images = [
        Image(f"/{n}", "qcow2", f"/{n - 1}" if n else None, size, 99, own=own or n > 0, original=not own and n == 0)
        for n, size in enumerate(allocated)
    ]
    points = [Point(f"s{n}", "vda", f"/{n}") for n in range(len(allocated) - 1)]
    return Graph("web1", images, points, {"vda": images[-1].path}, running)


def said(plan: MergePlan) -> list[tuple[str, str, str, int, str]]:
    """Return the steps, short."""
    return [(step.kind, step.top, step.base, step.bytes, step.where) for step in plan.steps]


@pytest.mark.parametrize(
    ("sizes", "doomed", "steps", "unlink", "moved"),
    [
        pytest.param((9, 5, 3), "s1", [("commit", "/2", "/1", 3, "live")], ("/2",), {"/2": "/1"}, id="down"),
        pytest.param((9, 3, 5), "s1", [("stream", "/2", "/1", 3, "live")], ("/1",), {}, id="up"),
        pytest.param(
            (9, 4, 4), "s1", [("stream", "/2", "/1", 4, "live")], ("/1",), {}, id="equal: no path changes"
        ),
        pytest.param((1, 9), "s0", [("stream", "/1", "/0", 1, "live")], ("/0",), {}, id="base"),
        pytest.param(
            (1, 2, 9, 3, 1),
            "s1 s2 s3",
            [("commit", "/4", "/2", 4, "live"), ("stream", "/2", "/1", 2, "live")],
            ("/4", "/3", "/1"),
            {"/4": "/2"},
            id="a run: into its largest image, from both sides",
        ),
    ],
)
def test_the_fewest_bytes_are_moved(
    sizes: tuple[int, ...],
    doomed: str,
    steps: list[tuple[str, str, str, int, str]],
    unlink: tuple[str, ...],
    moved: dict[str, str],
) -> None:
    """Down or up, whichever is less; several in a row each once; all other sequences of merges move no less."""
    graph = chain_of(*sizes, running=True)
    plan = plan_delete(graph, doomed.split())
    assert plan.bytes == least(graph.without(set(doomed.split())))[1]
    assert (said(plan), plan.unlink, plan.moved) == (steps, unlink, moved)
    assert plan.bytes == sum(step[3] for step in steps)


def test_a_commit_from_both_sides_ends_before_the_stream_and_names_its_backing() -> None:
    """What the commit brings need not be streamed, and the disk is on the survivor by then."""
    commit, stream = plan_delete(chain_of(1, 2, 9, 3, running=True), ["s1", "s2"]).steps
    assert (commit.active, stream.active, commit.after, stream.after) == (True, True, (), (0,))
    assert (commit.new_backing, stream.new_backing) == ("/1", "/0")


def test_the_users_own_disk_gets_its_content_back_whatever_that_costs() -> None:
    """It cannot be unlinked, and a stale disk where the user had a disk would be a trap."""
    plan = plan_delete(chain_of(1, 9, running=True, own=False), ["s0"])
    assert said(plan) == [("commit", "/1", "/0", 9, "live")]
    assert plan.moved == {"/1": "/0"}
    assert plan.unlink == ("/1",)


def test_a_template_is_neither_written_to_nor_copied() -> None:
    """Somebody else's file is pinned; so is what another domain reads."""
    images = [
        Image("/template", allocated=9, own=False),
        Image("/1", backing="/template", allocated=1),
        Image("/2", backing="/1", allocated=1),
    ]
    graph = Graph("web1", images, [Point("s", "vda", "/1")], {"vda": "/2"})
    assert said(plan_delete(graph, ["s"])) == [("stream", "/2", "/1", 1, "offline")]
    shared = plan_delete(attrs.evolve(graph, needed={"/1": "domain web2"}), ["s"])
    assert (shared.steps, shared.unlink, shared.kept) == ((), (), (("/1", "domain web2 needs it"),))


def test_an_image_with_a_snapshot_inside_stays_as_it_is() -> None:
    """The snapshot inside reads through the image's backing: neither may change."""
    graph = chain_of(1, 2, 3)
    inside = attrs.evolve(graph, points=(*graph.points, Point("inside", "vda", "/2", internal=True)))
    plan = plan_delete(inside, ["s1"])
    assert (plan.steps, plan.unlink) == ((), ())
    assert plan.kept == (("/1", "/2 is backed by it, and it has snapshot inside inside"),)
    assert plan_delete(inside, ["s1", "inside"]).steps


def test_two_disks_of_the_users_in_a_run_both_stay() -> None:
    """Neither can be unlinked, so what lies between merges into one of them."""
    sizes = {0: 1, 1: 2, 2: 7, 3: 1, 4: 3, 5: 2}
    images = [
        Image(f"/{n}", "qcow2", f"/{n - 1}" if n else None, size, own=n not in {0, 3}, original=n in {0, 3})
        for n, size in sizes.items()
    ]
    plan = plan_delete(Graph("web1", images, active={"vda": "/5"}), ())
    assert (plan.bytes, len(plan.unlink)) == (2 + 7 + 3 + 2, 4)
    assert [path for path, reason in plan.kept if "both are the user's" in reason] == ["/0"]


def test_sizes_divide_a_run_where_that_moves_the_least() -> None:
    """A disk that shrank and grew again: what lies between goes to the side where that moves less."""
    sizes = [(9, 5), (4, 1), (4, 8), (4, 9), (9, 1)]  # virtual size, allocated
    images = [
        Image(f"/{n}", "qcow2", f"/{n - 1}" if n else None, allocated, size)
        for n, (size, allocated) in enumerate(sizes)
    ]
    plan = plan_delete(Graph("web1", images, active={"vda": "/4"}), ())
    # Three pieces it must be: /0, and two of the others. /1 | /2 /3 /4 moves 9, as does /1 /2 /3 | /4.
    assert said(plan) == [("stream", "/2", "/1", 1, "offline"), ("commit", "/4", "/3", 1, "offline")]


def test_the_graph_comes_from_the_records() -> None:
    """Only a disk that the guest has written to is its own; a template under it, or a read-only disk, is not."""
    disks = (DeviceDisk("vda", "/disk"), DeviceDisk("vdb", "/cd", "raw", readonly=True))
    domain = DomainRecord(DomainDefinition("web1", disks=disks), active={"vda": DeviceDisk("vda", "/1")})
    record = snapshot_record(domain, "s", {"vda": DeviceDisk("vda", "/disk")})
    images = [
        Image("/template", own=False),
        Image("/disk", backing="/template", own=False),
        Image("/1", backing="/disk"),
    ]
    graph = graph_of(domain, [record], images, running=True, needed={"/template": "domain web2"})
    assert graph.active == {"vda": "/1"}, "the CD-ROM's file need not be there"
    assert graph.points == (Point("s", "vda", "/disk"),)
    assert [image.path for image in graph.images.values() if image.original] == ["/disk"]
    assert (graph.needed, sorted(graph.opened)) == ({"/template": "domain web2"}, ["/1", "/disk", "/template"])
    assert graph_of(domain, [record], images, running=True, needed={}).pins == {"/template": "it is not snaporch's"}


def branches() -> Graph:
    """Return /0 ← /1 ← two branches: /2 ← /3 (active) and /4 ← /5, with a snapshot each."""
    backings = {"/0": None, "/1": "/0", "/2": "/1", "/3": "/2", "/4": "/1", "/5": "/4"}
    images = [Image(path, backing=under, allocated=1 + int(path[1:])) for path, under in backings.items()]
    points = [Point(f"s{n}", "vda", f"/{n}") for n in (0, 1, 2, 4, 5)]
    return Graph("web1", images, points, {"vda": "/3"}, running=True)


def test_a_branching_image_stays_until_one_branch_is_left() -> None:
    """To merge it into both would be to copy it."""
    plan = plan_delete(branches(), ["s1"])
    assert (plan.steps, plan.kept) == ((), (("/1", "2 images are backed by it; it merges when one is left"),))
    later = plan_delete(apply(branches(), plan), ["s4", "s5"])
    assert said(later) == [("stream", "/2", "/1", 2, "live")]
    assert later.unlink == ("/5", "/4", "/1")
    assert later.resealed == ("/2",)


def test_branches_merge_side_by_side_once_what_is_under_them_has() -> None:
    """Each step's `after` is the last one that writes to its chain; closed images are merged offline."""
    plan = plan_delete(branches(), ["s0", "s2", "s4"])
    assert said(plan) == [
        ("stream", "/1", "/0", 1, "live"),
        ("stream", "/3", "/2", 3, "live"),
        ("stream", "/5", "/4", 5, "offline"),
    ]
    assert [step.after for step in plan.steps] == [(), (0,), (0,)]
    assert plan.resealed == ("/1", "/5")


def test_closed_branches_are_pointed_to_where_their_backing_has_gone() -> None:
    """A point that moves takes all its children along; their headers change, and so their checksums."""
    graph = branches()
    images = [attrs.evolve(image, allocated=99 if image.path == "/0" else 1) for image in graph.images.values()]
    plan = plan_delete(attrs.evolve(graph, images=images), ["s0"])
    assert said(plan) == [("commit", "/1", "/0", 1, "live")]
    assert (plan.steps[0].repoint, plan.moved) == (("/2", "/4"), {"/1": "/0"})
    assert plan.resealed == ("/0", "/2", "/4")


def test_an_image_that_a_guest_outruns_stays_as_a_link() -> None:
    """What is below it merges; the next plan has it again."""
    graph = chain_of(9, 1, 2, 3, running=True)
    plan = plan_delete(graph, ["s1", "s2"], frozenset({"/2"}))
    assert said(plan) == [("stream", "/2", "/1", 1, "live")]
    ((path, reason),) = plan.kept
    assert (path, "writes faster" in reason) == ("/2", True)
    assert said(plan_delete(apply(graph, plan), ())) == [("stream", "/3", "/2", 3, "live")]


# --- depth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "steps"),
    [(1, [("stream", "/3", "/0", 8, "live")]), (2, [("stream", "/3", "/1", 7, "live")]), (4, [])],
)
def test_a_flatten_copies_up_what_is_over_the_lowest(depth: int, steps: list[object]) -> None:
    """All that is held stays; what was there only for the chain goes afterwards."""
    graph = chain_of(1, 2, 5, 3, running=True)
    plan = plan_flatten(graph, ["/3"], depth)
    assert said(plan) == steps
    assert not plan.unlink
    linked = attrs.evolve(graph, points=graph.points[:1])
    flat = plan_flatten(linked, ["/3"], depth)
    assert set(plan_delete(apply(linked, flat), ()).unlink) == ({"/1", "/2"} if depth < 3 else {"/1", "/3"})


def test_a_flatten_shows_nothing_that_a_short_image_hides() -> None:
    """A disk that shrank and grew: block-stream onto the base would bring back what was cut off (7.2 and 10.0)."""
    sizes = (8, 4, 8)
    images = [Image(f"/{n}", "qcow2", f"/{n - 1}" if n else None, 1, size) for n, size in enumerate(sizes)]
    graph = Graph("web1", images, [Point("s0", "vda", "/0"), Point("s1", "vda", "/1")], {"vda": "/2"}, running=True)
    (step,) = plan_flatten(graph, ["/2"], 2).steps
    assert (step.base, step.new_backing) == ("/0", None)


def test_a_flatten_of_what_others_rely_on_is_refused() -> None:
    """A clone of another domain may have the image open."""
    graph = attrs.evolve(chain_of(1, 2, 3), needed={"/1": "domain web2"})
    with pytest.raises(Unsupported, match="web2"):
        plan_flatten(graph, ["/1"], 1)
    assert said(plan_flatten(graph, ["/2"], 1)) == [("stream", "/2", "/0", 3, "offline")]


def test_hundreds_of_snapshots_taken_and_deleted_leave_short_chains() -> None:
    """No chain is longer than there are images that somebody holds: each link in it has a branch of its own."""
    chance = random.Random(5)  # noqa: S311 - no secret
    graph, names = Graph("web1", [Image("/0", own=False, original=True)], active={"vda": "/0"}), [*range(1, 500)]
    longest = 0
    for number in names:
        points = graph.points
        if points and chance.random() < 0.3:  # back to one of them
            under = chance.choice(points).path
        else:
            under, points = graph.active["vda"], (*points, Point(f"s{number}", "vda", graph.active["vda"]))
        images = {**graph.images, f"/{number}": Image(f"/{number}", backing=under, allocated=chance.randrange(9))}
        graph = attrs.evolve(graph, images=images, points=points, active={"vda": f"/{number}"})
        while len(graph.points) > 6:
            graph = apply(graph, plan_delete(graph, [chance.choice(graph.points).snapshot]))
        longest = max(longest, len(list(graph.chain(graph.active["vda"]))))
        assert len(list(graph.chain(graph.active["vda"]))) <= 2 * (len(graph.points) + 1)
    assert longest > 4, "the test has made trees"


def test_a_plan_is_shown_as_a_tree() -> None:
    """For --dry-run."""
    assert render(plan_delete(chain_of(9, 5, 3000, running=True), ["s1"])) == [
        "delete s1",
        "├── merge: 5 bytes",
        "│   └── 1. vda: stream /1 up into /2: 5 bytes, live",
        "└── unlink",
        "    └── /1",
    ]
    assert render(plan_delete(branches(), ["s1"]))[1:] == [
        "└── keep",
        "    └── /1: 2 images are backed by it; it merges when one is left",
    ]


# --- the tree of snapshots ----------------------------------------------------------------------------------------

TREE = {"a": None, "b": "a", "c": "b", "d": "b", "e": "a"}


def test_flags_say_which_snapshots_go() -> None:
    """Just this one, with all descendants, or only these."""
    assert doomed_by(TREE, "b", DeleteFlag(0)) == {"b"}
    assert doomed_by(TREE, "b", DeleteFlag.CHILDREN) == {"b", "c", "d"}
    assert doomed_by(TREE, "b", DeleteFlag.CHILDREN_ONLY) == {"c", "d"}
    assert doomed_by(TREE, "e", DeleteFlag.CHILDREN_ONLY) == frozenset()
    with pytest.raises(InvalidInput, match="exclude each other"):
        doomed_by(TREE, "b", DeleteFlag.CHILDREN | DeleteFlag.CHILDREN_ONLY)
    with pytest.raises(NotFound, match="'x'"):
        doomed_by(TREE, "x", DeleteFlag(0))


def test_the_nearest_ancestor_that_remains_takes_over() -> None:
    """Children, and the domain's present state, descend from it then."""
    assert heir(TREE, frozenset({"b"}), TREE["c"]) == "a"
    assert heir(TREE, frozenset({"a", "b"}), TREE["c"]) is None
    assert heir(TREE, frozenset({"c"}), TREE["c"]) == "b"


@pytest.mark.parametrize(
    ("images", "path"),
    [
        ([Image("/1", backing="/0")], "/0"),
        ([Image("/0")], "/1"),
        ([Image("/1", backing="/0"), Image("/0", backing="/1")], "/"),
    ],
)
def test_a_graph_of_damaged_chains_is_refused(images: list[Image], path: str) -> None:
    """An image that is missing, or a chain that bites its own tail."""
    with pytest.raises(DamagedSnapshot) as caught:
        Graph("web1", images, active={"vda": "/1"})
    assert caught.value.path.startswith(path)


# --- how long it takes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["chain", "branches", "star"])
@pytest.mark.parametrize("doomed", ["one", "half", "all"])
def test_a_thousand_snapshots_are_planned_in_a_tenth_of_a_second(shape: str, doomed: str) -> None:
    """Graph and plan, in time of our own CPU, and the best of three: the machine may be busy."""
    backings = {
        "chain": [n - 1 for n in range(1001)],
        "branches": [(n - 1) // 2 for n in range(1001)],
        "star": [0 for _ in range(1001)],
    }
    backing = [f"/{under}" if n else None for n, under in enumerate(backings[shape])]
    images = [Image(f"/{n}", backing=backing[n], allocated=n * 7919 % 1000) for n in range(1001)]
    points = [Point(f"s{n}", "vda", f"/{n}") for n in range(1000)]
    names = {"one": {"s500"}, "half": {f"s{n}" for n in range(0, 1000, 2)}, "all": {f"s{n}" for n in range(1000)}}
    times = []
    for _ in range(3):
        begun = time.process_time()
        plan_delete(Graph("web1", images, points, {"vda": "/1000"}, running=True), names[doomed])
        times.append(time.process_time() - begun)
    assert min(times) < 0.1
