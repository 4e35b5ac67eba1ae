"""QMP through libvirt: what a `QemuMachine` needs of a connection."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import trio

from snaporch.drivers.libvirt.connection import Connection
from snaporch.drivers.local import process
from snaporch.drivers.local.process import LocalProcess
from snaporch.drivers.qmp.subscription import Subscription
from snaporch.drivers.qmp.wire import Event, Greeting
from snaporch.errors import CommandRefused, ConnectionGone, HypervisorError, ProtocolError

COMMAND_SECONDS = 20.0  # also `stop`, which waits for every disk request in flight
# What libvirt says before the end of the process is seen: QEMU closes its monitor first.
_LOST = re.compile(
    r"(end of file|unable to (read|write)|closed the).* monitor|domain is (not|no longer) running", re.IGNORECASE
)


class LibvirtQMP:
    """Passes commands on by ``virDomainQemuMonitorCommand``, and QEMU's events by libvirt's.

    It taints the domain (``custom-monitor``), which libvirt says once in the domain's log.
    """

    def __init__(
        self, connection: Connection, domain: Any, version: tuple[int, int, int], local: LocalProcess
    ) -> None:
        self.connection = connection
        self.domain = domain
        self._local = local
        self.check: Callable[[str, str, Any], None] | None = None
        self._greeting = Greeting(version, "", ())
        self._subscriptions: list[Subscription] = []

    @property
    def label(self) -> str:
        """See QMP."""
        return self.connection.label

    @property
    def greeting(self) -> Greeting:
        """See QMP."""
        return self._greeting

    def fileno(self) -> int | None:
        """See QMP."""
        return None

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
    ) -> Any:
        """See QMP."""
        document = {"execute": command} | ({"arguments": dict(arguments)} if arguments else {})
        text, qemu = json.dumps(document), self.connection.qemu
        function = qemu.qemuMonitorCommandWithFiles if fds else qemu.qemuMonitorCommand
        words = (self.domain, text, list(fds), 0) if fds else (self.domain, text, 0)
        answer = await self.call(command, function, *words, timeout=timeout or COMMAND_SECONDS)
        value = _value(self.label, command, answer[0] if fds else answer)
        if self.check is not None:
            self.check(self.label, command, value)
        return value

    async def call(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of libvirt's that is about this domain; see `Connection.call`.

        Raises:
            ConnectionGone: libvirt said no, as it has lost the domain's QEMU.
        """
        try:
            return await self.connection.call(what, function, *arguments, **options)
        except CommandRefused as error:
            self.check_lost(error)
            raise

    def check_lost(self, error: CommandRefused) -> None:
        """Tell a refusal that is about the domain from one because libvirt has lost its QEMU.

        Raises:
            ConnectionGone: it has.
        """
        if process.ending(self._local) or _LOST.search(error.description):
            raise ConnectionGone(f"{self.label}: its QEMU is gone: {error.description}") from None

    @contextmanager
    def subscribe(self, *names: str) -> Iterator[Subscription]:
        """See QMP."""
        subscription = Subscription(names, label=self.label)
        self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)
            subscription._leave()  # noqa: SLF001 - as in `QMPClient.subscribe`

    def deliver(self, event: Event) -> None:
        """Hand an event to those who have subscribed to it."""
        for subscription in self._subscriptions:
            subscription._deliver(event)  # noqa: SLF001 - as above


def _value(label: str, command: str, text: str) -> Any:
    """Return an answer's value.

    Raises:
        CommandRefused: it is an error.
        ProtocolError: it is no answer.
    """
    try:
        answer = json.loads(text)
        if "error" in answer:
            raise CommandRefused(label, command, answer["error"]["class"], answer["error"]["desc"])
        return answer["return"]
    except (ValueError, KeyError, TypeError):
        raise ProtocolError(f"{label}: what libvirt passed on as the answer to {command} is not QMP") from None


@asynccontextmanager
async def open_libvirt_qmp(connection: Connection, domain: Any, local: LocalProcess) -> AsyncIterator[LibvirtQMP]:
    """Speak QMP with the QEMU of a domain that is running."""
    text = await connection.call(
        "query-version", connection.qemu.qemuMonitorCommand, domain, '{"execute": "query-version"}', 0
    )
    version = _value(connection.label, "query-version", text)["qemu"]
    qmp = LibvirtQMP(connection, domain, (version["major"], version["minor"], version["micro"]), local)

    def heard(_connection: Any, _domain: Any, name: str, seconds: int, micros: int, details: str, _: Any) -> None:
        event = Event(name, json.loads(details) if details else {}, seconds + micros * 1e-6)
        connection.soon(qmp.deliver, event)

    register, deregister = connection.qemu.qemuMonitorEventRegister, connection.qemu.qemuMonitorEventDeregister
    number = await connection.call("event register", register, connection.raw, domain, None, heard, None, 0)
    try:
        yield qmp
    finally:
        # Where the connection is lost, so is what was registered.
        with trio.CancelScope(shield=True), suppress(HypervisorError):
            await connection.call("event deregister", deregister, connection.raw, number, timeout=5.0)
