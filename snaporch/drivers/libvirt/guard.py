"""What a guard does for a domain of libvirt's: the action of `snaporch.drivers.local.guard`.

    pause SITE URI UUID RIVAL VERDICT THAW
    pivot SITE URI UUID TARGET VERDICT

SITE is the directory that libvirt's binding is in: the program starts without it, and imports it only when there is
something to do. The guest is paused.

``pause``: where VERDICT (unless it is ``-``) says ``complete``, the domain RIVAL has taken the guest's place, and
nothing is done. Where it says ``end``, snaporch is about to end the guest: nothing is done as long as snaporch is
only stopped. Else VERDICT is ``undone`` from now on, RIVAL (a UUID, or ``-``) is ended, and the guest runs. With
THAW ``thaw`` its file systems are thawed by the guest agent. A memory stream that is under way goes on.

``pivot``: the disk TARGET is about to go over to the image below its own. It does where VERDICT says so; else it
stays, which VERDICT says from now on. Then the guest runs.

The guest is resumed by libvirt's own call, so that libvirt takes its disk leases again. There is no other way to
QEMU: its one monitor is libvirtd's. If libvirtd does not answer, the guard tries again.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

UNDONE = "undone"
COMPLETE = "complete"
END = "end"
STAY = "stay"
NONE = "-"


def act(arguments: Sequence[str], *, dead: bool, decide: Callable[..., str]) -> bool:
    """See the head of this file; libvirtd serves many clients, so a stopped snaporch is in nobody's way."""
    what, site, uri, uuid, *rest = arguments
    word = decide(rest[1], UNDONE) if what == "pause" and rest[1] != NONE else UNDONE
    if word == COMPLETE:
        return True
    if word == END and not dead:
        return False
    moves = what == "pivot" and decide(rest[1], STAY) != STAY
    sys.path.append(site)
    import libvirt  # noqa: PLC0415 - see the head of this file

    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError:
        return False
    with contextlib.closing(connection), contextlib.suppress(libvirt.libvirtError):
        if what == "pivot":
            _end_job(libvirt, connection, uuid, rest[0], moves=moves)
        elif rest[0] != NONE:
            with contextlib.suppress(libvirt.libvirtError):  # it has ended
                connection.lookupByUUIDString(rest[0]).destroy()
        undo = partial(decide, rest[1], UNDONE, over=END) if word == END else None
        return _let_run(libvirt, connection, uuid, undo, thaw=what == "pause" and rest[2] == "thaw")
    return False


def _end_job(libvirt: Any, connection: Any, uuid: str, target: str, *, moves: bool) -> None:
    domain = connection.lookupByUUIDString(uuid)
    if domain.blockJobInfo(target, 0):
        domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT if moves else 0)


def _let_run(libvirt: Any, connection: Any, uuid: str, undo: Callable[[], object] | None, *, thaw: bool) -> bool:
    """Return whether the guest runs, or is gone; `undo` is called before the guest may run."""
    try:
        domain = connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)
    if not domain.isActive():
        return True
    if undo is not None:
        undo()
    if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
        with contextlib.suppress(libvirt.libvirtError):  # it runs already, or cannot yet: the state is looked at
            domain.resume()
    if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
        return False
    if thaw:
        with contextlib.suppress(libvirt.libvirtError):
            domain.fsThaw(None, 0)
    return True
