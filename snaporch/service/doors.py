"""Accepts connections: records who the client is, and keeps to the limits on their number."""

from __future__ import annotations

import os
import resource
import socket
import ssl
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

import attrs
import trio

from snaporch.drivers.local.sockets import Peer, address, peer_of
from snaporch.errors import InvalidInput
from snaporch.service.config import Config, is_loopback
from snaporch.service.places import OWN_PLACES, Place, Pool, is_own, tcp_peer
from snaporch.service.roles import connected_peer
from snaporch.service.systemd import activated

BACKLOG = 512
SEND_SECONDS = 30.0  # for a client to read what it has asked for; the server itself waits for ever, and shielded


class Visitor(trio.abc.HalfCloseableStream):
    """A connection, which gives its place back when it is closed, and whose client must read."""

    def __init__(self, stream: trio.SocketStream, pool: Pool) -> None:
        self._stream = stream
        self._pool = pool
        self.place: Place | None = None
        self.socket = stream.socket  # the server asks it for its addresses

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio; a client that does not read is gone."""
        with trio.move_on_after(SEND_SECONDS) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            await trio.aclose_forcefully(self)
            raise trio.BrokenResourceError(f"the client has read nothing for {SEND_SECONDS:g} s")

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See trio."""
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        """See trio."""
        await self._stream.send_eof()

    def leave(self) -> None:
        """End the connection, from any task: a task that reads from it finds it closed."""
        self._stream.socket.close()

    def set_idle(self, *, idle: bool) -> None:
        """Note whether something is asked for by it."""
        if self.place is not None:
            self._pool.set_idle(self.place, idle=idle)

    async def aclose(self) -> None:
        """See trio."""
        if self.place is not None:
            self._pool.give_back(self.place)
        await self._stream.aclose()


