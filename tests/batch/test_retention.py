"""Retention: which stay, rule by rule, and what holds whatever the policy."""

from __future__ import annotations

from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st

from snaporch.batch.plan import Retention
from snaporch.batch.retention import Candidate, Verdict, plan_retention

HOUR, DAY = 3_600.0, 86_400.0
NOW = 1_736_899_200.0  # Wednesday, 15 January 2025, 00:00 UTC


def hourly(count: int) -> list[Candidate]:
    """Return one snapshot for each of the last hours, h0 the newest."""
    return [Candidate(f"h{number}", NOW - HOUR * number - 60, 10) for number in range(count)]


def kept(candidates: list[Candidate], **rules: Any) -> list[str]:
    return list(plan_retention(candidates, Retention(**rules), NOW).keep)


def test_last_and_hourly() -> None:
    """So many of the newest, and so many of the newest of each hour."""
    assert kept(hourly(9), last=3) == ["h0", "h1", "h2"]
    crowded = [*hourly(4), Candidate("extra", NOW - 30)]
    assert kept(crowded, hourly=2) == ["extra", "h1"]


def test_daily_weekly_monthly() -> None:
    """The newest of each period; periods without a snapshot do not count."""
    days = [Candidate(f"d{number}", NOW - DAY * number - 60) for number in range(60)]
    assert kept(days, daily=2) == ["d0", "d1"]
    assert kept(days, weekly=3) == ["d0", "d2", "d9"]  # Tuesday, and two Sundays
    assert kept(days, monthly=2) == ["d0", "d14"]  # 14 January, and 31 December
    assert kept([days[0], days[5], days[50]], daily=3) == ["d0", "d5", "d50"]


def test_zone() -> None:
    """A day begins where the policy says: at 23:59 UTC it is the next one in Berlin."""
    pair = [Candidate("before", NOW - 2 * HOUR), Candidate("after", NOW - 60)]
    assert kept(pair, daily=2) == ["after"]
    assert kept(pair, daily=2, zone="Europe/Berlin") == ["after", "before"]


def test_within() -> None:
    """All that are younger stay."""
    assert kept(hourly(9), within=3 * HOUR) == ["h0", "h1", "h2"]


def test_max_bytes() -> None:
    """Of what rules keep, the oldest go until there is room; the newest good one and pinned ones do not."""
    assert kept(hourly(9), last=5, max_bytes=30) == ["h0", "h1", "h2"]
    assert kept(hourly(9), last=5, max_bytes=0) == ["h0"]
    assert kept(hourly(9), last=5, max_bytes=20, pin=("h4",)) == ["h0", "h4"]


def test_a_damaged_one_takes_nobodys_place() -> None:
    """With the two newest damaged, `last = 1` keeps the third."""
    found = [attrs.evolve(each, good=each.name not in {"h0", "h1"}) for each in hourly(4)]
    verdict = plan_retention(found, Retention(last=1), NOW)
    assert list(verdict.keep) == ["h2"]
    assert verdict.delete == {"h3": "no rule keeps it", "h1": "damaged", "h0": "damaged"}


candidates = st.lists(
    st.builds(
        Candidate,
        name=st.integers(0, 10**6).map("s{}".format),
        point=st.floats(NOW - 400 * DAY, NOW),
        bytes=st.integers(0, 100),
        good=st.booleans(),
        pinned=st.booleans(),
    ),
    max_size=30,
    unique_by=lambda each: each.name,
)
counts = st.integers(0, 5)
policies = st.builds(
    Retention,
    last=st.integers(1, 5),
    hourly=counts,
    daily=counts,
    weekly=counts,
    monthly=counts,
    within=st.floats(0, 100 * DAY),
    max_bytes=st.none() | st.integers(0, 500),
)


@given(candidates, policies)
def test_whatever_the_policy(found: list[Candidate], policy: Retention) -> None:
    """Pinned ones stay, a good one stays where there is one, and a second look deletes nothing more."""
    verdict: Verdict = plan_retention(found, policy, NOW)
    by_name = {each.name: each for each in found}
    assert sorted([*verdict.keep, *verdict.delete]) == sorted(by_name)
    assert not any(by_name[name].pinned for name in verdict.delete)
    assert any(by_name[name].good for name in verdict.keep) == any(each.good for each in found)
    if policy.max_bytes is not None:
        loose = [by_name[n] for n, why in verdict.keep.items() if why not in {"pinned", "the newest good one"}]
        assert not loose or sum(by_name[name].bytes for name in verdict.keep) <= policy.max_bytes
    again = plan_retention([by_name[name] for name in verdict.keep], policy, NOW)
    assert not again.delete
