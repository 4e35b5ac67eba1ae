"""Durations, windows and cron expressions; no I/O, and no clock but what a caller says that it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import attrs
from cronsim import CronSim, CronSimError

from snaporch.errors import InvalidInput

DAY = 86_400.0
_UNITS = {"s": 1.0, "min": 60.0, "h": 3_600.0, "d": DAY, "w": 7 * DAY}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)")
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")


def parse_duration(value: float | str) -> float:
    """Return seconds for ``90`` or ``"90s"``, ``"5min"``, ``"2h"``, ``"7d"``, ``"4w"``.

    Raises:
        InvalidInput: it is no duration.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise InvalidInput(f"{value!r} is not a duration; write for example 90, 90s, 5min, 2h, 7d or 4w")
    return float(found[1]) * _UNITS[found[2]]


def parse_zone(name: str) -> ZoneInfo:
    """Return a time zone.

    Raises:
        InvalidInput: there is none of that name.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not there, no name at all, a directory
        raise InvalidInput(f"{name!r} is not a time zone; write for example UTC or Europe/Berlin") from None


def parse_clock(text: str) -> time:
    """Return a time of day for ``"22:30"``.

    Raises:
        InvalidInput: it is none.
    """
    if not _CLOCK.fullmatch(text):
        raise InvalidInput(f"{text!r} is not a time of day; write for example 06:00 or 22:30")
    return time.fromisoformat(text)


# --- windows ------------------------------------------------------------------------------------------------------


def _next(now: datetime, at: time) -> datetime:
    """Return the first instant after `now` at which local clocks show `at`; one that a change skips is moved on."""
    for days in range(3):
        day = now.date() + timedelta(days=days)
        # Through UTC: an hour that does not exist becomes the one that clocks show instead.
        found = datetime.combine(day, at, now.tzinfo).astimezone(UTC)
        if found > now:
            return found.astimezone(now.tzinfo)
    raise AssertionError("every time of day comes within two days")


def until_open(opens: str, closes: str, zone: str, now: float) -> float:
    """Return the seconds until a window is open, 0 when it is; `now` in seconds since the epoch."""
    local = datetime.fromtimestamp(now, parse_zone(zone))
    opening, closing = _next(local, parse_clock(opens)), _next(local, parse_clock(closes))
    return 0.0 if closing < opening else opening.timestamp() - now


def until_closed(opens: str, closes: str, zone: str, now: float) -> float:
    """Return the seconds until an open window closes, or the next one does."""
    wait = until_open(opens, closes, zone, now)
    local = datetime.fromtimestamp(now + wait, parse_zone(zone))
    return _next(local, parse_clock(closes)).timestamp() - now


# --- cron ---------------------------------------------------------------------------------------------------------


@attrs.frozen
class Cron:
    """When something is due: a cron expression in a time zone, moved by a jitter.

    Where clocks are set, this is Debian's cron: what falls into a skipped hour is due right after it, what falls
    into a repeated one is due once.

    Attributes:
        expression: five fields.
        zone: a name of the time zone database.
        jitter: each instant is moved by up to so many seconds, always the same ones for the same `name`.
        name: of what is due.
    """

    expression: str
    zone: str = "UTC"
    jitter: float = 0.0
    name: str = ""

    def __attrs_post_init__(self) -> None:
        zone = parse_zone(self.zone)
        try:
            next(CronSim(self.expression, datetime(2024, 1, 1, tzinfo=zone)))
        except (CronSimError, StopIteration):
            raise InvalidInput(
                f"{self.expression!r} is not a cron expression: minute hour day-of-month month day-of-week, for "
                "example '30 2 * * *'"
            ) from None

    def after(self, instant: float) -> Iterator[tuple[float, float]]:
        """Yield what is due after an instant: when by the expression, and when with the jitter."""
        began = datetime.fromtimestamp(instant, parse_zone(self.zone))
        for due in CronSim(self.expression, began):
            seconds = due.timestamp()
            yield seconds, seconds + self.jitter * self._spread(seconds)

    def _spread(self, due: float) -> float:
        """Return a number in [0, 1): the same after a restart, another for each plan and each day."""
        digest = hashlib.blake2b(f"{self.name} {due:.0f}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) / 2**32
