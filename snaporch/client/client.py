"""A client of the service, with the methods of `snaporch.Orchestrator`: code moves to it by changing one line.

    async with snaporch.open_orchestrator(root) as orch:    # in this process
    async with snaporch.open_client(root) as orch:          # by the service that owns the root
    async with snaporch.open_client(url="https://host:8443", token="sno_…") as orch:

A method returns and raises what the orchestrator's does. What differs:

- Paths are the service's, and are confined to its configured directories.
- An operation is the service's: when this process dies it goes on. When the *call* is cancelled the operation is
  cancelled, too, and the call ends when it has rolled back, as with the orchestrator.
- `ServiceGone`: the service does not answer, or no longer. What it did goes on, or is mended at its next start.
- `events` are those of all clients' operations; the channel ends where some were lost.
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import attrs
import httpx2
import trio

from snaporch.catalog.root import default_root
from snaporch.client.connection import ANSWER_SECONDS, Connection
from snaporch.drivers.local.sockets import address
from snaporch.errors import InvalidInput, ServiceGone
from snaporch.model.convert import lenient, load_definition
from snaporch.model.domain import Discovered, DomainDefinition, DomainInfo, DomainRecord, DomainState
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
from snaporch.service.owner import owner
from snaporch.service.shapes import OperationStatus, Screenshot, flag_names

T = TypeVar("T")


@attrs.define
class Client:
    """See the module; `open_client` makes one.

    Attributes:
        root: the root that the service owns, as far as we know.
    """

    root: Path
    _service: Connection

    # --- domains ---

    async def define(self, definition: DomainDefinition | Path | str) -> DomainRecord:
        """See `Orchestrator.define`; a file is read here, and its paths are to be there."""
        if not isinstance(definition, DomainDefinition):
            definition = load_definition(Path(definition))
        body = lenient.unstructure(definition)
        return await self._service.post(DomainRecord, "domains", **body)

    async def undefine(self, name: str, *, discard: bool = False) -> None:
        """See `Orchestrator.undefine`."""
        await self._service.ask("DELETE", _domain(name), params={"discard": "true"} if discard else {})

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
        return await self._act(name, "attach", socket=socket, driver=driver, uri=uri, of=of, records=records)

    async def sync(self, name: str, *, records: bool | None = None) -> SyncReport:
        """See `Orchestrator.sync`."""
        return await self._service.post(SyncReport, f"{_domain(name)}/sync", records=records)

    async def discover(self, driver: str = "") -> tuple[Discovered, ...]:
        """See `Orchestrator.discover`."""
        asked = {"driver": driver} if driver else {}
        return await self._service.get(tuple[Discovered, ...], "discover", **asked)

    async def start(self, name: str, *, paused: bool = False) -> DomainInfo:
        """See `Orchestrator.start`."""
        return await self._act(name, "start", paused=paused)

    async def shutdown(self, name: str, *, timeout: float = 60.0) -> DomainInfo:
        """See `Orchestrator.shutdown`."""
        return await self._act(name, "shutdown", seconds=timeout + ANSWER_SECONDS, timeout=timeout)

    async def destroy(self, name: str) -> DomainInfo:
        """See `Orchestrator.destroy`."""
        return await self._act(name, "destroy")

    async def pause(self, name: str) -> DomainInfo:
        """See `Orchestrator.pause`."""
        return await self._act(name, "pause")

    async def resume(self, name: str) -> DomainInfo:
        """See `Orchestrator.resume`."""
        return await self._act(name, "resume")

    async def reset(self, name: str) -> DomainInfo:
        """See `Orchestrator.reset`."""
        return await self._act(name, "reset")

    async def reboot(self, name: str, *, timeout: float = 60.0) -> DomainInfo:
        """See `Orchestrator.reboot`."""
        await self.shutdown(name, timeout=timeout)
        return await self.start(name)

    async def screenshot(self, name: str) -> bytes:
        """See `Orchestrator.screenshot`."""
        taken = await self._service.post(Screenshot, f"{_domain(name)}/screenshot")
        return b64decode(taken.png)

    async def tag(self, name: str, tags: Collection[str]) -> DomainInfo:
        """See `Orchestrator.tag`."""
        return await self._service.post(DomainInfo, f"{_domain(name)}/tags", method="PUT", tags=list(tags))

    async def _act(self, name: str, what: str, *, seconds: float = ANSWER_SECONDS, **body: Any) -> DomainInfo:
        return await self._service.post(DomainInfo, f"{_domain(name)}/{what}", seconds=seconds, **body)

    async def domains(self, after: str = "", limit: int | None = None) -> tuple[DomainInfo, ...]:
        """See `Orchestrator.domains`."""
        begin: dict[str, str] = {"after": after} if after else {}
        return await self._service.all(DomainInfo, "domains", limit=limit, **begin)

    async def domain_info(self, name: str) -> DomainInfo:
        """See `Orchestrator.domain_info`."""
        return await self._service.get(DomainInfo, _domain(name))

    async def is_active(self, name: str) -> bool:
        """See `Orchestrator.is_active`."""
        return (await self.domain_info(name)).state is not DomainState.INACTIVE

    # --- snapshots ---

    async def create(
        self,
        domain: str,
        snapshot: DomainSnapshot | None = None,
        flags: CreateFlag = CreateFlag(0),  # noqa: B008 - an immutable value
        options: CreateOptions | None = None,
        *,
        bandwidth: SharedBandwidth | None = None,
    ) -> SnapshotRecord:
        """See `Orchestrator.create`; a bandwidth cannot be shared with what runs in other processes.

        Raises:
            InvalidInput: `bandwidth` was given; `options` has one for this create alone.
        """
        _not_shared(bandwidth)
        body = {"snapshot": snapshot or DomainSnapshot(), "options": options or CreateOptions()}
        url = f"{_domain(domain)}/snapshots"
        return await self._service.operate(SnapshotRecord, url, flags=flag_names(flags), **body)

    async def create_group(
        self,
        domains: Sequence[str],
        snapshot: DomainSnapshot | None = None,
        flags: CreateFlag = CreateFlag(0),  # noqa: B008 - an immutable value
        options: CreateOptions | None = None,
        *,
        bandwidth: SharedBandwidth | None = None,
    ) -> tuple[SnapshotRecord, ...]:
        """See `Orchestrator.create_group`, and `create` for the bandwidth."""
        _not_shared(bandwidth)
        body = {"snapshot": snapshot or DomainSnapshot(), "options": options or CreateOptions()}
        kind = tuple[SnapshotRecord, ...]
        return await self._service.operate(kind, "groups", domains=domains, flags=flag_names(flags), **body)

    async def revert(
        self,
        domain: str,
        name: str,
        flags: RevertFlag = RevertFlag(0),  # noqa: B008 - an immutable value
        *,
        save_current: str = "",
        ids: Collection[str] = (),
    ) -> RevertRecord:
        """See `Orchestrator.revert`."""
        url, body = (
            f"{_snapshot(domain, name)}/revert",
            {"flags": flag_names(flags), "save_current": save_current, "ids": list(ids)},
        )
        return await self._service.operate(RevertRecord, url, **body)

    async def revert_group(
        self,
        domains: Sequence[str],
        name: str,
        flags: RevertFlag = RevertFlag(0),  # noqa: B008 - an immutable value
        *,
        save_current: str = "",
        ids: Collection[str] = (),
    ) -> tuple[RevertRecord, ...]:
        """See `Orchestrator.revert_group`."""
        kind = tuple[RevertRecord, ...]
        body = {
            "domains": domains,
            "name": name,
            "flags": flag_names(flags),
            "save_current": save_current,
            "ids": list(ids),
        }
        return await self._service.operate(kind, "groups/revert", **body)

    async def delete(
        self,
        domain: str,
        name: str | Collection[str],
        flags: DeleteFlag = DeleteFlag(0),  # noqa: B008 - an immutable value
        options: MergeOptions | None = None,
        *,
        ids: Collection[str] = (),
        dry_run: bool = False,
    ) -> MergePlan:
        """See `Orchestrator.delete`."""
        names = [name] if isinstance(name, str) else list(name)
        body: dict[str, Any] = {"names": names, "flags": flag_names(flags), "options": options or MergeOptions()}
        body |= {"ids": list(ids)}
        url = f"{_domain(domain)}/delete"
        return await self._plan_or_do(MergePlan, url, dry_run=dry_run, **body)

    async def delete_group(
        self,
        domains: Sequence[str],
        name: str | Collection[str],
        flags: DeleteFlag = DeleteFlag(0),  # noqa: B008 - an immutable value
        options: MergeOptions | None = None,
        *,
        ids: Collection[str] = (),
        dry_run: bool = False,
    ) -> dict[str, MergePlan]:
        """See `Orchestrator.delete_group`."""
        names = [name] if isinstance(name, str) else list(name)
        body: dict[str, Any] = {"names": names, "flags": flag_names(flags), "options": options or MergeOptions()}
        url, kind, body = "groups/delete", dict[str, MergePlan], {"domains": domains, "ids": list(ids)} | body
        return await self._plan_or_do(kind, url, dry_run=dry_run, **body)

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
        body: dict[str, Any] = {"snapshot": name, "depth": depth, "options": options or MergeOptions()}
        url = f"{_domain(domain)}/flatten"
        return await self._plan_or_do(MergePlan, url, dry_run=dry_run, **body)

    async def limit_depth(self, domain: str, depth: int) -> DomainInfo:
        """See `Orchestrator.limit_depth`."""
        return await self._service.post(DomainInfo, f"{_domain(domain)}/depth", method="PUT", depth=depth)

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
        body: dict[str, Any] = {"new": new, "options": options or CloneOptions(), "ids": list(ids)}
        kind = tuple[CloneRecord, ...]
        return await self._service.operate(kind, f"{_snapshot(domain, name)}/clone", **body)

    async def clones(self, domain: str) -> Mapping[str, tuple[str, ...]]:
        """See `Orchestrator.clones`."""
        kind = dict[str, tuple[str, ...]]
        return await self._service.get(kind, f"{_domain(domain)}/clones")

    async def verify(
        self, domain: str, name: str, *, boot: bool = False, ids: Collection[str] = ()
    ) -> VerifyReport:
        """See `Orchestrator.verify`."""
        return await self._service.operate(
            VerifyReport, f"{_snapshot(domain, name)}/verify", boot=boot, ids=list(ids)
        )

    async def intact(self, domain: str, name: str) -> bool:
        """See `Orchestrator.intact`."""
        return bool((await self._service.ask("GET", f"{_snapshot(domain, name)}/intact"))["intact"])

    async def pin(
        self, domain: str, name: str, *, pinned: bool = True, ids: Collection[str] = ()
    ) -> SnapshotRecord:
        """See `Orchestrator.pin`."""
        url = f"{_snapshot(domain, name)}/pin"
        return await self._service.post(SnapshotRecord, url, method="PUT", pinned=pinned, ids=list(ids))

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
        body: dict[str, Any] = {"name": new_name, "description": description, "ids": list(ids)}
        body["expires_in"] = expires_in
        return await self._service.post(SnapshotRecord, f"{_snapshot(domain, name)}/edit", **body)

    async def list(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """See `Orchestrator.list`."""
        return await self._service.all(SnapshotRecord, f"{_domain(domain)}/snapshots")

    async def current(self, domain: str) -> str | None:
        """See `Orchestrator.current`."""
        return (await self.domain_info(domain)).current

    async def show(self, domain: str, name: str) -> SnapshotRecord:
        """See `Orchestrator.show`."""
        return await self._service.get(SnapshotRecord, _snapshot(domain, name))

    async def tree(self, domain: str) -> Mapping[str | None, tuple[str, ...]]:
        """See `Orchestrator.tree`."""
        children: dict[str | None, tuple[str, ...]] = {}
        for record in await self.list(domain):
            children[record.parent] = (*children.get(record.parent, ()), record.name)
        return children

    async def _plan_or_do(self, kind: type[T], url: str, *, dry_run: bool, **body: Any) -> T:
        if dry_run:
            return await self._service.post(kind, f"{url}/plan", **body)
        return await self._service.operate(kind, url, **body)

    # --- the rest ---

    async def unreadable(self, domain: str | None = None, kind: str | None = None) -> tuple[Unreadable, ...]:
        """See `Orchestrator.unreadable`."""
        asked = {name: value for name, value in (("domain", domain), ("kind", kind)) if value}
        return await self._service.get(tuple[Unreadable, ...], "unreadable", **asked)

    async def recover(
        self, *, domain: str | None = None, patience: float = math.inf
    ) -> tuple[OperationRecord, ...]:
        """See `Orchestrator.recover`."""
        body = {"domain": domain, "patience": None if patience == math.inf else patience}
        return await self._service.operate(tuple[OperationRecord, ...], "recover", **body)

    async def give_up(self, operation: str, *, dry_run: bool = False) -> GivenUp:
        """See `Orchestrator.give_up`."""
        return await self._service.post(GivenUp, f"operations/{operation}/give-up", dry_run=dry_run)

    async def fsck(self, domain: str | None = None, *, repair: bool = False) -> tuple[Finding, ...]:
        """See `Orchestrator.fsck`."""
        return await self._service.operate(tuple[Finding, ...], "fsck", domain=domain, repair=repair)

    async def operations(
        self,
        domain: str | None = None,
        *,
        last: int | None = None,
        since: float | None = None,
        outcome: str | None = None,
    ) -> tuple[OperationRecord, ...]:
        """See `Orchestrator.operations`: those that the journal has, without what was refused."""
        if domain is not None:
            await self.domain_info(domain)
        asked = {"domain": domain, "since": since, "outcome": outcome}
        query = {name: value for name, value in asked.items() if value is not None}
        statuses = await self._service.all(OperationStatus, "operations", limit=last, **query)
        return tuple(_record(status) for status in reversed(statuses) if status.journaled)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """See `Orchestrator.events`; a broken connection is made anew, and nothing is lost by that."""
        async with self._service.events() as channel:
            yield channel

    async def estimate(self, domain: str, strategy: Strategy = Strategy.BACKGROUND) -> Estimate:
        """See `Orchestrator.estimate`."""
        return await self._service.get(Estimate, f"{_domain(domain)}/estimate", strategy=strategy)

    async def doctor(self, domain: str | None = None, *, measure: bool = True) -> dict[str, Any]:
        """See `Orchestrator.doctor`; for a viewer nothing is measured."""
        query = ({"domain": domain} if domain else {}) | ({} if measure else {"measure": "false"})
        return dict(await self._service.ask("GET", "doctor", params=query))


def _not_shared(bandwidth: SharedBandwidth | None) -> None:
    if bandwidth is not None:
        raise InvalidInput("a bandwidth is shared within one process; give each create its own in options")


def _domain(name: str) -> str:
    return f"domains/{quote(name, safe='')}"


def _snapshot(domain: str, name: str) -> str:
    return f"{_domain(domain)}/snapshots/{quote(name, safe='')}"


def _record(status: OperationStatus) -> OperationRecord:
    error = status.error["detail"] if status.error else ""
    kept = status.id, status.kind, status.domains, status.subject, status.state, status.begun, status.ended
    return OperationRecord(*kept, phases=status.phases, error=error)


@asynccontextmanager
async def open_client(
    root: Path | str | None = None, *, url: str = "", token: str = "", verify: Any = True
) -> AsyncIterator[Client]:
    """Open a client of the service that owns a root, or of one at a URL.

    Args:
        root: the root; the default one when None. Of no use with `url`.
        url: ``https://HOST:PORT``, or ``http://`` on this host.
        token: what `snaporch token make` has printed; needed with `url`.
        verify: as httpx2 has it: an SSL context, or whether certificates are checked.

    Raises:
        ServiceGone: no service owns the root.
    """
    headers = {"authorization": f"Bearer {token}"} if token else {}
    where = Path(root) if root is not None else default_root()
    with ExitStack() as stack:
        if url:
            transport = httpx2.AsyncHTTPTransport(verify=verify)
        else:
            if (service := owner(where)) is None:
                raise ServiceGone(f"no service owns {where}; `snaporch serve` starts one")
            transport = httpx2.AsyncHTTPTransport(uds=stack.enter_context(address(service.socket)))
        http = httpx2.AsyncClient(transport=transport, base_url=url or "http://snaporch", headers=headers)
        async with http:
            yield Client(where, Connection(http))
