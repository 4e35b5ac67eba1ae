"""A plan: what is snapshotted, how, within which limits, and what becomes of it; a TOML file.

The classes here are the format: `snaporch.batch.schema` makes docs/reference/batch.schema.json of them, and an
unknown key or a wrong value is refused with its place. Everything has a default that does nothing but `name` and
`select`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from snaporch.batch.timing import Cron, parse_clock, parse_zone
from snaporch.errors import InvalidInput
from snaporch.model.convert import read_toml, structured
from snaporch.model.formats import versioned
from snaporch.model.hook import Hook
from snaporch.model.names import SHORT, check_name
from snaporch.model.request import OnTimeout, Strategy
from snaporch.model.units import Seconds, Size

_SAMPLE = {"plan": "p", "time": "20260101T000000Z", "batch": "0" * SHORT}


class OnFailure(enum.StrEnum):
    """What becomes of a batch when a domain's snapshot fails."""

    CONTINUE = "continue"
    """The others go on."""
    STOP = "stop"
    """No other is begun; those that run are finished."""
    UNDO_ALL = "undo_all"
    """Those that run are rolled back, and those that are done are deleted."""


class Check(enum.StrEnum):
    """How a snapshot is verified once it is taken."""

    NONE = "none"
    FILES = "files"
    """Every file is read again and compared with its checksum."""
    BOOT = "boot"
    """Also, a throw-away copy is loaded and runs."""


class Missed(enum.StrEnum):
    """What becomes of instants that came while nothing was there to see them."""

    ONCE = "once"
    """However many were missed, the plan runs once, at once."""
    SKIP = "skip"


@attrs.frozen
class Select:
    """Which domains: those that any of these says, but for those excluded.

    Attributes:
        names: domains by name; one that does not exist is an error.
        globs: domains whose names match, for example ``web*``.
        tags: domains that have one of these tags (``snaporch domain tag``).
        exclude: domains whose names match one of these are left out.
        groups: by a name of the group's own: domains that are taken at one point in time, as one.
    """

    names: tuple[str, ...] = ()
    globs: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if not (self.names or self.globs or self.tags or self.groups):
            raise InvalidInput("selects nothing: give names, globs, tags or groups; globs = ['*'] is all")
        for group, members in self.groups.items():
            check_name(group, "group")
            if len(set(members)) != len(members) or not members:
                raise InvalidInput(f"group {group!r} must have members, and each once")


@attrs.frozen
class How:
    """How each snapshot is taken.

    Attributes:
        name: of every snapshot of a batch, from ``{plan}``, ``{time}`` (UTC) and ``{batch}``.
        description: free text.
        live: running guests run on; else each is paused until its memory is saved.
        memory: with memory, where there is any; else only inactive domains can be taken.
        strategy: how the memory of a running guest is saved.
        quiesce: the guest agent freezes the guest's file systems around the point.
        max_seconds: the time that saving memory live may take.
        on_timeout: what happens then.
        verify: what is checked once it is taken; a snapshot that is damaged is a failure.
    """

    name: str = "{plan}-{time}"
    description: str = ""
    live: bool = True
    memory: bool = True
    strategy: Strategy = Strategy.AUTO
    quiesce: bool = False
    max_seconds: Seconds | None = None
    on_timeout: OnTimeout = OnTimeout.FAIL
    verify: Check = Check.NONE

    def __attrs_post_init__(self) -> None:
        try:
            check_name(self.name.format(**_SAMPLE))
        except (KeyError, IndexError, ValueError, AttributeError):
            raise InvalidInput(
                f"name {self.name!r}: only {{plan}}, {{time}} and {{batch}} can be filled in"
            ) from None
        if self.strategy in {Strategy.PAUSED, Strategy.NONE}:
            raise InvalidInput("strategy is one of auto, background, precopy; for a pause write live = false")


@attrs.frozen
class Window:
    """The hours in which snapshots may be begun, by the clocks of a time zone.

    Attributes:
        opens: for example ``22:00``.
        closes: for example ``06:00``; what runs then is finished, nothing else is begun.
        zone: a name of the time zone database.
    """

    opens: str
    closes: str
    zone: str = "UTC"

    def __attrs_post_init__(self) -> None:
        parse_zone(self.zone)
        if parse_clock(self.opens) == parse_clock(self.closes):
            raise InvalidInput("a window cannot close at the time at which it opens; leave it out for no window")


def _above(least: float, instance: object, attribute: attrs.Attribute[Any], value: float | None) -> None:
    del instance
    if value is not None and value < least:
        raise InvalidInput(f"{attribute.name} must be at least {least:g}")


_one_or_more = partial(_above, 1)


@attrs.frozen
class Limits:
    """What a batch may take.

    Attributes:
        per_host: snapshots at once on one host.
        per_directory: snapshots at once that write to, or read images from, one storage directory.
        bandwidth: bytes a second that all memory streams together may write; 0 is no limit.
        deadline: after so long a run begins no other snapshot, and rolls those back that are not finished.
        window: the hours in which snapshots may be begun.
        min_free: bytes that are to stay free where the root is: a snapshot that is expected to leave less is not
            begun, and has failed. Expected is memory as of the last ones, and that guests write as much as since
            the last snapshot.
    """

    per_host: int = attrs.field(default=4, validator=_one_or_more)
    per_directory: int | None = attrs.field(default=None, validator=_one_or_more)
    bandwidth: Size = Size(0)  # noqa: RUF009 - a number
    deadline: Seconds | None = None
    window: Window | None = None
    min_free: Size = attrs.field(default=Size(0), validator=partial(_above, 0))


