"""Which commands are under way, and whose an answer is.

Every number that was sent is either waiting (somebody wants the answer) or forgotten (nobody does any longer:
the deadline ran out, or a cancellation came) until its answer is here. An answer to anything else is a
`ProtocolError`, but not at first: QEMU gives the next client what it still had to tell the one before (QEMU 10.0
did so after 99 of 1,500 clients that left with a command under way), and numbers begin anywhere so that no such
answer can be taken for ours. QEMU keeps to the order, so that with our first answer there are no more of those.
"""

from __future__ import annotations

import secrets

import trio
from attrs import define, field, frozen

from snaporch.drivers.qmp.wire import Failure, Reply
from snaporch.errors import ProtocolError

__all__ = ["Call", "Calls", "Statistics"]


@frozen
class Statistics:
    """What went over a connection so far.

    Attributes:
        sent: commands sent whole, the negotiation's included.
        in_flight: commands whose answer somebody waits for.
        unanswered: commands whose answer nobody waits for any longer, and which did not come.
        late: answers that were dropped because nobody waited any longer.
        foreign: answers that were dropped because they were to the earlier client.
        events: events received, subscribed to or not.
        seconds_waited: the time from sending to the answer, summed over the commands whose answer was wanted.
    """

    sent: int
    in_flight: int
    unanswered: int
    late: int
    foreign: int
    events: int
    seconds_waited: float


@define(eq=False)
class Call:
    """A command on its way; it is ``settled`` when it has its answer or will never get one."""

    command: str
    number: int
    # True from the first byte on: "perhaps" counts as sent.
    sent: bool = False
    sent_at: float = 0.0
    answer: Reply | Failure | None = None
    settled: trio.Event = field(factory=trio.Event)


class Calls:
    """The calls of one connection."""

    def __init__(self) -> None:
        self._last = secrets.randbits(48)  # QEMU hands back integers of up to 63 bits as they are
        self._sent = 0
        self._late = 0
        self._foreign = 0
        self._answered = False
        self._seconds_waited = 0.0
        self._waiting: dict[int, Call] = {}
        self._forgotten: set[int] = set()

    def __len__(self) -> int:
        """How many are waited for."""
        return len(self._waiting)

    def new(self, command: str) -> Call:
        """Return a call with a number of its own."""
        self._last += 1
        return Call(command, self._last)

    def sending(self, call: Call) -> None:
        """Expect the answer from now on: it may be here before the sending returns."""
        call.sent = True
        call.sent_at = trio.current_time()
        self._waiting[call.number] = call

    def sent(self) -> None:
        """Count a call that was sent whole."""
        self._sent += 1

    def not_sent(self, call: Call) -> None:
        """Take `sending` back."""
        call.sent = False
        self._waiting.pop(call.number, None)

    def forget(self, call: Call) -> None:
        """Drop the answer when it comes, if it is not here yet."""
        if self._waiting.pop(call.number, None) is not None:
            self._forgotten.add(call.number)

    def lose(self) -> None:
        """Settle all calls without an answer: none will come."""
        for call in self._waiting.values():
            call.settled.set()
        self._waiting.clear()

    def answer(self, answer: Reply | Failure) -> None:
        """Hand an answer to whom it is for.

        Raises:
            ProtocolError: it is for nobody.
        """
        number = answer.id
        # The type first: JSON's true is equal to 1 in Python, and a list cannot even be looked up.
        if type(number) is int:
            if (call := self._waiting.pop(number, None)) is not None:
                call.answer = answer
                call.settled.set()
                self._answered = True
                self._seconds_waited += trio.current_time() - call.sent_at
                return
            if number in self._forgotten:
                self._forgotten.remove(number)
                self._late += 1
                return
        if not self._answered:
            self._foreign += 1
            return
        if isinstance(answer, Failure):
            # Without a number QEMU tells us that it could not read what we sent.
            raise ProtocolError(f"a failure of no command: {answer.description}")
        raise ProtocolError(f"an answer to nothing, its id is {number!r}")

    def statistics(self, *, events: int) -> Statistics:
        """Return the figures."""
        return Statistics(
            sent=self._sent,
            in_flight=len(self._waiting),
            unanswered=len(self._forgotten),
            late=self._late,
            foreign=self._foreign,
            events=events,
            seconds_waited=self._seconds_waited,
        )
