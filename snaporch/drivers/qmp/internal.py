"""Points inside qcow2 images, by QEMU's own jobs: snapshot-save, snapshot-load and snapshot-delete.

These "jobs" do all of their work at once in QEMU's main loop, which answers nothing meanwhile, not even the
command that began them: a monitor that is silent for that long is no sign of a hang, so every command here waits.
QEMU stops the guest by itself and lets it run again if it ran, whether or not anybody is connected. A job stays in
the list until it is dismissed, which after a crash of snaporch is left to the next one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from snaporch.drivers.qmp import guard
from snaporch.drivers.qmp.protocol import QMP
from snaporch.errors import HypervisorError

_JOB = guard.INSIDE
SECONDS = 3600.0  # for all of a guest's memory to go to, or come from, a slow disk
RESTORE_SECONDS = 10.0


async def run(qmp: QMP, verb: str, arguments: Mapping[str, Any]) -> None:
    """Run one of the jobs to its end; none is under way, see `settle`.

    Raises:
        HypervisorError: it failed; the error has QEMU's words.
    """
    await qmp.execute(f"snapshot-{verb}", {"job-id": _JOB, **arguments}, timeout=SECONDS)
    if error := await settle(qmp):
        raise HypervisorError(f"{qmp.label}: QEMU's snapshot-{verb} of {arguments['tag']!r} failed: {error}")


async def settle(qmp: QMP) -> str:
    """Wait until no job is under way (a crash of snaporch leaves one); return the last job's error, or nothing."""
    with qmp.subscribe("JOB_STATUS_CHANGE") as changes:
        while True:
            jobs = await qmp.execute("query-jobs", timeout=SECONDS)
            job = next((job for job in jobs if job["id"] == _JOB), None)
            if job is None:
                return ""
            if job["status"] == "concluded":
                await qmp.execute("job-dismiss", {"id": _JOB})
                return str(job.get("error", ""))
            await changes.receive()


@asynccontextmanager
async def plain_migration(qmp: QMP) -> AsyncIterator[None]:
    """Have all migration capabilities off, which QEMU's snapshots obey too, and put them back."""
    before = await qmp.execute("query-migrate-capabilities")
    wanted = [c | {"state": c["capability"] == "events"} for c in before]
    changed = any(c["state"] for c in before if c["capability"] != "events")
    if changed:
        await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
    try:
        yield
    finally:
        if changed:
            with trio.move_on_after(RESTORE_SECONDS, shield=True):
                await qmp.execute("migrate-set-capabilities", {"capabilities": before})
