"""Snapshots that are needed for a time only."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    CreateOptions,
    DomainSnapshot,
    InvalidInput,
    MergePlan,
    Orchestrator,
    Refused,
    SnapshotRecord,
)
from snaporch.batch.plan import Retention
from snaporch.batch.prune import prune, prune_expired
from snaporch.batch.retention import Candidate, plan_retention
from snaporch.orchestrator import catalog_of
from snaporch.service.service import open_service
from snaporch.testing import SimulatedWorld, ThreadsHoldTime, open_simulated_world
from tests.group_world import open_group

DAY = 86_400.0


async def take(world: SimulatedWorld, name: str, days: float | None) -> float:
    """Take a snapshot that is needed for so many days; return its end."""
    options = CreateOptions(expires=None if days is None else days * DAY)
    record = await world.orchestrator.create(world.domain, DomainSnapshot(name), CreateFlag.LIVE, options)
    assert record.expires == (None if days is None else record.point + days * DAY)
    return record.expires or 0.0


async def names(world: SimulatedWorld) -> list[str]:
    return [record.name for record in await world.orchestrator.list(world.domain)]


async def test_what_has_expired_goes(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """What is pinned, has clones, or is needed still stays, and what stays can be gone back to."""
    async with open_simulated_world(tmp_path) as world:
        orch, web = world.orchestrator, world.domain
        end = max([await take(world, name, 1) for name in ("old", "pinned", "cloned")])
        await take(world, "week", 7)
        await take(world, "always", None)
        await orch.pin(web, "pinned")
        await orch.clone(web, "cloned", "copy")

        assert not await catalog_of(orch).domains_with_expired(end - DAY)
        verdict = (await prune_expired(orch, [web], now=end, dry_run=True))[web]
        assert verdict.delete == {"old": "expired"}
        assert len(await names(world)) == 5
        await prune_expired(orch, [web], now=end)
        assert await names(world) == ["pinned", "cloned", "week", "always"]
        await world.check_consistent()

        rules = Retention(last=9)
        await prune(orch, rules, [web], now=end + 7 * DAY)
        assert await names(world) == ["pinned", "cloned", "always"]
        for name in ("pinned", "always"):
            await orch.revert(web, name)
            await world.check_consistent()


async def test_a_group_goes_as_one(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Whichever of its domains is asked about; none goes where one stays."""
    async with open_group(tmp_path, 2) as group:
        orch, web0, web1 = group.orch, *group.names
        for name in ("both", "one"):
            options = CreateOptions(expires=DAY)
            taken = await orch.create_group(group.names, DomainSnapshot(name), CreateFlag.LIVE, options)
        end = max(record.expires or 0.0 for record in taken)
        await orch.edit(web1, "one", expires_in=0)
        verdicts = await prune_expired(orch, [web0], now=end)
        assert verdicts[web0].delete == verdicts[web1].delete == {"both": "expired"}
        assert verdicts[web0].keep == {"one": "one point with that of web1, which stays"}
        for name in group.names:
            assert [record.name for record in await orch.list(name)] == ["one"]


@pytest.mark.parametrize("change", ["pin", "edit"])
async def test_a_change_just_before(
    tmp_path: Path,
    autojump_clock: MockClock,
    threads_hold_time: ThreadsHoldTime,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    """What is pinned, or is to stay longer, after it was decided that it goes, stays; the others go."""
    async with open_simulated_world(tmp_path) as world:
        orch, web = world.orchestrator, world.domain
        end = max([await take(world, name, 1) for name in ("first", "dear", "last")])
        retire = Orchestrator.retire

        async def late(orch: Orchestrator, records: Sequence[SnapshotRecord]) -> Mapping[str, MergePlan]:
            monkeypatch.setattr(Orchestrator, "retire", retire)
            await (orch.pin(web, "dear") if change == "pin" else orch.edit(web, "dear", expires_in=0))
            return await orch.retire(records)

        monkeypatch.setattr(Orchestrator, "retire", late)
        with pytest.raises(Refused, match=r"dear of .* was .* just now: it stays"):
            await prune_expired(orch, [web], now=end)
        assert await names(world) == ["dear"]
        await orch.revert(web, "dear")
        await world.check_consistent()


async def test_what_cannot_go_holds_up_nothing(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused for one snapshot is told, and the others go; one that is gone by then is no error."""
    async with open_simulated_world(tmp_path) as world:
        orch, web = world.orchestrator, world.domain
        end = max([await take(world, name, 1) for name in ("first", "cloned", "gone", "last")])
        retire = Orchestrator.retire

        async def late(orch: Orchestrator, records: Sequence[SnapshotRecord]) -> Mapping[str, MergePlan]:
            monkeypatch.setattr(Orchestrator, "retire", retire)
            await orch.clone(web, "cloned", "copy")
            await orch.delete(web, "gone")
            return await orch.retire(records)

        monkeypatch.setattr(Orchestrator, "retire", late)
        with pytest.raises(Refused, match=r"cloned of .* is pinned"):
            await prune_expired(orch, [web], now=end)
        assert await names(world) == ["cloned"]


async def test_another_end(tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    async with open_simulated_world(tmp_path) as world:
        orch, web = world.orchestrator, world.domain
        await take(world, "point", 1)
        assert (await orch.edit(web, "point", expires_in=0)).expires is None
        later = (await orch.edit(web, "point", expires_in=DAY)).expires
        assert later is not None
        assert abs(later - time.time() - DAY) < DAY / 2
        assert (await orch.edit(web, "point", description="x")).expires == later
        with pytest.raises(InvalidInput, match="it may expire in up to"):
            await orch.edit(web, "point", expires_in=-1.0)
    with pytest.raises(InvalidInput):
        CreateOptions(expires=float("nan"))


def test_an_end_is_stronger_than_a_rule() -> None:
    """Also of the newest good one; not of a pinned one."""
    found = [Candidate("a", 1.0, expires=5.0), Candidate("b", 2.0, expires=5.0, pinned=True), Candidate("c", 3.0)]
    found.append(Candidate("d", 4.0, expires=5.0))
    verdict = plan_retention(found, Retention(last=9), now=5.0)
    assert (list(verdict.keep), verdict.delete) == (["c", "b"], {"a": "expired", "d": "expired"})
    assert list(plan_retention(found, Retention(last=9), now=4.9).keep) == ["d", "c", "b", "a"]


async def test_a_service_deletes_it(
    tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for an hour not what expires by a clock that is set ahead."""
    ahead = 0.0
    monkeypatch.setattr(time, "time", lambda: 1e9 + trio.current_time() + ahead)
    monkeypatch.setattr(time, "monotonic", trio.current_time)
    async with open_simulated_world(tmp_path) as world:
        end = await take(world, "point", 1)
        async with open_service(world.orchestrator):
            await trio.sleep(100)
            assert await names(world) == ["point"]
            ahead = end - time.time() + 1
            await trio.sleep(3_000)
            assert await names(world) == ["point"]
            await trio.sleep(800)
            assert await names(world) == []
