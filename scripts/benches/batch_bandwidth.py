"""Measures how well a batch keeps to the bandwidth that its plan shares out.

    scripts/bench batch-bandwidth [--guests 8] [--at-once 3] [--limit 24MiB/s] [--qemu VERSION] [--out FILE]

Real guests, all of whose memory is full, in one batch. Several times a second it is looked how large all memory
files together are: what has really been written, not what anybody believes. Told are the rate from the first byte
to the last, and those of every window of a few seconds on the way.

Exit status: 0 when all is within 10 % of the limit; 1 when not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import attrs
import trio
from benchlib.crowd import Crowd, running_crowd
from benchlib.lab import CACHE, GuestPlan, Qemu, pick, qemus, workplace

from snaporch.batch.plan import plan_from
from snaporch.batch.runner import run_batch
from snaporch.batch.store import BatchRecord
from snaporch.model.units import parse_size

RAM_MIB = 128
LOOK_SECONDS = 0.1
WINDOW_SECONDS = 4.0
WITHIN = 0.10
MIB = 2**20

Sample = tuple[float, int]


@attrs.frozen
class Result:
    """What was seen.

    Attributes:
        batch: the batch.
        samples: when, and how many bytes there were.
    """

    batch: BatchRecord
    samples: Sequence[Sample]

    @property
    def streaming(self) -> Sequence[Sample]:
        """From the last look without a byte to the first with all."""
        last = self.samples[-1][1]
        begin = max(place for place, (_, size) in enumerate(self.samples) if size == 0)
        end = min(place for place, (_, size) in enumerate(self.samples) if size == last)
        return self.samples[begin : end + 1]

    @property
    def overall(self) -> float:
        """Bytes a second from the first byte to the last."""
        (begin, _), (end, size) = self.streaming[0], self.streaming[-1]
        return size / (end - begin)

    @property
    def windows(self) -> list[float]:
        """Bytes a second of every window."""
        found, streaming = [], self.streaming
        for begin, size in streaming:
            later = next(((at, total) for at, total in streaming if at >= begin + WINDOW_SECONDS), None)
            if later is not None:
                found.append((later[1] - size) / (later[0] - begin))
        return found


def written(root: Path) -> int:
    """Return the bytes of all memory files."""
    return sum(path.stat().st_size for path in root.glob("*/*.mem"))


async def measure(crowd: Crowd, at_once: int, limit: int) -> Result:
    """Run the batch and look."""
    limits = {"per_host": at_once, "bandwidth": limit}
    plan = plan_from({"name": "shared", "select": {"globs": ["*"]}, "limits": limits})
    samples: list[Sample] = [(time.monotonic(), written(crowd.root))]

    async def look() -> None:
        while True:
            await trio.sleep(LOOK_SECONDS)
            samples.append((time.monotonic(), written(crowd.root)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        batch = await run_batch(crowd.orchestrator, plan)
        nursery.cancel_scope.cancel()
    samples.append((time.monotonic(), written(crowd.root)))
    await crowd.alive()
    return Result(batch, samples)


def kept(result: Result, limit: int) -> bool:
    """Say whether the limit was kept, and used."""
    rates = [result.overall, *result.windows]
    return (
        set(result.batch.counts) == {"done"}
        and max(rates) <= limit * (1 + WITHIN)
        and (result.overall >= limit * (1 - WITHIN))
    )


def report(options: argparse.Namespace, qemu: Qemu, result: Result) -> str:
    """Return the page."""
    limit, windows = options.limit, sorted(result.windows)
    (begin, _), (end, size) = result.streaming[0], result.streaming[-1]
    rates = {
        f"first byte to last: {size / MIB:.0f} MiB in {end - begin:.1f} s": result.overall,
        f"least of all windows of {WINDOW_SECONDS:g} s": windows[0],
        "median of them": windows[len(windows) // 2],
        "greatest of them": windows[-1],
    }
    rows = "\n".join(f"| {what} | {rate / MIB:.1f} | {rate / limit:.3f} |" for what, rate in rates.items())
    answer = "yes" if kept(result, limit) else "NO"
    return f"""# A bandwidth shared by a batch

Written by `scripts/bench batch-bandwidth {" ".join(sys.argv[1:])}`
on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; QEMU {qemu.version}, TCG, {options.guests} guests of {RAM_MIB} MiB,
{options.at_once} at a time, background. How it is measured is said in the script's head.

| | MiB/s | of the limit |
|---|---:|---:|
| limit, shared by all | {limit / MIB:.1f} | 1 |
{rows}

Kept within {WITHIN:.0%}: {answer}. All {options.guests} guests found nothing wrong.
"""


async def run(options: argparse.Namespace, qemu: Qemu, place: Path) -> tuple[bool, str]:
    """Measure; return whether the limit was kept, and the page."""
    plan = GuestPlan(ram=RAM_MIB * MIB, dirty=2, rate=20)
    async with running_crowd(place, CACHE, qemu, plan, options.guests) as crowd:
        result = await measure(crowd, options.at_once, options.limit)
    return kept(result, options.limit), report(options, qemu, result)


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--limit", type=lambda text: parse_size(text.removesuffix("/s")), default=24 * MIB)
    parser.add_argument("--qemu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with workplace(CACHE / "lab") as place:
        well, page = trio.run(run, options, pick(qemus(CACHE), options.qemu), place)
    print(page)
    if options.out:
        options.out.write_text(page)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
