"""Commands over a memory stream: who gets which answer, and what is known when none comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from snaporch.drivers.qmp import LINE_LIMIT, QMPClient, open_qmp_stream
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    InvalidInput,
    OutcomeUnknown,
    ProtocolError,
    SnaporchError,
)
from tests.qmp.conftest import Peer

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.qmp.conftest import Connect


GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}\n'
)


async def _failing(
    client: QMPClient, command: str, errors: list[SnaporchError], timeout: float | None = None
) -> None:
    try:
        await client.execute(command, timeout=timeout)
    except SnaporchError as error:
        errors.append(error)


async def test_a_command_and_its_answer(connect: Connect) -> None:
    """The arguments arrive, the value comes back, the statistics count."""
    async with connect() as (client, peer), trio.open_nursery() as nursery:

        async def qemu() -> None:
            command = await peer.receive()
            assert command["execute"] == "query-x"
            assert command["arguments"] == {"a": [1]}
            await peer.answer(command, [1, 2])

        nursery.start_soon(qemu)
        assert await client.execute("query-x", {"a": [1]}) == [1, 2]
        assert client.greeting.version == (10, 0, 2)
        assert client.peer_pid is None
        assert client.statistics().sent == 2
        assert repr(client) == "<QMPClient web1 OPEN, QEMU 10.0.2, 0 in flight>"


async def test_answers_out_of_order(connect: Connect) -> None:
    """Concurrent commands get their own answers, in whatever order these come."""
    answers: dict[str, Any] = {}
    async with connect() as (client, peer):

        async def ask(command: str) -> None:
            answers[command] = await client.execute(command)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(ask, name)
            commands = [await peer.receive() for _ in "abc"]
            assert client.statistics().in_flight == 3
            for command in sorted(commands, key=lambda c: str(c["execute"]), reverse=True):
                await peer.answer(command, command["execute"].upper())
    assert answers == {"a": "A", "b": "B", "c": "C"}


async def test_answers_to_the_client_before(
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    """QEMU hands what it still had for the last client to the next one; none of it is taken for ours."""
    ours, theirs = memory_stream_pair()
    peer = Peer(theirs)
    refused: dict[str, Any] = {"error": {"class": "GenericError", "desc": "no"}}

    async def qemu() -> None:
        await peer.send({"return": "stale", "id": 2}, GREETING, {"return": "stale"}, refused)
        negotiation = await peer.receive()
        stale = [{"return": "stale", "id": number} for number in ("old", *range(1, 100))]
        gone = {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}
        await peer.send(*stale, {"error": gone, "id": negotiation["id"]})
        await peer.answer(await peer.receive(), "ours")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(qemu)
        async with open_qmp_stream(ours, label="web1") as client:
            assert await client.execute("query-x") == "ours"
            assert client.statistics().foreign == 103


async def test_refusal(connect: Connect) -> None:
    """QEMU's error becomes ours, with its class and text."""
    async with connect() as (client, peer), trio.open_nursery() as nursery:

        async def qemu() -> None:
            command = await peer.receive()
            await peer.send({"error": {"class": "DeviceNotFound", "desc": "no disk"}, "id": command["id"]})

        nursery.start_soon(qemu)
        with pytest.raises(CommandRefused, match="web1: the hypervisor refused blockdev-del: no disk") as caught:
            await client.execute("blockdev-del")
        assert caught.value.error_class == "DeviceNotFound"


async def test_cancellation_of_one_and_its_late_answer(connect: Connect) -> None:
    """A cancelled command's answer is dropped; the others are not touched."""
    async with connect() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.execute, "slow")
            slow = await peer.receive()
            nursery.cancel_scope.cancel()
        assert client.statistics().unanswered == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.execute, "quick")
            quick = await peer.receive()
            await peer.answer(slow)
            await peer.answer(quick)
        assert (client.statistics().late, client.statistics().unanswered) == (1, 0)


async def test_cancelled_before_the_call_sends_nothing(connect: Connect) -> None:
    """In a cancelled scope a command is not sent at all."""
    async with connect() as (client, peer):
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.execute("stop")
        assert scope.cancelled_caught
        assert client.statistics().sent == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.execute, "cont")
            command = await peer.receive()
            assert command["execute"] == "cont"
            await peer.answer(command)


