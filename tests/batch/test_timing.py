"""Durations, windows, cron: where clocks are set, too."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest

from snaporch.batch.timing import Cron, until_closed, until_open
from snaporch.errors import InvalidInput
from snaporch.model.units import parse_duration

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


SYDNEY_ISLAND, CHILE = "Australia/Lord_Howe", "America/Santiago"  # half an hour at two; an hour at midnight


@pytest.mark.parametrize(
    ("zone", "night", "expression", "due"),
    [
        # Skipped: 02:00 to 03:00, 02:00 to 02:30, 00:00 to 01:00.
        ("Europe/Berlin", "2026-03-29", "30 2 * * *", ["03:00"]),
        ("Europe/Berlin", "2026-03-29", "*/30 2 * * *", ["03:00"]),
        ("Europe/Berlin", "2026-03-29", "15 1,2,3 * * *", ["01:15", "03:00", "03:15"]),
        ("Europe/Berlin", "2026-03-29", "30 */2 * * *", ["00:30", "03:00", "04:30"]),
        ("Europe/Berlin", "2026-03-29", "30 * * * *", ["00:30", "01:30", "03:30", "04:30"]),
        (SYDNEY_ISLAND, "2026-10-04", "*/15 2 * * *", ["02:30", "02:45"]),
        (SYDNEY_ISLAND, "2026-10-04", "*/15 * * * *", ["01:45", "02:30", "02:45", "03:00"]),
        (CHILE, "2026-09-06", "30 0 * * *", ["01:00"]),
        (CHILE, "2026-09-06", "*/20 0 * * *", ["01:00"]),
        # Repeated: 02:00 to 03:00, 01:30 to 02:00, and 23:00 to 24:00 of the day before.
        ("Europe/Berlin", "2026-10-25", "30 2 * * *", ["02:30"]),
        ("Europe/Berlin", "2026-10-25", "*/30 2 * * *", ["02:00", "02:30"]),
        ("Europe/Berlin", "2026-10-25", "30 */2 * * *", ["00:30", "02:30", "04:30"]),
        ("Europe/Berlin", "2026-10-25", "30 * * * *", ["00:30", "01:30", "02:30", "02:30", "03:30", "04:30"]),
        (SYDNEY_ISLAND, "2026-04-05", "45 1 * * *", ["01:45"]),
        (SYDNEY_ISLAND, "2026-04-05", "45 * * * *", ["00:45", "01:45", "02:45"]),
        (CHILE, "2026-04-04", "*/30 23 * * *", ["23:00", "23:30"]),
    ],
)
def test_cron_in_the_night_of_a_change(zone: str, night: str, expression: str, due: list[str]) -> None:
    """An hour that is named is due once, together with others that are skipped; each that passes, with ``*``."""
    cron, day = Cron(expression, zone), datetime.fromisoformat(night).replace(tzinfo=ZoneInfo(zone))
    dues = islice(cron.after(day.timestamp() - 1), 30)
    found = [datetime.fromtimestamp(at, day.tzinfo) for at, _ in dues]
    those = [each.strftime("%H:%M") for each in found if each.date() == day.date()]
    begin = those.index(due[0])
    assert those[begin : begin + len(due)] == due
    if "* * * *" not in expression[2:]:
        assert len({each.strftime("%d %H:%M") for each in found}) == len(found)


def test_cron_from_within_the_repeated_hour() -> None:
    """What was due in the first of two hours is not due again, or in the past, for who asks in the second."""
    second = at("2026-10-25 02:10", fold=1)
    assert next(Cron("30 2 * * *", "Europe/Berlin").after(second))[0] == at("2026-10-26 02:30")


@pytest.mark.parametrize("expression", ["* * * * * *", "0 30 2 * * *", "* * * *", "@daily", ""])
def test_five_fields(expression: str) -> None:
    """Anything but five fields is refused: with six, some take the first for minutes and some for seconds."""
    with pytest.raises(InvalidInput, match="cron expression"):
        Cron(expression)


@pytest.mark.parametrize(
    ("zone", "opens", "closes", "begin", "end"),
    [
        # Skipped: it opens at the jump, closes at the jump, or lies in what is skipped and opens a day later.
        ("Europe/Berlin", "02:30", "03:30", "2026-03-29T03:00+02:00", "2026-03-29T03:30+02:00"),
        ("Europe/Berlin", "01:30", "02:30", "2026-03-29T01:30+01:00", "2026-03-29T03:00+02:00"),
        ("Europe/Berlin", "02:00", "02:30", "2026-03-30T02:00+02:00", "2026-03-30T02:30+02:00"),
        (SYDNEY_ISLAND, "02:10", "03:00", "2026-10-04T02:30+11:00", "2026-10-04T03:00+11:00"),
        (CHILE, "00:00", "06:00", "2026-09-06T01:00-03:00", "2026-09-06T06:00-03:00"),
        (CHILE, "00:10", "00:50", "2026-09-07T00:10-03:00", "2026-09-07T00:50-03:00"),
        # Repeated: it opens at the first of two times, and closes at the first.
        ("Europe/Berlin", "02:00", "03:00", "2026-10-25T02:00+02:00", "2026-10-25T03:00+01:00"),
        ("Europe/Berlin", "02:30", "02:45", "2026-10-25T02:30+02:00", "2026-10-25T02:45+02:00"),
        (SYDNEY_ISLAND, "01:40", "02:00", "2026-04-05T01:40+11:00", "2026-04-05T02:00+10:30"),
        (CHILE, "23:30", "01:00", "2026-04-04T23:30-03:00", "2026-04-05T01:00-04:00"),
    ],
)
def test_window_in_the_night_of_a_change(zone: str, opens: str, closes: str, begin: str, end: str) -> None:
    """It opens and closes once, and is never open for a day because both fall together."""
    first, last = (datetime.fromisoformat(text).timestamp() for text in (begin, end))
    window, hour = (opens, closes, zone), 3600
    for now in (first - 2 * hour, first - hour, first - 1):
        assert now + until_open(*window, now) == first
        assert now + until_closed(*window, now) == last
    for now in (first, (first + last) / 2, last - 1):
        assert until_open(*window, now) == 0
        assert now + until_closed(*window, now) == last
    assert until_open(*window, last) > 17 * hour


def test_jitter() -> None:
    """It stays within its bound, is the same each time, and another for another plan."""
    one, other = (Cron("0 * * * *", jitter=600, name=name) for name in ("one", "other"))
    moved = [when - due for due, when in islice(one.after(0), 100)]
    assert all(0 <= seconds < 600 for seconds in moved)
    assert max(moved) - min(moved) > 300
    assert moved == [when - due for due, when in islice(one.after(0), 100)]
    assert moved != [when - due for due, when in islice(other.after(0), 100)]
