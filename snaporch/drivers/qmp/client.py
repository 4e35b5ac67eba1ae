"""A QMP connection: many commands at once, events, and an honest account of what is known when it breaks.

Rules:

1. One task, the reader, receives; nobody else does. It hands an answer to the one who waits for it and goes
   on. Between the bytes and the return of `QMPClient.execute` lie one decoding and one turn of the scheduler:
   a guest is paused meanwhile.
2. The reader is shielded from cancellation around the connection and ends only when the context is left:
   a cancelled operation must still be able to undo its work, by commands in a shielded scope.
3. The reader never raises. It notes why the connection ended, once (``_end``), and everyone who waits raises
   it, or rather what it means for them. So the body of ``async with open_qmp(...)`` is hit by no error but
   those of its own calls.
4. A command line is sent whole or the connection is given up: half a line would swallow the next command.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import trio

from snaporch.drivers.qmp import transport
from snaporch.drivers.qmp.calls import Call, Calls, Statistics
from snaporch.drivers.qmp.subscription import Subscription
from snaporch.drivers.qmp.wire import Decoder, Event, Failure, Greeting, Message, Reply, encode
from snaporch.errors import CommandRefused, ConnectionGone, OutcomeUnknown, ProtocolError

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

__all__ = ["QMPClient", "open_qmp", "open_qmp_stream"]

# One read takes all of a usual answer. Larger would cost every read an allocation of that size.
_CHUNK = 64 * 1024

# How long a send may hold up a cancellation. A command is some hundred bytes and a Unix socket takes 200 KiB,
# so a send that waits at all means a QEMU that has not read for long.
_SEND_SECONDS = 10.0


class QMPClient:
    """A negotiated connection to one QEMU; `open_qmp` gives one.

    Any number of tasks may use it at once.
    """

    def __init__(self, stream: trio.abc.Stream, *, label: str, timeout: float) -> None:
        self._stream = stream
        self._label = label
        self.check: Callable[[str, str, Any], None] | None = None  # may refuse an answer: label, command, value
        self._timeout = timeout
        self._peer = transport.peer(stream)
        self._decoder = Decoder()
        self._greeting: Greeting | None = None
        self._greeted = trio.Event()
        self._sending = trio.Lock()
        self._calls = Calls()
        self._subscriptions: list[Subscription] = []
        self._end: ConnectionGone | ProtocolError | None = None
        self._ended = trio.Event()
        self._reading = trio.CancelScope(shield=True)
        self._events = 0

    def __repr__(self) -> str:
        version = ".".join(map(str, self._greeting.version)) if self._greeting else "?"
        state = "GONE" if self._end else "OPEN" if self._greeting else "GREETING"
        return f"<QMPClient {self._label} {state}, QEMU {version}, {len(self._calls)} in flight>"

    @property
    def label(self) -> str:
        """The domain's name; every error begins with it."""
        return self._label

    @property
    def greeting(self) -> Greeting:
        """What QEMU said of itself."""
        if self._greeting is None:  # pragma: no cover - nobody gets a client before the greeting
            raise AssertionError
        return self._greeting

    def fileno(self) -> int | None:
        """Return the connection's descriptor; None without a socket."""
        unix = transport.unix_socket_of(self._stream)
        return None if unix is None or unix.fileno() < 0 else unix.fileno()

    @property
    def peer_pid(self) -> int | None:
        """The process that listens: QEMU, or who opened the socket for it; None without a socket."""
        return None if self._peer is None else self._peer.pid or None

    @property
    def peer_uid(self) -> int | None:
        """The user that process ran as when it began to listen; None without a socket."""
        return None if self._peer is None else self._peer.uid

    def statistics(self) -> Statistics:
        """Return what went over the connection so far."""
        return self._calls.statistics(events=self._events)

    async def wait_closed(self) -> None:
        """Return when the connection is of no more use: the other side is gone, or the context was left."""
        await self._ended.wait()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
    ) -> Any:
        """Have QEMU carry out a command and return its answer.

        Commands of several tasks may be under way at once; QEMU gets them in the order in which they were
        sent.

        If this is cancelled before the command's turn to be sent has come, it is not sent. From then on it is
        sent whole: cancellation neither cuts it off nor takes it back, and its answer is dropped when it
        comes. The connection stays good.

        Args:
            command: the QMP command.
            arguments: its arguments.
            fds: descriptors to send along, for ``getfd`` and ``add-fd``; they stay open here.
            timeout: seconds from the call to the answer; by default the client's.

        Raises:
            CommandRefused: QEMU answered with an error.
            OutcomeUnknown: the deadline ran out after the sending began, or the connection was lost before
                the answer came. The command may have been carried out.
            ConnectionGone: the connection was lost, or the deadline ran out, before the command was sent. It
                was not carried out, and never will be.
            ProtocolError: something that is not QMP came instead of the answer. The command may have been
                carried out.
            InvalidInput: the arguments cannot be said in JSON; nothing was sent.
            TypeError: an argument is of a type that JSON has not, or descriptors were given without a Unix
                socket; nothing was sent.
            OSError: a descriptor is not open; nothing was sent.
        """
        if timeout is None:
            timeout = self._timeout
        if fds and transport.unix_socket_of(self._stream) is None:
            raise TypeError("file descriptors can be sent over a Unix socket only")
        call = self._calls.new(command)
        line = encode(command, arguments, call.number)
        try:
            with trio.move_on_after(timeout) as scope:
                await self._take_turn()
                try:
                    await self._send(call, line, fds, scope.deadline)
                finally:
                    self._sending.release()
                await call.settled.wait()
        finally:
            # Nothing to forget, unless the deadline or a cancellation was faster than the answer.
            self._calls.forget(call)
        return self._result(call, timeout)

    async def _take_turn(self) -> None:
        # A free lock is taken without the turn of the scheduler that Lock.acquire always makes: the guest may be
        # paused already.
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()

    async def _send(self, call: Call, line: bytes, fds: Sequence[int], deadline: float) -> None:
        # The last moment at which a cancellation, or the deadline, means that nothing was sent.
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._end is not None:
            raise ConnectionGone(f"{self._end}; {call.command} was not sent") from self._end
        self._calls.sending(call)
        deadline = min(deadline, call.sent_at + _SEND_SECONDS)
        with trio.CancelScope(deadline=deadline, shield=True) as sending:
            try:
                await transport.send(self._stream, line, fds)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                # QEMU cannot have carried out what it did not get to the end. And noting the end is left to
                # the reader: answers to others may still be there to be read.
                self._calls.not_sent(call)
                raise ConnectionGone(f"{self._why()}; {call.command} was not sent") from error
            except Exception:
                self._calls.not_sent(call)
                raise
        if sending.cancelled_caught:
            seconds = round(deadline - call.sent_at, 3)
            self._finish(ConnectionGone(f"{self._label}: QEMU did not read {call.command} for {seconds:g} s"))
            raise OutcomeUnknown(self._label, call.command, seconds) from self._end
        self._calls.sent()

    def _why(self) -> str:
        return str(self._end or f"{self._label}: QEMU closed the connection")

    def _result(self, call: Call, timeout: float) -> Any:
        match call.answer:
            case Reply(value=value):
                if self.check is not None:
                    self.check(self._label, call.command, value)
                return value
            case Failure(error_class=error_class, description=description):
                raise CommandRefused(self._label, call.command, error_class, description)
        if not call.sent:
            raise ConnectionGone(
                f"{self._label}: {call.command} was not sent: others were being sent for {timeout:g} s"
            )
        if not call.settled.is_set():
            raise OutcomeUnknown(self._label, call.command, timeout)
        if isinstance(self._end, ProtocolError):
            raise ProtocolError(f"{self._end}; outcome of {call.command} unknown") from self._end
        raise OutcomeUnknown(self._label, call.command, None) from self._end

    @contextmanager
    def subscribe(self, *names: str) -> Iterator[Subscription]:
        """Receive the events of these names, or all if none is given, from the moment of entering on.

        None is lost: what comes is buffered, and even after the connection is lost all that came before can
        be received. A subscriber that leaves `EVENT_BUFFER` events unread loses its subscription by a
        `ProtocolError`. Events that QEMU sent before an answer are in the buffer when `execute` returns that
        answer.

        Raises:
            ConnectionGone: the connection is lost already.
        """
        if self._end is not None:
            raise ConnectionGone(str(self._end)) from self._end
        subscription = Subscription(names, label=self._label)
        self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)
            subscription._leave()  # noqa: SLF001 - the two are one thing in two files

    async def _read(self) -> None:
        """Receive until the end; then close, so that QEMU is free for another client."""
        try:
            with self._reading:
                await self._receive()
        finally:
            # Forceful, so it does not wait and needs no deadline.
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    async def _receive(self) -> None:
        try:
            while data := await self._stream.receive_some(_CHUNK):
                for message in self._decoder.feed(data):
                    self._take(message)
                # A bad line behind good ones shows only now.
                self._decoder.feed(b"")
            self._finish(ConnectionGone(f"{self._label}: QEMU closed the connection"))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._finish(ConnectionGone(f"{self._label}: the connection to QEMU broke"))
        except ProtocolError as error:
            self._finish(ProtocolError(f"{self._label}: what came is not QMP: {error}"))

    def _take(self, message: Message) -> None:
        if isinstance(message, (Reply, Failure)):
            self._calls.answer(message)
        elif isinstance(message, Event):
            self._events += 1
            for subscription in self._subscriptions:
                subscription._deliver(message)  # noqa: SLF001 - see subscribe
        elif self._greeting is None:
            self._greeting = message
            self._greeted.set()
        else:
            raise ProtocolError("a second greeting")

    def _finish(self, why: ConnectionGone | ProtocolError) -> None:
        """Note the end of the connection, once, and wake all who wait for something."""
        if self._end is not None:
            return
        self._end = why
        self._reading.cancel()
        self._calls.lose()
        for subscription in self._subscriptions:
            subscription._finish(why)  # noqa: SLF001 - see subscribe
        self._greeted.set()
        self._ended.set()

    async def _negotiate(self) -> None:
        with trio.move_on_after(self._timeout):
            await self._greeted.wait()
        if self._greeting is None:
            if self._end is not None:
                raise type(self._end)(f"{self._end}, before any greeting") from self._end
            raise ConnectionGone(
                f"{self._label}: no greeting within {self._timeout:g} s; another client is probably "
                "connected: QEMU serves one at a time"
            )
        try:
            await self.execute("qmp_capabilities")
        except CommandRefused as error:
            # The client before us left with this very command under way, and QEMU did it for us.
            if error.error_class != "CommandNotFound":
                raise
        except OutcomeUnknown as error:
            # Nobody needs to know the outcome of that: there is no connection.
            raise ConnectionGone(f"{self._label}: QEMU greeted and then fell silent: {error}") from error


