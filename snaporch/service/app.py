"""The ASGI application: authentication, limits, and the form of errors; the requests are in `api.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any
from urllib.parse import unquote

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount
from starlette.routing import Route as Path_
from starlette.types import ASGIApp, Receive, Scope, Send

from snaporch.errors import InvalidInput, NotFound, Refused, SnaporchError, TooLarge, Unavailable, exhausted, leaves
from snaporch.model.convert import dumps, structured
from snaporch.service.api import ROUTES
from snaporch.service.browser import Dashboard, check_origin
from snaporch.service.call import Call, Route
from snaporch.service.feed import is_number
from snaporch.service.openapi import document
from snaporch.service.problems import MEDIA_TYPE, problem
from snaporch.service.roles import Caller, Role, connected_peer, identify
from snaporch.service.service import Service

BODY_SECONDS = 30.0  # for a request's body to arrive
MOST_KEY = 255  # characters of an idempotency key
MOST_TOLD = 500  # characters of a path, or of an error, in the audit log
BEAT_SECONDS = 15.0  # between comments on an event stream that has nothing to say: who is gone is found out so
# Between two writes to one follower; what has happened meanwhile goes in one. Many are written to less often each:
# all writes together take no more than a part of our time.
PACE_SECONDS, WRITES_A_SECOND = 0.1, 400.0

_READING = frozenset({"GET", "HEAD"})

_log = structlog.get_logger("snaporch.service")

Answering = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> ASGIApp:
    """Return the application of a service that is open."""
    rows: list[BaseRoute] = [
        Path_(row.path, _guarded(service, row.role, partial(_answer, service, row)), methods=[row.method])
        for row in ROUTES
    ]
    described = dumps(document(ROUTES))

    def ready(_: Request) -> Response:
        if service.jobs.closing:
            raise Unavailable("the service is stopping")
        return _json('{"ready":true}')

    async def metrics(request: Request) -> Response:
        async with service.a_turn(request.state.caller):
            text, media_type = await service.metrics.text(request.headers.get("accept", ""))
        return Response(text, media_type=media_type)

    for path, role, answer in (
        ("/v1/events", Role.VIEWER, partial(_events, service)),
        ("/v1/openapi.json", None, lambda _: _json(described)),
        ("/v1/health", None, lambda _: _json('{"ok":true}')),
        ("/v1/ready", None, ready),
    ):
        rows.append(Path_(path, _guarded(service, role, _at_once(answer))))
    rows += [Path_("/metrics", _guarded(service, Role.VIEWER, metrics)), Mount("/", Dashboard())]
    app = Starlette(routes=rows, exception_handlers={HTTPException: _http_error, Exception: _defect})

    async def with_raw_path(scope: Scope, receive: Receive, send: Send) -> None:
        # Parts of a URL are told apart before they are decoded: a slash in a name is no place of its own.
        if "raw_path" in scope:
            scope["path"] = scope["raw_path"].decode("ascii")
        await app(scope, receive, send)

    return with_raw_path


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


def _at_once(answer: Callable[[Request], Response]) -> Answering:
    async def answering(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return answer(request)

    return answering


def _guarded(service: Service, role: Role | None, answering: Answering) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint: authenticate, authorise, turn errors into problem documents, and audit changes."""

    async def endpoint(request: Request) -> Response:
        caller = Caller("anonymous", None)
        try:
            await service.quiet.wait()
            caller = identify(connected_peer.get(), _secret(request), service.tokens, service.config.users)
            request.state.caller = caller
            check_origin(request.headers, local=caller.local)
            if role is not None:
                caller.must_be(role)
            with service.asking(caller):
                response = await answering(request)
        except SnaporchError as error:
            response = problem_response(error)
            if request.method not in _READING or response.status_code in {401, 403}:
                _note(service, request, caller, response.status_code, str(error))
            return response
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        if request.method not in _READING:
            _note(service, request, caller, response.status_code, None)
        return response

    return endpoint


def _note(service: Service, request: Request, caller: Caller, status: int, error: str | None) -> None:
    more = {"error": error[:MOST_TOLD]} if error else {}
    service.audit(caller, f"{request.method} {request.url.path}"[:MOST_TOLD], status, **more)


def _secret(request: Request) -> str:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def problem_response(error: SnaporchError) -> Response:
    """Return the answer that says what was wrong."""
    headers = {"www-authenticate": "Bearer"} if error.http_status == 401 else {}  # noqa: PLR2004 - HTTP's number
    return Response(dumps(problem(error)), error.http_status, headers, MEDIA_TYPE)


async def _http_error(_: Request, error: Exception) -> Response:
    """Answer for what the router refuses: no such place, no such method."""
    await trio.lowlevel.checkpoint()
    status = error.status_code if isinstance(error, HTTPException) else 500
    found = NotFound("there is nothing at this URL; /v1/openapi.json says what there is")
    if status == 404:  # noqa: PLR2004 - HTTP's number
        return problem_response(found)
    refused = Refused(
        f"the request does not fit this URL: {error.detail if isinstance(error, HTTPException) else error}"
    )
    headers = error.headers if isinstance(error, HTTPException) else None
    return Response(dumps(problem(refused) | {"status": status}), status, headers, MEDIA_TYPE)


