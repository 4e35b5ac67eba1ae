"""A connection to libvirtd: calls with deadlines, and events.

Rules:

1. A call runs in a worker thread and cannot be cancelled. A call that is not answered in time leaves its thread
   behind, and the connection is given up with it: another call on it could hang for minutes.
2. A lost connection is never "no such domain". Whether a call whose answer was lost was carried out is unknown.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import trio

from snaporch.drivers.libvirt import binding
from snaporch.errors import CommandRefused, ConnectionGone, HypervisorError, InvalidInput, OutcomeUnknown

OPEN_SECONDS = 20.0
CALL_SECONDS = 30.0
CLOSE_SECONDS = 5.0
KEEPALIVE = (5, 3)  # seconds between, and how many may be missed: libvirtd that hangs is noticed after 20 s
_THREADS = 8  # calls at once; a job that is watched needs two


def check_uri(uri: str) -> str:
    """Return a URI by which descriptors can be passed: of a libvirtd of this host.

    Raises:
        InvalidInput: it is of another host, or of no QEMU.
    """
    parts = urlsplit(uri)
    scheme, _, transport = parts.scheme.partition("+")
    if (
        scheme != "qemu"
        or transport not in {"", "unix"}
        or parts.netloc
        or parts.path not in {"/system", "/session"}
    ):
        raise InvalidInput(
            f"{uri!r} is not the URI of a libvirt of this host: memory is passed to QEMU by descriptors, which go "
            "through qemu:///system and qemu:///session only"
        )
    return uri


class NoDomain(ConnectionGone):
    """libvirtd answers, and has no such domain: a transient one has ended, or somebody has undefined it."""


class Connection:
    """An open connection; `open_connection` gives one."""

    def __init__(self, raw: Any, uri: str, label: str) -> None:
        self.raw = raw
        self.uri = uri
        self.label = label
        self.libvirt, self.qemu = binding.load()
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._token = trio.lowlevel.current_trio_token()
        self._silent = ""

    async def call(
        self, what: str, function: Callable[..., Any], *arguments: Any, timeout: float = CALL_SECONDS
    ) -> Any:
        """Return what a function of libvirt's returns.

        Args:
            what: its name, for errors.
            function: called in a worker thread.
            arguments: its arguments.
            timeout: seconds.

        Raises:
            CommandRefused: libvirt said no.
            OutcomeUnknown: no answer came, or the connection was lost meanwhile.
            ConnectionGone: the connection was given up before: nothing was called.
        """
        if self._silent:
            raise ConnectionGone(f"{self.label}: libvirtd has not answered {self._silent}; {what} was not called")
        with trio.move_on_after(timeout) as scope:
            try:
                return await trio.to_thread.run_sync(
                    function, *arguments, limiter=self._limiter, abandon_on_cancel=True
                )
            except self.libvirt.libvirtError as error:
                raise self._translated(what, error) from None
            finally:
                if scope.cancel_called:
                    self._silent = what
        self._silent = what
        raise OutcomeUnknown(self.label, what, timeout)

    def _translated(self, what: str, error: Any) -> HypervisorError:
        with suppress(self.libvirt.libvirtError):
            if self.raw.isAlive():
                return CommandRefused(self.label, what, f"libvirt {error.get_error_code()}", str(error))
        self._silent = what
        return OutcomeUnknown(self.label, what, None)

    def soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the Trio run of this connection; from any thread, also after that run's end."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *arguments)

    async def domain(self, uuid: str) -> Any:
        """Return libvirt's object of a domain.

        Raises:
            NoDomain: libvirt has no domain of this UUID.
        """
        try:
            return await self.call("virDomainLookupByUUIDString", self.raw.lookupByUUIDString, uuid)
        except CommandRefused as error:
            if error.error_class != f"libvirt {self.libvirt.VIR_ERR_NO_DOMAIN}":
                raise
            raise NoDomain(f"{self.label}: {self.uri} has no domain {uuid}: {error.description}") from None


@asynccontextmanager
async def open_connection(uri: str, label: str, *, timeout: float = OPEN_SECONDS) -> AsyncIterator[Connection]:
    """Connect to a libvirtd of this host.

    Raises:
        Unsupported: there is no binding.
        InvalidInput: the URI is of another host.
        ConnectionGone: nobody answers.
    """
    libvirt, _ = binding.load()
    raw = None
    with trio.move_on_after(timeout):
        try:
            raw = await trio.to_thread.run_sync(libvirt.open, check_uri(uri), abandon_on_cancel=True)
        except libvirt.libvirtError as error:
            raise ConnectionGone(f"{label}: libvirt cannot be reached at {uri}: {error}") from None
    if raw is None:
        raise ConnectionGone(f"{label}: libvirt at {uri} has not answered for {timeout:g} s")
    try:
        raw.setKeepAlive(*KEEPALIVE)
        yield Connection(raw, uri, label)
    finally:
        with trio.move_on_after(CLOSE_SECONDS, shield=True), suppress(libvirt.libvirtError):
            await trio.to_thread.run_sync(raw.close, abandon_on_cancel=True)
