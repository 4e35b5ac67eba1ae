"""snaporch: live whole-system snapshots of virtual machines, orchestrated with structured concurrency.

async with snaporch.open_orchestrator("/srv/snapshots") as orch:
await orch.create("web1", DomainSnapshot("before-upgrade"), CreateFlag.LIVE)
...
await orch.revert("web1", "before-upgrade")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snaporch.errors import (
    Busy,
    CommandRefused,
    ConnectionGone,
    DamagedSnapshot,
    DeadlineExceeded,
    Forbidden,
    HypervisorError,
    InvalidInput,
    Left,
    NotEnoughSpace,
    NotFound,
    OperationFailed,
    OutcomeUnknown,
    ProtocolError,
    Refused,
    ServiceGone,
    SnaporchError,
    Stranded,
    TargetExists,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainInfo, DomainState
from snaporch.model.record import (
    Estimate,
    Event,
    FileRecord,
    OperationRecord,
    Outcome,
    SnapshotRecord,
    Timings,
    VerifyReport,
)
from snaporch.model.request import CreateOptions, MergeOptions, OnTimeout, Strategy
from snaporch.model.rfc import CreateFlag, DeleteFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.orchestrator import Orchestrator, open_orchestrator

if TYPE_CHECKING:
    from snaporch.client import Client, open_client

__all__ = [  # noqa: RUF022 - in the order in which a reader needs them
    "open_orchestrator",
    "Orchestrator",
    "open_client",
    "Client",
    # the RFC's structures and flags
    "DomainSnapshot",
    "DiskSnapshot",
    "DeviceDisk",
    "CreateFlag",
    "DeleteFlag",
    "RevertFlag",
    # requests
    "CreateOptions",
    "Strategy",
    "OnTimeout",
    "MergeOptions",
    "DomainDefinition",
    # answers
    "SnapshotRecord",
    "Outcome",
    "FileRecord",
    "Timings",
    "Estimate",
    "VerifyReport",
    "DomainInfo",
    "DomainState",
    "DiskStatus",
    "OperationRecord",
    "Event",
    # errors, as drawn in snaporch.errors
    "SnaporchError",
    "Refused",
    "InvalidInput",
    "TargetExists",
    "NotEnoughSpace",
    "Unsupported",
    "DamagedSnapshot",
    "NotFound",
    "Busy",
    "OperationFailed",
    "DeadlineExceeded",
    "Stranded",
    "HypervisorError",
    "CommandRefused",
    "ConnectionGone",
    "ProtocolError",
    "OutcomeUnknown",
    "Left",
    # errors of the service
    "ServiceGone",
    "Unauthenticated",
    "Forbidden",
    "TooLarge",
    "Unavailable",
]


def __getattr__(name: str) -> Any:
    """Give the client's names: whoever does without them need not wait until HTTP is imported."""
    if name in {"open_client", "Client"}:
        from snaporch import client  # noqa: PLC0415

        return getattr(client, name)
    raise AttributeError(name)
