"""``snaporch demo``: the whole story on a real guest.

A guest counts: it writes each number to two disks and compares them with its memory. It is checkpointed live while
it counts, and once more as most tools do it, standing still until everything is saved. Then it ruins its own disks,
and is taken back to the live checkpoint. It must go on from there and find nothing wrong; else the demo fails.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.demo.guest import Boot, DemoFailed, Guest, Say, find_guest
from snaporch.errors import NotFound, OperationFailed, Unsupported
from snaporch.guest.report import Report, count_starts, parse, parse_errors
from snaporch.model.domain import DomainDefinition
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import CreateFlag, DeviceDisk, DomainSnapshot
from snaporch.orchestrator import Orchestrator, open_orchestrator

NAME = "demo"
LIVE, STANDING = "live", "stop-and-save"
MEMORY = 512 * 2**20
SWEEP_MIB_PER_SECOND = 32  # the guest's own pace: so long it takes until all patterns have been looked at once
BOOT_SECONDS = 60.0  # a Linux guest without KVM, on a busy machine
ANSWER_SECONDS = 15.0
CLEAN_UP_SECONDS = 20.0


@attrs.frozen
class Ending:
    """What the demo has shown.

    Attributes:
        document: all figures, for ``--json``.
        records: the checkpoints.
        current: the one that the guest descends from.
    """

    document: dict[str, Any]
    records: tuple[SnapshotRecord, ...]
    current: str | None


async def run(say: Say, *, keep: bool, tiny: bool, accel: str) -> Ending:
    """Tell the story.

    Args:
        say: told each line of it.
        keep: leave the guest running, and its files.
        tiny: with the small guest instead of Linux.
        accel: auto, kvm or tcg.

    Raises:
        DemoFailed: the guest is not whole after the revert.
    """
    boot = await find_guest(say, tiny=tiny)
    async with _place(say, keep=keep) as directory, open_orchestrator(directory / "root") as orchestrator:
        guest = Guest(directory)
        try:
            await start(orchestrator, guest, boot, accel, say)
            document = await _story(orchestrator, guest, say) | {"guest": boot.name}
            records, info = await orchestrator.list(NAME), await orchestrator.domain_info(NAME)
            return Ending(document, records, info.current)
        finally:
            if not keep:
                with trio.CancelScope(shield=True), trio.move_on_after(CLEAN_UP_SECONDS), suppress(NotFound):
                    await orchestrator.destroy(NAME)


@asynccontextmanager
async def _place(say: Say, *, keep: bool) -> AsyncIterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="snaporch-demo-"))
    try:
        yield directory
    finally:
        if keep:
            say(f"Kept: snaporch --root {directory / 'root'} tree {NAME}")
            say(f"To end it: snaporch --root {directory / 'root'} domain destroy {NAME}; rm -r {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


async def start(
    orchestrator: Orchestrator, guest: Guest, boot: Boot, accel: str, say: Say, *, name: str = NAME
) -> None:
    """Start the guest on two fresh disks, and wait until it counts.

    Raises:
        DemoFailed: it does not.
    """
    disks = []
    for target in ("vda", "vdb"):
        path = str(guest.directory / f"{target}.qcow2")
        await _qemu_img("create", "-q", "-f", "qcow2", path, "64M")
        disks.append(DeviceDisk(target, path))
    definition = DomainDefinition(
        name,
        memory=MEMORY,
        accel=accel,
        machine="q35",
        kernel=str(boot.kernel),
        initrd=str(boot.initrd or ""),
        append=boot.append,
        extra_args=guest.make(),
        disks=tuple(disks),
    )
    await orchestrator.define(definition)
    say(f"Starting the {boot.name} guest: {MEMORY >> 20} MiB of memory, two disks; it writes numbers to both.")
    await orchestrator.start(name)

    def counts(reports: Sequence[Report]) -> bool:
        return len(reports) > 1 and reports[-1].seq > reports[0].seq

    await guest.until("count", counts, seconds=BOOT_SECONDS)


async def _qemu_img(*arguments: str) -> None:
    if shutil.which("qemu-img") is None:
        raise Unsupported("qemu-img is not installed (Debian: apt install qemu-utils)")
    done = await trio.run_process(["qemu-img", *arguments], capture_stderr=True, check=False)
    if done.returncode:
        raise OperationFailed(f"qemu-img {arguments[0]} failed: {done.stderr.decode(errors='replace').strip()}")


async def _story(orchestrator: Orchestrator, guest: Guest, say: Say) -> dict[str, Any]:
    live, counted = await _checkpoint(orchestrator, guest, LIVE, CreateFlag.LIVE)
    say(f"Live checkpoint taken; the guest counted from {counted[0]} to {counted[1]} meanwhile.")
    standing, _ = await _checkpoint(orchestrator, guest, STANDING, CreateFlag(0))
    say("")
    for row in _comparison(live, standing):
        say(row)
    ruined = await _ruin(guest, say)
    after = await go_back(orchestrator, guest, counted, say)
    return {
        "live": _figures(live),
        "stop_and_save": _figures(standing),
        "counted_during_live": counted,
        "errors_when_ruined": ruined,
        "after_revert": after,
    }


async def _checkpoint(
    orchestrator: Orchestrator, guest: Guest, name: str, flags: CreateFlag
) -> tuple[SnapshotRecord, tuple[int, int]]:
    """Take a checkpoint; return it, and the guest's numbers before and after."""
    before = guest.last().seq
    record = await orchestrator.create(NAME, DomainSnapshot(name), flags)
    start = guest.said()
    await guest.until("go on counting", lambda reports: len(reports) > 1, seconds=ANSWER_SECONDS, start=start)
    return record, (before, guest.last().seq)


