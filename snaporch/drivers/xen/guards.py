"""The guards of a Xen guest, from snaporch's side: what they are told. What they do is in `guard`."""

from __future__ import annotations

from snaporch.drivers.base import Guard, PauseNote, PivotNote
from snaporch.drivers.local.leash import GuardProcess
from snaporch.drivers.qmp.guards import Reach
from snaporch.drivers.qmp.protocol import QMP
from snaporch.drivers.xen import binding, guard
from snaporch.drivers.xen.domain import XenDomain


def pause_guard(domain: XenDomain, note: PauseNote) -> Guard:
    """Return a guard that lets the guest run again; see `Machine.guard`."""
    rival = XenDomain.of(note.rival).word if note.rival is not None else "-"
    return GuardProcess(guard.__file__, (binding.__file__, domain.word, rival, str(note.verdict or "-")))


def pivot_guard(domain: XenDomain, qmp: QMP, job: str, note: PivotNote) -> Guard:
    """Return a guard of a disk that goes over to the image below: a matter of the QEMU that serves it."""
    return Reach(qmp, domain.socket, "", "").pivot(job, note)
