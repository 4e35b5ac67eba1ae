"""Predicts what a checkpoint will take, before it is begun; no I/O.

Size, speed and pause are those of the domain's last checkpoints (their medians). Where there is none, all of its
RAM counts as full, and usual speeds are assumed. What a precopy sends again is computed from the rate at which the
guest writes to its memory, if that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from snaporch.model.record import Estimate, PastCheckpoint
from snaporch.model.request import Strategy

LOOK_BACK = 5  # of a domain's last checkpoints
ASSUMED_RATE = 200e6  # bytes a second: a disk of the usual kind
ASSUMED_ARM_RATE = 50 * 2**30  # bytes of RAM write-protected a second, by docs/evidence/bench/results.md
COMMANDS_SECONDS = 0.0035  # of a background checkpoint's pause, beside arming
DOWNTIME_SECONDS = 0.3  # QEMU's default `downtime-limit`
LEAST_SECONDS = 1e-3


def rate_of(earlier: Sequence[PastCheckpoint]) -> float | None:
    """Return the bytes a second at which memory was saved, all told; None where it never was."""
    rates = [each.bytes / max(each.seconds, LEAST_SECONDS) for each in earlier]
    return median(rates) if rates else None


def estimate(
    strategy: Strategy, ram: int, earlier: Sequence[PastCheckpoint], *, dirty_rate: float | None = None
) -> Estimate:
    """Return what a checkpoint of a running guest is expected to take.

    Args:
        strategy: how its memory is to be saved.
        ram: bytes of RAM.
        earlier: the domain's last checkpoints.
        dirty_rate: bytes of RAM a second that the guest writes to, where that is known.
    """
    alike = [each for each in earlier if each.strategy is strategy]
    once = [each for each in earlier if each.strategy is not Strategy.PRECOPY]
    rate = rate_of(earlier) or ASSUMED_RATE
    size = median([each.bytes for each in once] or [ram])
    if strategy is Strategy.PRECOPY:
        if dirty_rate is not None and dirty_rate >= rate:
            return Estimate(strategy, 0, None, None, len(earlier), dirty_rate)
        if dirty_rate is not None:
            size *= rate / (rate - dirty_rate)  # what is written while the last round is sent is sent in the next
        elif alike:
            size = median(each.bytes for each in alike)
    seconds = size / rate
    pauses = [each.pause for each in alike if each.pause is not None]
    assumed = {
        Strategy.BACKGROUND: COMMANDS_SECONDS + ram / ASSUMED_ARM_RATE,
        Strategy.PRECOPY: DOWNTIME_SECONDS,
    }
    pause = median(pauses) if pauses else assumed.get(strategy, seconds)
    return Estimate(strategy, round(size), seconds, pause, len(earlier), dirty_rate)
