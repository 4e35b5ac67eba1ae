"""Subscriptions over a memory stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snaporch.drivers.qmp import EVENT_BUFFER
from snaporch.errors import ConnectionGone, ProtocolError

if TYPE_CHECKING:
    from tests.qmp.conftest import Connect


async def test_events_by_name_and_all(connect: Connect) -> None:
    """Each subscriber gets the names that it asked for, in order; no names mean all."""
    async with connect() as (client, peer):
        with client.subscribe("STOP", "RESUME") as some, client.subscribe() as every:
            await peer.event("STOP", "MIGRATION", "RESUME")
            assert [(await some.receive()).name for _ in range(2)] == ["STOP", "RESUME"]
            assert [every.receive_nowait().name for _ in range(3)] == ["STOP", "MIGRATION", "RESUME"]
            with pytest.raises(trio.WouldBlock):
                some.receive_nowait()
            assert repr(some) == "<Subscription web1 OPEN, RESUME, STOP, 0 buffered>"
        assert client.statistics().events == 3
        with pytest.raises(trio.ClosedResourceError):
            await some.receive()


async def test_an_event_before_an_answer_is_there_with_it(connect: Connect) -> None:
    """An event that QEMU sent before the answer can be taken without waiting once the answer is here."""
    async with connect() as (client, peer), trio.open_nursery() as nursery:

        async def qemu() -> None:
            command = await peer.receive()
            await peer.event("STOP")
            await peer.answer(command)

        nursery.start_soon(qemu)
        with client.subscribe("STOP") as events:
            await client.execute("stop")
            assert events.receive_nowait().timestamp == 1.5


async def test_only_what_comes_after_entering(connect: Connect) -> None:
    """Events from before the subscription are not part of it."""
    async with connect() as (client, peer):
        await peer.event("STOP")
        await wait_all_tasks_blocked()
        with client.subscribe() as events:
            await peer.event("RESUME")
            assert (await events.receive()).name == "RESUME"


async def test_loss_ends_by_an_error_after_the_last_event(connect: Connect) -> None:
    """What came before the loss is delivered; then iterating raises instead of ending silently, and again."""
    names = []
    async with connect() as (client, peer):
        with client.subscribe() as events:
            await peer.event("STOP", "SHUTDOWN")
            await peer.stream.aclose()

            async def collect() -> None:
                async for event in events:
                    names.append(event.name)  # noqa: PERF401 - a comprehension would be lost with the error

            with pytest.raises(ConnectionGone, match="web1: QEMU closed the connection"):
                await collect()
            assert names == ["STOP", "SHUTDOWN"]
            with pytest.raises(ConnectionGone):
                events.receive_nowait()


async def test_garbage_ends_by_a_protocol_error(connect: Connect) -> None:
    """A subscriber who waits while garbage comes learns what came."""
    async with connect() as (client, peer), trio.open_nursery() as nursery:
        with client.subscribe() as events:
            nursery.start_soon(peer.send, b"garbage\n")
            with pytest.raises(ProtocolError, match="web1: what came is not QMP"):
                await events.receive()


async def test_a_subscriber_that_does_not_read_loses_its_own(connect: Connect) -> None:
    """One event too many ends the one subscription, by an error after all that was buffered."""
    async with connect() as (client, peer):
        with client.subscribe() as lazy, client.subscribe("LAST") as other:
            await peer.event(*["NOISE"] * (EVENT_BUFFER + 1), "LAST")
            assert (await other.receive()).name == "LAST"
            for _ in range(EVENT_BUFFER):
                lazy.receive_nowait()
            with pytest.raises(ProtocolError, match="web1: 10,000 events were not read"):
                await lazy.receive()
            assert "ENDED" in repr(lazy)
            await peer.event("LAST")
            await other.receive()
