"""Everything that snaporch raises.

    SnaporchError                    exit  http
    ├── Refused                         2   409   nothing was touched
    │   ├── InvalidInput                2   422   the request itself makes no sense
    │   ├── TargetExists                2   409   a name or a file is taken
    │   ├── NotEnoughSpace              2   507   both figures are in it
    │   ├── Unsupported                 2   409   this hypervisor or this domain cannot do it
    │   │   └── OtherMachine            2   409   the domain's machine cannot be started, or differs
    │   ├── OtherSnapshot               2   409   the name means another snapshot than the one that was meant
    │   ├── DamagedSnapshot             2   409   a file is missing or is not what was saved
    │   ├── Unauthenticated             2   401   the service does not know who asks
    │   ├── Forbidden                   2   403   who asks may not do it
    │   ├── TooLarge                    2   413   the request is larger than the service takes
    │   └── Unavailable                 2   503   the service takes nothing just now: it stops, or is full
    ├── NotFound                        3   404
    ├── UnreadableRecord                2   500   the catalog's record of it is damaged or a newer snaporch's
    ├── Busy                            4   409   another operation runs on the domain
    ├── OperationFailed                 1   500   it failed, and everything is as it was before
    │   └── DeadlineExceeded            1   504
    ├── Stranded                        5   500   it failed and could not be undone; says what mends it
    ├── Left                            1   503   snaporch stopped; the hypervisor goes on, the next start ends it
    ├── ServiceGone                     1   502   the service does not answer; what it does goes on
    └── HypervisorError                 1   502
        ├── CommandRefused              1   502   the hypervisor answered with an error
        ├── LoadFailed                  1   502   the hypervisor could not load a guest's memory
        ├── ConnectionGone              1   502   closed by the other side, or never there
        ├── NotConverging               1   502   a merge that a guest's writes outrun; it was given up
        ├── ProtocolError               1   502   what came is not QMP
        └── OutcomeUnknown              1   504   sent, never answered: it may have been carried out

An error carries what it knows as attributes, so that a caller never has to read its text; the text is for
people: what happened, why, and what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import ClassVar

__all__ = [
    "Busy",
    "CommandRefused",
    "ConnectionGone",
    "DamagedSnapshot",
    "DeadlineExceeded",
    "Forbidden",
    "HypervisorError",
    "InvalidInput",
    "Left",
    "LoadFailed",
    "NotConverging",
    "NotEnoughSpace",
    "NotFound",
    "OperationFailed",
    "OtherMachine",
    "OtherSnapshot",
    "OutcomeUnknown",
    "ProtocolError",
    "Refused",
    "ServiceGone",
    "SnaporchError",
    "Stranded",
    "TargetExists",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnreadableRecord",
    "Unsupported",
]


class SnaporchError(Exception):
    """Base of every error that snaporch raises on purpose.

    Attributes:
        exit_code: the command line's exit status for it.
        http_status: the service's answer for it.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class Refused(SnaporchError):
    """The request was refused before anything was touched."""

    exit_code = 2
    http_status = 409


class InvalidInput(Refused):
    """The request makes no sense in itself: a bad name, flags that exclude each other, a bad definition.

    Attributes:
        faults: where several things are wrong, each by itself; else empty.
    """

    http_status = 422
    faults: tuple[str, ...] = ()


class TargetExists(Refused):
    """A name, or a file at a place that is to be written, exists already."""

    def __init__(self, what: str, path: str = "") -> None:
        super().__init__(what)
        self.path = path


class NotEnoughSpace(Refused):
    """What the operation may need is more than what is free.

    Attributes:
        needed: bytes that may be needed.
        free: bytes that are free.
        where: the directory (or "host memory") that is short.
        makes_room: snapshots whose deletion needs no space and frees enough: each of these does, which is one name,
            or several that do so one after the other.
    """

    http_status = 507

    def __init__(
        self, needed: int, free: int, where: str, makes_room: tuple[tuple[str, ...], ...] | None = None
    ) -> None:
        advice = "free some, or choose another place"
        if makes_room:
            names = " or ".join(", then ".join(each) for each in makes_room)
            advice = f"deleting {names} needs no space and frees enough"
        elif makes_room is not None:
            advice = "no snapshot of the domain can be deleted to free enough: free some elsewhere"
        super().__init__(
            f"not enough space in {where}: {needed:,} bytes may be needed, {free:,} are free; {advice}"
        )
        self.makes_room = makes_room or ()
        self.needed = needed
        self.free = free
        self.where = where


class Unsupported(Refused):
    """This hypervisor, or this domain as it is now, cannot do what is asked."""


class OtherMachine(Unsupported):
    """The domain's machine cannot be started, or the started machine differs from it; nothing was touched."""


class OtherSnapshot(Refused):
    """A name that is used again means another snapshot than the one whose id was given."""


