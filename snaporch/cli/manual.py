"""The reference of the command line, made from the verbs themselves: a page in Markdown, and manual pages.

``python -m snaporch.cli.manual`` prints the first, docs/reference/cli.md, and a test compares the two;
``python -m snaporch.cli.manual DIRECTORY`` writes a manual page for the program and for each verb.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs
from cyclopts import App

from snaporch.cli.examples import EXAMPLES, GROUPS

STATUSES = (
    (0, "done"),
    (1, "failed, and rolled back: everything is as it was; the line on standard error says why"),
    (2, "refused, or wrong use: nothing was touched; the line says what to do instead"),
    (3, "there is no such domain or snapshot; `snaporch domain list` and `snaporch list DOMAIN` list them"),
    (
        4,
        "busy: another operation runs there; `snaporch operations --running` says which, `create --wait` waits",
    ),
    (5, "stranded: failed, and not all could be undone; `snaporch recover` tries again"),
    (130, "interrupted by Ctrl-C or a signal, and rolled back"),
)
GLOBAL = (
    ("--root DIR", "The directory of the catalog and, by default, of all files; also SNAPORCH_ROOT."),
    ("--json", "Print one JSON document; what is without an end prints one a line."),
    ("-v, --verbose", "Say more on standard error; twice: everything, with tracebacks."),
    ("-h, --help", "Say how a verb is used, and with which options."),
    ("--version", "Print the version."),
)


@attrs.frozen
class Word:
    """An argument or an option: how it is written, and what it does."""

    written: str
    text: str


@attrs.frozen
class Verb:
    """A verb.

    Attributes:
        name: with the group before it, for example ``domain start``.
        short: its first sentence.
        long: what else there is to say.
        arguments: in their order.
        options: without those of all verbs.
    """

    name: str
    short: str
    long: str
    arguments: tuple[Word, ...]
    options: tuple[Word, ...]

    @property
    def usage(self) -> str:
        """How it is typed."""
        return " ".join(["snaporch", self.name, *(each.written for each in self.arguments)])


def _choices(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    found = [_choices(each) for each in get_args(hint)]
    if any(found):
        return next(filter(None, found))
    return "|".join(str(each.value) for each in list[Enum](hint)) if isinstance(hint, EnumMeta) else ""


def _value(argument: Any) -> str:
    """Return how the value of an option is written."""
    hint = argument.hint
    if hint is bool:
        return ""
    if choices := _choices(hint):
        return f" {choices}"
    said = str(hint)
    kinds = {"Path": "FILE", "int": "N", "float": "N", "str": "TEXT"}
    return f" {next((word for kind, word in kinds.items() if kind in said), 'TEXT')}"


def _verb(name: str, app: App) -> Verb:
    arguments, options = list[Word](), list[Word]()
    for each in app.assemble_argument_collection(parse_docstring=True):
        kind, text = each.field_info.kind, " ".join((each.parameter.help or "").split())
        if not each.parse:
            continue
        if kind in {kind.POSITIONAL_ONLY, kind.VAR_POSITIONAL}:
            word = _choices(each.hint) or each.names[0].strip("-").upper()
            word = f"{word}…" if kind is kind.VAR_POSITIONAL else word
            arguments.append(Word(word if each.required else f"[{word}]", text))
        else:
            options.append(Word(f"{each.names[0]}{_value(each)}", text))
    short, _, long = app.help.partition("Parameters\n")[0].partition("\n\n")
    return Verb(name, " ".join(short.split()), " ".join(long.split()), tuple(arguments), tuple(options))


def verbs(app: App, before: str = "") -> Iterator[Verb]:
    """Yield all verbs that the help shows, those of a group after one another."""
    for name in app:
        sub = app[name]
        if name.startswith("-") or not sub.show:
            continue
        if sub.default_command is not None:
            yield _verb(f"{before}{name}", sub)
        yield from verbs(sub, f"{before}{name} ")


def _heading(verb: Verb) -> int:
    first = verb.name.split()[0]
    return next(place for place, members in enumerate(GROUPS.values()) if first in members)


def markdown(app: App) -> str:
    """Return the page of the documentation."""
    found = sorted(verbs(app), key=_heading)
    lines = [
        "# The command line",
        "",
        "Made from the program by `python -m snaporch.cli.manual`; `snaporch VERB --help` says the same.",
        "",
        "`snaporch [--root DIR] [--json] [-v] VERB …`",
        "",
        *_table("of all verbs", [Word(*each) for each in GLOBAL]),
        "",
        "## Exit status",
        "",
        *_table("status", [Word(str(status), text) for status, text in STATUSES]),
    ]
    for place, heading in enumerate(GROUPS):
        lines += ["", f"## {heading}"]
        for verb in found:
            if _heading(verb) == place:
                lines += ["", *_section(verb)]
    return "\n".join(lines) + "\n"


def _section(verb: Verb) -> Iterator[str]:
    yield from (f"### {verb.name}", "", f"`{verb.usage}`", "", verb.short)
    if verb.long:
        yield from ("", verb.long)
    if words := [each for each in verb.arguments if each.text] + list(verb.options):
        yield from ("", *_table("", words))
    if examples := EXAMPLES.get(verb.name):
        yield from ("", "```console", *(f"$ snaporch {line}   # {what}" for line, what in examples), "```")


def _table(heading: str, words: Sequence[Word]) -> Iterator[str]:
    yield from (f"| {heading} | |", "|---|---|")
    for word in words:
        written, text = (each.replace("|", "\\|") for each in (word.written.strip("[]"), word.text))
        yield f"| `{written}` | {text} |"


def _roff(text: str) -> str:
    """Return text in which nothing is a command of roff."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "").replace("…", "...")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain


