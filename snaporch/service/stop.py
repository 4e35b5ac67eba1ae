"""The end of a service: every operation comes to where it can be left, or to its end.

A create whose point is complete is left to the hypervisor: its memory goes on to its file, and the next start
completes it (`snaporch.engine.replay` says from which states that is so). One that is at its point or before comes
there
first: that takes milliseconds. What only reads is cancelled. What is not there when the time is up is cancelled,
and rolls back; a delete, which goes forward only, is finished by the next start.
"""

from __future__ import annotations

from functools import partial

import structlog
import trio

from snaporch.service.jobs import Job
from snaporch.service.service import Service

_log = structlog.get_logger("snaporch.service")


async def settle(service: Service) -> None:
    """Return when no operation runs any more; none is taken meanwhile."""
    service.jobs.closing = True
    service.orchestrator.leave()
    jobs = list(service.jobs.active())
    _log.info("stopping", operations=[job.id for job in jobs], seconds=service.config.stop_seconds)
    for job in jobs:
        if job.kind.only_reads or job.state == "queued":
            job.scope.cancel()
    with trio.move_on_after(service.config.stop_seconds):
        await _all_over(jobs)
    for job in service.jobs.active():
        _log.warning("cancelled: it was not to be left in time", operation=job.id, kind=job.kind)
        job.scope.cancel()
    await _all_over(jobs)


async def _all_over(jobs: list[Job]) -> None:
    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(partial(job.over.wait))
