"""Whether a domain's newest checkpoint is of a worse kind than the one before it. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from snaporch.model.record import PastCheckpoint
from snaporch.model.request import Strategy
from snaporch.model.way import Way

WHAT = ("strategy", "way_back")

_STRATEGIES: Sequence[str] = (Strategy.BACKGROUND, Strategy.PRECOPY)  # others are chosen by whoever asks
_WAYS: Sequence[str] = (Way.BESIDE, Way.PROVEN, Way.IN_PLACE, Way.DISPLACE, Way.NONE)


def worse(checkpoints: Sequence[PastCheckpoint]) -> dict[str, str]:
    """Return what is worse about the last of these than about the one before it, each in words."""
    if len(checkpoints) < 2:  # noqa: PLR2004 - there is none to compare it with
        return {}
    before, now = checkpoints[-2:]
    found = {}
    if _later(_STRATEGIES, before.strategy, now.strategy):
        found["strategy"] = f"memory was streamed by {now.strategy} and not by {before.strategy}, as the last time"
    if _later(_WAYS, before.way_back, now.way_back):
        found["way_back"] = f"the way back is {now.way_back} and not {before.way_back}, as the last time"
    return found


def _later(order: Sequence[str], one: str, other: str) -> bool:
    return one in order and other in order and order.index(other) > order.index(one)