def _items(words: Sequence[Word]) -> Iterator[str]:
    for word in words:
        yield from (".TP", f".B {_roff(word.written.strip('[]'))}", _roff(word.text))


def _sections(parts: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = [line for heading, body in parts if body for line in (f".SH {heading}", *body)]
    return "\n".join(lines) + "\n"


def _title(name: str, version: str) -> str:
    return f'.TH "{name.upper()}" 1 "" "snaporch {version}" "User commands"\n'


def man_page(verb: Verb, version: str) -> str:
    """Return a verb's manual page."""
    examples = [
        line
        for command, what in EXAMPLES.get(verb.name, ())
        for line in (".TP", f".B snaporch {_roff(command)}", _roff(what))
    ]
    name = f"snaporch-{verb.name.replace(' ', '-')}"
    return _title(name, version) + _sections(
        (
            ("NAME", [f"{_roff(name)} \\- {_roff(verb.short.rstrip('.'))}"]),
            ("SYNOPSIS", [f".B {_roff(verb.usage)}", *(["[options]"] if verb.options else [])]),
            ("DESCRIPTION", [_roff(" ".join(filter(None, [verb.short, verb.long])))]),
            ("ARGUMENTS", list(_items([each for each in verb.arguments if each.text]))),
            ("OPTIONS", list(_items(verb.options))),
            ("EXAMPLES", examples),
            ("SEE ALSO", [".BR snaporch (1)"]),
        )
    )


def man_pages(app: App, version: str) -> dict[str, str]:
    """Return the manual pages by the names of their files."""
    found = list(verbs(app))
    whole = _title("snaporch", version) + _sections(
        (
            ("NAME", ["snaporch \\- live snapshots of virtual machines: memory and all disks at one point"]),
            ("SYNOPSIS", [".B snaporch", "[\\-\\-root DIR] [\\-\\-json] [\\-v] VERB ..."]),
            ("OPTIONS", list(_items([Word(*each) for each in GLOBAL]))),
            ("VERBS", list(_items([Word(each.name, each.short) for each in found]))),
            ("EXIT STATUS", list(_items([Word(str(status), text) for status, text in STATUSES]))),
            (
                "FILES",
                list(
                    _items([Word("/var/lib/snaporch", "The root, for root; ~/.local/state/snaporch for others.")])
                ),
            ),
        )
    )
    pages = {f"snaporch-{each.name.replace(' ', '-')}.1": man_page(each, version) for each in found}
    return {"snaporch.1": whole} | pages


def main() -> None:
    """Print the page, or write the manual pages."""
    from importlib.metadata import version  # noqa: PLC0415

    from snaporch.cli import application  # noqa: PLC0415 - it imports all verbs

    app = application()
    if len(sys.argv) == 1:
        sys.stdout.write(markdown(app))
    for directory in map(Path, sys.argv[1:]):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in man_pages(app, version("snaporch")).items():
            (directory / name).write_text(text)


if __name__ == "__main__":
    main()