async def test_cancelled_while_sending_sends_the_whole_line(connect: Connect) -> None:
    """A cancellation in the midst of sending waits for the line to be whole: the next command is readable."""
    async with connect() as (client, peer):
        half_sent, go_on = trio.Event(), trio.Event()
        sender = client._stream.send_stream  # type: ignore[attr-defined]
        pump = sender.send_all_hook

        async def stall() -> None:
            half_sent.set()
            await go_on.wait()
            await pump()

        sender.send_all_hook = stall
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.execute, "stop")
            await half_sent.wait()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            go_on.set()
        assert (await peer.receive())["execute"] == "stop"
        assert client.statistics().unanswered == 1
        assert "OPEN" in repr(client)


async def test_a_peer_that_does_not_read(
    connect: Connect,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    """A send that gets stuck ends the connection; whoever waited for its turn was not sent."""
    errors: list[SnaporchError] = []
    async with connect() as (client, _):
        client._stream.send_stream.send_all_hook = trio.sleep_forever  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_failing, client, "first", errors, 60.0)
            await wait_all_tasks_blocked()
            nursery.start_soon(_failing, client, "impatient", errors, 1.0)
            nursery.start_soon(_failing, client, "patient", errors, 60.0)
        assert [type(error) for error in errors] == [ConnectionGone, OutcomeUnknown, ConnectionGone]
        assert str(errors[0]) == "web1: impatient was not sent: others were being sent for 1 s"
        assert str(errors[1]) == "web1: outcome of first unknown: no answer within 10 s"
        assert str(errors[2]) == "web1: QEMU did not read first for 10 s; patient was not sent"
        await client.wait_closed()


async def test_timeout_and_late_answer(
    connect: Connect,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    """The deadline is in the error, and the answer that comes after it harms nobody."""
    async with connect(timeout=7) as (client, peer):
        with pytest.raises(OutcomeUnknown, match="web1: outcome of stop unknown: no answer within 7 s") as first:
            await client.execute("stop")
        assert first.value.seconds == 7
        with pytest.raises(OutcomeUnknown, match=r"within 0\.5 s"):
            await client.execute("cont", timeout=0.5)
        for _ in range(2):
            await peer.answer(await peer.receive())
        await wait_all_tasks_blocked()
        assert client.statistics().late == 2
        assert "OPEN" in repr(client)


async def test_end_with_commands_outstanding(connect: Connect) -> None:
    """All who wait learn that the outcome is unknown; later commands are not sent; the body goes on."""
    errors: list[SnaporchError] = []
    async with connect() as (client, peer):
        async with trio.open_nursery() as nursery:
            for name in "ab":
                nursery.start_soon(_failing, client, name, errors)
            await wait_all_tasks_blocked()
            await peer.stream.aclose()
        assert [type(error) for error in errors] == [OutcomeUnknown] * 2
        assert {str(error) for error in errors} == {
            f"web1: outcome of {name} unknown: the connection was lost" for name in "ab"
        }
        with pytest.raises(ConnectionGone, match="web1: QEMU closed the connection; stop was not sent"):
            await client.execute("stop")
        await client.wait_closed()
        assert repr(client) == "<QMPClient web1 GONE, QEMU 10.0.2, 0 in flight>"


async def test_an_answer_before_the_end_counts(connect: Connect) -> None:
    """What was answered right before the end, or before garbage, was answered."""
    async with connect() as (client, peer), trio.open_nursery() as nursery:

        async def qemu() -> None:
            command = await peer.receive()
            await peer.send({"return": "bye", "id": command["id"]}, b"garbage\n")
            await peer.stream.aclose()

        nursery.start_soon(qemu)
        assert await client.execute("quit") == "bye"
        with pytest.raises(ConnectionGone, match="what came is not QMP"):
            await client.execute("stop")


@pytest.mark.parametrize(
    ("garbage", "text"),
    [
        (b"hello\r\n", "a line that is not JSON: b'hello"),
        (b'{"return": {}, "id": 99}\n', "an answer to nothing, its id is 99"),
        (b'{"return": {}, "id": true}\n', "an answer to nothing, its id is True"),
        (b'{"return": {}, "id": []}\n', r"an answer to nothing, its id is \[\]"),
        (b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n', "JSON parse error"),
        (b"x" * (LINE_LIMIT + 1), "more than 16,777,216 bytes"),
        (GREETING, "a second greeting"),
    ],
    ids=["text", "unknown", "true", "list", "unread", "long", "greeting"],
)
async def test_garbage_with_a_command_outstanding(connect: Connect, garbage: bytes, text: str) -> None:
    """Who waits gets a ProtocolError with the domain's name, later commands are not sent, leaving is clean."""
    async with connect() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.send, garbage)
            with pytest.raises(ProtocolError, match=f"^web1: .*{text}.*; outcome of stop unknown"):
                await client.execute("stop")
        with pytest.raises(ConnectionGone, match="cont was not sent"):
            await client.execute("cont")


async def test_what_cannot_be_sent(connect: Connect) -> None:
    """Bad arguments, and descriptors without a socket, are refused before anything is sent."""
    async with connect() as (client, _):
        with pytest.raises(InvalidInput):
            await client.execute("migrate", {"uri": "\udcff"})
        with pytest.raises(TypeError):
            await client.execute("migrate", {"uri": object()})
        with pytest.raises(TypeError, match="Unix socket"):
            await client.execute("getfd", {"fdname": "x"}, fds=[0])
        assert client.statistics().sent == 1


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(1)], ids=type)
@pytest.mark.parametrize("lost", [False, True])
async def test_the_body_raises_its_own(connect: Connect, error: BaseException, lost: bool) -> None:
    """What the body raises comes out as itself, connection lost or not."""

    async def body() -> None:
        async with connect() as (_, peer):
            if lost:
                await peer.stream.aclose()
                await wait_all_tasks_blocked()
            raise error

    with pytest.raises(type(error)) as caught:
        await body()
    assert caught.value is error