async def _defect(_: Request, error: Exception) -> Response:
    await trio.lowlevel.checkpoint()
    if known := exhausted(error):
        _log.error("the host has no more for snaporch", error=str(known))
        return problem_response(known)
    _log.error("a defect in snaporch", exc_info=error)
    return problem_response(SnaporchError(f"{type(error).__name__}: a defect in snaporch; the log shows where"))


async def _answer(service: Service, row: Route, request: Request) -> Response:
    """Answer a request; if its client goes away, waiting and reading end."""
    raw = b"" if request.method in _READING else await _body(request, service.config.body_bytes)
    gone, ends, found = trio.Event(), trio.Event(), None
    reads = request.method in _READING or row.only_reads

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()
        if reads or ends.is_set():
            watching.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as watching:
            watching.start_soon(until_gone)
            found = await _answered(service, row, request, raw, (gone, ends))
            watching.cancel_scope.cancel()
    except* Exception as group:  # noqa: BLE001 - it is raised again, without the group around it
        raise next(leaves(group)) from None
    if found is None:
        raise ClientDisconnect
    return found


async def _answered(
    service: Service, row: Route, request: Request, raw: bytes, client: tuple[trio.Event, trio.Event]
) -> Response:
    key = request.headers.get("idempotency-key", "")
    if len(key) > MOST_KEY:
        raise InvalidInput(f"Idempotency-Key: {len(key):,} characters are more than {MOST_KEY}")
    call = Call(
        service,
        request.state.caller,
        {name: unquote(value) for name, value in request.path_params.items()},
        request.query_params,
        _parsed(raw, row.body) if row.body else None,
        key,
        _fingerprint(request, raw) if key else "",
        *client,
    )
    if row.long:
        async with service.a_turn(call.caller):
            found = await row.handler(call)
    else:
        found = await row.handler(call)
    if isinstance(found, Response):
        return found
    if row.status == 204:  # noqa: PLR2004 - HTTP's number
        return Response(status_code=204)
    status = 200 if row.status == 202 and getattr(found, "ended", None) else row.status  # noqa: PLR2004
    return Response(dumps(found), status, media_type="application/json")


def _fingerprint(request: Request, raw: bytes) -> str:
    """Return what tells a request from another: by which name it came here, and how long it waits, are no part."""
    parts = [request.method.encode(), request.scope["path"].encode(), raw]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


async def _body(request: Request, most: int) -> bytes:
    """Read a body, and no more of it than is allowed.

    Raises:
        TooLarge: it is larger, or does not come.
    """
    too_large = TooLarge(f"the body is larger than {most:,} bytes, which is all that the service takes")
    declared = request.headers.get("content-length", "0")
    if not is_number(declared) or int(declared) > most:
        raise too_large
    body = bytearray()
    with trio.move_on_after(BODY_SECONDS) as scope:
        async with aclosing(request.stream()) as stream:
            async for chunk in stream:
                body += chunk
                if len(body) > most:
                    raise too_large
    if scope.cancelled_caught:
        raise TooLarge(f"the body did not come within {BODY_SECONDS:g} s")
    return bytes(body)


def _parsed(raw: bytes, kind: Any) -> Any:
    """Return a body as a value; one that is empty is an empty object.

    Raises:
        InvalidInput: it is not JSON, or not such a value; the places are named.
    """
    try:
        data = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        raise InvalidInput("the body is not JSON") from None
    return structured(data, kind, "body")


# --- events -------------------------------------------------------------------------------------------------


def _events(service: Service, request: Request) -> Response:
    caller: Caller = request.state.caller
    if service.streams >= service.config.streams and not caller.own:
        raise Unavailable(f"{service.streams} clients follow events, which is as many as may; try again later")
    last = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
    return EventStream(service, caller, last, request.query_params.get("domain"))


class EventStream(Response):
    """An endless answer: what happens, as it happens, until the client goes or the service stops."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, caller: Caller, last: str | None, domain: str | None) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._caller = caller
        self._follower = service.feed.follow(last, domain)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events; see ASGI."""
        del scope
        self._service.streams += 1
        self._service.metrics.figures.followers.inc()
        try:
            with self._service.asking(self._caller, at_all_costs=True):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._until_gone, receive, nursery.cancel_scope)
                    await self._send_all(send)
                    nursery.cancel_scope.cancel()
        finally:
            self._service.streams -= 1
            self._service.metrics.figures.followers.dec()

    @staticmethod
    async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _send_all(self, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        feed = self._service.feed
        await write(f": {feed.boot}\nretry: 2000\n\n".encode())
        going = True
        while going:
            with trio.move_on_after(BEAT_SECONDS):
                going = await self._follower.more()
            async with self._service.quiet.passage():
                data = self._follower.take()
            await write(data or b": still here\n\n")  # a client that does not read holds no passage
            await trio.sleep(max(PACE_SECONDS, self._service.streams / WRITES_A_SECOND))
        await write(self._follower.farewell(), more=False)
