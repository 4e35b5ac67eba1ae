"""The client of xenstore, against a xenstored of memory."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import trio
from trio.testing import memory_stream_pair

from snaporch.drivers.xen.wire import Decoder, Kind, Message
from snaporch.drivers.xen.xenstore import Xenstore
from snaporch.errors import ConnectionGone, HypervisorError

TREE = {
    "/local/domain/0/name": "Domain-0",
    "/local/domain/3/name": "web",
    "/local/domain/3/vm": "/vm/0000-3",
    "/local/domain/3/image/device-model-pid": "77",
    "/local/domain/12/name": "db",
    "/local/domain/12/vm": "/vm/0000-12",
}


def answer_to(request: Message) -> bytes:
    path = request.strings[0]
    kind, body = request.kind, b""
    if request.kind == Kind.READ and path in TREE:
        body = TREE[path].encode()
    elif request.kind == Kind.DIRECTORY:
        below = {each.removeprefix(f"{path}/").partition("/")[0] for each in TREE if each.startswith(f"{path}/")}
        body = b"".join(name.encode() + b"\0" for name in sorted(below))
    elif request.kind == Kind.WATCH:
        body = b"OK\0"
    elif request.kind == Kind.WRITE:
        TREE[path], body = request.body.partition(b"\0")[2].decode(), b"OK\0"
    else:
        kind, body = Kind.ERROR, b"EACCES\0" if path == "/secret" else b"ENOENT\0"
    return struct.pack("=IIII", kind, request.id, 0, len(body)) + body


def event(path: str) -> bytes:
    body = f"{path}\0{path}\0".encode()
    return struct.pack("=IIII", Kind.EVENT, 0, 0, len(body)) + body


async def serve(stream: trio.abc.Stream, answer: Callable[[Message], bytes]) -> None:
    decoder = Decoder()
    async for data in stream:
        for request in decoder.feed(bytes(data)):
            await stream.send_all(answer(request))


async def test_domains_are_found_by_what_xenstore_has() -> None:
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, theirs, answer_to)
        store = Xenstore(ours)
        assert await store.domids() == (3, 12)
        assert await store.domid("0000-12") == 12
        assert await store.domid("0000-99") is None
        assert await store.name(3) == "web"
        assert await store.disks_process(3) == 77
        assert await store.disks_process(12) is None
        with pytest.raises(HypervisorError, match="EACCES"):
            await store.read("/secret")
        await store.write("/backend/vifname", "web0")
        assert await store.read("/backend/vifname") == "web0"
        nursery.cancel_scope.cancel()


async def test_events_are_kept_while_an_answer_is_waited_for() -> None:
    ours, theirs = memory_stream_pair()

    def answer(request: Message) -> bytes:
        before = event("@releaseDomain") if request.kind == Kind.READ else b""
        return before + answer_to(request)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, theirs, answer)
        store = Xenstore(ours)
        await store.watch("@releaseDomain")
        assert await store.name(3) == "web"
        assert await store.event() == "@releaseDomain"
        nursery.cancel_scope.cancel()


async def test_an_answer_to_one_who_was_cancelled_is_not_the_next_ones() -> None:
    ours, theirs = memory_stream_pair()
    store = Xenstore(ours)
    with trio.move_on_after(0):
        await store.name(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, theirs, answer_to)
        assert await store.name(12) == "db"
        nursery.cancel_scope.cancel()


async def test_a_lost_connection_is_told() -> None:
    ours, theirs = memory_stream_pair()

    async def hang_up() -> None:
        await theirs.receive_some()
        await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        with pytest.raises(ConnectionGone):
            await Xenstore(ours).name(3)
