"""Who is at the other end of a unix socket, by the kernel's word."""

from __future__ import annotations

import socket
import struct
from typing import Protocol

import attrs

_UCRED = struct.Struct("3i")  # struct ucred


class _Socket(Protocol):
    @property
    def family(self) -> int: ...

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


@attrs.frozen
class Peer:
    """The process at the other end; an id of one in another PID namespace is 0."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: _Socket) -> Peer | None:
    """Return who is at the other end of a socket; None where that is not a unix socket."""
    if sock.family != socket.AF_UNIX:
        return None
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
