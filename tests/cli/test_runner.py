"""Exit status, errors and signals, in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from snaporch import errors
from snaporch.cli import execute
from snaporch.cli.logs import log_of_a_command, log_of_a_service
from snaporch.cli.runner import run
from snaporch.cli.session import Answer, Session

SAMPLES: dict[str, tuple[Any, ...]] = {
    "TargetExists": ("taken", "/a/file"),
    "NotEnoughSpace": (2000, 1000, "/a"),
    "DamagedSnapshot": ("gone", "/a/file"),
    "Busy": ("web", "0123abcd", "create one"),
    "Stranded": ("create one failed", "0123abcd", ("vda is on its overlay",)),
    "CommandRefused": ("web", "stop", "GenericError", "no"),
    "OutcomeUnknown": ("web", "stop", 3.0),
}
CLASSES = [getattr(errors, name) for name in errors.__all__]
STATUS = {"Refused": 2, "NotFound": 3, "Busy": 4, "Stranded": 5, "UnreadableRecord": 2}


def raising(error: BaseException) -> Callable[[], Awaitable[Answer]]:
    async def work() -> Answer:
        await trio.lowlevel.checkpoint()
        raise error

    return work


def sample(kind: type[errors.SnaporchError]) -> errors.SnaporchError:
    return kind(*SAMPLES.get(kind.__name__, ("it did not work",)))


@pytest.mark.parametrize("kind", CLASSES)
def test_each_error_has_its_status_one_line_and_a_document(
    kind: type[errors.SnaporchError], capsys: pytest.CaptureFixture[str]
) -> None:
    """An error is one line on stderr, and with --json one document with all that it knows."""
    error = sample(kind)
    status = run(Session(as_json=True), raising(error))
    out, err = capsys.readouterr()
    said = json.loads(out)["error"]
    base = next((each.__name__ for each in kind.__mro__ if each.__name__ in STATUS), "")
    assert status == said["exit_code"] == STATUS.get(base, 1)
    assert said["type"] == kind.__name__
    assert err == f"snaporch: {error}\n"
    assert said.items() >= {name: list(v) if isinstance(v, tuple) else v for name, v in vars(error).items()}.items()


def test_an_error_says_how_the_operation_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """What was rolled back or stranded says so, and of what; what was refused has no outcome."""
    found = {}
    for kind in (errors.OperationFailed, errors.DeadlineExceeded, errors.Stranded, errors.Busy):
        run(Session(as_json=True, subject={"domain": "web", "name": "one"}), raising(sample(kind)))
        document = json.loads(capsys.readouterr().out)
        found[kind] = (document.get("domain"), document.get("outcome"))
    assert found == {
        errors.OperationFailed: ("web", "rolled-back"),
        errors.DeadlineExceeded: ("web", "rolled-back"),
        errors.Stranded: ("web", "stranded"),
        errors.Busy: (None, None),
    }


def test_of_several_errors_the_worst_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """What could not be undone is never hidden by what failed beside it."""
    group = BaseExceptionGroup("", [sample(errors.Busy), ExceptionGroup("", [sample(errors.Stranded)])])
    assert run(Session(), raising(group)) == 5
    assert "recover" in capsys.readouterr().err


@pytest.mark.parametrize("verbose", [0, 2])
def test_a_defect_is_one_line(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody sees a traceback who has not asked for one."""
    assert run(Session(as_json=True, verbose=verbose), raising(KeyError("nodes"))) == 1
    out, err = capsys.readouterr()
    assert "KeyError" in json.loads(out)["error"]["message"]
    assert ("Traceback" in err) is (verbose == 2)


@pytest.mark.parametrize("log", [partial(log_of_a_command, 2), partial(log_of_a_service, "console", 0)])
def test_a_defect_is_logged_without_what_it_had_in_hand(
    log: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """The traceback, and no variables: they may be anything, a token or a gigabyte."""
    log()
    secret = "".join(["sno", "_", "x" * 9])
    try:
        dict[int, str]()[len(secret)]
    except KeyError as error:
        structlog.get_logger().error("a defect", exc_info=error)
    file = structlog.get_config()["logger_factory"]._file
    getattr(file, "close", lambda: None)()  # a service's log is written by a thread
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "KeyError: 13" in err
    assert secret not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_and_a_second_one_does_not_hurt(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operation's own rollback runs to its end, whatever comes meanwhile."""
    undone = []

    async def work() -> Answer:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                os.kill(os.getpid(), number)
                await trio.testing.wait_all_tasks_blocked()
            undone.append(True)
        raise AssertionError

    assert run(Session(as_json=True, subject={"domain": "web", "name": "one"}), work) == 130
    document = json.loads(capsys.readouterr().out)
    assert undone
    assert (document["outcome"], document["error"]["type"]) == ("rolled-back", "Interrupted")


def test_a_signal_that_comes_too_late_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """What was committed in spite of a signal is answered as done."""

    async def work() -> Answer:
        with trio.CancelScope(shield=True):
            os.kill(os.getpid(), signal.SIGINT)
            await trio.testing.wait_all_tasks_blocked()
        return Answer({"outcome": "complete"}, lambda human: human.line("done"))

    assert run(Session(as_json=True), work) == 0
    assert json.loads(capsys.readouterr().out) == {"format": 1, "outcome": "complete"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["domain"],
        ["create"],
        ["create", "web", "--nope"],
        ["create", "web", "--strategy", "paused"],
        ["create", "web", "--max-seconds", "soon"],
        ["revert", "web"],
        ["domain", "attach", "web"],
        [],
    ],
)
def test_wrong_use_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An error in the use is status 2, one line, and with --json one document."""
    assert execute(["--json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_code"] == 2
    assert err.count("\n") == 1


def test_an_unknown_driver_is_told_which_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and nothing is known afterwards that was not before."""
    root = ["--json", "--root", str(tmp_path / "root")]
    assert execute([*root, "domain", "attach", "web", "--qmp", "/run/q", "--driver", "qmeu"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], "there is no driver 'qmeu'; there are qemu" in error["message"]) == (
        "InvalidInput",
        True,
    )
    assert execute([*root, "domain", "list"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("arguments", [["--help"], ["create", "--help"], ["domain", "start", "-h"], ["--version"]])
def test_help_is_no_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Help goes to standard output."""
    assert execute(arguments) == 0
    out, err = capsys.readouterr()
    assert out
    assert not err


def test_signals_that_are_to_be_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    """Below a parent that has set all of them so (``trap '' INT TERM``), a verb runs all the same."""
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert execute(["--json", "--root", "/proc/nowhere", "list", "x"]) == errors.NotFound.exit_code
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "NotFound"
