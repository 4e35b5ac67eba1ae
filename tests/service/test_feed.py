"""The ring of events, and the silence around a pause."""

from __future__ import annotations

import json

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from snaporch.model.record import Event, EventKind
from snaporch.service.feed import Feed
from snaporch.service.quiet import PASSAGES, PATIENCE_SECONDS, Quiet


def event(number: int, state: str = "streaming", domain: str = "web1", operation: str = "0") -> Event:
    return Event(operation, (domain,), EventKind.PROGRESS, 0.0, state, done=number)


def numbers(data: bytes) -> list[int]:
    """Return what a follower has read: the events' numbers, -1 for a gap."""
    found = []
    for frame in data.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in frame.split("\n"))
        found.append(-1 if lines["event"] == "gap" else json.loads(lines["data"])["done"])
    return found


def test_a_follower_reads_all_in_order() -> None:
    """From when it began, or from where it says that it was."""
    feed = Feed()
    feed.publish(event(1))
    follower = feed.follow()
    feed.publish(event(2))
    feed.publish(event(3, domain="db1"))
    feed.publish(event(4))
    assert numbers(follower.take()) == [2, 3, 4]
    assert numbers(follower.take()) == []
    assert numbers(feed.follow(f"{feed.boot}-1").take()) == [2, 3, 4]
    assert numbers(feed.follow(f"{feed.boot}-1", "web1").take()) == [2, 4]
    assert numbers(feed.follow(f"{feed.boot}-4").take()) == []


def test_a_gap_is_told() -> None:
    """Whoever is further behind than the ring is long, or comes from another boot, is told, and then goes on."""
    feed = Feed(capacity=3)
    late = feed.follow()
    for number in range(1, 6):
        feed.publish(event(number))
    assert numbers(late.take()) == [-1, 3, 4, 5]
    assert numbers(feed.follow(f"{feed.boot}-1").take()) == [-1, 3, 4, 5]
    assert numbers(feed.follow(f"{feed.boot}-2").take()) == [3, 4, 5]
    for strange in ("00000000-4", "nonsense", f"{feed.boot}-99", f"{feed.boot}-x", ""):
        assert numbers(feed.follow(strange).take()) == [-1], strange


async def test_a_follower_waits_and_ends() -> None:
    """It sleeps while nothing happens, and comes to its end when the service stops, after the last event."""
    feed = Feed()
    follower, seen = feed.follow(), list[int]()

    async def follow() -> None:
        while await follower.more():
            seen.extend(numbers(follower.take()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        feed.publish(event(1))
        await wait_all_tasks_blocked()
        assert seen == [1]
        feed.publish(event(2))
        feed.drain()
    assert seen == [1, 2]


async def test_nothing_passes_while_a_guest_stands(autojump_clock: MockClock) -> None:
    """From the pause until the guest runs on, what can wait waits, for a moment; then a few at a time pass."""
    quiet, passed, inside, most = Quiet(), list[int](), 0, 0

    async def pass_through(number: int) -> None:
        nonlocal inside, most
        async with quiet.passage():
            inside += 1
            most = max(most, inside)
            await trio.lowlevel.checkpoint()
            inside -= 1
            passed.append(number)

    quiet.hear(event(0, "pausing", operation="a"))
    quiet.hear(event(0, "arming", operation="b"))
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(pass_through, number)
        await wait_all_tasks_blocked()
        quiet.hear(event(0, "streaming", operation="a"))
        await wait_all_tasks_blocked()
        assert passed == []
        quiet.hear(event(0, "rolling-back", operation="b"))
        await wait_all_tasks_blocked()
        assert len(passed) == 20
    assert most <= PASSAGES
    quiet.hear(event(0, "pausing", operation="c"))
    began = trio.current_time()
    await quiet.wait()
    assert trio.current_time() - began == PATIENCE_SECONDS
    assert autojump_clock is not None