async def test_the_bodys_error_survives_a_cancellation(connect: Connect) -> None:
    """Leaving in a cancelled scope does not turn the body's exception into Cancelled."""

    async def body() -> None:
        with trio.CancelScope() as scope:
            async with connect():
                scope.cancel()
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await body()


async def test_undo_in_a_cancelled_scope(connect: Connect) -> None:
    """A shielded command works while everything around is cancelled, so that a guest can be resumed."""
    with trio.CancelScope() as scope:
        async with connect() as (client, peer):
            scope.cancel()
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.execute, "cont")
                    await peer.answer(await peer.receive())
                assert client.statistics().late == 0
            assert client.statistics().unanswered == 0
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_left_with_a_command_of_another_task(connect: Connect) -> None:
    """A command that another task has under way when the context is left does not hang."""
    errors: list[SnaporchError] = []
    async with trio.open_nursery() as nursery, connect() as (client, peer):
        nursery.start_soon(_failing, client, "stop", errors)
        await peer.receive()
    assert isinstance(errors[0], OutcomeUnknown)
    with pytest.raises(ConnectionGone, match="web1: the connection was closed here"):
        await client.execute("cont")
    with pytest.raises(ConnectionGone, match="web1: the connection was closed here"), client.subscribe():
        pass


@pytest.mark.parametrize(
    ("first", "close", "error", "text"),
    [
        (b"", False, ConnectionGone, "web1: no greeting within 3 s; another client is probably connected"),
        (b"", True, ConnectionGone, "web1: QEMU closed the connection, before any greeting"),
        (b"SSH-2.0\r\n", False, ProtocolError, "web1: what came is not QMP: .*SSH"),
        (GREETING, False, ConnectionGone, "web1: QEMU greeted and then fell silent: .* within 3 s"),
    ],
    ids=["silent", "closed", "garbage", "mute"],
)
async def test_what_is_no_greeting(
    first: bytes,
    close: bool,
    error: type[SnaporchError],
    text: str,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    """Whoever does not greet is told apart, with name and deadline, and not waited for longer."""
    ours, theirs = memory_stream_pair()
    await theirs.send_all(first)
    if close:
        await theirs.aclose()
    with pytest.raises(error, match=text):
        async with open_qmp_stream(ours, label="web1", timeout=3):
            pytest.fail("entered")
