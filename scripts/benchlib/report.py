"""What was measured, as tables in Markdown."""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import attrs
from benchlib.lab import Qemu
from benchlib.measure import (
    BACKGROUND,
    FILE,
    FLOOR,
    LATE,
    MATRIX,
    NOTHING,
    PAUSED,
    PRECOPY,
    PRECOPY_SECONDS,
    UNSYNCED,
    Run,
)

CONTENDERS = (BACKGROUND, LATE, FLOOR, PRECOPY, PAUSED, FILE, NOTHING)
PAUSE_CELL, STALL_CELL = "pause target", "stall target"
TARGET_RUNS = 20
UNSYNCED_WORDS = ("", " and unsynced writes")


@attrs.frozen
class Machine:
    """Where it was measured.

    Attributes:
        cpu: its name.
        cores: how many.
        memory: of the host, in bytes.
        kernel: release.
        load: average of the last minute before the start.
        disk: bytes a second that one O_DIRECT write to the bench's file system reached.
        qemu: its own words.
        date: UTC.
        command: the command line.
        seconds: how long it all took.
    """

    cpu: str
    cores: int
    memory: int
    kernel: str
    load: float
    disk: float
    qemu: str
    date: str
    command: str
    seconds: float = 0.0


def look_at_machine(qemu: Qemu, disk: float, command: str) -> Machine:
    """Return where we are."""
    info = Path("/proc/cpuinfo").read_text()
    cpu = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    words = subprocess.run([qemu.emulator, "--version"], capture_output=True, text=True, check=True).stdout
    return Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        load=os.getloadavg()[0],
        disk=disk,
        qemu=words.splitlines()[0],
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        command=command,
    )


@attrs.frozen
class Target:
    """A figure, and the limit that it must keep."""

    name: str
    wanted: str
    found: str
    n: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """Return it in words."""
        return {None: "not measured", True: "met", False: "**not met**"}[self.met]


def milliseconds(seconds: float) -> str:
    """Return a time for people, with three figures or so."""
    value = seconds * 1000
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"  # noqa: PLR2004


