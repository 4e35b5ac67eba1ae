"""hypercorn's HTTP/1.1 for one connection, which ends with its client.

What hypercorn does otherwise: a connection whose client is gone stays for as long as an idle one may; one on which
a second request waits behind the first does not notice that its client is gone; and a client may change to HTTP/2
or websockets, each with any number of requests in one connection. Here a connection is read from at all times, its
place is given back as soon as it ends, and it speaks HTTP/1.1 only.
"""

from __future__ import annotations

from typing import Any

import h11
import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

from snaporch.errors import leaves

HANDSHAKE_SECONDS = 10.0
HEAD_SECONDS = 10.0  # for the first request of a connection to have come, from its beginning to its last header
AHEAD_BYTES = 256 * 1024  # that a client may send before they are looked at
_log = structlog.get_logger("snaporch.service")
_UPGRADES = frozenset({b"upgrade", b"http2-settings"})


class _OnlyHttp1(H11Protocol):
    """See the module; what would change to another protocol is a request as any other."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Take everything for HTTP/1.1."""

    async def _create_stream(self, request: h11.Request) -> None:
        headers = [(name, value) for name, value in request.headers if name not in _UPGRADES]
        plain = h11.Request(
            method=request.method, target=request.target, headers=headers, http_version=request.http_version
        )
        await super()._create_stream(plain)


class Connection(TCPServer):
    """One connection; `await` it to serve it."""

    def __init__(
        self, app: AppWrapper, config: Config, context: WorkerContext, state: ConnectionState, stream: Any
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self._visitor = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
        self._asked = False

    async def run(self) -> None:
        """Serve the connection until its client is gone, or has been asked to go."""
        tls = isinstance(self.stream, trio.SSLStream)
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                if tls:
                    await self.stream.do_handshake()
            await self._serve(tls=tls)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError):
            pass  # the client's doing, or its end
        except* Exception as group:  # noqa: BLE001 - what one client brings about ends its connection, and no other
            _log.warning("a connection was given up", error=[repr(leaf) for leaf in leaves(group)])
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._visitor)

    async def _serve(self, *, tls: bool) -> None:
        sock = self._visitor.socket
        client = parse_socket_addr(sock.family, sock.getpeername())
        server = parse_socket_addr(sock.family, sock.getsockname())
        async with TaskGroup() as group:
            self._task_group = group
            self.protocol = _OnlyHttp1(  # type: ignore[assignment]
                self.app, self.config, self.context, group, ConnectionState(self.state), tls, client, server,
                self.protocol_send,
            )  # fmt: skip
            await self.protocol.initiate()
            await self.idle_task.restart(group, self._idle_timeout)
            await self._read_data()
            await self._close()  # its place is another's, while what it asked for comes to its end
            await self.idle_task.stop()
            await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        """Read until the client is gone, also while its request is worked on."""
        ahead = 0
        send, receive = trio.open_memory_channel[bytes](AHEAD_BYTES)

        async def feed() -> None:
            nonlocal ahead
            async for data in receive:
                ahead -= len(data)
                await self.protocol.handle(RawData(data))

        async with trio.open_nursery() as reading:
            reading.start_soon(feed)
            try:
                while ahead <= AHEAD_BYTES and (data := bytes(await self.stream.receive_some(MAX_RECV))):
                    ahead += len(data)
                    send.send_nowait(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            reading.cancel_scope.cancel()

    async def protocol_send(self, event: Event) -> None:
        """See hypercorn; notes whether something is asked for at present."""
        if isinstance(event, Updated):
            self._asked = True
            self._visitor.set_idle(idle=event.idle)
        await super().protocol_send(event)

    async def _idle_timeout(self) -> None:
        if self._asked:
            await super()._idle_timeout()
            return
        with trio.move_on_after(HEAD_SECONDS):
            await self.context.terminated.wait()
        await trio.aclose_forcefully(self._visitor)
