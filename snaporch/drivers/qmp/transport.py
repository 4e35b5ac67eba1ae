"""What QMP needs of a Unix socket beyond a stream of bytes.

Three things, and nothing else in this package knows about sockets: connecting to a path of any length, asking
who listens, and sending file descriptors along with bytes.
"""

from __future__ import annotations

import os
import socket
from array import array
from typing import TYPE_CHECKING

import trio

from snaporch.drivers.local.sockets import Peer, address, peer_of
from snaporch.errors import ConnectionGone

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["connect", "peer", "send", "unix_socket_of"]

# Between two looks at whether there is room: QEMU takes the next client as soon as it comes to it.
_ROOM_SECONDS = 0.01


async def connect(
    path: str | os.PathLike[str], *, label: str, timeout: float, listener: int | None = None
) -> trio.SocketStream:
    """Connect to a listening Unix socket.

    Args:
        path: the socket; may be longer than the kernel's limit.
        label: the domain's name, for errors.
        timeout: seconds to wait for where as many as the listener wants wait already.
        listener: the process that has to listen; None: whichever does.

    Raises:
        ConnectionGone: there is no such socket, nobody listens or another process does, or there is still no room.
    """
    deadline = trio.current_time() + timeout
    while True:
        try:
            stream = _connect(os.fsdecode(path))
            found = peer_of(stream.socket)
            if listener is None or (found is not None and found.pid == listener):
                return stream
            await trio.aclose_forcefully(stream)
            raise ConnectionGone(
                f"{label}: {os.fspath(path)} is no socket of its QEMU (process {listener}) any more, but of "
                f"process {found.pid if found else 0}: that QEMU cannot be reached; shut its guest down from inside"
            )
        except BlockingIOError as error:
            if trio.current_time() >= deadline:
                raise ConnectionGone(
                    f"{label}: {os.fspath(path)} has had no room for another connection for {timeout:g} s: QEMU "
                    "serves one client at a time, and others are waiting already"
                ) from error
        except OSError as error:
            why = error.strerror or str(error)
            raise ConnectionGone(f"{label}: cannot connect to {os.fspath(path)}: {why}") from error
        await trio.sleep(_ROOM_SECONDS)


def _connect(path: str) -> trio.SocketStream:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        raw.settimeout(0)
        # Directly and not by Trio: a Unix socket connects at once or not at all, and Trio takes the EAGAIN of
        # a full queue for the EINPROGRESS of TCP, and the socket, which polls as writable, for connected.
        with address(path) as place:
            raw.connect(place)
        return trio.SocketStream(trio.socket.from_stdlib_socket(raw))
    except BaseException:
        raw.close()
        raise


def unix_socket_of(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    """Return the Unix socket below a stream, or None if there is none."""
    if isinstance(stream, trio.SocketStream) and stream.socket.family == socket.AF_UNIX:
        return stream.socket
    return None


def peer(stream: trio.abc.Stream) -> Peer | None:
    """Return who is at the other end, or None if that is unknown."""
    unix = unix_socket_of(stream)
    return None if unix is None else peer_of(unix)


async def send(stream: trio.abc.Stream, data: bytes, fds: Sequence[int]) -> None:
    """Send all of the data, with the descriptors attached to its first byte.

    Raises:
        OSError: a descriptor is not open, or there are too many; nothing was sent then.
        trio.BrokenResourceError: the other side is gone; some of the data may have been sent, but never all.
    """
    if not fds:
        await stream.send_all(data)
        return
    unix = unix_socket_of(stream)
    if unix is None:
        raise TypeError("file descriptors can be sent over a Unix socket only")
    try:
        sent = await unix.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds).tobytes())])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise trio.BrokenResourceError from error
    if sent < len(data):
        await stream.send_all(data[sent:])
