"""The service as a process: its sockets, its signals, systemd; its beginning and its end.

hypercorn speaks HTTP. Its `TCPServer` is given connections of ours rather than sockets: only so is it known who is
at the other end of a unix socket, and a client that does not read is let go (`doors.py`).
"""

from __future__ import annotations

import gc
import signal
import ssl
from functools import partial
from pathlib import Path

import attrs
import hypercorn
import structlog
import trio
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app

from snaporch.engine.realtime import take_priority
from snaporch.errors import SnaporchError
from snaporch.orchestrator import catalog_of, open_orchestrator
from snaporch.service import systemd
from snaporch.service.adopt import adopt
from snaporch.service.app import make_app
from snaporch.service.config import Config, load_config
from snaporch.service.doors import doors, listening, load_certificate, open_the_way, tls_context
from snaporch.service.http1 import Connection
from snaporch.service.owner import LOCK, SOCKET, owned, tell
from snaporch.service.service import Service, open_service
from snaporch.service.stop import settle

CLOSE_SECONDS = 5.0  # for answers that are on their way when the service stops
IDLE_SECONDS = 30.0  # for a connection between two requests, and for the headers of the next to arrive
HEADER_BYTES = 32 * 1024

_log = structlog.get_logger("snaporch.service")


@attrs.frozen
class Settings:
    """What the command line says, which also holds after a reload.

    Attributes:
        file: the configuration file.
        must_exist: it was named, and so must be there.
        overrides: values in place of the file's.
    """

    file: Path
    must_exist: bool = False
    overrides: dict[str, object] = attrs.field(factory=dict)

    def load(self) -> Config:
        """Read the configuration, see `load_config`."""
        return load_config(self.file, must_exist=self.must_exist, **self.overrides)


async def serve(root: Path, settings: Settings) -> None:
    """Serve a root until SIGTERM or SIGINT; SIGHUP reads the configuration anew.

    Args:
        root: the root.
        settings: where the configuration is.

    Raises:
        InvalidInput: the configuration is wrong, or an address cannot be had.
        Refused: another service owns the root.
    """
    config = settings.load()
    if config.realtime:
        take_priority()
    async with open_orchestrator(root, recover=False, realtime=config.realtime) as orchestrator:
        path = config.socket or str(orchestrator.root / SOCKET)
        with owned(orchestrator.root) as lock, listening(config, path) as sockets:
            open_the_way(config, orchestrator.root, orchestrator.root / LOCK)
            async with open_service(orchestrator, config) as service, trio.open_nursery() as nursery:
                tls, stopping = tls_context(config), trio.Event()
                nursery.start_soon(run_http, service, doors(sockets, config, tls), stopping)
                with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                    await adopt(service)
                    service.nursery.start_soon(_watchdog, service)
                    tell(lock, path)
                    systemd.notify("READY=1")
                    _log.info("ready", root=str(root), socket=path, listen=config.listen or None)
                    async for number in signals:
                        if number != signal.SIGHUP:
                            break
                        _reload(service, settings, tls)
                    systemd.notify("STOPPING=1")
                    await settle(service)
                service.feed.drain()
                stopping.set()
    _log.info("stopped")


def _reload(service: Service, settings: Settings, tls: ssl.SSLContext | None) -> None:
    systemd.reloading()
    try:
        config = settings.load()
        if tls is not None and config.certificate:
            load_certificate(tls, config)
        service.reload(config)
        _log.info("reloaded", file=str(settings.file))
    except SnaporchError as error:
        _log.error("not reloaded: all is as it was", error=str(error))
    systemd.notify("READY=1")


async def _watchdog(service: Service) -> None:
    """Tell systemd that we live: the loop turns, and the catalog answers."""
    seconds = systemd.watchdog_seconds()
    while seconds is not None:
        await catalog_of(service.orchestrator).operation("")
        systemd.notify("WATCHDOG=1")
        await trio.sleep(seconds / 2)


async def run_http(
    service: Service, listeners: list[trio.abc.Listener[trio.abc.Stream]], stopping: trio.Event
) -> None:
    """Answer requests until `stopping`, and those that have begun a little longer."""
    # What is here now is here to stay: to look through it for garbage would hold up everybody for 100 ms.
    gc.collect()
    gc.freeze()
    config = hypercorn.Config()
    config.errorlog = None  # what the application raises it has logged itself
    config.include_server_header = False
    config.keep_alive_timeout = IDLE_SECONDS
    config.h11_max_incomplete_size = HEADER_BYTES
    context = WorkerContext(None)
    app: ASGIFramework = make_app(service)  # type: ignore[assignment]
    server = partial(Connection, wrap_app(app, 0, "asgi"), config, context, ConnectionState({}))
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(partial(trio.serve_listeners, server, listeners, handler_nursery=connections))
            await stopping.wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()  # connections without a request close
        connections.cancel_scope.deadline = trio.current_time() + CLOSE_SECONDS
