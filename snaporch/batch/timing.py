"""Durations, windows and cron expressions; no I/O, and no clock but what a caller says that it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import attrs
from cronsim import CronSim, CronSimError

from snaporch.errors import InvalidInput

DAY = 86_400.0
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")


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


def _instant(day: date, at: time, zone: ZoneInfo) -> float:
    """Return when clocks show a time of a day: the first of two times, and where they skip it, the jump."""
    shown = datetime.combine(day, at, zone)
    found, other = shown.astimezone(UTC), shown.replace(fold=1).astimezone(UTC)
    if found <= other:
        return found.timestamp()
    while found - other > timedelta(seconds=0.25):  # in the gap: before the jump, as it were, and after it
        middle = other + (found - other) / 2
        if middle.astimezone(zone).utcoffset() == shown.utcoffset():
            other = middle
        else:
            found = middle
    return round(found.timestamp())


def _current(opens: str, closes: str, zone: str, now: float) -> tuple[float, float]:
    """Return when the window opens and closes that is open, or else the next one."""
    clocks, opening, closing = parse_zone(zone), parse_clock(opens), parse_clock(closes)
    today = datetime.fromtimestamp(now, clocks).date()
    for days in range(-1, 4):
        day = today + timedelta(days=days)
        begin = _instant(day, opening, clocks)
        end = _instant(day if opening < closing else day + timedelta(days=1), closing, clocks)
        if now < end and begin < end:
            return begin, end
    raise AssertionError("every window opens within two days")


def until_open(opens: str, closes: str, zone: str, now: float) -> float:
    """Return the seconds until a window is open, 0 when it is; `now` in seconds since the epoch.

    Where clocks are set, a window opens and closes once: at the first of two times that clocks show, and at the
    jump for a time that it skips. One that lies in the skipped hour as a whole does not open that night.
    """
    return max(0.0, _current(opens, closes, zone, now)[0] - now)


def until_closed(opens: str, closes: str, zone: str, now: float) -> float:
    """Return the seconds until an open window closes, or the next one does."""
    return _current(opens, closes, zone, now)[1] - now


# --- cron ---------------------------------------------------------------------------------------------------------


@attrs.frozen
class Cron:
    """When something is due: a cron expression in a time zone, moved by a jitter.

    Where clocks are set: with ``*`` for the hour every hour that passes has its runs, a repeated one too. Whatever
    else is there names hours: each time of day is due once, in a repeated hour at the first of the two, and all
    those that are skipped are due together, once, right after the jump.

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
            next(CronSim(self._fields, datetime(2024, 1, 1, tzinfo=zone)))
        except (CronSimError, StopIteration, ValueError):
            raise InvalidInput(
                f"{self.expression!r} is not a cron expression: minute hour day-of-month month day-of-week, for "
                "example '30 2 * * *'"
            ) from None

    @property
    def _fields(self) -> str:
        """The expression, with the numbers for which ``*`` stands where it names hours, so that CronSim knows."""
        minute, hour, *days = self.expression.split()
        if len(days) != 3:  # noqa: PLR2004 - day of the month, month, day of the week
            raise ValueError(self.expression)
        if hour not in {"*", "*/1"}:
            minute, hour = re.sub(r"^\*", "0-59", minute), re.sub(r"^\*", "0-23", hour)
        return " ".join((minute, hour, *days))

    def after(self, instant: float) -> Iterator[tuple[float, float]]:
        """Yield what is due after an instant: when by the expression, and when with the jitter."""
        last = instant
        for due in CronSim(self._fields, datetime.fromtimestamp(instant, parse_zone(self.zone))):
            # By a time of day alone CronSim does not know which of two hours `instant` is in.
            if (seconds := due.timestamp()) > last:
                last = seconds
                yield seconds, seconds + self.jitter * self._spread(seconds)

    def _spread(self, due: float) -> float:
        """Return a number in [0, 1): the same after a restart, another for each plan and each day."""
        digest = hashlib.blake2b(f"{self.name} {due:.0f}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) / 2**32
