"""Xenstore's wire protocol: what is sent, and what is made of bytes however they come."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snaporch.drivers.xen.wire import MOST, Decoder, Kind, Message, encode
from snaporch.errors import ProtocolError

MESSAGES = st.lists(st.builds(Message, st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=60)))


def sent(message: Message) -> bytes:
    return struct.pack("=IIII", message.kind, message.id, 0, len(message.body)) + message.body


def test_a_request_is_a_head_and_strings() -> None:
    assert encode(Kind.WATCH, 7, "@releaseDomain", "t") == (
        struct.pack("=IIII", 4, 7, 0, 17) + b"@releaseDomain\0t\0"
    )


def test_a_request_that_is_too_long_is_refused() -> None:
    with pytest.raises(ProtocolError):
        encode(Kind.READ, 1, "x" * MOST)


@given(MESSAGES, st.lists(st.integers(1, 40)))
def test_messages_come_out_whole_however_they_are_cut(messages: list[Message], cuts: list[int]) -> None:
    data, decoder, found = b"".join(map(sent, messages)), Decoder(), list[Message]()
    for cut in cuts:
        found += decoder.feed(data[:cut])
        data = data[cut:]
    found += decoder.feed(data)
    assert found == messages


def test_what_is_not_xenstores_is_noticed() -> None:
    with pytest.raises(ProtocolError):
        list(Decoder().feed(b"HTTP/1.1 200 OK\r\n\r\n"))


@pytest.mark.parametrize(
    ("body", "strings"), [(b"", ()), (b"a\0", ("a",)), (b"a\0b\0", ("a", "b")), (b"a", ("a",))]
)
def test_strings_of_a_body(body: bytes, strings: tuple[str, ...]) -> None:
    assert Message(Kind.DIRECTORY, 1, body).strings == strings
