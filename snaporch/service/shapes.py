"""What is sent to the service and what it answers, beyond the library's own values; OpenAPI comes from both."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, TypeVar

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.formats import versioned
from snaporch.model.limits import MOST_ITEMS, MOST_SECONDS, SHUTDOWN_SECONDS, no_longer_than, within
from snaporch.model.record import OperationKind
from snaporch.model.request import CloneOptions, CreateOptions, MergeOptions
from snaporch.model.rfc import DomainSnapshot
from snaporch.model.upcasts import domains_listed

F = TypeVar("F", bound=enum.Flag)

MOST_SHUTDOWN_SECONDS = 3_600.0
MOST_TAGS, MOST_LINKS = 100, 2_000


def flag_names(flags: enum.Flag) -> tuple[str, ...]:
    """Return flags as they are sent: ``("disk-only", "quiesce")``."""
    return tuple((flag.name or "").lower().replace("_", "-") for flag in flags)


def flags_of(kind: type[F], names: Iterable[str]) -> F:
    """Return what `flag_names` made of flags.

    Raises:
        InvalidInput: there is no such flag.
    """
    known = {name: flag for flag in kind for name in flag_names(flag)}
    flags = kind(0)
    for name in names:
        if name not in known:
            raise InvalidInput(f"{name!r} is no flag; there are {', '.join(known)}")
        flags |= known[name]
    return flags


@versioned("attach-request")
@attrs.frozen
class Attach:
    """Take charge of a domain that something else started.

    By its control socket or, where the driver has managers, the URI of one and the domain's name there.
    """

    socket: str = ""
    driver: str = "qemu"
    uri: str = ""
    of: str = ""
    records: bool = True


@versioned("sync-request")
@attrs.frozen
class Sync:
    """Bring the manager's list of snapshots and snaporch's into agreement; `records` as in `Orchestrator.sync`."""

    records: bool | None = None


@versioned("start-request")
@attrs.frozen
class Start:
    """Start a domain; `paused`: the guest is paused before its first instruction."""

    paused: bool = False


@versioned("shutdown-request")
@attrs.frozen
class Shutdown:
    """Ask the guest to power off; wait no longer than `timeout` seconds, nor, if so, than the client is there."""

    timeout: float = attrs.field(default=SHUTDOWN_SECONDS, validator=within(0, MOST_SHUTDOWN_SECONDS))
    ends_with_client: bool = False


@versioned("screenshot")
@attrs.frozen
class Screenshot:
    """A picture of a screen: `png` is the file, in base64."""

    png: str


@versioned("tags-request")
@attrs.frozen
class Tags:
    """The tags that a domain is to have."""

    tags: tuple[str, ...] = attrs.field(validator=no_longer_than(MOST_TAGS))


@versioned("pin-request")
@attrs.frozen
class Pin:
    """Whether retention must leave the snapshot."""

    pinned: bool = True
    ids: tuple[str, ...] = ()


@versioned("edit-request")
@attrs.frozen
class Edit:
    """What a snapshot is to be called and described as: what is left out stays; `ids`: what it must be.

    `expires_in` is in seconds from now; 0: it never expires.
    """

    name: str = ""
    description: str | None = None
    expires_in: float | None = None
    ids: tuple[str, ...] = ()


@versioned("create-request")
@attrs.frozen
class Create:
    """Take a snapshot; flags: ``disk-only``, ``live``, ``quiesce``."""

    snapshot: DomainSnapshot = DomainSnapshot()  # noqa: RUF009 - an immutable value
    flags: tuple[str, ...] = ()
    options: CreateOptions = CreateOptions()  # noqa: RUF009 - as above


@versioned("create-group-request")
@attrs.frozen
class CreateGroup:
    """Take a snapshot of several domains at one point; the rest as in `Create`."""

    domains: tuple[str, ...] = attrs.field(validator=no_longer_than(MOST_ITEMS))
    snapshot: DomainSnapshot = DomainSnapshot()  # noqa: RUF009 - an immutable value
    flags: tuple[str, ...] = ()
    options: CreateOptions = CreateOptions()  # noqa: RUF009 - as above


@versioned("revert-request")
@attrs.frozen
class Revert:
    """Go back to a snapshot; `ids`: what it must be.

    Flags: ``running``, ``paused``, ``force``, ``alone``, ``keep-clock``, ``lazy``.
    """

    flags: tuple[str, ...] = ()
    save_current: str = ""
    ids: tuple[str, ...] = ()


@versioned("revert-group-request")
@attrs.frozen
class RevertGroup:
    """Go back to the point of several domains; the rest as in `Revert`."""

    domains: tuple[str, ...] = attrs.field(validator=no_longer_than(MOST_ITEMS))
    name: str
    flags: tuple[str, ...] = ()
    save_current: str = ""
    ids: tuple[str, ...] = ()


@versioned("clone-request")
@attrs.frozen
class Clone:
    """Make new domains of a snapshot: `new`, or of a count ``new-1`` and so on."""

    new: str
    options: CloneOptions = attrs.field(factory=CloneOptions)
    ids: tuple[str, ...] = ()


@versioned("verify-request")
@attrs.frozen
class Verify:
    """Read a snapshot in full; `boot`: load it in a throw-away copy, too."""

    boot: bool = False
    ids: tuple[str, ...] = ()


@versioned("delete-request")
@attrs.frozen
class Delete:
    """Delete snapshots; flags: ``children``, ``children-only``, ``alone``."""

    names: tuple[str, ...] = attrs.field(validator=no_longer_than(MOST_ITEMS))
    flags: tuple[str, ...] = ()
    options: MergeOptions = attrs.field(factory=MergeOptions)
    ids: tuple[str, ...] = ()


@versioned("delete-group-request")
@attrs.frozen
class DeleteGroup:
    """Delete snapshots that were taken of several domains at one point; the rest as in `Delete`."""

    domains: tuple[str, ...] = attrs.field(validator=no_longer_than(MOST_ITEMS))
    names: tuple[str, ...] = attrs.field(validator=no_longer_than(MOST_ITEMS))
    flags: tuple[str, ...] = ()
    options: MergeOptions = attrs.field(factory=MergeOptions)
    ids: tuple[str, ...] = ()


@versioned("flatten-request")
@attrs.frozen
class Flatten:
    """Shorten the chains of a domain, or of a `snapshot` of it, to `depth` images."""

    snapshot: str = ""
    depth: int = attrs.field(default=1, validator=within(0, MOST_LINKS))
    options: MergeOptions = attrs.field(factory=MergeOptions)


@versioned("depth-request")
@attrs.frozen
class Depth:
    """How many images the domain's chains may have; 0: as many as there are."""

    depth: int = attrs.field(validator=within(0, MOST_LINKS))