@attrs.frozen
class Retries:
    """What is tried again: what was rolled back, or found a domain busy. What was refused would be so again.

    Attributes:
        attempts: in all; 1 tries nothing again.
        wait: before the second; each further wait is twice as long.
        busy: a domain on which something else is done is tried again for so long, within the window.
    """

    attempts: int = attrs.field(default=1, validator=_one_or_more)
    wait: Seconds = Seconds(5.0)  # noqa: RUF009 - a number
    busy: Seconds = Seconds(600.0)  # noqa: RUF009 - a number


@attrs.frozen
class Hooks:
    """Programs to run, each list in order.

    Attributes:
        before: once, first; if one fails nothing is begun.
        before_each: before each snapshot; if one fails that snapshot fails, and its domain is untouched.
        after_each: after each snapshot that was taken, and verified.
        failed_each: after each that failed.
        after: once, last, however it went.
    """

    before: tuple[Hook, ...] = ()
    before_each: tuple[Hook, ...] = ()
    after_each: tuple[Hook, ...] = ()
    failed_each: tuple[Hook, ...] = ()
    after: tuple[Hook, ...] = ()


@attrs.frozen
class Retention:
    """Which snapshots stay, of each domain that this batch has taken: those that any rule keeps.

    Attributes:
        last: so many of the newest.
        hourly: of each of the last so many hours that have any, the newest; likewise the following.
        daily: see hourly.
        weekly: see hourly; a week begins on Monday.
        monthly: see hourly.
        within: all that are younger than this.
        max_bytes: of what is kept, the oldest go until a domain's snapshots hold no more than this.
        pin: snapshots whose names match one of these stay, as do those pinned by ``snaporch pin``.
        zone: where hours and days begin.
        everything: also of snapshots that this plan has not taken.
    """

    last: int = attrs.field(default=0, validator=partial(_above, 0))
    hourly: int = attrs.field(default=0, validator=partial(_above, 0))
    daily: int = attrs.field(default=0, validator=partial(_above, 0))
    weekly: int = attrs.field(default=0, validator=partial(_above, 0))
    monthly: int = attrs.field(default=0, validator=partial(_above, 0))
    within: Seconds = Seconds(0.0)  # noqa: RUF009 - a number
    max_bytes: Size | None = None
    pin: tuple[str, ...] = ()
    zone: str = "UTC"
    everything: bool = False

    def __attrs_post_init__(self) -> None:
        parse_zone(self.zone)
        if not (self.last or self.hourly or self.daily or self.weekly or self.monthly or self.within):
            raise InvalidInput("keeps nothing: give last, hourly, daily, weekly, monthly or within")


@attrs.frozen
class Schedule:
    """When the plan runs by itself, in the service or ``snaporch batch schedule``; never while it still runs.

    Attributes:
        cron: five fields, for example ``30 2 * * *``.
        zone: a name of the time zone database.
        jitter: each run is moved by up to so long, to spread the load of several plans.
        missed: what becomes of runs that were missed.
    """

    cron: str
    zone: str = "UTC"
    jitter: Seconds = Seconds(0.0)  # noqa: RUF009 - a number
    missed: Missed = Missed.ONCE

    def __attrs_post_init__(self) -> None:
        Cron(self.cron, self.zone)


@attrs.frozen
class Reports:
    """Files that are written when a batch ends; ``{batch}`` is filled in, relative paths are relative to the plan.

    Attributes:
        json: everything, for programs.
        junit: for continuous integration.
        html: one page with a timeline, for people.
    """

    json: str = ""
    junit: str = ""
    html: str = ""


@versioned("plan")
@attrs.frozen
class Plan:
    """A batch that can be run again and again.

    Attributes:
        name: of the plan; a batch that was cut short is found by it.
        select: which domains.
        snapshot: how each is taken.
        limits: what all of it may take.
        on_failure: what becomes of the rest when one fails.
        retries: what is tried again.
        hooks: programs to run before and after.
        retention: which snapshots go afterwards; without, none.
        schedule: when it runs by itself.
        report: files about how it went.
    """

    name: str
    select: Select
    snapshot: How = How()
    limits: Limits = Limits()
    on_failure: OnFailure = OnFailure.CONTINUE
    retries: Retries = Retries()
    hooks: Hooks = Hooks()
    retention: Retention | None = None
    schedule: Schedule | None = None
    report: Reports = Reports()

    def __attrs_post_init__(self) -> None:
        check_name(self.name, "plan")

    @property
    def cron(self) -> Cron | None:
        """When it is due."""
        if self.schedule is None:
            return None
        return Cron(self.schedule.cron, self.schedule.zone, self.schedule.jitter, self.name)

    def cron_after(self, instant: float) -> Iterator[tuple[float, float]]:
        """Yield when it is due after an instant: by the expression, and with the jitter; see `Cron.after`."""
        return self.cron.after(instant) if self.cron is not None else iter(())


# --- reading ------------------------------------------------------------------------------------------------------


def plan_from(data: Any, where: str = "plan") -> Plan:
    """Structure a plan.

    Raises:
        InvalidInput: with every place that is wrong, as ``what @ where.table.key``.
    """
    return structured(data, Plan, where)


def retention_from(data: Any, where: str = "retention") -> Retention:
    """Structure a retention policy by itself; see `plan_from`."""
    return structured(data, Retention, where)


def load_plan(path: Path) -> Plan:
    """Read a plan; the paths of its reports are made absolute, relative to the file.

    Raises:
        InvalidInput: it cannot be read, is not TOML (with line and column), or says something that makes no sense
            (with the keys that lead there).
    """
    plan, base = plan_from(read_toml(path), str(path)), path.absolute().parent
    report = plan.report
    files = {name: str(base / text) if text else "" for name, text in attrs.asdict(report).items()}
    return attrs.evolve(plan, report=Reports(**files))
