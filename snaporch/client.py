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

import json
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import attrs
import cattrs
import httpx2
import trio

from snaporch.errors import InvalidInput, ServiceGone, SnaporchError
from snaporch.model.convert import lenient, load_definition
from snaporch.model.domain import Discovered, DomainDefinition, DomainInfo, DomainRecord, DomainState
from snaporch.model.merge import MergePlan
from snaporch.model.record import (
    Estimate,
    Event,
    Finding,
    GivenUp,
    OperationRecord,
    RevertRecord,
    SnapshotRecord,
    Unreadable,
    VerifyReport,
)
from snaporch.model.request import CreateOptions, MergeOptions, Strategy
from snaporch.model.rfc import CreateFlag, DeleteFlag, DomainSnapshot, RevertFlag
from snaporch.operations.bandwidth import SharedBandwidth
from snaporch.orchestrator import default_root
from snaporch.service.owner import address, owner
from snaporch.service.problems import MEDIA_TYPE, error_of
from snaporch.service.shapes import OperationStatus, flag_names

T = TypeVar("T")

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0  # for what is no operation; a shutdown has its own
POLL_SECONDS = 30.0  # an operation is waited for by one request after another
UNDO_SECONDS = 360.0  # for an operation that was cancelled to roll back
RECONNECT_SECONDS = 1.0
PAGE = 1_000
BUFFER = 1_000
_LAST = frozenset({"gap", "draining"})  # whoever listens must not believe that it has seen everything


