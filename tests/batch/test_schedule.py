"""Schedules: a year of nights in seconds, clocks that are set, runs that were missed, and no overlap."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import attrs
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from snaporch import InvalidInput
from snaporch.batch import store
from snaporch.batch.schedule import ScheduleInfo, Scheduler
from snaporch.batch.store import BatchRecord
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime
from tests.batch.estate import EPOCH, GIB, Estate, now, open_estate

HOUR, DAY = 3_600.0, 86_400.0
BERLIN = ZoneInfo("Europe/Berlin")
Virtual = ThreadsHoldTime


def write(
    directory: Path,
    name: str,
    cron: str,
    *,
    written: float | None = None,
    limits: str = "",
    schedule: str = "",
    domain: str = "vm0",
    file: str = "",
) -> Path:
    """Write a plan that is as old as `written`, by default as the present."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{file or name}.toml"
    text = f'name = "{name}"\nselect = {{ names = ["{domain}"] }}\nlimits = {{ {limits} }}\n'
    path.write_text(f'{text}[schedule]\ncron = "{cron}"\n{schedule}\n')
    when = now() if written is None else written
    os.utime(path, (when, when))
    return path


@asynccontextmanager
async def scheduled(
    estate: Estate, directory: Path, look_every: float = 30.0, clock: Callable[[], float] = now
) -> AsyncIterator[Scheduler]:
    """Let plans run for as long as the body takes."""
    scheduler = Scheduler(estate.orch, directory, clock, look_every)
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        yield scheduler
        nursery.cancel_scope.cancel()


async def batches(estate: Estate) -> tuple[BatchRecord, ...]:
    return await store.batches(catalog_of(estate.orch))


