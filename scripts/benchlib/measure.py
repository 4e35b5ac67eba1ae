"""Runs of one cell: contenders take turns on one guest, so that the machine's moods hit all alike.

Each round has every contender once, in an order drawn anew. A fresh guest every few rounds keeps the chain of
overlays short; a first bare snapshot on it, not counted, has the host's pages of the guest as they are later.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import trio
from benchlib import floor
from benchlib.lab import DOMAIN, Guest, GuestPlan, Qemu, remove, running_guest

from snaporch import CreateFlag, CreateOptions, DomainSnapshot, OnTimeout, Strategy
from snaporch.drivers.local.hugepages import collapse
from snaporch.testing.dying import hypervisors

BACKGROUND, LATE, FLOOR, PRECOPY, PAUSED, FILE, NOTHING = (
    "background",
    "late stop",
    "floor",
    "precopy",
    "paused",
    "bare file:",
    "no snapshot",
)
MATRIX = "matrix"  # a cell that is for no target
UNSYNCED = "unsynced writes"
ROUNDS_A_GUEST = 5
SETTLE_SECONDS = 0.2
NOTHING_SECONDS = 1.0  # of looking on while nothing is done, before there is a background create to go by
PRECOPY_SECONDS = 10.0  # then it pauses the guest to finish: at high rates it would never end
POUR = 100  # MB/s, of what is to be unsynced
MINIMUM_ROUND = 8.0  # seconds; a first guess


@attrs.frozen
class Cell:
    """What is measured together.

    Attributes:
        purpose: `MATRIX`, or the target that it is for.
        ram: bytes.
        dirty: MB/s.
        contenders: who take turns.
        rounds: how often, when there is time.
        unsynced: MiB that the guest has written to a disk, and not flushed, before each go.
    """

    purpose: str
    ram: int
    dirty: int
    contenders: tuple[str, ...]
    rounds: int
    unsynced: int = 0

    @property
    def guest(self) -> GuestPlan:
        """The guest that it is measured on."""
        if not self.unsynced:
            return GuestPlan(ram=self.ram, dirty=self.dirty)
        return GuestPlan(ram=self.ram, dirty=self.dirty, disks=3, pour=POUR, span=self.unsynced)


@attrs.frozen
class Run:
    """One contender's one go; times in seconds.

    Attributes:
        purpose: of the cell, as are `ram` and `dirty`.
        contender: who.
        round: in which turn.
        total: the whole of it, as the user waits.
        pause: from QEMU's STOP to its RESUME event.
        gap: the longest time in which the guest, running, could not write its memory, from begin to end.
        dirtied: MB/s that the guest really dirtied meanwhile, by its own clock.
        bytes: of memory, in the file or through the pipe.
        between: snaporch's own time between the commands of the pause.
        steps: seconds by step: phases of snaporch, commands of the bare ones.
    """

    purpose: str
    ram: int
    dirty: int
    contender: str
    round: int
    total: float
    pause: float
    gap: float
    dirtied: float
    bytes: int = 0
    between: float | None = None
    steps: dict[str, float] = attrs.field(factory=dict)

    @property
    def stall(self) -> float:
        """The longest that the guest was held up: standing still, or waiting for a page."""
        return max(self.pause, self.gap)


@attrs.frozen
class Taken:
    """What a contender itself knows of its go."""

    total: float
    pause: float = 0.0
    bytes: int = 0
    between: float | None = None
    steps: dict[str, float] = attrs.field(factory=dict)


async def take(guest: Guest, contender: str, looking: float) -> Taken:
    """Have a contender do its work once."""
    if contender == NOTHING:
        await trio.sleep(looking)
        return Taken(total=looking)
    if contender in {FLOOR, FILE}:
        return await take_bare(guest, to_file=contender == FILE)
    options = CreateOptions()
    if contender != PAUSED:
        options = CreateOptions(
            strategy=Strategy.BACKGROUND if contender == LATE else Strategy(contender),
            late_stop=contender == LATE,
            max_seconds=PRECOPY_SECONDS if contender == PRECOPY else None,
            on_timeout=OnTimeout.PAUSE,
        )
    flags = CreateFlag(0) if contender == PAUSED else CreateFlag.LIVE
    record = await guest.orchestrator.create(DOMAIN, DomainSnapshot(guest.fresh_name()), flags, options)
    if record.memory is None or record.timings.pause is None:
        sys.exit(f"{contender}: the record has no memory or no pause: {record}")
    for path in (record.memory.path, record.index):
        remove(path)
    timings = record.timings
    return Taken(timings.total, timings.pause, record.memory.size, timings.between, timings.phases)


async def take_bare(guest: Guest, *, to_file: bool) -> Taken:
    """Run floor.py beside us, as the program of its own that it is."""
    name = guest.fresh_name()
    command = [sys.executable, "-I", floor.__file__, str(guest.socket()), "--qemu-img", guest.qemu.img]
    for letter in "abcd"[: guest.plan.disks]:
        command += ["--disk", f"vd{letter}={guest.place}/vd{letter}.{name}.qcow2"]
    memory = guest.place / f"{name}.mem"
    if to_file:
        command += ["--file", str(memory)]
    done = await trio.run_process(command, stdin=subprocess.DEVNULL, capture_stdout=True)
    remove(memory)
    answer = json.loads(done.stdout)
    return Taken(answer["total"], answer["pause"], answer["bytes"], steps=answer["steps"])


async def measured(guest: Guest, cell: Cell, contender: str, number: int, looking: float) -> Run:
    """Return one go, with what the guest felt of it."""
    serial = guest.serial
    for pid in hypervisors(str(guest.root), DOMAIN):  # whoever came before may have left its huge pages split
        await trio.to_thread.run_sync(collapse, pid, threading.Event())
    await trio.sleep(max(SETTLE_SECONDS, cell.unsynced * 2**20 / (POUR * 1e6)))
    (*_, before) = await serial.more(serial.mark(), 1)  # so that the next report's time begins now
    mark = serial.mark()
    taken = await take(guest, contender, looking)
    (*reports, last) = await serial.more(mark, len(serial.reports(mark)) + 2)  # the first may have been on its way
    seconds = (last.up_ms - before.up_ms) / 1000
    return Run(
        purpose=cell.purpose,
        ram=cell.ram,
        dirty=cell.dirty,
        contender=contender,
        round=number,
        gap=max(report.gap_us for report in reports) / 1e6,
        dirtied=(last.dirty_mb - before.dirty_mb) * 2**20 / 1e6 / seconds,
        **attrs.asdict(taken),
    )


@attrs.define
class Bench:
    """The measurement under way.

    Attributes:
        qemu: what is measured.
        place: for all files.
        cache: of scripts/setup.
        ends: when it has to be over, by `time.monotonic`.
        runs: what was found so far.
    """

    qemu: Qemu
    place: Path
    cache: Path
    ends: float
    runs: list[Run] = attrs.field(factory=list)
    order: random.Random = attrs.field(factory=lambda: random.Random(1))  # noqa: S311 - no secret

    async def cells(self, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
        """Measure cells in turn: those of targets whole, the others within what is left of the time.

        Each of the others gets its share of that, and one round at least.
        """
        for number, cell in enumerate(cells):
            began = time.monotonic()
            share = max(0.0, self.ends - began) / (len(cells) - number) if cell.purpose == MATRIX else math.inf
            found = await self._cell(cell, began + share)
            self.runs += found
            rounds = len(found) // len(cell.contenders)
            say(
                f"{number + 1}/{len(cells)} {cell.purpose}, {cell.ram / 2**30:g} GiB, {cell.dirty} MB/s: "
                f"{rounds} rounds in {time.monotonic() - began:.0f} s"
            )

    async def _cell(self, cell: Cell, ends: float) -> list[Run]:
        found: list[Run] = []
        took = MINIMUM_ROUND
        for first in range(0, cell.rounds, ROUNDS_A_GUEST):
            if first and time.monotonic() + took > ends:
                break
            async with running_guest(self.place, self.cache, self.qemu, cell.guest) as guest:
                await take_bare(guest, to_file=False)
                for number in range(first, min(first + ROUNDS_A_GUEST, cell.rounds)):
                    began = time.monotonic()
                    if number and began + took > ends:
                        break
                    found += await self._round(guest, cell, number, found)
                    took = time.monotonic() - began
                guest.check()
        return found

    async def _round(self, guest: Guest, cell: Cell, number: int, before: Sequence[Run]) -> list[Run]:
        found: list[Run] = []
        for contender in self.order.sample(cell.contenders, len(cell.contenders)):
            earlier = [run.total for run in (*before, *found) if run.contender == BACKGROUND]
            looking = earlier[-1] if earlier else NOTHING_SECONDS
            found.append(await measured(guest, cell, contender, number, looking))
        return found
