"""Runs one verb: signals, errors, exit status. Nothing else in the command line ends the process.

A verb is cancelled by SIGINT, SIGTERM or SIGHUP (its terminal is gone), and the operation rolls itself back; a
second signal changes nothing, as half a rollback helps nobody. Whatever goes wrong becomes one line on standard
error and, with ``--json``, one document on standard output; a traceback is a defect, shown only on request.

What a verb has done is done, whether or not its answer can be written: then it exits 0 with a line on standard
error, and with 1 where the answer was all that there was to do.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from functools import partial

import trio

from snaporch.cli.output import INTERRUPTED, error_document, print_answer, print_document
from snaporch.cli.session import Answer, Session
from snaporch.errors import OperationFailed, SnaporchError, Stranded, exhausted, leaves

WRONG_USE = 2
DEBUG_VERBOSITY = 2

# All that can come out of a run: at the outermost border nothing may pass as a traceback.
ANYTHING = (Exception, BaseExceptionGroup, KeyboardInterrupt, SystemExit)

Work = Callable[[], Awaitable[Answer]]


class Interrupted(SnaporchError):
    """A signal ended it; an operation that ran was rolled back."""

    exit_code = INTERRUPTED


def run(session: Session, work: Work) -> int:
    """Run a verb, print its answer or its error, and return the exit status."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # before there was nothing to be rolled back
    try:
        answer = trio.run(_supervised, session, work)
    except ANYTHING as error:
        return report(session, error)
    return _print(session, partial(print_answer, answer, as_json=session.as_json), answer.status)


def show(session: Session, write: Callable[[], None]) -> int:
    """Print what is no verb's answer (help, the version) and return the exit status."""
    session.only_reads = True

    def flushed() -> None:
        write()
        sys.stdout.flush()

    return _print(session, flushed, 0)


def _print(session: Session, write: Callable[[], None], status: int, *, done: bool = True) -> int:
    """Print to standard output and return the exit status; `done`: it is an answer, not an error."""
    try:
        _check_open()
        write()
    except BrokenPipeError:
        _discard_output()  # whoever read it has seen enough, as `head` has
    except OSError as error:
        _discard_output()
        words = "; what was asked for is done" if done and not session.only_reads else ""
        session.say(f"snaporch: standard output cannot be written to: {error.strerror}{words}")
        return status or int(session.only_reads)
    except SystemExit:
        pass  # rich's way to say that nobody reads on
    except Exception as error:  # noqa: BLE001 - how an answer is shown says nothing about what was done
        return report(session, error) if session.only_reads else _unshown(session, error, status)
    return status


def _check_open() -> None:
    """Raise where there was no standard output when the program began: Python then writes to nowhere."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _unshown(session: Session, error: Exception, status: int) -> int:
    session.say(f"snaporch: done, and it cannot be shown: {_unexpected(error)}: a defect in snaporch")
    return status


def report(session: Session, error: BaseException) -> int:
    """Print an error and return its exit status."""
    cause = _cause(error)
    if session.verbose >= DEBUG_VERBOSITY or os.environ.get("SNAPORCH_DEBUG"):
        traceback.print_exception(error)
    if isinstance(cause, SystemExit):
        return 0  # rich's way to say that nobody reads on, and ours in `run`
    if isinstance(cause, KeyboardInterrupt):
        cause = Interrupted("interrupted")
    if not isinstance(cause, SnaporchError):
        cause = exhausted(cause) or SnaporchError(
            f"{_unexpected(cause)}: a defect in snaporch; -vv shows where, and `snaporch operations` what it left"
        )
    for line in getattr(cause, "faults", ()) or (str(cause),):
        session.say("snaporch: " + " ".join(line.split()))
    if session.as_json:
        document = error_document(cause, session.subject)
        return _print(session, partial(print_document, document), cause.exit_code, done=False)
    return cause.exit_code


def refuse(session: Session, text: str) -> int:
    """Print an error in the use of the command line and return its exit status."""
    text = " ".join(text.split())
    session.say(f"snaporch: {text}")
    if session.as_json:
        document = {"error": {"type": "UsageError", "message": text, "exit_code": WRONG_USE}}
        return _print(session, partial(print_document, document), WRONG_USE, done=False)
    return WRONG_USE


def _unexpected(error: BaseException) -> str:
    words = str(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _cause(error: BaseException) -> BaseException:
    """Return the error that says most: of several, the one that could not be undone."""
    found = list(leaves(error))
    for kind in (Stranded, SnaporchError, Exception):
        for leaf in found:
            if isinstance(leaf, kind):
                return leaf
    return found[0]


def _discard_output() -> None:
    """Let the interpreter flush what is left to nowhere, without a complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _signals() -> list[signal.Signals]:
    """Return the signals that cancel; one that our parent has set to be ignored (``nohup``, ``&``) stays so."""
    return [
        each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN
    ]


async def _supervised(session: Session, work: Work) -> Answer:
    """Run a verb so that a signal cancels it.

    Raises:
        Interrupted: a signal came, and the verb did not get to its end.
    """
    scope, names, heeded = trio.CancelScope(), list[str](), _signals()
    answers: list[Answer] = []  # none when it was cancelled
    with trio.open_signal_receiver(*heeded) if heeded else nullcontext() as signals:
        async with trio.open_nursery() as nursery:
            if signals is not None:
                nursery.start_soon(_watch, session, signals, scope, names)
            try:
                with scope:
                    answers.append(await work())
            except* OperationFailed as failed:
                if not names:
                    raise
                raise Interrupted(f"interrupted by {names[0]}: {next(leaves(failed))}") from failed
            nursery.cancel_scope.cancel()
    if not answers:
        ended = "rolled back: everything is as it was before" if session.subject else session.interrupted
        raise Interrupted(f"interrupted by {names[0]}; {ended}")
    return answers[0]


async def _watch(session: Session, signals: AsyncIterator[int], scope: trio.CancelScope, names: list[str]) -> None:
    async for number in signals:
        if not names:
            session.say(f"snaporch: {signal.Signals(number).name}: stopping")
        elif session.subject:
            session.say("snaporch: still rolling back; a guest must not be left half switched")
        names.append(signal.Signals(number).name)
        scope.cancel()