@attrs.define
class Client:
    """See the module; `open_client` makes one.

    Attributes:
        root: the root that the service owns, as far as we know.
    """

    root: Path
    _http: httpx2.AsyncClient

    # --- asking ---

    async def _ask(self, method: str, url: str, *, seconds: float = ANSWER_SECONDS, **more: Any) -> Any:
        """Ask once and return the answer's document.

        Raises:
            ServiceGone: there is no answer.
            SnaporchError: what the service has raised.
        """
        try:
            response = await self._http.request(method, f"/v1/{url}", timeout=_timeout(seconds), **more)
        except httpx2.TransportError as error:
            raise _gone(error) from error
        return _document(response)

    async def _get(self, kind: Any, url: str, /, **query: str | float) -> Any:
        return _read(await self._ask("GET", url, params=query), kind)

    async def _all(self, kind: type[T], url: str, /, *, limit: int | None = None, **query: Any) -> tuple[T, ...]:
        """Return a whole list, or as much of it as `limit` says, page by page."""
        found: list[T] = []
        after: dict[str, str] = {}
        while True:
            some = PAGE if limit is None else min(PAGE, limit - len(found))
            page = await self._ask("GET", url, params={"limit": some, **query, **after})
            found += _read(page["items"], list[kind])  # type: ignore[valid-type]
            if page["next"] is None or len(found) == limit:
                return tuple(found)
            after = {"after": page["next"]}

    async def _post(
        self, kind: Any, url: str, /, *, method: str = "POST", seconds: float = ANSWER_SECONDS, **body: Any
    ) -> Any:
        return _read(await self._ask(method, url, seconds=seconds, json=lenient.unstructure(body)), kind)

    async def _operate(self, kind: Any, url: str, /, **body: Any) -> Any:
        """Have an operation done and return its result; a cancellation cancels it and waits until that is done.

        The request that begins it is not cut off: whether it has begun would not be known.
        """
        headers = {"idempotency-key": secrets.token_hex(16)}
        with trio.CancelScope(shield=True):
            begun = await self._ask("POST", url, json=lenient.unstructure(body), headers=headers)
        status = _read(begun, OperationStatus)
        try:
            status = await self._ended(status)
        except trio.Cancelled:  # noqa: ASYNC103 - an operation that was complete is not cancelled
            with trio.move_on_after(UNDO_SECONDS, shield=True):
                await self._ask("POST", f"operations/{status.id}/cancel", json={})
                status = await self._ended(status)
            if status.error is not None and status.error["exit_code"] not in {1, 2}:
                raise error_of(status.error) from None  # noqa: ASYNC104 - what could not be undone is told
            if status.outcome != "complete":
                raise
        if status.error is not None:
            raise error_of(status.error)
        return _read(status.result, kind)

    async def _ended(self, status: OperationStatus) -> OperationStatus:
        try:
            return await self._waited_for(status)
        except ServiceGone as error:
            what = f"{status.kind} {status.subject}".strip()
            raise ServiceGone(f"{error}: {what} is operation {status.id} in `snaporch operations`") from error

    async def _waited_for(self, status: OperationStatus) -> OperationStatus:
        while status.ended is None:
            seconds = POLL_SECONDS + ANSWER_SECONDS
            answer = await self._ask(
                "GET", f"operations/{status.id}", seconds=seconds, params={"wait": POLL_SECONDS}
            )
            status = _read(answer, OperationStatus)
        return status

    # --- domains ---

    async def define(self, definition: DomainDefinition | Path | str) -> DomainRecord:
        """See `Orchestrator.define`; a file is read here, and its paths are to be there."""
        if not isinstance(definition, DomainDefinition):
            definition = load_definition(Path(definition))
        body = lenient.unstructure(definition)
        return cast("DomainRecord", await self._post(DomainRecord, "domains", **body))

    async def undefine(self, name: str) -> None:
        """See `Orchestrator.undefine`."""
        await self._ask("DELETE", _domain(name))

    async def attach(
        self, name: str, socket: str = "", *, driver: str = "qemu", uri: str = "", of: str = ""
    ) -> DomainInfo:
        """See `Orchestrator.attach`."""
        return await self._act(name, "attach", socket=socket, driver=driver, uri=uri, of=of)

    async def discover(self, driver: str = "") -> tuple[Discovered, ...]:
        """See `Orchestrator.discover`."""
        asked = {"driver": driver} if driver else {}
        return cast("tuple[Discovered, ...]", await self._get(tuple[Discovered, ...], "discover", **asked))

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

    async def tag(self, name: str, tags: Collection[str]) -> DomainInfo:
        """See `Orchestrator.tag`."""
        found = await self._post(DomainInfo, f"{_domain(name)}/tags", method="PUT", tags=list(tags))
        return cast("DomainInfo", found)

    async def _act(self, name: str, what: str, *, seconds: float = ANSWER_SECONDS, **body: Any) -> DomainInfo:
        return cast("DomainInfo", await self._post(DomainInfo, f"{_domain(name)}/{what}", seconds=seconds, **body))

    async def domains(self, after: str = "", limit: int | None = None) -> tuple[DomainInfo, ...]:
        """See `Orchestrator.domains`."""
        begin: dict[str, str] = {"after": after} if after else {}
        return await self._all(DomainInfo, "domains", limit=limit, **begin)

    async def domain_info(self, name: str) -> DomainInfo:
        """See `Orchestrator.domain_info`."""
        return cast("DomainInfo", await self._get(DomainInfo, _domain(name)))

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
        record = await self._operate(SnapshotRecord, url, flags=flag_names(flags), **body)
        return cast("SnapshotRecord", record)

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
        records = await self._operate(kind, "groups", domains=domains, flags=flag_names(flags), **body)
        return cast("tuple[SnapshotRecord, ...]", records)

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
        return cast("RevertRecord", await self._operate(RevertRecord, url, **body))

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
        return cast("tuple[RevertRecord, ...]", await self._operate(kind, "groups/revert", **body))

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
        ask = self._post(MergePlan, f"{url}/plan", **body) if dry_run else self._operate(MergePlan, url, **body)
        return cast("MergePlan", await ask)

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
        ask = self._post(kind, f"{url}/plan", **body) if dry_run else self._operate(kind, url, **body)
        return cast("dict[str, MergePlan]", await ask)

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
        ask = self._post(MergePlan, f"{url}/plan", **body) if dry_run else self._operate(MergePlan, url, **body)
        return cast("MergePlan", await ask)

    async def limit_depth(self, domain: str, depth: int) -> DomainInfo:
        """See `Orchestrator.limit_depth`."""
        found = await self._post(DomainInfo, f"{_domain(domain)}/depth", method="PUT", depth=depth)
        return cast("DomainInfo", found)

    async def verify(
        self, domain: str, name: str, *, boot: bool = False, ids: Collection[str] = ()
    ) -> VerifyReport:
        """See `Orchestrator.verify`."""
        report = await self._operate(VerifyReport, f"{_snapshot(domain, name)}/verify", boot=boot, ids=list(ids))
        return cast("VerifyReport", report)

    async def intact(self, domain: str, name: str) -> bool:
        """See `Orchestrator.intact`."""
        return bool((await self._ask("GET", f"{_snapshot(domain, name)}/intact"))["intact"])

    async def pin(
        self, domain: str, name: str, *, pinned: bool = True, ids: Collection[str] = ()
    ) -> SnapshotRecord:
        """See `Orchestrator.pin`."""
        url = f"{_snapshot(domain, name)}/pin"
        return cast(
            "SnapshotRecord", await self._post(SnapshotRecord, url, method="PUT", pinned=pinned, ids=list(ids))
        )

    async def edit(
        self,
        domain: str,
        name: str,
        *,
        new_name: str = "",
        description: str | None = None,
        ids: Collection[str] = (),
    ) -> SnapshotRecord:
        """See `Orchestrator.edit`."""
        body: dict[str, Any] = {"name": new_name, "description": description, "ids": list(ids)}
        return cast("SnapshotRecord", await self._post(SnapshotRecord, f"{_snapshot(domain, name)}/edit", **body))

    async def list(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """See `Orchestrator.list`."""
        return await self._all(SnapshotRecord, f"{_domain(domain)}/snapshots")

    async def current(self, domain: str) -> str | None:
        """See `Orchestrator.current`."""
        return (await self.domain_info(domain)).current

    async def show(self, domain: str, name: str) -> SnapshotRecord:
        """See `Orchestrator.show`."""
        return cast("SnapshotRecord", await self._get(SnapshotRecord, _snapshot(domain, name)))

    async def tree(self, domain: str) -> Mapping[str | None, tuple[str, ...]]:
        """See `Orchestrator.tree`."""
        children: dict[str | None, tuple[str, ...]] = {}
        for record in await self.list(domain):
            children[record.parent] = (*children.get(record.parent, ()), record.name)
        return children

    # --- the rest ---

    async def unreadable(self, domain: str | None = None, kind: str | None = None) -> tuple[Unreadable, ...]:
        """See `Orchestrator.unreadable`."""
        asked = {name: value for name, value in (("domain", domain), ("kind", kind)) if value}
        found = await self._get(tuple[Unreadable, ...], "unreadable", **asked)
        return cast("tuple[Unreadable, ...]", found)

    async def recover(
        self, *, domain: str | None = None, patience: float = math.inf
    ) -> tuple[OperationRecord, ...]:
        """See `Orchestrator.recover`."""
        body = {"domain": domain, "patience": None if patience == math.inf else patience}
        return cast(
            "tuple[OperationRecord, ...]", await self._operate(tuple[OperationRecord, ...], "recover", **body)
        )

    async def give_up(self, operation: str, *, dry_run: bool = False) -> GivenUp:
        """See `Orchestrator.give_up`."""
        return cast("GivenUp", await self._post(GivenUp, f"operations/{operation}/give-up", dry_run=dry_run))

    async def fsck(self, domain: str | None = None, *, repair: bool = False) -> tuple[Finding, ...]:
        """See `Orchestrator.fsck`."""
        found = await self._operate(tuple[Finding, ...], "fsck", domain=domain, repair=repair)
        return cast("tuple[Finding, ...]", found)

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
        statuses = await self._all(OperationStatus, "operations", limit=last, **query)
        return tuple(_record(status) for status in reversed(statuses) if status.journaled)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """See `Orchestrator.events`; a broken connection is made anew, and nothing is lost by that."""
        send, receive = trio.open_memory_channel[Event](BUFFER)
        heard = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, send, heard)
            with receive:
                await heard.wait()
                yield receive
            nursery.cancel_scope.cancel()

    async def _follow(self, send: trio.MemorySendChannel[Event], heard: trio.Event) -> None:
        """Send events on until some are lost, or the service stops; `heard` is set when none is missed any more.

        What reads the connection has to come to its own end (httpx2's generators are not closed otherwise): it is
        cancelled where it reads, and nothing is raised out of its loop.
        """
        last = ""
        with send, trio.CancelScope() as end:

            async def hear(frame: Mapping[str, str]) -> None:
                nonlocal last
                last = frame.get("id", last)
                heard.set()
                if frame.get("event") in _LAST:
                    end.cancel()
                elif "data" in frame:
                    event = _read(json.loads(frame["data"]), Event)
                    try:
                        with trio.CancelScope(shield=True):  # whoever is cancelled closes the channel first
                            await send.send(event)
                    except trio.BrokenResourceError:
                        end.cancel()

            while True:
                try:
                    await self._listen(last, hear)
                except httpx2.TransportError as error:
                    if not heard.is_set():
                        raise _gone(error) from error
                await trio.sleep(RECONNECT_SECONDS)

    async def _listen(self, last: str, hear: Callable[[Mapping[str, str]], Awaitable[None]]) -> None:
        """Call `hear` with the fields of each server-sent event, until the connection ends."""
        headers = {"last-event-id": last} if last else {}
        async with self._http.stream("GET", "/v1/events", headers=headers, timeout=_timeout(60)) as response:
            if response.is_error:
                await response.aread()
                _document(response)
            frame: dict[str, str] = {}
            async for line in response.aiter_lines():
                name, _, value = line.partition(": ")
                if line:
                    frame[name] = value
                else:
                    await hear(frame)
                    frame = {}

    async def estimate(self, domain: str, strategy: Strategy = Strategy.BACKGROUND) -> Estimate:
        """See `Orchestrator.estimate`."""
        return cast("Estimate", await self._get(Estimate, f"{_domain(domain)}/estimate", strategy=strategy))

    async def doctor(self, domain: str | None = None, *, measure: bool = True) -> dict[str, Any]:
        """See `Orchestrator.doctor`; for a viewer nothing is measured."""
        query = ({"domain": domain} if domain else {}) | ({} if measure else {"measure": "false"})
        return cast("dict[str, Any]", await self._ask("GET", "doctor", params=query))


