"""All names that `snaporch` exports, each imported from where it lives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snaporch.drivers.base import Driver
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
    LoadFailed,
    NotConverging,
    NotEnoughSpace,
    NotFound,
    OperationFailed,
    OtherMachine,
    OtherSnapshot,
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
    UnreadableRecord,
    Unsupported,
)
from snaporch.model.archive import Exported, Imported
from snaporch.model.domain import (
    Discovered,
    DiskStatus,
    DomainDefinition,
    DomainInfo,
    DomainRecord,
    DomainState,
    ForwardedPort,
    Handle,
    Origin,
)
from snaporch.model.finding import Finding, Trouble, Unreadable
from snaporch.model.merge import MergeKind, MergePlan, MergeStep, Where
from snaporch.model.record import (
    CloneRecord,
    Estimate,
    Event,
    EventKind,
    FileRecord,
    GivenUp,
    Group,
    OperationKind,
    OperationRecord,
    Outcome,
    RevertRecord,
    SnapshotRecord,
    SyncReport,
    Timings,
    VerifyReport,
)
from snaporch.model.request import CloneOptions, CreateOptions, MergeOptions, OnTimeout, Strategy
from snaporch.model.rfc import CreateFlag, DeleteFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.operations.bandwidth import SharedBandwidth
from snaporch.orchestrator import Orchestrator, default_root, open_orchestrator
from snaporch.pool import Pool, open_pool
from snaporch.protocol import AnyOrchestrator

if TYPE_CHECKING:
    from snaporch.client import Client, open_client

__all__ = [  # noqa: RUF022 - in the order in which a reader needs them
    "open_orchestrator",
    "Orchestrator",
    "open_client",
    "Client",
    "AnyOrchestrator",
    "open_pool",
    "Pool",
    "default_root",
    "__version__",  # noqa: F822 - by `__getattr__`
    # the RFC's structures and flags
    "DomainSnapshot",
    "DiskSnapshot",
    "DeviceDisk",
    "CreateFlag",
    "DeleteFlag",
    "RevertFlag",
    # requests
    "CreateOptions",
    "CloneOptions",
    "Strategy",
    "OnTimeout",
    "MergeOptions",
    "SharedBandwidth",
    "Discovered",
    "DomainDefinition",
    # answers
    "SnapshotRecord",
    "Outcome",
    "FileRecord",
    "SyncReport",
    "Timings",
    "Estimate",
    "RevertRecord",
    "CloneRecord",
    "ForwardedPort",
    "Origin",
    "VerifyReport",
    "DomainInfo",
    "DomainState",
    "DiskStatus",
    "Group",
    "DomainRecord",
    "Handle",
    "MergePlan",
    "MergeStep",
    "MergeKind",
    "Where",
    "OperationRecord",
    "OperationKind",
    "Event",
    "EventKind",
    "Finding",
    "Trouble",
    "Unreadable",
    "Exported",
    "GivenUp",
    "Imported",
    # for drivers of one's own
    "Driver",
    # errors, as drawn in snaporch.errors
    "SnaporchError",
    "Refused",
    "InvalidInput",
    "TargetExists",
    "NotEnoughSpace",
    "Unsupported",
    "DamagedSnapshot",
    "OtherSnapshot",
    "OtherMachine",
    "LoadFailed",
    "NotFound",
    "UnreadableRecord",
    "Busy",
    "OperationFailed",
    "DeadlineExceeded",
    "Stranded",
    "HypervisorError",
    "CommandRefused",
    "ConnectionGone",
    "NotConverging",
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
    """Give the client's names and the version: who does without need not wait until HTTP is imported."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - as slow

        return version("snaporch")
    if name in {"open_client", "Client"}:
        from snaporch import client  # noqa: PLC0415

        return getattr(client, name)
    raise AttributeError(name)
