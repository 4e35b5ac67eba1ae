"""Batches on simulated domains: limits, failures, retries, hooks, and going on where one was cut short."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch import Busy, CreateFlag, DomainSnapshot, HypervisorError, InvalidInput, NotFound
from snaporch.batch import store
from snaporch.batch.adoption import adopt
from snaporch.batch.prune import prune_by_plan
from snaporch.batch.store import End, Stage
from snaporch.catalog import Change, domain_lock
from snaporch.drivers.local.process import process_of
from snaporch.orchestrator import catalog_of
from snaporch.testing import SimulatedHost, SimulatedSpeed, ThreadsHoldTime
from tests.batch.estate import EPOCH, GIB, Estate, booted, now, open_estate, plan

Virtual = ThreadsHoldTime
RATE = 1e9  # bytes a second of a simulated stream
STREAM = GIB / RATE


@attrs.define
class Crowd:
    """Counts how many streams run at once."""

    host: SimulatedHost
    most: int = 0
    running: int = 0

    def __attrs_post_init__(self) -> None:
        self.host.on_effect = self.see

    def see(self, at: str, domain: str) -> None:
        """See a call."""
        del domain
        self.running += {"stream.open": 1, "stream.seal": -1}.get(at, 0)
        self.most = max(self.most, self.running)


async def test_a_batch(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Every domain gets its snapshot, three at a time, and the record says how it went."""
    async with open_estate(tmp_path, 9) as estate:
        crowd = Crowd(estate.host)
        batch = await estate.run(plan(limits={"per_host": 3}))
        assert crowd.most == 3
        assert set(map(tuple, (await estate.snapshots()).values())) == {("s",)}
        items = await estate.items(batch)
    assert (batch.stage, batch.counts, batch.runs) == (Stage.COMPLETE, {"done": 9}, 1)
    assert {record.bytes for record in items.values()} == {GIB}
    assert all(EPOCH <= record.begun < record.ended <= (batch.ended or 0) for record in items.values())
    assert 3 * STREAM <= (batch.ended or 0) - batch.begun < 3 * STREAM + 1