def spread(values: Sequence[float], show: Callable[[float], str] = milliseconds) -> str:
    """Return a median, and from the least to the greatest."""
    if not values:
        return "-"
    middle = show(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({show(min(values))} to {show(max(values))})"


def p95(values: Iterable[float]) -> str:
    """Return what 95 of 100 do not exceed."""
    found = sorted(values)
    return milliseconds(found[math.ceil(0.95 * len(found)) - 1]) if found else "-"


def select(runs: Iterable[Run], contender: str, purpose: str | None = None) -> list[Run]:
    """Return the runs of a contender, of all cells or of those of one purpose."""
    return [run for run in runs if run.contender == contender and purpose in {None, run.purpose}]


def median(values: Iterable[float]) -> float:
    """Return the median; NaN of nothing."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def _ratio(name: str, wanted: str, runs: tuple[list[Run], list[Run]], figure: str, limit: float) -> Target:
    """Return a target that the first's median is at most `limit` times the second's."""
    ours, theirs = runs
    if not ours or not theirs:
        return Target(name, wanted, "-", "0", None)
    one, other = (median(getattr(run, figure) for run in some) for some in runs)
    times = f"{one / other:.2f} times" if one > other or limit > 1 else f"1/{other / one:.1f}"
    found = f"{times} ({milliseconds(one)} to {milliseconds(other)} ms)"
    return Target(name, wanted, found, str(min(len(ours), len(theirs))), one <= limit * other)


def targets(runs: Sequence[Run]) -> list[Target]:
    """Return the limits, and what was found; the medians are compared."""
    paused, stalled = ({c: select(runs, c, purpose) for c in CONTENDERS} for purpose in (PAUSE_CELL, STALL_CELL))
    found = [
        _ratio(
            "pause of background, to the floor's",
            "≤ 1.3 times",
            (paused[BACKGROUND], paused[FLOOR]),
            "pause",
            1.3,
        ),
        _ratio(
            "pause of background, to precopy's at 50 MB/s",
            "≤ 1/10",
            (paused[BACKGROUND], paused[PRECOPY]),
            "pause",
            0.1,
        ),
        _ratio(
            "stall of background at 100 MB/s, to bare `file:`'s",
            "≤ 1/4",
            (stalled[BACKGROUND], stalled[FILE]),
            "stall",
            0.25,
        ),
    ]
    every = select(runs, BACKGROUND)
    if every:
        largest = max(run.bytes / run.ram for run in every)
        name = "largest memory file of background, to RAM, at any rate"
        found.append(Target(name, "≤ 1.02", f"{largest:.4f}", str(len(every)), largest <= 1.02))  # noqa: PLR2004
    own = [run.between for run in paused[BACKGROUND] if run.between is not None]
    if own:
        name = "snaporch's own time between the commands of the pause"
        found.append(Target(name, "< 2 ms", f"{spread(own)} ms", str(len(own)), median(own) < 2e-3))  # noqa: PLR2004
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines."""
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _cells(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Yield the rows of one size of RAM."""
    cells = sorted({(run.dirty, run.purpose) for run in runs})
    for (dirty, purpose), contender in itertools.product(cells, CONTENDERS):
        some = [r for r in runs if (r.dirty, r.purpose, r.contender) == (dirty, purpose, contender)]
        if some:
            if contender == NOTHING:
                pause = late = stall = memory = "-"
            else:
                pause, stall = spread([r.pause for r in some]), spread([r.stall for r in some])
                late = p95(r.pause for r in some)
                memory = f"{median(r.bytes for r in some) / 2**20:.0f}"
            own = [r.between for r in some if r.between is not None]
            yield [
                f"{dirty} MB/s{UNSYNCED_WORDS[purpose == UNSYNCED]}, {contender}",
                pause,
                late,
                stall,
                spread([r.gap for r in some]),
                f"{median(r.total for r in some):.2f}",
                memory,
                spread(own),
                f"{median(r.dirtied for r in some):.0f}",
                str(len(some)),
            ]


# The same stretch of the pause, as snaporch's phases and as the floor's commands.
_STRETCHES = {
    "stop, query-status": (("pausing",), ("stop", "query-status")),
    "transaction": (("switching",), ("transaction",)),
    "migrate, until the first page is sent": (("arming",), ("migrate", "armed")),
    "cont": (("resuming",), ("cont",)),
}


def _stretches(runs: Sequence[Run]) -> Iterator[list[str]]:
    ours, theirs = select(runs, BACKGROUND, PAUSE_CELL), select(runs, FLOOR, PAUSE_CELL)
    for name, (phases, commands) in _STRETCHES.items():
        yield [
            name,
            spread([sum(run.steps.get(phase, 0.0) for phase in phases) for run in ours]),
            spread([sum(run.steps[command] for command in commands) for run in theirs]),
        ]
    yield ["STOP to RESUME", spread([r.pause for r in ours]), spread([r.pause for r in theirs])]


def _stalls(runs: Sequence[Run]) -> Iterator[list[str]]:
    for contender in CONTENDERS:
        if some := select(runs, contender):
            figures = [[run.pause for run in some], [run.stall for run in some], [run.gap for run in some]]
            yield [contender, *map(spread, figures), str(len(some))]


def markdown(machine: Machine, runs: Sequence[Run]) -> str:
    """Return the whole page."""
    matrix = [run for run in runs if run.purpose in {MATRIX, UNSYNCED}]
    lines = [
        "# Measurements",
        "",
        f"Written by `{machine.command}` on {machine.date} in {machine.seconds / 60:.0f} minutes;",
        "every single run is in `results.json`.",
        "",
        f"- {machine.qemu}, TCG; a guest of one CPU and two qcow2 disks, nearly all of its RAM filled",
        f"- {machine.cpu}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB; Linux {machine.kernel}",
        f"- load {machine.load:.2f} before the start",
        f"- the disk takes {machine.disk / 1e6:.0f} MB/s (one O_DIRECT write of 512 MiB)",
        "",
        "Figures are medians (least to greatest). All contenders of a cell take turns on the same guest, each",
        "once a round, in an order drawn anew each round; before each go the guest gets its huge pages back.",
        "",
        "## Targets",
        "",
        *table(
            ("target", "limit", "found", "n", ""),
            ([t.name, t.wanted, t.found, t.n, t.verdict] for t in targets(runs)),
        ),
        "",
        "1 GiB; pauses at 50 MB/s dirtied, stall at 100 MB/s.",
    ]
    if select(runs, FLOOR, PAUSE_CELL):
        lines += [
            "",
            "Where the pause goes, by the host's clock, in ms:",
            "",
            *table(("", "background", "floor"), _stretches(runs)),
        ]
    if stalled := [run for run in runs if run.purpose == STALL_CELL]:
        lines += ["", "The guest at 100 MB/s, in ms:", ""]
        lines += table(("", "pause", "stall", "gap", "n"), _stalls(stalled))
    for ram in sorted({run.ram for run in matrix}):
        lines += ["", f"## {ram / 2**30:g} GiB of RAM", ""]
        figures = ("pause ms", "p95 ms", "stall ms", "gap ms", "total s", "memory MiB", "own ms", "dirtied MB/s")
        head = ("", *figures, "n")
        lines += table(head, _cells([run for run in matrix if run.ram == ram]))
    return "\n".join([*lines, "", *_legend()]) + "\n"


def _legend() -> list[str]:
    return [
        "## What the words mean",
        "",
        "- *background*, *precopy*, *paused*: `create` of snaporch with that strategy; precopy pauses the guest",
        f"  to finish after {PRECOPY_SECONDS:g} s. *late stop*: background with `--late-stop`.",
        "- *floor*: the same QMP commands as background's, sent by `scripts/benchlib/floor.py`, which has",
        "  nothing around them; memory goes through a pipe into nothing. *bare file:*: the same, QEMU itself",
        "  writing to a `file:` URI on the same disk.",
        "- *no snapshot*: the guest alone for as long as background takes: what it sees of this machine's noise.",
        "- *pause*: QEMU's STOP event to its RESUME event. *gap*: the longest time that the guest itself,",
        "  between two turns of its loop, found missing from begin to end; its clock stands still while it is",
        "  paused. *stall*: the larger of the two.",
        "- *total*: what the caller waits for; snaporch's includes fsync and checksums of memory and disks.",
        "  *own*: time of the pause in which snaporch was not waiting for QEMU. *dirtied*: what the guest really",
        "  managed.",
    ]
