"""Rehearsals: what is foretold is what then happens, and nothing real is touched."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from trio.testing import MockClock

from snaporch import CreateFlag, DomainSnapshot, NotFound
from snaporch.batch.rehearsal import Forecast, lines, rehearse
from snaporch.orchestrator import catalog_of
from snaporch.testing import GuestModel, SimulatedSpeed, ThreadsHoldTime
from tests.batch.estate import GIB, Estate, open_estate, plan

Virtual = ThreadsHoldTime


async def forecast(estate: Estate, **options: Any) -> Forecast:
    """Rehearse; nothing may be different afterwards."""
    before = await catalog_of(estate.orch).domains(), await estate.snapshots(), estate.host.files()
    found = await rehearse(estate.orch, plan(**options))
    assert before == (await catalog_of(estate.orch).domains(), await estate.snapshots(), estate.host.files())
    return found


async def test_it_comes_true(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Of domains that differ in size, speed and pause: time, space and pause are those of the run that follows."""
    async with open_estate(tmp_path, 0) as estate:
        for number, (rate, arm) in enumerate([(2e8, 2e10), (5e8, 4e10), (1e9, 5e10), (1e8, 1e10)]):
            estate.host.speeds[f"vm{number}"] = SimulatedSpeed(bandwidth=rate, arm_rate=arm)
        estate.host.models["vm1"] = GuestModel(background_blocker="VFIO", dirty_rate=1e6)
        await estate.boot(4)
        for number in range(4):
            await estate.orch.create(f"vm{number}", DomainSnapshot("before"), CreateFlag.LIVE)
        limits = {"per_host": 2}
        told = await forecast(estate, limits=limits)
        batch = await estate.run(plan(limits=limits))
        items = await estate.items(batch)
    pauses = [record.pause or 0.0 for record in items.values()]
    assert (told.domains, told.known, told.counts) == (4, 4, {"done": 4})
    assert told.seconds == pytest.approx((batch.ended or 0) - batch.begun, rel=0.05)
    assert told.bytes == pytest.approx(sum(record.bytes for record in items.values()), rel=0.01)
    assert told.pause_longest == pytest.approx(max(pauses), rel=0.1)
    assert any("4 done" in line for line in lines(told))


async def test_what_was_never_taken(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """Domains without a snapshot are taken to be full, and as quick as the others; limits hold."""
    async with open_estate(tmp_path, 3) as estate:
        estate.host.speed = attrs.evolve(estate.host.speed, bandwidth=1e9)
        await estate.orch.create("vm0", DomainSnapshot("before"), CreateFlag.LIVE)
        told = await forecast(estate, limits={"bandwidth": GIB // 10})
        late = await forecast(estate, limits={"per_host": 1, "deadline": 1.5})
    assert (told.known, told.bytes) == (1, 3 * GIB)
    assert told.seconds == pytest.approx(30, rel=0.02)
    assert late.counts == {"done": 1, "skipped": 2}
    assert "the deadline of 1.5 s ran out" in late.failures["vm1"]


async def test_what_would_fail(
    tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little space is seen; a domain that is not there is an error."""
    async with open_estate(tmp_path, 2) as estate:
        monkeypatch.setattr("snaporch.batch.rehearsal.free_bytes", lambda _: GIB + GIB // 2)
        told = await forecast(estate, limits={"per_host": 1})
        assert told.counts == {"done": 1, "failed": 1}
        assert "bytes" in told.failures["vm1"]
        with pytest.raises(NotFound):
            await rehearse(estate.orch, plan(select={"names": ["nobody"]}))


async def test_a_page(tmp_path: Path, autojump_clock: MockClock, virtual_time: Virtual) -> None:
    """The timeline that the run would have can be looked at."""
    page = tmp_path / "page.html"
    async with open_estate(tmp_path / "root", 3) as estate:
        await rehearse(estate.orch, plan(), html=str(page))
    assert page.read_text().count('<rect class="done"') == 3
