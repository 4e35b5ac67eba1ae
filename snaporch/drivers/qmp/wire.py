"""QMP as bytes and values, without I/O.

Rules:

1. One line is one JSON object, in UTF-8, ended by a newline (QEMU sends CR LF, which JSON takes for white
   space). QEMU's ``-qmp-pretty``, which spreads an object over lines, is not understood.
2. A line is a greeting, a reply, a failure or an event, told apart by the key that each alone has. Keys that
   we do not know are ignored, as the specification of QMP asks of clients.
3. Anything else is a `ProtocolError`, and nothing after it can be trusted: the decoder stays broken.
4. What came before the bad line is delivered, however the bytes were cut into chunks: a command that was
   answered was answered. So `Decoder.feed` returns these messages first and raises when it is next called.
5. At most one unfinished line is kept, and it is never longer than the limit. Each byte is looked at once for
   a newline.

This module imports neither an event loop nor sockets, and a test checks that.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from attrs import frozen

from snaporch.errors import InvalidInput, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["LINE_LIMIT", "Decoder", "Event", "Failure", "Greeting", "Message", "Reply", "encode"]

# The longest answers that we ask for are those of query-named-block-nodes, some KiB a node; hundreds of nodes
# stay far below this.
LINE_LIMIT = 16 * 1024 * 1024

# As much of a bad line as helps in an error's text.
_EXCERPT = 60


@frozen
class Greeting:
    """The first line that QEMU sends."""

    version: tuple[int, int, int]
    package: str
    capabilities: tuple[str, ...]


@frozen
class Reply:
    """A command was carried out; ``id`` is what was sent with it."""

    id: Any
    value: Any


@frozen
class Failure:
    """A command was refused; ``id`` is None when QEMU could not even read the command."""

    id: Any
    error_class: str
    description: str


@frozen
class Event:
    """Something happened in QEMU, at ``timestamp`` seconds of the host's wall clock."""

    name: str
    data: Mapping[str, Any]
    timestamp: float


Message = Greeting | Reply | Failure | Event


class Decoder:
    """Turns bytes, cut anywhere, into messages.

    Args:
        limit: the longest message, in bytes without its newline, that is accepted.

    A message is a line or, of a monitor that is to be read by people (``-qmp-pretty``), the lines from one with
    nothing but a brace to the next one such.
    """

    __slots__ = ("_broken", "_limit", "_pretty", "_tail")

    def __init__(self, limit: int = LINE_LIMIT) -> None:
        self._limit = limit
        # The line that is not ended yet; it holds no newline, which is why it is never searched again.
        self._tail = bytearray()
        self._pretty = bytearray()  # the lines of a message that is not ended yet
        self._broken: str | None = None

    def feed(self, data: bytes | bytearray) -> list[Message]:
        """Take the next bytes and return the messages that they complete.

        Feeding nothing is allowed: it raises if the decoder is broken and does nothing else.

        Raises:
            ProtocolError: what came is not QMP. If whole messages came before it, they are returned and the
                next call raises; from then on every call does.
        """
        messages: list[Message] = []
        if self._broken is None:
            try:
                # Not a comprehension or `extend`: what precedes a bad line must survive it.
                for line in self._lines(data):
                    if (whole := self._whole(line)) is not None:
                        messages.append(_parse(whole))  # noqa: PERF401
            except ProtocolError as error:
                self._broken = str(error)
                self._tail = bytearray()
        if self._broken is not None and not messages:
            raise ProtocolError(self._broken)
        return messages

    def _lines(self, data: bytes | bytearray) -> Iterator[bytes | bytearray]:
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._check_room(end - start)
            if self._tail:
                line, self._tail = self._tail, bytearray()
                line += data[start:end]
                yield line
            else:
                yield data[start:end]
            start = end + 1
        self._check_room(len(data) - start)
        self._tail += data[start:]

    def _whole(self, line: bytes | bytearray) -> bytes | bytearray | None:
        """Return the message that a line completes."""
        if not self._pretty and line.rstrip() != b"{":
            return line
        self._pretty += line
        if line.rstrip() != b"}":
            return None
        message, self._pretty = self._pretty, bytearray()
        return message

    def _check_room(self, more: int) -> None:
        # Before the bytes are added, never after: a peer that sends no newline must not fill our memory.
        if len(self._tail) + len(self._pretty) + more > self._limit:
            raise ProtocolError(f"a line of more than {self._limit:,} bytes")


def _parse(line: bytes | bytearray) -> Message:
    try:
        # Decoded by hand because json.loads would guess at UTF-16.
        message = _shape(_JSON.decode(line.decode()))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a line that is not JSON: {_excerpt(line)}") from error
    except OverflowError as error:
        raise ProtocolError(f"a time that is none: {_excerpt(line)}") from error
    if message is None:
        raise ProtocolError(f"neither greeting, answer nor event: {_excerpt(line)}")
    return message


def _shape(value: Any) -> Message | None:
    match value:
        # First, because someone waits for it while a guest is paused.
        case {"return": result}:
            return Reply(value.get("id"), result)
        case {"error": {"class": str(error_class), "desc": str(description)}}:
            return Failure(value.get("id"), error_class, description)
        case {"event": str(name), "timestamp": {"seconds": int(seconds), "microseconds": int(micros)}}:
            data = value.get("data", {})
            return Event(name, data, seconds + micros / 1e6) if isinstance(data, dict) else None
        case {"QMP": {"version": {"qemu": qemu, "package": str(package)}, "capabilities": [*names]}}:
            return _greeting(qemu, package, names)
    return None


def _greeting(qemu: Any, package: str, names: list[Any]) -> Greeting | None:
    match qemu:
        case {"major": int(major), "minor": int(minor), "micro": int(micro)}:
            if all(isinstance(name, str) for name in names):
                return Greeting((major, minor, micro), package, tuple(names))
    return None


def _excerpt(line: bytes | bytearray) -> str:
    return repr(bytes(line[:_EXCERPT])) + ("..." if len(line) > _EXCERPT else "")


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(constant)


# Python takes NaN and Infinity for JSON; nobody else does.
_JSON = json.JSONDecoder(parse_constant=_not_a_number)


def encode(command: str, arguments: Mapping[str, Any] | None, id: int) -> bytes:  # noqa: A002 - QMP's word
    """Return the line that asks QEMU for a command.

    Raises:
        InvalidInput: a number or a text in the arguments cannot be said in JSON, for example a file name that
            is not UTF-8. QEMU would answer without an id, and nobody would know which command that was about.
        TypeError: an argument is of a type that JSON does not have.
    """
    message: dict[str, Any] = {"execute": command, "id": id}
    if arguments:
        message["arguments"] = dict(arguments)
    try:
        text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"
    except ValueError as error:
        raise InvalidInput(f"the arguments of {command} cannot be said in JSON: {error}") from error
