"""Claims: the images that an operation reads or writes while it runs, visible to all processes on one root.

The lock of a domain keeps two operations on *it* apart. Two domains may share images: one operation may merge an
image that another domain is about to start on. So an operation claims images before its last look at their readers:

- define, start, attach, create, revert and verify claim for reading the images of their disks;
- merges claim for writing the images that they write to or remove.

The claim is one transaction with the look at all other claims; the second operation finds the first one's claim, or
its result. A conflicting claim is Busy. A claim ends with its operation, in the same transaction. The claim of a
process that is gone is dropped by the next operation, unless its operation is in the journal and has not ended: an
interrupted operation keeps its images until it is recovered or given up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from snaporch.catalog.claims import Claimer, take_claims
from snaporch.drivers.local.process import boot, started
from snaporch.engine.context import Context, at_work
from snaporch.engine.run import Operation


def _dead(operation: str, pid: int, began: int, booted: str) -> bool:
    if pid == os.getpid() and booted == boot():
        return operation not in at_work
    return booted != boot() or started(pid) != began


async def claim(context: Context, operation: Operation, images: Mapping[str, str], *, write: bool) -> None:
    """Claim images for an operation, more of them each time that it is called; under its lock, with which they end.

    Args:
        context: the orchestrator's.
        operation: whose claim it is.
        images: identity to path.
        write: they are written to or removed: nobody else may even read them.

    Raises:
        Busy: another operation has claimed one, and one of the two writes; nothing more is then claimed.
    """
    if not images:
        return
    pid, what = os.getpid(), f"{operation.kind} {operation.subject}".strip()
    claimer = Claimer(operation.id, operation.who, what, pid, started(pid), boot())
    await context.catalog.transact(
        lambda connection: take_claims(connection, claimer, images, write=write, dead=_dead)
    )
