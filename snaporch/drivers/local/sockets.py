"""Unix sockets: at paths of any length, and who is at the other end, by the kernel's word."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import attrs

from snaporch.model.limits import LONGEST_SOCKET

_UCRED = struct.Struct("3i")  # struct ucred


@contextmanager
def address(path: str) -> Iterator[str]:
    """Yield an address for a unix socket's path, however long that is; it holds while the body runs."""
    if len(os.fsencode(path)) <= LONGEST_SOCKET:
        yield path
        return
    fd = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{os.path.basename(path)}"
    finally:
        os.close(fd)


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