async def test_bandwidth_is_shared(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Whether one streams or four, together they have the plan's bandwidth, and all of it."""
    async with open_estate(tmp_path, 9) as estate:
        batch = await estate.run(plan(limits={"per_host": 4, "bandwidth": GIB // 10}))
    assert (batch.ended or 0) - batch.begun == pytest.approx(9 * 10, rel=0.02)


async def test_storage_directories(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """One busy directory does not hold up what is elsewhere."""
    async with open_estate(tmp_path / "root", 0) as estate:
        names = [f"{place}{number}" for place in "ab" for number in range(3)]
        records = [booted(estate.host, name, directory=f"/{name[0]}") for name in names]
        await catalog_of(estate.orch).write(Change(domains=tuple(records)))
        one = plan(limits={"per_host": 6, "per_directory": 1})
        assert all(str(tmp_path / "root") in item.places for item in await selected(estate, one))
        crowd = Crowd(estate.host)
        await estate.run(one)
        assert crowd.most == 1  # all write to the root
        crowd.most = 0
        await estate.run(plan(snapshot={"name": "t"}, limits={"per_host": 6, "per_directory": 2}))
        assert crowd.most == 2


async def test_the_longest_first(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """By what their last checkpoints took, or else by their size: the end waits for none that was begun last."""
    async with open_estate(tmp_path, 0) as estate:
        estate.host.speeds["a"] = SimulatedSpeed(bandwidth=1e7)  # small, and known to be slow
        sizes = {"a": GIB, "b": 4 * GIB, "c": 2 * GIB, "d": 2 * GIB}
        records = [booted(estate.host, name, memory=size) for name, size in sizes.items()]
        await catalog_of(estate.orch).write(Change(domains=tuple(records)))
        await estate.orch.create("a", DomainSnapshot("before"), CreateFlag.LIVE)
        assert [item.name for item in await selected(estate, plan())] == ["a", "b", "c", "d"]
        grouped = plan(select={"names": ["b"], "groups": {"both": ["a", "c"]}})
        assert [item.name for item in await selected(estate, grouped)] == ["both", "b"]
        batch = await estate.run(plan(limits={"per_host": 2}))
        items = await estate.items(batch)
        assert items["a"].expected > 100 > items["b"].expected > items["c"].expected > 0
        begun = sorted(items, key=lambda name: items[name].begun)
        assert begun == ["a", "b", "c", "d"]
        await estate.orch.destroy("b")  # it has no memory to take
        assert [item.name for item in await selected(estate, plan())][-1] == "b"


async def selected(estate: Estate, one: Any) -> tuple[Any, ...]:
    return await store.select(catalog_of(estate.orch), str(estate.orch.root), one)


async def test_select(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """By name, glob and tag, less what is excluded; a name that is not there is an error, first of all."""
    async with open_estate(tmp_path, 5) as estate:
        await estate.orch.tag("vm4", ["prod"])

        async def names(**select: Any) -> list[str]:
            return [item.name for item in await selected(estate, plan(select=select))]

        assert await names(names=["vm1"], tags=["prod", "other"]) == ["vm1", "vm4"]
        assert await names(globs=["vm[0-2]"], exclude=["*1"]) == ["vm0", "vm2"]
        for wrong in ({"names": ["nope"]}, {"globs": ["nope*"]}):
            with pytest.raises(NotFound):
                await estate.run(plan(select=wrong))
        with pytest.raises(InvalidInput, match="has the name of a domain"):
            await names(groups={"vm1": ["vm1", "vm4"]})
        assert await names(globs=["vm[0-2]"], groups={"pair": ["vm1", "vm4"]}) == ["pair", "vm0", "vm2"]
        assert not any((await estate.snapshots()).values())
        assert not await store.batches(catalog_of(estate.orch))


async def test_inactive_domains(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """What a plan says of running guests, strategy and quiesce, does not keep inactive domains from being taken."""
    async with open_estate(tmp_path, 2) as estate:
        await estate.orch.destroy("vm1")
        first = await estate.run(plan(snapshot={"name": "a", "strategy": "background"}))
        only = plan(snapshot={"name": "b", "quiesce": True}, select={"names": ["vm1"]})
        second = await estate.run(only)
        records = [await estate.orch.show("vm1", name) for name in "ab"]
    assert (first.counts, second.counts) == ({"done": 2}, {"done": 1})
    assert not any(record.memory for record in records)


async def test_groups(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """A group is one item, taken at one point or not at all; one that was cut short is gone on with as a whole."""
    select = {"globs": ["vm*"], "groups": {"pair": ["vm1", "vm3"]}}
    async with open_estate(tmp_path, 4) as estate:
        break_(estate.host, "vm3")
        failed = await estate.run(plan(snapshot={"name": "a"}, select=select))
        taken = {name for name, found in (await estate.snapshots()).items() if found}
        assert (failed.counts, taken) == ({"done": 2, "failed": 1}, {"vm0", "vm2"})
        one = plan(snapshot={"name": "b", "verify": "files"}, select=select, limits={"per_host": 1})
        await cut_short(estate, one, STREAM / 2)  # the group is first
        batch = await estate.run(one)
        pair = (await estate.items(batch))["pair"]
        records = [await estate.orch.show(name, "b") for name in pair.item.members]
    assert (batch.counts, batch.runs, pair.verified, pair.bytes) == ({"done": 3}, 2, True, 2 * GIB)
    assert records[0].group == records[1].group
    assert records[0].group is not None
    assert pair.pause == max(record.timings.pause or 0.0 for record in records)


async def test_retention_of_a_group(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """What a group's plan has taken goes from all members, or, where it is kept of one, from none."""
    retention = {"last": 1}
    select = {"groups": {"pair": ["vm0", "vm1"]}}
    async with open_estate(tmp_path, 2) as estate:
        for name in "ab":
            one = plan(snapshot={"name": name}, select=select, retention=retention)
            await estate.run(attrs.evolve(one, retention=None))
        verdicts = await prune_by_plan(estate.orch, one, "pair", ["vm0", "vm1"], now=now(), dry_run=True)
        alone = await prune_by_plan(estate.orch, one, "pair", ["vm0"], now=now(), dry_run=True)
        await estate.orch.pin("vm1", "a")
        pinned = await prune_by_plan(estate.orch, one, "pair", ["vm0", "vm1"], now=now(), dry_run=True)
    assert [list(verdict.delete) for verdict in verdicts.values()] == [["a"], ["a"]]
    assert [list(verdict.delete) for verdict in (*alone.values(), *pinned.values())] == [[], [], []]
    assert alone["vm0"].keep["a"] == "one point with that of vm1, which stays"


def break_(host: SimulatedHost, domain: str, times: float = 1) -> None:
    """Let a domain's streams fail half way."""
    host.faults.add("stream.half", domain=domain, times=times, error=HypervisorError("the stream broke"))


async def test_continue(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """One that fails is in the record with its error; the others are taken."""
    async with open_estate(tmp_path, 4) as estate:
        break_(estate.host, "vm1")
        batch = await estate.run(plan(limits={"per_host": 2}))
        failed = (await estate.items(batch))["vm1"]
        assert (await estate.snapshots())["vm1"] == []
    assert (batch.stage, batch.counts) == (Stage.FAILED, {"done": 3, "failed": 1})
    assert "the stream broke" in failed.error
    assert (failed.end, failed.taken) == (End.FAILED, False)


async def test_stop(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """What runs is finished, nothing else is begun."""
    async with open_estate(tmp_path, 6) as estate:
        break_(estate.host, "vm1")
        batch = await estate.run(plan(limits={"per_host": 2}, on_failure="stop"))
        items = await estate.items(batch)
    assert batch.counts == {"done": 1, "failed": 1, "skipped": 4}
    assert items["vm5"].error == "vm1 failed"


async def test_undo_all(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """What runs when one fails is rolled back, nothing else is begun; test_live.py has what was taken already."""
    async with open_estate(tmp_path, 5) as estate:
        break_(estate.host, "vm1")
        batch = await estate.run(plan(limits={"per_host": 2}, on_failure="undo_all"))
        assert not any((await estate.snapshots()).values())
    assert (batch.stage, batch.counts) == (Stage.UNDONE, {"failed": 1, "skipped": 4})


async def test_retries(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """What was rolled back is tried again, as often as the plan says; what is refused is not."""
    async with open_estate(tmp_path, 3) as estate:
        break_(estate.host, "vm0", times=2)
        break_(estate.host, "vm1", times=3)
        await estate.orch.create("vm2", DomainSnapshot("s"), CreateFlag.LIVE)
        batch = await estate.run(plan(retries={"attempts": 3, "wait": "1min"}))
        items = await estate.items(batch)
    assert [(items[name].end, items[name].attempts) for name in ("vm0", "vm1", "vm2")] == [
        (End.DONE, 3),
        (End.FAILED, 3),
        (End.FAILED, 1),
    ]
    assert "has a snapshot 's' already" in items["vm2"].error
    assert items["vm0"].ended - items["vm0"].begun > 60 + 2 * 60 - 30


async def test_deadline(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """After it nothing is begun, and what is not finished is rolled back."""
    async with open_estate(tmp_path, 5) as estate:
        batch = await estate.run(plan(limits={"per_host": 1, "deadline": 2.5 * STREAM}))
        items, snapshots = await estate.items(batch), await estate.snapshots()
    assert batch.counts == {"done": 2, "skipped": 3}
    assert {name for name, found in snapshots.items() if found} == {
        name for name, record in items.items() if record.end is End.DONE
    }
    assert items["vm2"].error == f"the deadline of {2.5 * STREAM:g} s ran out"


async def test_a_create_that_commits_at_the_deadline(
    tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual
) -> None:
    """Wherever the deadline falls, the record says of each snapshot what is so."""
    for number in range(30):
        async with open_estate(tmp_path / str(number), 1) as estate:
            batch = await estate.run(plan(limits={"deadline": STREAM + number * 0.001}))
            item = (await estate.items(batch))["vm0"]
            assert bool((await estate.snapshots())["vm0"]) == (item.end is End.DONE) == item.taken


async def test_window(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Nothing is begun before it opens nor after it closes; what runs then is finished. EPOCH is 15:06:40 UTC."""
    async with open_estate(tmp_path, 3) as estate:
        window = {"opens": "22:00", "closes": "22:01"}
        limits = {"per_host": 1, "window": window, "bandwidth": GIB // 40}
        batch = await estate.run(plan(limits=limits))
        items = await estate.items(batch)
    opens = EPOCH + 6 * 3600 + 53 * 60 + 20
    assert items["vm0"].begun == pytest.approx(opens, abs=1)
    assert items["vm1"].begun < opens + 60 < items["vm1"].ended
    assert (items["vm2"].end, items["vm2"].error) == (End.SKIPPED, "the window has closed")


async def test_verify(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """A snapshot that is damaged as soon as it is there is a failure, and stays to be looked at."""
    async with open_estate(tmp_path, 2) as estate:

        def damage(at: str, domain: str) -> None:
            path = str(tmp_path / "vm1" / "s.mem")
            if at == "stream.seal" and domain == "vm1":
                estate.host.damage(path, silent=True)

        estate.host.on_effect = damage
        batch = await estate.run(plan(snapshot={"name": "s", "verify": "files"}))
        items = await estate.items(batch)
    assert (items["vm0"].end, items["vm0"].verified) == (End.DONE, True)
    assert (items["vm1"].end, items["vm1"].verified, items["vm1"].taken) == (End.FAILED, False, True)
    assert "damaged" in items["vm1"].error


NOTE = """
import os, sys
place, domain = sys.argv[1], os.environ.get("SNAPORCH_DOMAIN", "-")
with open(os.environ["SNAPORCH_ROOT"] + "/log", "a") as log:
    log.write(f"{place} {domain} {os.environ['SNAPORCH_SNAPSHOT']}\\n")
if (place, domain) == ("before_each", "vm1"):
    sys.exit("not vm1")
"""


async def test_hooks(tmp_path: Path) -> None:
    """They run in their places, know where they are, and what they say when they fail is in the record."""
    places = ("before", "before_each", "after_each", "failed_each", "after")
    hooks = {place: [{"command": [sys.executable, "-c", NOTE, place]}] for place in places}
    async with open_estate(tmp_path, 2) as estate:
        estate.host.speed = attrs.evolve(estate.host.speed, bandwidth=1e12)
        batch = await estate.run(plan(hooks=hooks, limits={"per_host": 1}, retries={"attempts": 2}))
        items = await estate.items(batch)
        assert (await estate.snapshots())["vm1"] == []
    assert (tmp_path / "log").read_text().splitlines() == [
        "before - s",
        "before_each vm0 s",
        "after_each vm0 s",
        "before_each vm1 s",
        "failed_each vm1 s",
        "after - s",
    ]
    assert items["vm1"].error.endswith("ended with status 1: not vm1")
    assert batch.stage is Stage.FAILED


HANG = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"])
with open(f"{sys.argv[1]}.new", "w") as file:
    file.write(str(child.pid))
os.rename(f"{sys.argv[1]}.new", sys.argv[1])
child.wait()
"""


async def test_a_hook_that_hangs(tmp_path: Path) -> None:
    """It is ended at its deadline, and what it has started too; when it is the first one, nothing is begun."""
    child = tmp_path / "child"
    async with open_estate(tmp_path / "root", 1) as estate:
        for deadline in (1, 10, 60):  # on a busy machine it may not have started anything yet
            hangs = {"command": [sys.executable, "-c", HANG, str(child)], "deadline": deadline}
            batch = await estate.run(plan(hooks={"before": [hangs]}))
            assert not any((await estate.snapshots()).values())
            assert batch.counts == {"skipped": 1}
            assert f"took longer than {deadline} s" in batch.problems[0]
            if child.exists():
                break
    with trio.fail_after(60):
        while process_of(int(child.read_text())) is not None:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.01)


async def test_one_at_a_time(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """A plan that runs is busy."""
    async with open_estate(tmp_path, 1) as estate, trio.open_nursery() as nursery:
        nursery.start_soon(estate.run, plan())
        await trio.sleep(STREAM / 2)
        with pytest.raises(Busy):
            await estate.run(plan())


async def cut_short(estate: Estate, one: Any, seconds: float) -> None:
    """Run a plan for some time."""
    with trio.move_on_after(seconds) as scope:
        await estate.run(one)
    assert scope.cancelled_caught


async def test_going_on(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """A batch that was interrupted goes on: same items, same name, each taken once; one that ended does not."""
    one = plan(snapshot={"name": "{plan}-{time}"}, limits={"per_host": 1})
    async with open_estate(tmp_path, 4) as estate:
        await cut_short(estate, one, 2.5 * STREAM)
        assert sum(map(len, (await estate.snapshots()).values())) == 2
        await catalog_of(estate.orch).write(Change(domains=(booted(estate.host, "vm9"),)))
        batch = await estate.run(one)
        snapshots = await estate.snapshots()
        assert (batch.stage, batch.counts, batch.runs) == (Stage.COMPLETE, {"done": 4}, 2)
        assert {name: found == [batch.snapshot] for name, found in snapshots.items()} == {
            "vm0": True, "vm1": True, "vm2": True, "vm3": True, "vm9": False,
        }  # fmt: skip
        other = await estate.run(one)
    assert (other.id != batch.id, other.counts) == (True, {"done": 5})


async def test_anew(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """What was cut short can be given up."""
    one = plan(snapshot={"name": "{batch}"}, limits={"per_host": 1})
    async with open_estate(tmp_path, 2) as estate:
        await cut_short(estate, one, 1.5 * STREAM)
        batch = await estate.run(one, anew=True)
        first, second = await store.batches(catalog_of(estate.orch))
        assert await store.counts(catalog_of(estate.orch), first.id) == {"done": 1, "skipped": 1}
    assert (first.stage, second.stage, batch.counts) == (Stage.ABANDONED, Stage.COMPLETE, {"done": 2})


async def test_many_pages(
    tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items are read a few at a time; all of them are taken."""
    monkeypatch.setattr(store, "PAGE", 4)
    async with open_estate(tmp_path, 19) as estate:
        batch = await estate.run(plan(limits={"per_host": 7}))
        assert len(await estate.items(batch)) == 19
    assert batch.counts == {"done": 19}


async def test_what_is_to_stay_free(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """What is expected to leave less is not begun, and has failed: memory, and overlays that grow, are expected."""
    async with open_estate(tmp_path, 2) as estate:
        assert (await estate.run(plan())).stage is Stage.COMPLETE
        needed, free = await estate.orch.room_for(["vm0"], memory=True)
        memory = (await estate.orch.show("vm0", "s")).memory_size
        assert needed > memory > 0  # the guest writes on
        low = plan(snapshot={"name": "low"}, limits={"min_free": free, "per_host": 1})
        batch = await estate.run(low)
        assert (batch.stage, batch.counts) == (Stage.FAILED, {"failed": 2})
        assert all("min_free" in item.error for item in (await estate.items(batch)).values())
        assert await estate.snapshots() == {"vm0": ["s"], "vm1": ["s"]}
        # There is room for one, and not for both at once; a root's own limit is kept, too.
        room = free - 3 * needed // 2
        batch = await estate.run(plan(snapshot={"name": "one"}), min_free=room)
        assert batch.counts == {"done": 1, "failed": 1}


async def test_a_busy_domain(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """It is tried again while the window is open, and for as long as the plan says; then it has failed."""
    async with open_estate(tmp_path, 1) as estate:

        async def hold(seconds: float, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            async with domain_lock(estate.orch.root / "locks", "vm0", "", "something else"):
                task_status.started()
                await trio.sleep(seconds)

        window = {"opens": "15:00", "closes": "15:20"}
        changes: list[dict[str, Any]] = [{}, {"retries": {"busy": "2min"}}, {"limits": {"window": window}}]
        for number, (change, end) in enumerate(zip(changes, (End.DONE, End.FAILED, End.FAILED), strict=True)):
            async with trio.open_nursery() as nursery:
                await nursery.start(hold, 300.0)
                batch = await estate.run(plan(snapshot={"name": f"s{number}"}, **change))
            assert batch.counts == {end: 1}, number


async def test_snapshots_of_no_plan(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Those of a plan that is called otherwise now are given to it, and its retention is about them."""
    async with open_estate(tmp_path, 1) as estate:
        for number in range(3):
            await estate.run(plan(snapshot={"name": f"s{number}"}))
        catalog, names = catalog_of(estate.orch), ("s0", "s1", "s2")
        assert await store.snapshots_by_plan(catalog) == {"nightly": {"vm0": names}}
        for old, new, error in (
            ("x", "y", NotFound),
            ("nightly", "nightly", InvalidInput),
            ("-", "y", InvalidInput),
        ):
            with pytest.raises(error):
                await adopt(estate.orch, old, new)
        async with domain_lock(estate.orch.root / "locks", "batch weekly", "", "batch weekly"):
            with pytest.raises(Busy):
                await adopt(estate.orch, "nightly", "weekly")
        assert await adopt(estate.orch, "nightly", "weekly") == 3
        assert await store.snapshots_by_plan(catalog) == {"weekly": {"vm0": names}}
        await estate.run(plan(name="weekly", snapshot={"name": "s3"}, retention={"last": 2}))
        assert await estate.snapshots() == {"vm0": ["s2", "s3"]}


async def test_what_a_revert_has_saved(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """It is marked, and retention of any plan is about it; what somebody has taken by hand is left."""
    async with open_estate(tmp_path, 1) as estate:
        await estate.orch.create("vm0", DomainSnapshot("mine"), CreateFlag.LIVE)
        await estate.orch.revert("vm0", "mine", save_current="saved")
        saved = await estate.orch.show("vm0", "saved")
        assert (saved.saved_by_revert, saved.kind) == (True, "checkpoint, saved by a revert")
        for name in ("a", "b"):
            await estate.run(plan(snapshot={"name": name}, retention={"last": 2}))
        assert await estate.snapshots() == {"vm0": ["mine", "a", "b"]}


async def test_old_batches_are_forgotten(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """But not what they have taken and is there still, nor the last batch of a plan."""
    async with open_estate(tmp_path, 2) as estate:
        for number in range(3):
            await estate.run(plan(snapshot={"name": f"s{number}"}))
            await trio.sleep(10)
        await estate.orch.delete("vm0", "s0")
        await estate.orch.delete("vm0", "s1")
        await estate.orch.delete("vm1", "s1")
        ago = time.time() - now()  # the journal goes by the host's clock
        assert await estate.orch.prune_journal(ago) > 0
        left = {batch.snapshot: batch for batch in await store.batches(catalog_of(estate.orch))}
        assert list(left) == ["s0", "s2"]
        assert list(await estate.items(left["s0"])) == ["vm1"]
        assert len(await estate.items(left["s2"])) == 2
        await estate.run(plan(snapshot={"name": "s3"}, retention={"last": 2}))
        assert await estate.snapshots() == {"vm0": ["s2", "s3"], "vm1": ["s2", "s3"]}