class _Reader:
    """Runs the client's reader while the context lasts.

    A class and not a nursery around a yield: a nursery would wrap the body's own exceptions in a group.
    """

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._nursery = trio.open_nursery()

    async def __aenter__(self) -> None:
        nursery = await self._nursery.__aenter__()
        nursery.start_soon(self._client._read, name=f"QMP reader of {self._client.label}")  # noqa: SLF001

    def __aexit__(self, *_: object) -> Awaitable[None]:
        why = ConnectionGone(f"{self._client.label}: the connection was closed here")
        self._client._finish(why)  # noqa: SLF001
        return self._join()

    async def _join(self) -> None:
        # Told of no exception, the nursery has none to wrap: the body's goes its own way. (That it returns
        # whether to swallow the exception must not get out, hence no return.) It needs neither shield nor
        # deadline: a nursery's exit cannot be cancelled, and its one task ends now.
        await self._nursery.__aexit__(None, None, None)


@asynccontextmanager
async def open_qmp_stream(
    stream: trio.abc.Stream, *, label: str, timeout: float = 10.0
) -> AsyncIterator[QMPClient]:
    """Speak QMP over a stream that is connected already; see `open_qmp`. The stream is closed in the end."""
    client = QMPClient(stream, label=label, timeout=timeout)
    async with _Reader(client):
        await client._negotiate()  # noqa: SLF001
        yield client


@asynccontextmanager
async def open_qmp(
    path: str | os.PathLike[str], *, label: str, timeout: float = 10.0, listener: int | None = None
) -> AsyncIterator[QMPClient]:
    """Connect to QEMU's QMP socket and negotiate.

    Exceptions of the body come out as they are. The loss of the connection shows in the client's calls alone;
    the body is not interrupted by it, and leaving is clean. Commands that other tasks have under way when the
    context is left raise OutcomeUnknown.

    The client works on within a shielded scope when everything around is cancelled, so that what was begun
    can be undone.

    Args:
        path: the Unix socket; may be longer than the kernel's limit for socket addresses.
        label: the domain's name, for errors.
        timeout: seconds for room in the socket's queue, for the greeting, for the negotiation, and for each
            command that is given none of its own.
        listener: the process that has to listen; None: whichever does.

    Raises:
        ConnectionGone: nobody listens or another process does, QEMU serves another client, or it closed the
            connection.
        ProtocolError: the listener does not speak QMP.
    """
    stream = await transport.connect(path, label=label, timeout=timeout, listener=listener)
    async with open_qmp_stream(stream, label=label, timeout=timeout) as client:
        yield client
