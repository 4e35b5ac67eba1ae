"""``snaporch completion``: what a shell offers to complete a command line with, names of snapshots too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

from cyclopts import App

from snaporch.cli.session import Answer, Here, Session
from snaporch.errors import SnaporchError

_SCRIPTS = {
    "bash": """\
_snaporch() {
    local IFS=$'\\n'
    COMPREPLY=($(snaporch completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _snaporch snaporch
""",
    "zsh": """\
#compdef snaporch
_snaporch() {
    local -a found
    found=(${(f)"$(snaporch completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -- $found; else _files; fi
}
compdef _snaporch snaporch
""",
    "fish": """\
function __snaporch
    snaporch completion words -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c snaporch -a '(__snaporch)'
""",
}
_GLOBAL = ("--root", "--json", "--verbose", "--help", "--version")


async def completion(shell: Literal["bash", "zsh", "fish"], /, *, session: Here) -> Answer:  # noqa: ARG001, ASYNC124 - as all verbs
    """Print the completion of a shell: `snaporch completion bash > /etc/bash_completion.d/snaporch`.

    Parameters
    ----------
    shell
        The shell that reads it.
    """
    return Answer(
        {"shell": shell, "script": _SCRIPTS[shell]}, lambda human: human.lines(_SCRIPTS[shell].splitlines())
    )


def words_of(app: App) -> Callable[..., Any]:
    """Return the verb that the scripts call."""

    async def words(*typed: str, session: Here) -> Answer:
        """List what can come next; the last word is what is typed of it.

        Parameters
        ----------
        typed
            The words after `snaporch`.
        """
        *before, begun = typed or ("",)
        found = sorted(each for each in await _candidates(app, session, before, begun) if each.startswith(begun))
        return Answer(found, lambda human: human.lines(found))

    return words


async def _candidates(app: App, session: Session, before: Sequence[str], begun: str) -> list[str]:
    node, chain, places = app, list[str](), list[str]()
    for word in before:
        if not places and not word.startswith("-") and word in node:
            node = node[word]
            chain.append(word)
        elif not word.startswith("-"):
            places.append(word)
    verb = node.default_command
    if begun.startswith("-"):
        return [*_GLOBAL, *(_options(verb) if verb is not None else ())]
    found = [name for name in node if not places and not name.startswith("-")]
    if verb is not None:
        found += await _names(session, _place(verb, chain, len(places)), places)
    return found


def _options(verb: Callable[..., Any]) -> Iterator[str]:
    for name, parameter in inspect.signature(verb).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name != "session":
            yield f"--{name.strip('_').replace('_', '-')}"


def _place(verb: Callable[..., Any], chain: Sequence[str], number: int) -> str:
    """Return what the next argument is: a ``domain``, a ``snapshot``, or something else."""
    arguments = [
        name
        for name, parameter in inspect.signature(verb).parameters.items()
        if parameter.kind is parameter.POSITIONAL_ONLY
    ]
    if number >= len(arguments):
        return ""
    if arguments[number] == "domain" or (number == 0 and chain[:1] == ["domain"]):
        return "domain"
    known = number == 1 and arguments[0] == "domain" and arguments[1] in {"name", "old"}
    return "snapshot" if known and list(chain) != ["create"] else ""


async def _names(session: Session, kind: str, places: Sequence[str]) -> list[str]:
    with suppress(SnaporchError, OSError):
        if kind == "domain":
            async with session.look() as orchestrator:
                return [info.name for info in await orchestrator.domains()]
        if kind == "snapshot":
            async with session.read() as known:
                return [record.name for record in await known.list(places[0])]
    return []


def register(app: App) -> None:
    """Add the verbs to the program."""
    group = App(name="completion")
    group.default(completion)
    group.command(words_of(app), name="words", show=False)
    app.command(group)
