"""What somebody should look at is told to addresses of `service.toml`, and again until they have it.

A request cannot name an address: only who may write `service.toml` can. No redirect is followed, and no proxy of
the environment is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from math import inf

import attrs
import httpx2
import stamina
import structlog
import trio

from snaporch.batch.schedule import ScheduleInfo
from snaporch.engine.states import State
from snaporch.model.convert import dumps
from snaporch.model.formats import versioned
from snaporch.model.record import Event, EventKind

ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 12, 1.0, 300.0  # half an hour, about
ANSWER_SECONDS = 10.0
UNDER_WAY = 1_000  # messages that are not delivered yet; what comes beyond is logged and dropped
OVERDUE_EVERY_SECONDS = 60.0
_AGAIN = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})

_log = structlog.get_logger("snaporch.service")


@versioned("alert")
@attrs.frozen
class Alert:
    """What a webhook is sent, as JSON.

    Attributes:
        kind: ``plan-failed``, ``plan-overdue``, ``operation-stranded`` or ``domain-worse``.
        subject: the plan's, or the domains', name.
        text: for people.
        time: by the host's clock.
    """

    kind: str
    subject: str
    text: str
    time: float = attrs.field(factory=time.time)


class _NotTaken(Exception):
    """An address has answered that it cannot take a message now."""


@attrs.define(eq=False)
class Webhooks:
    """Sends alerts; `tell` it, and let it `run`.

    Attributes:
        addresses: returns where to, at present.
        schedules: returns the plans, of which some may be overdue.
    """

    addresses: Callable[[], Sequence[str]]
    schedules: Callable[[], Iterable[ScheduleInfo]] = tuple
    _under_way: int = 0
    _overdue: frozenset[str] = frozenset()
    _told: tuple[trio.MemorySendChannel[Alert], trio.MemoryReceiveChannel[Alert]] = attrs.field(
        factory=lambda: trio.open_memory_channel[Alert](inf)  # `tell` keeps it short
    )

    def tell(self, alert: Alert) -> None:
        """Have an alert sent to all addresses; returns at once."""
        for _ in self.addresses()[:1]:
            if self._under_way >= UNDER_WAY:
                _log.warning("an alert was dropped: too many are not delivered yet", kind=alert.kind)
                return
            self._under_way += 1
            self._told[0].send_nowait(alert)

    def hear(self, event: Event) -> None:
        """Take note of what happens in operations; returns at once."""
        if event.kind is EventKind.STATE and event.state == State.STRANDED:
            text = event.text or "could be neither finished nor undone; `snaporch recover` tries again"
            self.tell(Alert("operation-stranded", ", ".join(event.domains), text))

    async def run(self) -> None:
        """Send what was told, for ever."""
        async with (
            httpx2.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False) as http,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._watch)
            async for alert in self._told[1]:
                nursery.start_soon(self._send, http, alert)

    async def _watch(self) -> None:
        """Tell of plans that become overdue."""
        while True:
            found = {each.plan: each for each in self.schedules() if each.overdue}
            for name in found.keys() - self._overdue:
                why = found[name].error or "it should have taken every snapshot by now, and has not"
                self.tell(Alert("plan-overdue", name, why))
            self._overdue = frozenset(found)
            await trio.sleep(OVERDUE_EVERY_SECONDS)

    async def _send(self, http: httpx2.AsyncClient, alert: Alert) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for address in self.addresses():
                    nursery.start_soon(self._post, http, address, alert)
        finally:
            self._under_way -= 1

    @staticmethod
    async def _post(http: httpx2.AsyncClient, address: str, alert: Alert) -> None:
        again = stamina.retry_context(
            on=(httpx2.HTTPError, _NotTaken),
            attempts=ATTEMPTS,
            timeout=None,
            wait_initial=FIRST_WAIT,
            wait_max=LONGEST_WAIT,
            wait_jitter=FIRST_WAIT,
        )
        try:
            async for attempt in again:
                with attempt:
                    await _post_once(http, address, alert)
        except (httpx2.HTTPError, _NotTaken) as error:
            _log.error(
                "an alert was not delivered", address=address, kind=alert.kind, error=str(error) or repr(error)
            )


async def _post_once(http: httpx2.AsyncClient, address: str, alert: Alert) -> None:
    headers = {"content-type": "application/json"}
    answer = await http.post(address, content=dumps(alert), headers=headers, follow_redirects=False)
    if answer.is_server_error or answer.status_code in _AGAIN:
        raise _NotTaken(f"HTTP status {answer.status_code}")
    if not answer.is_success:
        _log.error("an alert was refused", address=address, kind=alert.kind, status=answer.status_code)
