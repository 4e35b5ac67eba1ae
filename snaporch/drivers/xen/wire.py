"""The wire protocol of xenstore: messages in and out, no I/O.

A message is a head of four 32-bit numbers in the host's byte order (kind, request id, transaction, length) and a
body: strings, each ended by a NUL, or the bytes of a value. An answer has the kind and the id of its request, or
the kind ERROR and a word of errno's; a watch that fires comes by itself, as EVENT. See Xen's public/io/xs_wire.h.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

import attrs

from snaporch.errors import ProtocolError

_HEAD = struct.Struct("=IIII")
MOST = 4096  # bytes of a body: XENSTORE_PAYLOAD_MAX


class Kind(enum.IntEnum):
    """The kinds of messages that are used."""

    DIRECTORY = 1
    READ = 2
    WATCH = 4
    UNWATCH = 5
    WRITE = 11
    EVENT = 15
    ERROR = 16


@attrs.frozen
class Message:
    """An answer or an event.

    Attributes:
        kind: as it came; of one that is not known, the number.
        id: of the request that it answers; 0 of an event.
        body: without interpretation.
    """

    kind: int
    id: int
    body: bytes

    @property
    def strings(self) -> tuple[str, ...]:
        """The body as strings."""
        text = self.body.decode(errors="surrogateescape")
        return tuple(text.removesuffix("\0").split("\0")) if text else ()


def encode(kind: Kind, number: int, *strings: str, value: bytes = b"") -> bytes:
    """Return a request outside of any transaction.

    Args:
        kind: its kind.
        number: its id.
        strings: each is ended by a NUL.
        value: behind them, as it is.

    Raises:
        ProtocolError: it is longer than xenstore takes.
    """
    body = b"".join(each.encode(errors="surrogateescape") + b"\0" for each in strings) + value
    if len(body) > MOST:
        raise ProtocolError(f"a request of {len(body)} bytes is more than xenstore takes")
    return _HEAD.pack(kind, number, 0, len(body)) + body


@attrs.define
class Decoder:
    """Takes bytes as they come, and gives whole messages."""

    _rest: bytes = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are now whole.

        Raises:
            ProtocolError: what came is not xenstore's.
        """
        self._rest += data
        while len(self._rest) >= _HEAD.size:
            kind, number, _transaction, length = _HEAD.unpack_from(self._rest)
            if length > MOST:
                raise ProtocolError(f"a message of {length} bytes is not xenstore's")
            end = _HEAD.size + length
            if len(self._rest) < end:
                return
            body, self._rest = self._rest[_HEAD.size : end], self._rest[end:]
            yield Message(kind, number, body)
