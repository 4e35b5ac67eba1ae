"""What a handler gets, and what a row of the table of URLs is (`snaporch.service.api`); pages of lists."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import attrs
import trio
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from snaporch.errors import InvalidInput
from snaporch.service.roles import Caller, Role
from snaporch.service.service import Service

PAGE, MOST = 100, 1_000


@attrs.frozen
class Call:
    """A request.

    Attributes:
        service: the service.
        caller: who asks.
        path: the parts of the URL that have names.
        query: the parameters after the question mark.
        body: what was sent, structured; None where the table says that there is none.
        key: the idempotency key, or nothing.
        request: tells this request from another one under the same key.
        gone: set when the client has gone.
        ends: to be set where what is done ends with the client.
    """

    service: Service
    caller: Caller
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any = None
    key: str = ""
    request: str = ""
    gone: trio.Event = attrs.field(factory=trio.Event)
    ends: trio.Event = attrs.field(factory=trio.Event)

    async def wait_for(self, event: trio.Event, seconds: float) -> None:
        """Wait for something, but no longer than that, nor than the client is there.

        Raises:
            ClientDisconnect: it has gone.
        """

        async def until_gone() -> None:
            await self.gone.wait()
            nursery.cancel_scope.cancel()

        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_gone)
                await event.wait()
                nursery.cancel_scope.cancel()
        if self.gone.is_set():
            raise ClientDisconnect

    @property
    def domain(self) -> str:
        """The domain in the URL."""
        return self.path["domain"]

    @property
    def name(self) -> str:
        """The snapshot in the URL."""
        return self.path["name"]

    def number(self, name: str, default: float, most: float) -> float:
        """Return a parameter that is a number; given without one it is `most`.

        Raises:
            InvalidInput: it is none, or is out of range.
        """
        text = self.query.get(name)
        if text is None:
            return default
        if text in {"", "true"}:
            return most
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= most:
            raise InvalidInput(f"{name}: {text!r} is not a number from 0 to {most:g}")
        return number


Handler = Callable[[Call], Awaitable[Any]]


@attrs.frozen
class Route:
    """A row of the table.

    Attributes:
        method: GET, POST, PUT or DELETE.
        path: with the names of its parts in braces.
        role: what it takes; None: anybody may ask.
        handler: answers.
        body: the class of the body; None: there is none.
        answer: the class of the answer; None: it is not JSON, or has no class.
        page: the answer is a page of those.
        status: of the answer.
        query: names of parameters.
        only_reads: nothing is changed, though it is a POST.
        long: it takes time of a CPU, or of a disk: few of one caller's work at once.
    """

    method: str
    path: str
    role: Role | None
    handler: Handler
    body: Any = None
    answer: Any = None
    page: bool = False
    status: int = 200
    query: tuple[str, ...] = ()
    only_reads: bool = False
    long: bool = False


def json_page(items: Sequence[str], following: str | None) -> Response:
    """Return a page whose items are JSON already."""
    return Response(
        f'{{"items":[{",".join(items)}],"next":{json.dumps(following)}}}', media_type="application/json"
    )


def limit_of(call: Call) -> int:
    """Return how many items a page may have."""
    return int(call.number("limit", PAGE, MOST)) or PAGE


def no_cursor(after: str | None) -> InvalidInput:
    """Return the error of a cursor that is nobody's."""
    return InvalidInput(f"after: {after!r} is not in the list, or no longer; begin without it")