async def test_a_year(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Every Sunday at half past two by the clocks of Berlin, which are set twice that year, at just that hour."""
    plans = tmp_path / "plans"
    async with open_estate(tmp_path / "root", 1) as estate:
        write(plans, "weekly", "30 2 * * 0", schedule='zone = "Europe/Berlin"\njitter = "10min"')
        async with scheduled(estate, plans, look_every=DAY):
            await trio.sleep(365 * DAY)
        found = await batches(estate)
    assert [batch.counts for batch in found] == [{"done": 1}] * 52
    local = [datetime.fromtimestamp(batch.due, BERLIN) for batch in found]
    assert {at.weekday() for at in local} == {6}
    assert all(b.date() - a.date() == timedelta(7) for a, b in pairwise(local))
    odd = [at for at in local if (at.hour, at.minute) != (2, 30)]
    assert [at.strftime("%m-%d %H:%M") for at in odd] == ["03-29 03:00"]  # 02:30 is skipped in that night
    assert all(0 <= batch.begun - batch.due < 600 + 1 for batch in found)


async def test_missed(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """However many were missed, it is one run, at once; or none; and nothing from before the plan was written."""
    async with open_estate(tmp_path / "root", 1) as estate:
        await trio.sleep(10 * DAY)
        cron = "0 3 * * *"
        write(tmp_path / "plans", "once", cron, written=now() - 5 * DAY)
        write(tmp_path / "plans", "skip", cron, written=now() - 5 * DAY, schedule='missed = "skip"')
        write(tmp_path / "plans", "new", cron, written=now() - 60)
        async with scheduled(estate, tmp_path / "plans"):
            await trio.sleep(HOUR)
        assert [batch.name for batch in await batches(estate)] == ["once"]
        async with scheduled(estate, tmp_path / "plans"):  # and after a restart not once more
            await trio.sleep(DAY)
        names = [batch.name for batch in await batches(estate)]
    assert sorted(names) == ["new", "once", "once", "skip"]


async def test_no_overlap(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """A batch that takes an hour and a half is due every hour: what comes due while it runs is dropped."""
    async with open_estate(tmp_path / "root", 1) as estate:
        write(tmp_path / "plans", "hourly", "0 * * * *", limits=f"bandwidth = {GIB // 5400}")
        async with scheduled(estate, tmp_path / "plans") as scheduler:
            await trio.sleep(1.5 * HOUR)
            (info,) = scheduler.schedules()
            assert (info.running, info.next) == (True, None)
            await trio.sleep(6 * HOUR)
        found = await batches(estate)
    ended = [batch for batch in found if batch.ended]
    assert len(ended) == 3
    assert all(b.begun >= (a.ended or 0) for a, b in pairwise(found))
    assert [round((b.due - a.due) / HOUR) for a, b in pairwise(found)] == [2] * (len(found) - 1)


async def test_a_clock_that_was_wrong(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """A clock that was years ahead and is set right has no plan wait for these years, here and after a restart."""
    plans, ahead = tmp_path / "plans", 3 * 365 * DAY

    async def in_time() -> int:
        return sum(batch.due <= now() for batch in await batches(estate))

    async with open_estate(tmp_path / "root", 1) as estate:
        write(plans, "daily", "0 3 * * *", written=now() + ahead)
        async with scheduled(estate, plans, clock=lambda: now() + ahead) as scheduler:
            await trio.sleep(2 * DAY)
            assert len(await batches(estate)) == 2
            ahead = 0.0
            with capture_logs() as lines:
                await trio.sleep(HOUR)
            assert any("set back" in line["event"] for line in lines)
            (info,) = scheduler.schedules()
            assert info.next is not None
            assert now() < info.next <= now() + DAY
            assert (info.succeeded, info.overdue) == (0.0, False)  # what lies ahead is no success of today's
            await trio.sleep(2 * DAY)
            assert await in_time() == 2
        async with scheduled(estate, plans):  # the newest batch that it knows of is years ahead
            await trio.sleep(DAY)
        assert (await in_time(), len(await batches(estate))) == (3, 5)


async def test_it_goes_on_with_what_was_cut_short(
    tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual
) -> None:
    """The service ends in the middle of a batch; the next one goes on at once, and does not run it again."""
    async with open_estate(tmp_path / "root", 1) as estate:
        write(tmp_path / "plans", "daily", "0 16 * * *", limits=f"bandwidth = {GIB // 600}")  # EPOCH is 15:06:40
        async with scheduled(estate, tmp_path / "plans"):
            await trio.sleep(HOUR - 4 * 60)  # the batch is a few minutes old
        (cut,) = await batches(estate)
        assert cut.ended is None
        await trio.sleep(HOUR)
        began = now()
        async with scheduled(estate, tmp_path / "plans"):
            await trio.sleep(DAY / 2)
        (batch,) = await batches(estate)
    assert (batch.id, batch.counts, batch.runs) == (cut.id, {"done": 1}, 2)
    assert began + 600 < (batch.ended or 0) < began + 700


def named(scheduler: Scheduler) -> dict[str, ScheduleInfo]:
    return {Path(info.file).stem: info for info in scheduler.schedules()}


async def test_the_directory(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Plans come, change and go without a restart; one that makes no sense harms no other."""
    plans = tmp_path / "plans"
    async with open_estate(tmp_path / "root", 1) as estate:
        write(plans, "a", "0 * * * *")
        (plans / "broken.toml").write_text("name = 3")
        (plans / "loop.toml").symlink_to("loop.toml")
        (plans / "directory.toml").mkdir()
        async with scheduled(estate, plans) as scheduler:
            write(plans, "b", "30 * * * *")
            write(plans, "b", "0 * * * *", file="twin")
            write(plans, "lost", "0 * * * *", domain="nobody")
            await trio.sleep(2 * HOUR)
            seen = named(scheduler)
            assert "3 is not a string" in seen["broken"].error
            assert "Too many levels of symbolic links" in seen["loop"].error
            assert "directory" in seen["directory"].error
            assert "another file here is plan b" in seen["twin"].error
            assert "no domain 'nobody'" in seen["lost"].error
            assert seen["a"].outcome == seen["b"].outcome == "complete"
            assert seen["a"].failed == ()
            assert seen["a"].succeeded > EPOCH
            assert seen["lost"].succeeded == 0
            assert seen["a"].next == pytest.approx(EPOCH + 2 * HOUR + 53 * 60 + 20)
            (plans / "a.toml").unlink()
            write(plans, "b", "45 12 * * *")
            await trio.sleep(HOUR)
            assert sorted(named(scheduler)) == ["b", "broken", "directory", "loop", "lost", "twin"]
            plans.rename(tmp_path / "away")  # all goes on as it was last seen
            await trio.sleep(HOUR)
            assert "b" in named(scheduler)
            (tmp_path / "away").rename(plans)
            assert named(scheduler)["b"].cron == "45 12 * * *"
        found = [batch.name for batch in await batches(estate) if batch.stage is store.Stage.COMPLETE]
        assert sorted(found) == ["a", "a", "b", "b"]
        nowhere = attrs.evolve(scheduler, directory=tmp_path / "nowhere")
        with pytest.raises(InvalidInput, match="is no directory"):
            await nowhere.run()


async def test_what_failed_is_seen(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """A plan of which items fail says which and why, in its schedule and in the log, and has not succeeded."""
    plans = tmp_path / "plans"
    async with open_estate(tmp_path / "root", 1) as estate:
        path = write(plans, "frozen", "0 * * * *")
        text = path.read_text().replace("[schedule]", "snapshot = { quiesce = true }\n[schedule]")
        path.write_text(text)
        os.utime(path, (now(), now()))
        with capture_logs() as lines:
            async with scheduled(estate, plans) as scheduler:
                await trio.sleep(2 * HOUR)
                seen = named(scheduler)["frozen"]
        assert (seen.outcome, seen.succeeded) == ("failed", 0)
        assert len(seen.failed) == 1
        assert "agent" in seen.failed[0]
        assert next(line for line in lines if line["event"] == "a plan has not done all")["why"] == [*seen.failed]


async def test_what_is_overdue(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """One that never ran, selects nobody, has no schedule, or is no plan; not one that took every snapshot."""
    plans = tmp_path / "plans"
    async with open_estate(tmp_path / "root", 1) as estate:
        for name, domain in (("well", "vm0"), ("nobody", "nobody")):
            write(plans, name, "0 * * * *", domain=domain)
        write(plans, "yearly", "0 0 1 1 *")
        (plans / "broken.toml").write_text("name = 3")
        (plans / "idle.toml").write_text('name = "idle"\nselect = { globs = ["*"] }')
        async with scheduled(estate, plans) as scheduler:
            early = {name for name, info in named(scheduler).items() if info.overdue}
            await trio.sleep(2 * HOUR)
            late = {name for name, info in named(scheduler).items() if info.overdue}
        assert (early, late) == ({"broken", "idle"}, {"broken", "idle", "nobody"})
        lost = await store.latest(catalog_of(estate.orch), "nobody")
        assert lost is not None
        assert (lost.stage, lost.due > 0) == (store.Stage.FAILED, True)
        assert "no domain 'nobody'" in lost.problems[0]  # `batch show` says so


async def test_a_run_that_is_dropped(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """It is in the log and in the plan's schedule; a plan that runs for longer than its period is overdue."""
    plans, told = tmp_path / "plans", list[tuple[str, str]]()
    async with open_estate(tmp_path / "root", 1) as estate:
        write(plans, "slow", "* * * * *", limits=f"bandwidth = {GIB // 300}")
        with capture_logs() as lines:
            async with scheduled(estate, plans) as scheduler:
                scheduler.failed = lambda plan, why: told.append((plan, why))
                await trio.sleep(220)
                assert named(scheduler)["slow"].overdue
                await trio.sleep(200)
                assert named(scheduler)["slow"].dropped >= 3
                assert not told
                write(plans, "lost", "* * * * *", domain="nobody")
                await trio.sleep(120)
        assert any(line["event"].startswith("runs of a plan were dropped") for line in lines)
        slow = next(batch for batch in await batches(estate) if batch.name == "slow")
        assert slow.stage is store.Stage.COMPLETE
        assert "dropped" in slow.problems[-1]  # `batch show` says so
        assert told[0][0] == "lost"
        assert "no domain 'nobody'" in told[0][1]
