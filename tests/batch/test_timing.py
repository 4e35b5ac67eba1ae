"""Durations, windows, cron: where clocks are set, too."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest

from snaporch.batch.timing import Cron, parse_duration, until_closed, until_open
from snaporch.errors import InvalidInput

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", None), (90, 90), ("1.5h", 5400), ("2 w", 1_209_600), (-1, None)]
)
def test_durations(text: float | str, seconds: float | None) -> None:
    """A string has a unit; a number is seconds."""
    if seconds is None:
        with pytest.raises(InvalidInput):
            parse_duration(text)
    else:
        assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("now", "opens", "closes"),
    [
        ("2025-01-10 21:00", 3600, 9 * 3600),
        ("2025-01-10 22:00", 0, 8 * 3600),
        ("2025-01-11 05:59", 0, 60),
        ("2025-01-11 06:00", 16 * 3600, 24 * 3600),
        ("2025-03-29 22:00", 0, 7 * 3600),  # the night in which 02:00 to 03:00 is skipped
        ("2025-10-25 22:00", 0, 9 * 3600),  # and that in which it comes twice
    ],
)
def test_windows(now: str, opens: float, closes: float) -> None:
    """A window over midnight, in the nights in which clocks are set as well."""
    window = ("22:00", "06:00", "Europe/Berlin")
    assert until_open(*window, at(now)) == opens
    assert until_closed(*window, at(now)) == closes


def test_cron_where_clocks_are_set() -> None:
    """Half past two comes once a day, whether clocks show it never, once or twice."""
    cron = Cron("30 2 * * *", "Europe/Berlin")
    for begin, days in (("2025-03-28 00:00", 4), ("2025-10-25 00:00", 3)):
        dates = [datetime.fromtimestamp(due, BERLIN).date() for due, _ in islice(cron.after(at(begin)), days)]
        first = datetime.fromisoformat(begin).date()
        assert dates == [first + timedelta(days=number) for number in range(days)]


def test_jitter() -> None:
    """It stays within its bound, is the same each time, and another for another plan."""
    one, other = (Cron("0 * * * *", jitter=600, name=name) for name in ("one", "other"))
    moved = [when - due for due, when in islice(one.after(0), 100)]
    assert all(0 <= seconds < 600 for seconds in moved)
    assert max(moved) - min(moved) > 300
    assert moved == [when - due for due, when in islice(one.after(0), 100)]
    assert moved != [when - due for due, when in islice(other.after(0), 100)]
