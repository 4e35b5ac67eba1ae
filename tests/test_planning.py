"""What is decided before anything is touched: each kind of create and revert."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from snaporch.drivers.base import Capabilities, OverlayPlace, Trait
from snaporch.errors import InvalidInput, Refused, Unsupported
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainRecord, DomainState
from snaporch.model.record import PastCheckpoint, SnapshotRecord
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.model.way import Way
from snaporch.operations.choosing import one_after_the_other
from snaporch.operations.create_checks import _needs
from snaporch.operations.create_plan import CreatePlan, Scene, at_one_point, plan_create
from snaporch.operations.revert_plan import plan_revert

ANY = CreateFlag(0)
DISKS = (
    DiskStatus("vda", "/d/a.qcow2", "qcow2", readonly=False, virtual_size=2**30, chain=("/d/a.qcow2",), node="a"),
    DiskStatus("vdb", "/d/b.raw", "raw", readonly=False, virtual_size=2**30, chain=("/d/b.raw",), node="b"),
    DiskStatus("vdc", "/d/c.qcow2", "qcow2", readonly=True, virtual_size=2**30, chain=("/d/c.qcow2",), node="c"),
)
DOMAIN = DomainRecord(
    DomainDefinition("web1", disks=tuple(DeviceDisk(d.target, d.active, d.format, d.readonly) for d in DISKS))
)
ALL = frozenset(Trait)
CAPABLE = Capabilities(hypervisor="QEMU", background=True, ram=2**29, traits=ALL)
UNABLE = attrs.evolve(CAPABLE, background=False, background_blocker="RAM is a shared file")
RUNNING = Scene(
    DOMAIN, DomainState.RUNNING, DISKS, CAPABLE, {}, "/root/web1", "0a1b2c3d", 1_000_000_000.5, traits=ALL
)
PAUSED = attrs.evolve(RUNNING, state=DomainState.PAUSED)
INACTIVE = attrs.evolve(RUNNING, state=DomainState.INACTIVE, capabilities=None)


def plan(
    scene: Scene = RUNNING,
    snapshot: DomainSnapshot | None = None,
    flags: CreateFlag = ANY,
    options: CreateOptions | None = None,
) -> CreatePlan:
    """Plan a create with everything at its default."""
    return plan_create(scene, snapshot or DomainSnapshot("s"), flags, options or CreateOptions())


def disks(*targets: str, external: bool = True, path: str = "") -> DomainSnapshot:
    """Return a request that names disks."""
    overlay = {t: DeviceDisk(t, path) if external else None for t in targets}
    return DomainSnapshot(
        "s", disks=tuple(DiskSnapshot(DeviceDisk(t), external=external, external_sn=overlay[t]) for t in targets)
    )


def test_all_writable_disks_are_taken_and_read_only_ones_never() -> None:
    """Disks with no entry are all taken that are writable."""
    made = plan()
    assert [overlay.target for overlay in made.overlays] == ["vda", "vdb"]
    assert [disk.disk.path for disk in made.snapshot.disks] == ["/d/a.qcow2", "/d/b.raw"]


def test_files_bear_the_operations_id() -> None:
    """So that what is left by a crash can be told from what is not ours."""
    made = plan()
    assert [overlay.path for overlay in made.overlays] == [
        "/root/web1/vda.0a1b2c3d.qcow2",
        "/root/web1/vdb.0a1b2c3d.qcow2",
    ]


def test_a_missing_name_is_made_from_the_utc_time() -> None:
    """The strategy of each kind of create; the memory file is named for it."""
    made = plan(snapshot=DomainSnapshot())
    assert made.snapshot.name == "20010909T014640Z"
    assert made.snapshot.memory_file == "/root/web1/20010909T014640Z.mem"


@pytest.mark.parametrize(
    ("scene", "flags", "asked", "chosen"),
    [
        (RUNNING, ANY, Strategy.AUTO, Strategy.PAUSED),
        (RUNNING, CreateFlag.LIVE, Strategy.AUTO, Strategy.BACKGROUND),
        (RUNNING, CreateFlag.LIVE, Strategy.PRECOPY, Strategy.PRECOPY),
        (RUNNING, ANY, Strategy.BACKGROUND, Strategy.BACKGROUND),
        (PAUSED, ANY, Strategy.AUTO, Strategy.PAUSED),
        (PAUSED, CreateFlag.LIVE, Strategy.PRECOPY, Strategy.PAUSED),
        (INACTIVE, CreateFlag.DISK_ONLY, Strategy.AUTO, Strategy.NONE),
        (attrs.evolve(RUNNING, capabilities=UNABLE), CreateFlag.LIVE, Strategy.AUTO, Strategy.PRECOPY),
    ],
)
def test_the_strategy(scene: Scene, flags: CreateFlag, asked: Strategy, chosen: Strategy) -> None:
    """What is chosen for what is asked."""
    assert plan(scene, flags=flags, options=CreateOptions(strategy=asked)).strategy is chosen


def test_the_record_says_why_background_was_not_possible() -> None:
    """A fallback is never silent."""
    made = plan(attrs.evolve(RUNNING, capabilities=UNABLE), flags=CreateFlag.LIVE)
    assert "RAM is a shared file" in made.reason


def test_a_precopy_that_may_lose_pages_is_never_chosen_by_itself() -> None:
    """Asked for, it is done, and the record says what it may be worth."""
    unsafe = attrs.evolve(RUNNING, capabilities=attrs.evolve(UNABLE, precopy_caveat="it loses pages"))
    made = plan(unsafe, flags=CreateFlag.LIVE)
    assert made.strategy is Strategy.PAUSED
    assert "it loses pages" in made.reason
    made = plan(unsafe, options=CreateOptions(strategy=Strategy.PRECOPY))
    assert made.strategy is Strategy.PRECOPY
    assert "it loses pages" in made.reason


def test_a_paused_guest_is_streamed_so_that_it_stays_truly_paused() -> None:
    """By write-protection where the hypervisor leaves it as it was, else plainly."""
    stream = plan(PAUSED).stream
    assert stream is not None
    assert stream.strategy is Strategy.BACKGROUND
    stream = plan(attrs.evolve(PAUSED, capabilities=attrs.evolve(CAPABLE, keeps_paused=False))).stream
    assert stream is not None
    assert stream.strategy is Strategy.PAUSED


@pytest.mark.parametrize(
    ("scene", "snapshot", "flags", "options", "words"),
    [
        (RUNNING, disks("vda", external=False), CreateFlag.LIVE, CreateOptions(), "--live is for external"),
        (RUNNING, None, CreateFlag.LIVE | CreateFlag.DISK_ONLY, CreateOptions(), "--live is for external"),
        (RUNNING, None, CreateFlag.DISK_ONLY, CreateOptions(), "not be one point"),
        (RUNNING, DomainSnapshot("s", memory=False), ANY, CreateOptions(), "not be one point"),
        (INACTIVE, None, ANY, CreateOptions(), "no memory to save"),
        (RUNNING, disks("vdx"), ANY, CreateOptions(), "has no disk 'vdx'"),
        (RUNNING, disks("vdc"), ANY, CreateOptions(), "read-only"),
        (RUNNING, disks("vda", "vda"), ANY, CreateOptions(), "named twice"),
        (RUNNING, disks("vda"), ANY, CreateOptions(exclude=["vda"]), "both asked for and left out"),
        (RUNNING, disks("vda", "vdb", path="/o"), ANY, CreateOptions(), "the same overlay"),
        (RUNNING, DomainSnapshot("../etc"), ANY, CreateOptions(), "is not a snapshot name"),
        (
            attrs.evolve(RUNNING, capabilities=UNABLE),
            None,
            ANY,
            CreateOptions(strategy=Strategy.BACKGROUND),
            "RAM is a shared file",
        ),
    ],
)
def test_what_is_refused(
    scene: Scene, snapshot: DomainSnapshot | None, flags: CreateFlag, options: CreateOptions, words: str
) -> None:
    """Each with its reason, and with exit status 2."""
    with pytest.raises(Refused, match=words) as caught:
        plan(scene, snapshot, flags, options)
    assert caught.value.exit_code == 2


def test_a_disk_can_be_left_out() -> None:
    """`none` on the command line."""
    made = plan(options=CreateOptions(exclude=["vdb"]))
    assert [overlay.target for overlay in made.overlays] == ["vda"]


def record(made: CreatePlan) -> SnapshotRecord:
    """Return a record of what was planned."""
    return SnapshotRecord(
        domain="web1",
        snapshot=made.snapshot,
        parent=None,
        domain_state=made.state,
        strategy=made.strategy,
        reason=made.reason,
        point=0.0,
        memory=None,
        images={},
        definition=DOMAIN.definition,
    )


def revert_state(state: DomainState, flags: RevertFlag) -> DomainState:
    """Return what a domain does after a revert to a point at which it was in `state`."""
    target = attrs.evolve(record(plan()), domain_state=state)
    return plan_revert(DOMAIN, DomainState.RUNNING, target, flags, directory="/root/web1", operation="1").state


@pytest.mark.parametrize("state", list(DomainState))
def test_a_revert_goes_to_the_state_at_the_point_unless_told_otherwise(state: DomainState) -> None:
    """RUNNING and PAUSED override it."""
    assert revert_state(state, RevertFlag(0)) is state
    assert revert_state(state, RevertFlag.RUNNING) is DomainState.RUNNING
    assert revert_state(state, RevertFlag.PAUSED) is DomainState.PAUSED


def test_running_and_paused_together_are_refused() -> None:
    """RUNNING and PAUSED exclude each other."""
    with pytest.raises(InvalidInput, match="exclude each other"):
        revert_state(DomainState.RUNNING, RevertFlag.RUNNING | RevertFlag.PAUSED)


def test_a_changed_definition_needs_force() -> None:
    """The memory belongs to the machine that it came from."""
    changed = attrs.evolve(DOMAIN, definition=attrs.evolve(DOMAIN.definition, vcpus=2))
    target = record(plan())
    with pytest.raises(Unsupported, match="defined differently"):
        plan_revert(changed, DomainState.RUNNING, target, RevertFlag(0), directory="/r", operation="1")
    forced = plan_revert(changed, DomainState.RUNNING, target, RevertFlag.FORCE, directory="/r", operation="1")
    assert forced.way == "beside"


def test_a_disk_that_the_snapshot_does_not_hold_cannot_be_had_by_two_guests() -> None:
    """Without FORCE that is refused; with it, the old guest goes first."""
    target = record(plan(options=CreateOptions(exclude=["vdb"])))
    with pytest.raises(Unsupported, match="does not hold vdb"):
        plan_revert(DOMAIN, DomainState.RUNNING, target, RevertFlag(0), directory="/r", operation="1")
    forced = plan_revert(DOMAIN, DomainState.RUNNING, target, RevertFlag.FORCE, directory="/r", operation="1")
    assert forced.way == "displace"
    idle = plan_revert(DOMAIN, DomainState.INACTIVE, target, RevertFlag(0), directory="/r", operation="1")
    assert idle.way == "beside"


@pytest.mark.parametrize("force", [True, False])
async def test_a_lazy_revert_that_has_to_go_another_way_says_why(*, force: bool) -> None:
    """What was asked for is not what was done."""
    target = attrs.evolve(record(plan()), domain_state=DomainState.RUNNING)
    lazy = attrs.evolve(
        plan_revert(DOMAIN, DomainState.RUNNING, target, RevertFlag.LAZY, directory="/r", operation="1"),
        way=Way.LAZY,
    )
    nothing: Any = None
    found = await one_after_the_other(nothing, nothing, lazy, None, "a port is taken", force=force)
    assert (found.way, found.eager) == (Way.DISPLACE if force else Way.PROVEN, "a port is taken")


@pytest.mark.parametrize(
    ("lacking", "state", "snapshot", "flags"),
    [
        (Trait.MEMORY_STREAMS, DomainState.RUNNING, DomainSnapshot("s"), ANY),
        (Trait.OVERLAYS, DomainState.RUNNING, DomainSnapshot("s"), ANY),
        (Trait.POINTS_INSIDE, DomainState.RUNNING, disks("vda", external=False), ANY),
        (Trait.IMAGE_POINTS, DomainState.INACTIVE, disks("vda", external=False), CreateFlag.DISK_ONLY),
        (Trait.GUEST_AGENT, DomainState.RUNNING, DomainSnapshot("s"), CreateFlag.QUIESCE),
    ],
)
def test_what_the_record_does_not_name_is_refused(
    lacking: Trait, state: DomainState, snapshot: DomainSnapshot, flags: CreateFlag
) -> None:
    """Before anything is touched, and with words; with the trait it is not."""
    exclude = CreateOptions(exclude=frozenset({"vdb"}))
    for traits in (ALL, ALL - {lacking}):
        can = attrs.evolve(CAPABLE, traits=traits) if state is DomainState.RUNNING else None
        scene = attrs.evolve(RUNNING, state=state, capabilities=can, traits=traits)
        if lacking in traits:
            assert plan(scene, snapshot, flags, exclude).bases
        else:
            with pytest.raises(Unsupported, match="web1: its hypervisor"):
                plan(scene, snapshot, flags, exclude)


def test_a_stream_that_stops_the_guest_begins_while_it_runs() -> None:
    """A create without LIVE takes the steps of a precopy, and can be of no group and not quiesced."""
    scene = attrs.evolve(RUNNING, capabilities=attrs.evolve(CAPABLE, stops_itself=True))
    made = plan(scene)
    assert (made.strategy, made.order) == (Strategy.PAUSED, Strategy.PRECOPY)
    assert plan().order is Strategy.PAUSED
    with pytest.raises(Unsupported, match="at one point"):
        at_one_point([made, plan(attrs.evolve(scene, directory="/root/web2"))])
    with pytest.raises(Unsupported, match="--quiesce would keep the file systems"):
        plan(scene, flags=CreateFlag.QUIESCE)


def test_an_index_has_room() -> None:
    """Nine bytes a page: of a large machine that is more than what a stream takes beside RAM."""
    needs = []
    for traits in (ALL - {Trait.LOADS_LAZILY}, ALL):
        made = plan(attrs.evolve(RUNNING, traits=traits))
        participant: Any = SimpleNamespace(plan=made, machine=SimpleNamespace(capabilities=CAPABLE))
        needs.append(_needs(participant)[made.memory_place])
    assert 9 * CAPABLE.ram // 4096 < needs[1] - needs[0] < CAPABLE.ram // 200


def test_no_late_stop_of_several() -> None:
    """All are paused first; the records say so."""
    past = PastCheckpoint(Strategy.BACKGROUND, 2**20, 1.0, 0.05, setup=0.05)
    scene = attrs.evolve(RUNNING, earlier=(past,))
    options = CreateOptions(late_stop=True)
    alone = plan(scene, flags=CreateFlag.LIVE, options=options)
    assert (alone.late, at_one_point([alone])) == (0.05, (alone,))
    other = plan(attrs.evolve(scene, directory="/root/web2"), flags=CreateFlag.LIVE)
    both = at_one_point([alone, other])
    assert [each.late for each in both] == [None, None]
    assert ["no late stop: several" in each.reason for each in both] == [True, False]


def test_a_stream_that_keeps_to_no_bandwidth_is_given_none() -> None:
    """A limit that nobody keeps to is refused."""
    scene = attrs.evolve(RUNNING, capabilities=attrs.evolve(CAPABLE, limits_streams=False))
    assert plan(scene).stream
    with pytest.raises(Unsupported, match="bandwidth"):
        plan(scene, options=CreateOptions(bandwidth=2**20))


def test_overlays_are_where_the_driver_wants_them() -> None:
    """But for one whose file was named."""
    places = {disk.target: OverlayPlace("/pool", (64055, 64055)) for disk in DISKS}
    made = plan(attrs.evolve(RUNNING, places=places), disks("vdb", path="/mine.qcow2"))
    assert [(o.path, o.owner) for o in made.overlays] == [
        ("/pool/vda.0a1b2c3d.qcow2", (64055, 64055)),
        ("/mine.qcow2", (64055, 64055)),
    ]
