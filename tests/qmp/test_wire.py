"""The wire codec: bytes to messages and commands to bytes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snaporch.drivers.qmp import Decoder, Event, Failure, Greeting, Message, Reply, encode
from snaporch.errors import InvalidInput, ProtocolError

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, '
    b'"capabilities": ["oob"]}}\r\n'
)

_names = st.text(max_size=10)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=6,
)
_ids = st.none() | st.integers(0, 10**6)
_stamps = st.tuples(st.integers(-1, 2**33), st.integers(0, 999_999))


def _wire(message: Message, stamp: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    match message:
        case Greeting((major, minor, micro), package, capabilities):
            qemu = {"major": major, "minor": minor, "micro": micro}
            version = {"qemu": qemu, "package": package}
            return {"QMP": {"version": version, "capabilities": list(capabilities)}}
        case Reply(number, value):
            return {"return": value, "id": number}
        case Failure(number, error_class, description):
            return {"error": {"class": error_class, "desc": description}, "id": number}
        case Event(name, data, _):
            timestamp = {"seconds": stamp[0], "microseconds": stamp[1]}
            return {"event": name, "data": dict(data), "timestamp": timestamp}


def _event(name: str, data: dict[str, Any], stamp: tuple[int, int]) -> tuple[Message, dict[str, Any]]:
    event = Event(name, data, stamp[0] + stamp[1] / 1e6)
    return event, _wire(event, stamp)


_plain = (
    st.builds(Greeting, st.tuples(*[st.integers(0, 99)] * 3), _names, st.lists(_names).map(tuple))
    | st.builds(Reply, _ids, _values)
    | st.builds(Failure, _ids, _names, _names)
)
_pairs = _plain.map(lambda message: (message, _wire(message))) | st.builds(
    _event, _names, st.dictionaries(_names, _values, max_size=3), _stamps
)


@given(pairs=st.lists(_pairs, max_size=6), escaped=st.booleans(), data=st.data())
def test_any_chunking_decodes_alike(
    pairs: list[tuple[Message, dict[str, Any]]], *, escaped: bool, data: st.DataObject
) -> None:
    """However the bytes are cut, the same messages come out."""
    wire = b"".join(json.dumps(value, ensure_ascii=escaped).encode() + b"\r\n" for _, value in pairs)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)))))
    decoder = Decoder()
    messages: list[Message] = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        messages += decoder.feed(wire[start:end])
    assert messages == [message for message, _ in pairs]


@given(st.binary(max_size=80) | st.builds(lambda value: json.dumps(value).encode() + b"\n", _values))
def test_nothing_but_protocol_errors(garbage: bytes) -> None:
    """Whatever comes, the decoder raises no other error than its own."""
    with contextlib.suppress(ProtocolError):
        Decoder().feed(garbage)


def test_greeting() -> None:
    """QEMU's greeting, as QEMU 10 sends it."""
    assert Decoder().feed(GREETING) == [Greeting((10, 0, 2), "Debian", ("oob",))]


def test_event_without_data_and_with_time() -> None:
    """An event may lack data; its time is in seconds."""
    line = b'{"timestamp": {"seconds": 12, "microseconds": 250000}, "event": "STOP"}\r\n'
    assert Decoder().feed(line) == [Event("STOP", {}, 12.25)]


@pytest.mark.parametrize(
    "line",
    [
        b"SSH-2.0-OpenSSH_9.2",
        b"",
        b"{1}",
        b'"text"',
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"return": NaN, "id": 1}',
        b'{"return": ' + b"[" * 100_000,
        b'{"return": ' + b"9" * 10_000 + b"}",
        b'{"error": "no"}',
        b'{"event": "STOP"}',
        b'{"event": "STOP", "data": [], "timestamp": {"seconds": 1, "microseconds": 2}}',
        b'{"event": "STOP", "timestamp": {"seconds": 1' + b"0" * 400 + b', "microseconds": 2}}',
        b'{"QMP": {}}',
        GREETING.strip().replace(b'"oob"', b"1"),
        GREETING.strip().replace(b"10", b'"10"'),
    ],
    ids=range(17),
)
def test_what_is_not_qmp(line: bytes) -> None:
    """A line that is no QMP message raises, and so does everything after it."""
    decoder = Decoder()
    with pytest.raises(ProtocolError) as first:
        decoder.feed(line + b"\n")
    with pytest.raises(ProtocolError) as second:
        decoder.feed(GREETING)
    assert str(first.value) == str(second.value)
    assert len(str(first.value)) < 400