def _figures(record: SnapshotRecord) -> dict[str, Any]:
    return {
        "strategy": record.strategy,
        "pause_seconds": record.timings.pause,
        "total_seconds": record.timings.total,
        "memory_bytes": record.memory.size if record.memory else 0,
    }


def _comparison(live: SnapshotRecord, standing: SnapshotRecord) -> list[str]:
    rows = [f"  {'':14} {'strategy':11} {'pause':>12} {'in all':>9} {'memory file':>12}"]
    for record in (live, standing):
        size = record.memory.size / 2**20 if record.memory else 0.0
        pause = (record.timings.pause or 0.0) * 1000
        rows.append(
            f"  {record.name:14} {record.strategy:11} {pause:9.1f} ms {record.timings.total:7.2f} s {size:8.1f} MiB"
        )
    if live.timings.pause and standing.timings.pause:
        rows.append(f"  The pause was {standing.timings.pause / live.timings.pause:.0f} times shorter.")
    return [*rows, ""]


async def _ruin(guest: Guest, say: Say) -> int:
    """Let the guest overwrite what it wrote; return how many errors it then finds."""
    if early := parse_errors(guest.text()):
        raise DemoFailed(f"the guest finds errors before it has ruined anything: {early[0]}", early)
    start = guest.said()
    guest.send("ruin")
    await guest.until("notice the damage", _any_errors, seconds=ANSWER_SECONDS, start=start)
    errors = guest.last().errors
    lines = parse_errors(guest.text(start))
    say(f"The guest has ruined its own disks, and finds {errors} errors, such as: {lines[0] if lines else '?'}")
    return errors


def _any_errors(reports: Sequence[Report]) -> bool:
    """Return whether the guest has found something wrong."""
    return any(report.errors for report in reports)


async def go_back(orchestrator: Orchestrator, guest: Guest, counted: tuple[int, int], say: Say) -> dict[str, Any]:
    """Revert, and let the guest look at all that it has.

    Raises:
        DemoFailed: it began anew, is at another number, or finds something wrong.
    """
    seen, ruined_at = guest.said(), guest.last().seq
    began = trio.current_time()
    await orchestrator.revert(NAME, LIVE)
    seconds, start = trio.current_time() - began, guest.said()
    now = guest.last()
    until = now.up_ms + 1000 * (1 + now.ram_mb / SWEEP_MIB_PER_SECOND)

    def looked(reports: Sequence[Report]) -> bool:
        return _any_errors(reports) or any(report.up_ms >= until for report in reports)

    await guest.until("check its memory", looked, seconds=4 * ANSWER_SECONDS, start=start)
    reports = parse(guest.text(start))
    first, last = reports[0], reports[-1]
    say(f"Reverted in {seconds:.2f} s: it was at {ruined_at}, and counts again from {first.seq} on.")
    if last.errors or count_starts(guest.text(seen)):
        what = f"it finds {last.errors} errors" if last.errors else "it began anew"
        raise DemoFailed(f"the guest is not what it was at the point: {what}", parse_errors(guest.text(start)))
    if not counted[0] <= first.seq < ruined_at or last.seq <= first.seq:
        raise DemoFailed(
            f"the guest goes on from {first.seq}, and not from the point ({counted[0]} to {counted[1]})"
        )
    say(f"At {last.seq} it has compared {last.checked} sectors and pages since it began: {last.errors} errors.")
    return {"seconds": seconds, "first": first.seq, "last": last.seq, "errors": last.errors, "before": ruined_at}
