"""What `snaporch.Orchestrator` and `snaporch.Client` both are: for code that works with either."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import trio

from snaporch.model.domain import Discovered, DomainDefinition, DomainInfo, DomainRecord
from snaporch.model.finding import Finding, Unreadable
from snaporch.model.merge import MergePlan
from snaporch.model.record import (
    CloneRecord,
    Estimate,
    Event,
    GivenUp,
    OperationRecord,
    RevertRecord,
    SnapshotRecord,
    SyncReport,
    VerifyReport,
)
from snaporch.model.request import CloneOptions, CreateOptions, MergeOptions, Strategy
from snaporch.model.rfc import CreateFlag, DeleteFlag, DomainSnapshot, RevertFlag
from snaporch.operations.bandwidth import SharedBandwidth


class AnyOrchestrator(Protocol):
    """Everything that can be done on a root, in this process or by the service that owns it."""

    @property
    def root(self) -> Path:
        """The directory that holds all."""

    async def define(self, definition: DomainDefinition | Path | str) -> DomainRecord:
        """See `Orchestrator.define`."""

    async def undefine(self, name: str, *, discard: bool = False) -> None:
        """See `Orchestrator.undefine`."""

    async def attach(
        self,
        name: str,
        socket: str = "",
        *,
        driver: str = "qemu",
        uri: str = "",
        of: str = "",
        records: bool = True,
    ) -> DomainInfo:
        """See `Orchestrator.attach`."""

    async def sync(self, name: str, *, records: bool | None = None) -> SyncReport:
        """See `Orchestrator.sync`."""

    async def discover(self, driver: str = "") -> tuple[Discovered, ...]:
        """See `Orchestrator.discover`."""

    async def start(self, name: str, *, paused: bool = False) -> DomainInfo:
        """See `Orchestrator.start`."""

    async def shutdown(self, name: str, *, timeout: float = ...) -> DomainInfo:
        """See `Orchestrator.shutdown`."""

    async def destroy(self, name: str) -> DomainInfo:
        """See `Orchestrator.destroy`."""

    async def pause(self, name: str) -> DomainInfo:
        """See `Orchestrator.pause`."""

    async def resume(self, name: str) -> DomainInfo:
        """See `Orchestrator.resume`."""

    async def reset(self, name: str) -> DomainInfo:
        """See `Orchestrator.reset`."""

    async def reboot(self, name: str, *, timeout: float = ...) -> DomainInfo:
        """See `Orchestrator.reboot`."""

    async def screenshot(self, name: str) -> bytes:
        """See `Orchestrator.screenshot`."""

    async def domains(self, after: str = "", limit: int | None = None) -> tuple[DomainInfo, ...]:
        """See `Orchestrator.domains`."""

    async def domain_info(self, name: str) -> DomainInfo:
        """See `Orchestrator.domain_info`."""

    async def is_active(self, name: str) -> bool:
        """See `Orchestrator.is_active`."""

    async def tag(self, name: str, tags: Collection[str]) -> DomainInfo:
        """See `Orchestrator.tag`."""

    async def create(
        self,
        domain: str,
        snapshot: DomainSnapshot | None = None,
        flags: CreateFlag = ...,
        options: CreateOptions | None = None,
        *,
        bandwidth: SharedBandwidth | None = None,
    ) -> SnapshotRecord:
        """See `Orchestrator.create`."""

    async def create_group(
        self,
        domains: Sequence[str],
        snapshot: DomainSnapshot | None = None,
        flags: CreateFlag = ...,
        options: CreateOptions | None = None,
        *,
        bandwidth: SharedBandwidth | None = None,
    ) -> tuple[SnapshotRecord, ...]:
        """See `Orchestrator.create_group`."""

    async def revert(
        self, domain: str, name: str, flags: RevertFlag = ..., *, save_current: str = "", ids: Collection[str] = ()
    ) -> RevertRecord:
        """See `Orchestrator.revert`."""

    async def revert_group(
        self,
        domains: Sequence[str],
        name: str,
        flags: RevertFlag = ...,
        *,
        save_current: str = "",
        ids: Collection[str] = (),
    ) -> tuple[RevertRecord, ...]:
        """See `Orchestrator.revert_group`."""

    async def delete(
        self,
        domain: str,
        name: str | Collection[str],
        flags: DeleteFlag = ...,
        options: MergeOptions | None = None,
        *,
        ids: Collection[str] = (),
        dry_run: bool = False,
    ) -> MergePlan:
        """See `Orchestrator.delete`."""

    async def delete_group(
        self,
        domains: Sequence[str],
        name: str | Collection[str],
        flags: DeleteFlag = ...,
        options: MergeOptions | None = None,
        *,
        ids: Collection[str] = (),
        dry_run: bool = False,
    ) -> dict[str, MergePlan]:
        """See `Orchestrator.delete_group`."""

    async def flatten(
        self,
        domain: str,
        name: str = "",
        depth: int = 1,
        options: MergeOptions | None = None,
        *,
        dry_run: bool = False,
    ) -> MergePlan:
        """See `Orchestrator.flatten`."""

    async def limit_depth(self, domain: str, depth: int) -> DomainInfo:
        """See `Orchestrator.limit_depth`."""

    async def clone(
        self,
        domain: str,
        name: str,
        new: str,
        options: CloneOptions | None = None,
        *,
        ids: Collection[str] = (),
    ) -> tuple[CloneRecord, ...]:
        """See `Orchestrator.clone`."""

    async def clones(self, domain: str) -> Mapping[str, tuple[str, ...]]:
        """See `Orchestrator.clones`."""

    async def verify(
        self, domain: str, name: str, *, boot: bool = False, ids: Collection[str] = ()
    ) -> VerifyReport:
        """See `Orchestrator.verify`."""

    async def intact(self, domain: str, name: str) -> bool:
        """See `Orchestrator.intact`."""

    async def pin(
        self, domain: str, name: str, *, pinned: bool = True, ids: Collection[str] = ()
    ) -> SnapshotRecord:
        """See `Orchestrator.pin`."""

    async def edit(
        self,
        domain: str,
        name: str,
        *,
        new_name: str = "",
        description: str | None = None,
        expires_in: float | None = None,
        ids: Collection[str] = (),
    ) -> SnapshotRecord:
        """See `Orchestrator.edit`."""

    async def list(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """See `Orchestrator.list`."""

    async def current(self, domain: str) -> str | None:
        """See `Orchestrator.current`."""

    async def show(self, domain: str, name: str) -> SnapshotRecord:
        """See `Orchestrator.show`."""

    async def tree(self, domain: str) -> Mapping[str | None, tuple[str, ...]]:
        """See `Orchestrator.tree`."""

    async def unreadable(self, domain: str | None = None, kind: str | None = None) -> tuple[Unreadable, ...]:
        """See `Orchestrator.unreadable`."""

    async def recover(self, *, domain: str | None = None, patience: float = ...) -> tuple[OperationRecord, ...]:
        """See `Orchestrator.recover`."""

    async def fsck(self, domain: str | None = None, *, repair: bool = False) -> tuple[Finding, ...]:
        """See `Orchestrator.fsck`."""

    async def give_up(self, operation: str, *, dry_run: bool = False) -> GivenUp:
        """See `Orchestrator.give_up`."""

    async def operations(
        self,
        domain: str | None = None,
        *,
        last: int | None = None,
        since: float | None = None,
        outcome: str | None = None,
    ) -> tuple[OperationRecord, ...]:
        """See `Orchestrator.operations`."""

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Event]]:
        """See `Orchestrator.events`."""

    async def estimate(self, domain: str, strategy: Strategy = Strategy.BACKGROUND) -> Estimate:
        """See `Orchestrator.estimate`."""

    async def doctor(self, domain: str | None = None, *, measure: bool = True) -> dict[str, Any]:
        """See `Orchestrator.doctor`."""
