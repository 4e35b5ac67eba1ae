"""The start of a service: operations that its predecessor left, or was killed in, are finished or undone.

Each is a job under its old id, so that the client that was given the id can still ask for it, and wait for it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from snaporch.engine.states import State
from snaporch.errors import Busy, OperationFailed
from snaporch.model.record import OperationKind, OperationRecord
from snaporch.orchestrator import catalog_of
from snaporch.service.jobs import Job
from snaporch.service.service import Service

ADOPTED = "snaporch"  # in the place of who asked: the service itself


async def adopt(service: Service) -> None:
    """Begin to recover every operation that was cut short; of a domain, all that there are with the first."""
    domains: set[str] = set()
    for record, _ in await catalog_of(service.orchestrator).unfinished():
        if not domains.issuperset(record.domains):
            domains.update(record.domains)
            work = partial(_recover, service, record)
            job = Job(record.kind, record.domains, record.subject, ADOPTED, work, id=record.id)
            service.jobs.submit(job, own=True)


async def _recover(service: Service, record: OperationRecord) -> Any:
    """Recover an operation and return what it was to return, as far as there is such a thing.

    Raises:
        OperationFailed: it was undone.
        Busy: it was not cut short: another process does it.
    """
    what = f"{record.kind} {record.subject}"
    for domain in record.domains:
        await service.orchestrator.recover(domain=domain)
    now = await catalog_of(service.orchestrator).operation(record.id)
    if now is None or now.ended is None:
        raise Busy(record.who, record.id, what)
    if now.state == State.ROLLED_BACK:
        raise OperationFailed(f"{what} of {record.who} was rolled back: {now.error}")
    if record.kind is OperationKind.CREATE:
        found = [await service.orchestrator.show(domain, now.subject) for domain in record.domains]
        return found if len(found) > 1 else found[0]
    return None