@attrs.frozen
class Pools:
    """The places of all doors; see `snaporch.service.places`."""

    own: Pool
    unix: Pool
    tcp: Pool

    @classmethod
    def of(cls, config: Config) -> Pools:
        """Return those that a configuration says, as far as there are descriptors for them."""
        most = min(config.connections, _descriptors() // 3)
        each = min(config.per_peer, most)
        return cls(Pool(OWN_PLACES, OWN_PLACES), Pool(most, each), Pool(most, each))

    def chosen(self, sock: socket.socket, peer: Peer | None) -> tuple[Pool, Hashable]:
        """Return where a connection has its place, and as whose."""
        if peer is None:
            return self.tcp, tcp_peer(str(sock.getpeername()[0]))
        return (self.own if is_own(peer) else self.unix), peer.uid


def _descriptors() -> int:
    """Return how many files may be open; as many are asked for as may be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


class Door(trio.abc.Listener[Visitor]):
    """A listening socket."""

    def __init__(self, sock: socket.socket, pools: Pools) -> None:
        sock.setblocking(False)
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self._pools = pools

    async def accept(self) -> Visitor:
        """See trio; whatever is done for this connection, in tasks begun by its own, finds who is there."""
        while True:
            stream = await self._listener.accept()
            sock = cast("socket.socket", stream.socket)
            try:
                peer = peer_of(sock)
                pool, whose = self._pools.chosen(sock, peer)
            except OSError:  # it is gone already
                stream.socket.close()
                continue
            visitor = Visitor(stream, pool)
            visitor.place = pool.take(whose, visitor.leave)
            if visitor.place is None:
                visitor.leave()
                continue
            connected_peer.set(peer)
            return visitor

    async def aclose(self) -> None:
        """See trio."""
        await self._listener.aclose()


def tls_context(config: Config) -> ssl.SSLContext | None:
    """Return what TCP connections are encrypted with; None where they are not.

    Raises:
        InvalidInput: the certificate or the key cannot be used.
    """
    if not config.certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, config)
    return context


def load_certificate(context: ssl.SSLContext, config: Config) -> None:
    """Take a certificate for the connections from now on; see `tls_context`."""
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(f"certificate {config.certificate}, key {config.key}: {error}") from None


def open_the_way(config: Config, *paths: Path) -> None:
    """Let those users pass who have a role on the unix socket, if there are any, and else nobody.

    Args:
        config: says who.
        paths: the root, through which they pass, and what they read in it. What else is in the root is ours alone.

    Raises:
        InvalidInput: it cannot be done.
    """
    for path in paths:
        mode, others = (0o700, 0o011) if path.is_dir() else (0o600, 0o044)
        if config.users:
            mode |= others & (0o070 if config.group else 0o077)
        try:
            if config.users and config.group:
                os.chown(path, -1, config.group_id)
            path.chmod(mode)
        except OSError as error:
            raise InvalidInput(f"users: {path}: {error.strerror}") from None


def _open_to(config: Config, where: str) -> None:
    """Let others than root and ourselves connect to a socket, where they have a role; see `open_the_way`."""
    if config.users:
        if config.group:
            os.chown(where, -1, config.group_id)
        os.chmod(where, 0o660 if config.group else 0o666)


@contextmanager
def _unix_socket(config: Config, path: str) -> Iterator[socket.socket]:
    """Listen at a path that only we may use; what an earlier service left there goes: we own the root."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, address(path) as where:
        try:
            if os.path.exists(path) and not _is_socket(path):
                raise InvalidInput(f"socket: {path} exists, and is not a socket")
            if os.path.lexists(path):
                if _answers(where):
                    raise InvalidInput(f"socket: {path} is in use by another service")
                os.unlink(path)
            before = os.umask(0o177)
            try:
                sock.bind(where)
            finally:
                os.umask(before)
            _open_to(config, where)
        except OSError as error:
            raise InvalidInput(f"socket: {path}: {error.strerror or error}") from None
        sock.listen(BACKLOG)
        try:
            yield sock
        finally:
            os.unlink(path)


def _answers(where: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(where) == 0


def _is_socket(path: str) -> bool:
    return Path(path).is_socket()


@contextmanager
def _tcp_socket(config: Config) -> Iterator[socket.socket]:
    try:
        sock = socket.create_server(config.address, backlog=BACKLOG, family=_family(config))
    except OSError as error:
        raise InvalidInput(f"listen: {config.listen}: {error.strerror or error}") from None
    with sock:
        yield sock


def _family(config: Config) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in config.address[0] else socket.AF_INET


@contextmanager
def listening(config: Config, path: str) -> Iterator[Sequence[socket.socket]]:
    """Yield the sockets that a configuration names, or those that systemd has given to us.

    Raises:
        InvalidInput: one cannot be had.
    """
    with ExitStack() as stack:
        if sockets := [stack.enter_context(sock) for sock in activated()]:
            for sock in sockets:
                _check_private(sock, config)
            yield sockets
            return
        sockets = [stack.enter_context(_unix_socket(config, path))]
        if config.listen:
            sockets.append(stack.enter_context(_tcp_socket(config)))
        yield sockets


def _check_private(sock: socket.socket, config: Config) -> None:
    """Refuse a socket from systemd by which tokens would go over a network in the clear.

    Raises:
        InvalidInput: so it is.
    """
    if sock.family == socket.AF_UNIX or config.certificate:
        return
    where = sock.getsockname()
    if sock.family not in {socket.AF_INET, socket.AF_INET6} or not is_loopback(str(where[0])):
        raise InvalidInput(
            f"the socket unit listens on {where[0] if isinstance(where, tuple) else where}, which is no loopback "
            "address: it needs a certificate and a key in service.toml"
        )


def doors(
    sockets: Sequence[socket.socket], config: Config, tls: ssl.SSLContext | None
) -> list[trio.abc.Listener[trio.abc.Stream]]:
    """Return the listeners of sockets: TCP with TLS, where there is a certificate."""
    pools = Pools.of(config)
    found: list[trio.abc.Listener[trio.abc.Stream]] = []
    for sock in sockets:
        door = Door(sock, pools)
        if sock.family == socket.AF_UNIX or tls is None:
            found.append(door)
        else:
            found.append(trio.SSLListener(door, tls, https_compatible=True))
    return found