class DamagedSnapshot(Refused):
    """A file of the snapshot is missing or is not what was saved."""

    def __init__(self, what: str, path: str) -> None:
        super().__init__(what)
        self.path = path


class Unauthenticated(Refused):
    """The service does not know the client: there is no token, or the service has not made it."""

    http_status = 401


class Forbidden(Refused):
    """The client is known, and its role does not permit this."""

    http_status = 403


class TooLarge(Refused):
    """The request is larger than the service takes."""

    http_status = 413


class Unavailable(Refused):
    """The service takes no requests now: it is stopping, or its queue is full."""

    http_status = 503


class NotFound(SnaporchError):
    """There is no such domain, snapshot or operation."""

    exit_code = 3
    http_status = 404


class UnreadableRecord(SnaporchError):
    """The catalog's record of this one thing cannot be read: it is damaged, or a newer snaporch has written it.

    Nothing was touched; everything else in the root can be worked with.
    """

    exit_code = 2


class Busy(SnaporchError):
    """Another operation runs on the domain.

    Attributes:
        domain: the domain's name.
        operation: the id of the operation that runs.
        running: what it is, for example ``create before-upgrade``.
    """

    exit_code = 4
    http_status = 409

    def __init__(self, domain: str, operation: str, running: str) -> None:
        super().__init__(f"{domain} is busy: {running} runs (operation {operation}); wait for it or cancel it")
        self.domain = domain
        self.operation = operation
        self.running = running


class OperationFailed(SnaporchError):
    """The operation failed and was rolled back: the domain, its disks and the catalog are as they were."""


class DeadlineExceeded(OperationFailed):
    """As OperationFailed: a deadline ran out."""

    http_status = 504


class Stranded(SnaporchError):
    """The operation failed and the hypervisor is gone or refuses to undo it.

    Attributes:
        operation: the operation's id, for ``snaporch recover``.
        remains: what could not be undone and where it is, one entry each.
    """

    exit_code = 5

    def __init__(self, what: str, operation: str, remains: tuple[str, ...]) -> None:
        super().__init__(
            f"{what}; not undone: {'; '.join(remains)}. `snaporch recover` mends it, and where it "
            f"cannot, `snaporch operations give-up {operation}` ends it"
        )
        self.operation = operation
        self.remains = remains

    @property
    def what(self) -> str:
        """What failed, and why."""
        return str(self).partition("; not undone: ")[0]


class Left(SnaporchError):
    """snaporch stopped, and the hypervisor goes on with the operation; the next start completes it."""

    http_status = 503


class ServiceGone(SnaporchError):
    """The service does not answer: an operation goes on in it, or is finished or undone at its next start."""

    http_status = 502


class HypervisorError(SnaporchError):
    """The hypervisor did not do what snaporch asked, or the connection to it failed."""

    http_status = 502


class CommandRefused(HypervisorError):
    """The hypervisor answered a command with an error; the command had no effect.

    Attributes:
        command: the QMP command.
        error_class: the hypervisor's class of the error; QEMU's is mostly ``GenericError``.
        description: the hypervisor's text.
    """

    def __init__(self, label: str, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{label}: the hypervisor refused {command}: {description}")
        self.label = label
        self.command = command
        self.error_class = error_class
        self.description = description


class LoadFailed(HypervisorError):
    """The hypervisor could not load a guest's memory; its last message is in the error."""


class ConnectionGone(HypervisorError):
    """The hypervisor closed the connection, died, or was never there.

    A command that was sent and not answered raises OutcomeUnknown instead.
    """


class NotConverging(HypervisorError):
    """The guest writes faster than a merge copies, and pausing it was not allowed; nothing has changed."""


class ProtocolError(HypervisorError):
    """What came over the socket is not QMP: garbage, a line without end, an answer to nothing."""


class OutcomeUnknown(HypervisorError):
    """A command was sent and no answer came: it may or may not have been carried out.

    Attributes:
        command: the QMP command.
        seconds: the deadline that ran out, or None when the connection was lost.
    """

    http_status = 504

    def __init__(self, label: str, command: str, seconds: float | None) -> None:
        why = "the connection was lost" if seconds is None else f"no answer within {seconds:g} s"
        super().__init__(f"{label}: outcome of {command} unknown: {why}")
        self.label = label
        self.command = command
        self.seconds = seconds


_NO_MORE = {
    errno.EAGAIN: "processes",
    errno.EMFILE: "open files",
    errno.ENFILE: "open files",
    errno.ENOMEM: "memory",
}


def exhausted(error: BaseException) -> Unavailable | None:
    """Return the error that says what this host has no more of for snaporch; None: `error` is of another kind."""
    more = _NO_MORE.get(error.errno or 0) if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        more = "memory"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        more = "threads"
    if more is None:
        return None
    return Unavailable(
        f"this host has no more {more} for snaporch ({error}): see `ulimit -a`, and what takes them; then try again"
    )


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors inside nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
