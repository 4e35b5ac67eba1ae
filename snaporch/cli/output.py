"""The way to standard output, of documents (`snaporch.model.documents`) and of text (`snaporch.cli.human`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from snaporch.cli.session import Answer
from snaporch.errors import OperationFailed, SnaporchError, Stranded
from snaporch.model.convert import converter
from snaporch.model.documents import FORMAT
from snaporch.model.record import Outcome

PIPE_WIDTH = 200  # columns where there is no terminal: a path must not be cut in two
INTERRUPTED = 130


def print_answer(answer: Answer, *, as_json: bool) -> None:
    """Print what a verb answers."""
    if as_json:
        print_document(answer.document)
        return
    from rich.console import Console  # noqa: PLC0415 - not needed with --json, and slow

    from snaporch.cli import human  # noqa: PLC0415

    # What is printed are names and paths of others: nothing in them is markup.
    plain = {"markup": False, "emoji": False, "highlight": False}
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, **plain)  # type: ignore[arg-type]
    console.print(answer.human(human), soft_wrap=not sys.stdout.isatty(), crop=False)
    sys.stdout.flush()


def print_document(document: Any) -> None:
    """Print one JSON document; every object of it that has no number of its own has that of the documents."""
    plain = converter.unstructure(document)
    numbered = [_numbered(each) for each in plain] if isinstance(plain, list) else _numbered(plain)
    print(json.dumps(numbered, indent=2), flush=True)  # noqa: T201 - this is the output


def _numbered(document: Any) -> Any:
    return {"format": FORMAT} | document if isinstance(document, dict) else document


def error_document(error: SnaporchError, subject: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``--json`` says of an error; `subject` is what a create, revert or delete was about."""
    details = {name: value for name, value in vars(error).items() if not name.startswith("_")}
    said = {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    document: dict[str, Any] = {"error": said | details}
    if isinstance(error, Stranded):
        return dict(subject) | {"outcome": Outcome.STRANDED} | document
    if subject and (isinstance(error, OperationFailed) or error.exit_code == INTERRUPTED):
        return dict(subject) | {"outcome": Outcome.ROLLED_BACK} | document
    return document
