"""Which snapshots stay and which go; no I/O.

Rules:

1. A snapshot stays if any rule of the policy keeps it. `last`, `hourly` and so on count only good snapshots: a
   damaged one takes no place, and only a pin keeps it.
2. Then `max_bytes`: of what is kept, the oldest go, until the rest is small enough.
3. A pinned snapshot always stays, and so does the newest good one: a domain that has a snapshot to go back to is
   never left without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from fnmatch import fnmatchcase

import attrs

from snaporch.batch.plan import Retention
from snaporch.batch.timing import parse_zone


@attrs.frozen
class Candidate:
    """A snapshot, as far as retention looks at it.

    Attributes:
        name: the snapshot's.
        point: the instant that it holds.
        bytes: what its own files hold.
        good: it can be gone back to.
        pinned: it is to stay.
        expires: the instant from which on it is needed no longer, or None.
    """

    name: str
    point: float
    bytes: int = 0
    good: bool = True
    pinned: bool = False
    expires: float | None = None

    def has_expired(self, now: float) -> bool:
        """Whether it is to go, whatever other rules keep it."""
        return self.expires is not None and self.expires <= now and not self.pinned


@attrs.frozen
class Verdict:
    """What becomes of each snapshot.

    Attributes:
        keep: why each stays, newest first.
        delete: why each goes, oldest first.
    """

    keep: dict[str, str] = attrs.field(factory=dict)
    delete: dict[str, str] = attrs.field(factory=dict)


_Period = Callable[[datetime], tuple[int, ...]]

_PERIODS: tuple[tuple[str, _Period], ...] = (
    # By UTC offset too: the hour that clocks show twice is two hours.
    ("hourly", lambda at: (at.year, at.month, at.day, at.hour, at.fold)),
    ("daily", lambda at: (at.year, at.month, at.day)),
    ("weekly", lambda at: at.isocalendar()[:2]),
    ("monthly", lambda at: (at.year, at.month)),
)


def _newest_of_each(newest_first: Iterable[Candidate], period: _Period, zone: str, count: int) -> list[str]:
    """Return the newest snapshot of each of the last `count` periods that have one."""
    place, found = parse_zone(zone), dict[tuple[int, ...], str]()
    for each in newest_first:
        key = period(datetime.fromtimestamp(each.point, place))
        if key not in found and len(found) == count:
            break
        found.setdefault(key, each.name)
    return list(found.values())


def _kept(newest_first: Sequence[Candidate], policy: Retention, now: float) -> dict[str, str]:
    """Return what the rules keep, each with the first that does."""
    good = [each for each in newest_first if each.good]
    rules = [("last", [each.name for each in good[: policy.last]])]
    for name, period in _PERIODS:
        if count := getattr(policy, name):
            rules.append((name, _newest_of_each(good, period, policy.zone, count)))
    rules.append(("within", [each.name for each in good if each.point > now - policy.within]))
    keep: dict[str, str] = {}
    for rule, names in rules:
        for name in names:
            keep.setdefault(name, rule)
    return keep


def plan_retention(candidates: Iterable[Candidate], policy: Retention, now: float) -> Verdict:
    """Decide. What has expired goes, unless it is pinned.

    Args:
        candidates: all snapshots of one domain that the policy is about.
        policy: a plan's.
        now: seconds since the epoch.
    """
    every = sorted(candidates, key=lambda each: (each.point, each.name), reverse=True)
    newest_first = [each for each in every if not each.has_expired(now)]
    fixed = {each.name: "pinned" for each in newest_first if each.pinned or _matches(each.name, policy.pin)}
    if only := next((each.name for each in newest_first if each.good), None):
        fixed.setdefault(only, "the newest good one")
    keep = _kept(newest_first, policy, now) | fixed
    why = {each.name: "no rule keeps it" if each.good else "damaged" for each in newest_first}
    if policy.max_bytes is not None:
        held = sum(each.bytes for each in newest_first if each.name in keep)
        for each in reversed(newest_first):
            if held > policy.max_bytes and each.name in keep and each.name not in fixed:
                held -= each.bytes
                why[each.name] = f"over max_bytes ({keep.pop(each.name)} had kept it)"
    return Verdict(
        {each.name: keep[each.name] for each in newest_first if each.name in keep},
        {each.name: why.get(each.name, "expired") for each in reversed(every) if each.name not in keep},
    )


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
