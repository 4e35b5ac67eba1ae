"""A connection to a service: asks, waits for operations, follows events, and raises what the service raises."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import attrs
import cattrs
import httpx2
import trio

from snaporch.errors import ServiceGone, SnaporchError
from snaporch.model.convert import lenient
from snaporch.model.record import Event
from snaporch.service.problems import MEDIA_TYPE, error_of
from snaporch.service.shapes import OperationStatus

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
class Connection:
    """What a `Client` asks through.

    Attributes:
        http: to the service.
    """

    http: httpx2.AsyncClient

    async def ask(self, method: str, url: str, *, seconds: float = ANSWER_SECONDS, **more: Any) -> Any:
        """Ask once and return the answer's document.

        Raises:
            ServiceGone: there is no answer.
            SnaporchError: what the service has raised.
        """
        try:
            response = await self.http.request(method, f"/v1/{url}", timeout=_timeout(seconds), **more)
        except httpx2.TransportError as error:
            raise _gone(error) from error
        return _document(response)

    async def get(self, kind: type[T], url: str, /, **query: str | float) -> T:
        """Ask for something."""
        return _read(await self.ask("GET", url, params=query), kind)

    async def all(self, kind: type[T], url: str, /, *, limit: int | None = None, **query: Any) -> tuple[T, ...]:
        """Return a whole list, or as much of it as `limit` says, page by page."""
        found: list[T] = []
        after: dict[str, str] = {}
        while True:
            some = PAGE if limit is None else min(PAGE, limit - len(found))
            page = await self.ask("GET", url, params={"limit": some, **query, **after})
            found += _read(page["items"], list[kind])  # type: ignore[valid-type]
            if page["next"] is None or len(found) == limit:
                return tuple(found)
            after = {"after": page["next"]}

    async def post(
        self, kind: type[T], url: str, /, *, method: str = "POST", seconds: float = ANSWER_SECONDS, **body: Any
    ) -> T:
        """Have something done that is no operation."""
        return _read(await self.ask(method, url, seconds=seconds, json=lenient.unstructure(body)), kind)

    async def operate(self, kind: type[T], url: str, /, **body: Any) -> T:
        """Have an operation done and return its result; a cancellation cancels it and waits until that is done.

        The request that begins it is not cut off: whether it has begun would not be known.
        """
        headers = {"idempotency-key": secrets.token_hex(16)}
        with trio.CancelScope(shield=True):
            begun = await self.ask("POST", url, json=lenient.unstructure(body), headers=headers)
        status = _read(begun, OperationStatus)
        try:
            status = await self._ended(status)
        except trio.Cancelled:  # noqa: ASYNC103 - an operation that was complete is not cancelled
            with trio.move_on_after(UNDO_SECONDS, shield=True):
                await self.ask("POST", f"operations/{status.id}/cancel", json={})
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
            answer = await self.ask(
                "GET", f"operations/{status.id}", seconds=seconds, params={"wait": POLL_SECONDS}
            )
            status = _read(answer, OperationStatus)
        return status

    @asynccontextmanager
    async def events(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """See `Client.events`."""
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
        async with self.http.stream("GET", "/v1/events", headers=headers, timeout=_timeout(60)) as response:
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


def _read(document: Any, kind: type[T]) -> T:
    """Return what a service has answered as a `kind`.

    Raises:
        SnaporchError: it is not that: the service is a newer one.
    """
    try:
        return lenient.structure(document, kind)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        words = str(error) if isinstance(error, ValueError) else "; ".join(cattrs.transform_error(error, "answer"))
        raise SnaporchError(f"the service's answer cannot be read: {words}") from error


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