@versioned("recover-request")
@attrs.frozen
class Recover:
    """Finish or undo what a crash left, of one domain or all; `patience`: seconds for a stream, or no limit."""

    domain: str | None = None
    patience: float | None = attrs.field(default=None, validator=within(0, MOST_SECONDS))


@versioned("give-up-request")
@attrs.frozen
class GiveUp:
    """End an operation that cannot be mended, or only say what that would keep and lose."""

    dry_run: bool = False


@versioned("fsck-request")
@attrs.frozen
class Fsck:
    """Compare catalog, files and hypervisors, of one domain or all."""

    domain: str | None = None
    repair: bool = False


@versioned("operation-status", domains_listed)
@attrs.frozen
class OperationStatus:
    """An operation that was asked for.

    Attributes:
        id: 32 hexadecimal digits; eight in what snaporch 0.1 has written.
        kind: what it does.
        domains: the names of the domains that it works on; none: all.
        subject: the snapshot's name.
        state: ``queued``, a state of `snaporch.engine.states`, ``running`` where there is none, or ``refused``.
        begun: seconds since the epoch.
        ended: the same; None while it runs.
        outcome: ``complete``, ``rolled-back``, ``stranded``, ``left``, ``failed`` or ``refused``; None while it
            runs.
        phases: seconds that each phase took.
        done: bytes of memory streamed, or of images merged.
        total: bytes there are, as far as is known.
        by: who asked for it; empty where that is not known any more.
        journaled: the journal has it: it was not refused, and does more than read.
        result: what the library's method returns.
        error: a problem document.
    """

    id: str
    kind: OperationKind
    domains: tuple[str, ...]
    subject: str
    state: str
    begun: float
    ended: float | None = None
    outcome: str | None = None
    phases: dict[str, float] = attrs.field(factory=dict)
    done: int = 0
    total: int = 0
    by: str = ""
    journaled: bool = False
    result: Any = None
    error: dict[str, Any] | None = None


@versioned("page")
@attrs.frozen
class Page:
    """A part of a list: `next` is the `after` of what follows, or None."""

    items: tuple[Any, ...]
    next: str | None
