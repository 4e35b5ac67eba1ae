"""The command line: ``snaporch [--root DIR] [--json] [-v] VERB …``; one module a group of verbs.

Exit status: 0 done; 1 failed and rolled back; 2 refused or wrong use, nothing touched; 3 no such domain or
snapshot; 4 busy; 5 stranded; 130 interrupted, and rolled back.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Awaitable, Sequence
from functools import partial
from importlib import import_module
from inspect import iscoroutinefunction
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from snaporch.cli import completion
from snaporch.cli.examples import arrange
from snaporch.cli.habits import in_words
from snaporch.cli.runner import ANYTHING, refuse, report, run, show
from snaporch.cli.session import Answer, Session
from snaporch.errors import InvalidInput
from snaporch.model.names import check_text

__all__ = ["execute", "main"]

_HELP = """Live snapshots of virtual machines: memory and all disks at one point, while the guest runs.

Exit status: 0 done, 1 failed and rolled back, 2 refused or wrong use, 3 not found, 4 busy, 5 stranded,
130 interrupted and rolled back.
"""


# Verbs, in whatever group, that change nothing.
_READS = frozenset(
    {
        "list",
        "show",
        "tree",
        "operations",
        "orphans",
        "doctor",
        "discover",
        "estimate",
        "rehearse",
        "verify",
        "check",
        "plan",
        "logs",
        "watch",
        "completion",
        "words",
    }
)


_HELP_FLAGS = frozenset({"--help", "-h"})

# By module: each verb with what it is in there.
_VERBS = {
    "domain": {"domain": "app"},
    "batch": {"batch": "app"},
    "service": {"serve": "serve", "token": "app"},
    "snapshot": {
        "create": "create",
        "list": "list_",
        "tree": "tree",
        "show": "show",
        "revert": "revert",
        "delete": "delete",
        "clone": "clone",
        "flatten": "flatten",
        "verify": "verify",
        "pin": "pin",
        "edit": "edit",
    },
    "prune": {"prune": "prune"},
    "archive": {"export": "export", "export-disk": "export_disk", "import": "import_"},
    "inspect": {
        "operations": "past",
        "recover": "recover",
        "fsck": "fsck",
        "doctor": "doctor",
        "watch": "watch",
        "demo": "demo",
    },
}


def application(arguments: Sequence[str] = ()) -> App:
    """Return the program with all its verbs; those that these arguments cannot mean are not imported."""
    named = [module for module, verbs in _VERBS.items() if not verbs.keys().isdisjoint(arguments)]
    every = not named or not _HELP_FLAGS.isdisjoint(arguments)  # help has a line from each
    plain = Parameter(negative=(), show_default=False)
    app = App(name="snaporch", help=_HELP, help_format="markdown", default_parameter=plain)
    for module, verbs in _VERBS.items():
        for name, verb in verbs.items():
            where = f"{__name__}.{module}"
            if every or module in named:
                app.command(getattr(import_module(where), verb), name=name)
            else:
                app.command(f"{where}:{verb}", name=name)
    completion.register(app)
    if every:
        arrange(app)
    return app


def execute(arguments: Sequence[str]) -> int:
    """Run the program and return its exit status; it never raises."""
    session, app = Session(as_json="--json" in arguments), application(arguments)
    for word in arguments:
        try:
            check_text(word, "arguments")
        except InvalidInput as error:
            return report(session, error)

    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        root: Annotated[Path | None, Parameter(env_var="SNAPORCH_ROOT")] = None,
        as_json: Annotated[bool, Parameter(name="--json")] = False,
        verbose: Annotated[int, Parameter(name=["--verbose", "-v"], count=True)] = 0,
    ) -> int:
        """Run a verb.

        Parameters
        ----------
        root
            The directory of the catalog and, by default, of all files.
        as_json
            Print one JSON document.
        verbose
            Say more on standard error; twice: everything, with tracebacks.
        """
        session.root, session.as_json, session.verbose = root, as_json, verbose
        return _verb(app, session, tokens)

    app.meta.default(launch)
    try:
        command, bound, _ = app.meta.parse_args(list(arguments), exit_on_error=False, print_error=False)
        if command is not launch:  # help or the version, of the program itself
            return show(session, partial(command, *bound.args, **bound.kwargs))
        return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        return refuse(session, in_words(app, error))
    except ANYTHING as error:
        return report(session, error)


def _verb(app: App, session: Session, tokens: Sequence[str]) -> int:
    command, bound, ignored = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
    if not iscoroutinefunction(command):  # help or version, asked for or for want of a verb
        if (tokens or session.as_json) and not (_HELP_FLAGS | {"--version"}) & set(tokens):
            group = " ".join(["snaporch", *tokens])
            return refuse(session, f"{group}: which verb? `{group} --help` lists them")
        return show(session, partial(command, *bound.args, **bound.kwargs))
    session.only_reads = command.__name__.rstrip("_") in _READS
    injected = dict.fromkeys(ignored, session)
    work: partial[Awaitable[Answer]] = partial(command, *bound.args, **bound.kwargs, **injected)
    return run(session, work)


def main() -> NoReturn:
    """Run the program on this process's arguments."""
    _have_standard_files()
    status = execute(sys.argv[1:])
    gc.freeze()  # what ends is not looked through once more for what could be freed
    sys.exit(status)


def _have_standard_files() -> None:
    """Have descriptors 0 to 2 open: a file that got one would be written to. Escape what cannot be shown."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets that number: the lowest that is free
    if sys.stderr is None:  # to print to None is to print to standard output
        sys.stderr = os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