def test_what_precedes_garbage_is_delivered() -> None:
    """An answer in the same bytes as garbage is not lost; the next call raises."""
    decoder = Decoder()
    assert decoder.feed(b'{"return": {}, "id": 1}\nnonsense\n{"return": {}, "id": 2}\n') == [Reply(1, {})]
    with pytest.raises(ProtocolError, match="nonsense"):
        decoder.feed(b"")


def test_limit_counts_the_line_without_its_end() -> None:
    """A line of exactly the limit passes."""
    line = b'{"return": {}}'
    assert Decoder(limit=len(line)).feed(line + b"\n") == [Reply(None, {})]
    with pytest.raises(ProtocolError, match="more than 13 bytes"):
        Decoder(limit=len(line) - 1).feed(line + b"\n")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_limit_holds_for_a_line_without_end(chunk: int) -> None:
    """A line that never ends raises at the limit and leaves nothing in memory."""
    decoder = Decoder(limit=100)
    with pytest.raises(ProtocolError, match="more than 100 bytes"):
        [decoder.feed(b"x" * chunk) for _ in range(200)]
    assert not decoder._tail


def test_many_small_pieces_are_not_searched_again() -> None:
    """Every piece is looked through once: the kept line is never searched."""
    searched = 0

    class Piece(bytes):
        __slots__ = ()

        def find(self, *args: Any) -> int:
            nonlocal searched
            searched += len(self)
            return super().find(*args)

    decoder = Decoder()
    for _ in range(10_000):
        decoder.feed(Piece(b" "))
    assert searched == 10_000


def test_encode() -> None:
    """A command is one line; arguments are left out when there are none."""
    assert encode("stop", None, 1) == b'{"execute":"stop","id":1}\n'
    line = encode("getfd", {"fdname": "a\nü"}, 2)
    assert line == '{"execute":"getfd","id":2,"arguments":{"fdname":"a\\nü"}}\n'.encode()


@pytest.mark.parametrize("value", [float("nan"), "\udc80.qcow2"])
def test_encode_refuses_what_json_cannot_say(value: object) -> None:
    """A number or a file name that JSON cannot carry is refused before anything is sent."""
    with pytest.raises(InvalidInput, match="arguments of migrate"):
        encode("migrate", {"uri": value}, 1)


def test_encode_refuses_foreign_types() -> None:
    """An object that is no JSON is a mistake of the program."""
    with pytest.raises(TypeError):
        encode("migrate", {"uri": object()}, 1)


def test_imports_no_io() -> None:
    """The codec imports neither an event loop nor sockets."""
    # A stand-in for the package, whose own __init__ imports everything; and the module on its own, for the
    # same reason.
    program = (
        "import importlib.util, sys, types\n"
        "sys.modules['snaporch'] = package = types.ModuleType('snaporch')\n"
        "package.__path__ = [sys.argv[2]]\n"
        "spec = importlib.util.spec_from_file_location('wire', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['wire'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'trio', 'socket', 'asyncio', 'selectors'} & set(sys.modules)\n"
    )
    wire = Path(sys.modules[Decoder.__module__].__file__ or "")
    subprocess.run([sys.executable, "-c", program, wire, wire.parents[2]], check=True)


def test_what_is_written_for_people() -> None:
    """Of ``-qmp-pretty`` a message is many lines; however the bytes are cut, and up to the limit."""
    text = json.dumps(json.loads(GREETING), indent=4).encode().replace(b"\n", b"\r\n") + b"\r\n"
    for size in (1, 7, len(text)):
        decoder = Decoder()
        pieces = [(text * 2)[start : start + size] for start in range(0, 2 * len(text), size)]
        found = [message for piece in pieces for message in decoder.feed(piece)]
        assert found == Decoder().feed(GREETING) * 2
    with pytest.raises(ProtocolError, match="more than"):
        Decoder(len(text) // 2).feed(text)