def _read(document: Any, kind: Any) -> Any:
    """Return what a service has answered as a `kind`.

    Raises:
        SnaporchError: it is not that: the service is a newer one.
    """
    try:
        return lenient.structure(document, kind)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        words = str(error) if isinstance(error, ValueError) else "; ".join(cattrs.transform_error(error, "answer"))
        raise SnaporchError(f"the service's answer cannot be read: {words}") from error


def _not_shared(bandwidth: SharedBandwidth | None) -> None:
    if bandwidth is not None:
        raise InvalidInput("a bandwidth is shared within one process; give each create its own in options")


def _timeout(seconds: float) -> httpx2.Timeout:
    return httpx2.Timeout(seconds, connect=CONNECT_SECONDS)


def _gone(error: Exception) -> ServiceGone:
    words = str(error) or type(error).__name__
    return ServiceGone(
        f"the service does not answer: {words}; what it was doing goes on, or its next start mends it"
    )


def _document(response: httpx2.Response) -> Any:
    """Return what an answer says.

    Raises:
        SnaporchError: it is a problem.
    """
    if response.headers.get("content-type") == MEDIA_TYPE:
        raise error_of(response.json())
    if response.is_error:
        raise SnaporchError(f"the service answered {response.status_code} {response.reason_phrase}")
    return response.json() if response.content else None


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
            yield Client(where, http)
