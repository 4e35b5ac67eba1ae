"""What is said of a word that is no verb: which was meant, by its spelling or by what other programs call it."""

from __future__ import annotations

from difflib import get_close_matches

from cyclopts import App, CycloptsError, MissingArgumentError, UnknownCommandError
from cyclopts.exceptions import UnusedCliTokensError

_CALLED = {
    "create": "snapshot snap save take checkpoint snapshot-create snapshot-create-as backup",
    "revert": "rollback restore goto switch load loadvm snapshot-revert snapshot-restore",
    "delete": "rm remove del destroy-snapshot delsnapshot delvm snapshot-delete",
    "list": "ls snapshots listsnapshot snapshot-list",
    "tree": "graph log",
    "show": "info inspect snapshot-info snapshot-dumpxml",
    "edit": "rename mv move describe snapshot-edit",
    "flatten": "blockpull blockcommit commit rebase consolidate squash",
    "operations": "jobs tasks history journal status",
    "fsck": "check repair",
    "domain list": "vms domains machines ps",
    "domain show": "config dumpxml dominfo",
    "domain shutdown": "stop poweroff halt",
    "domain destroy": "kill off",
    "domain reboot": "restart",
    "domain screenshot": "screendump",
    "domain pause": "suspend freeze stand",
    "domain resume": "unpause unfreeze continue cont",
    "domain define": "add new import-xml",
    "domain undefine": "forget",
    "serve": "server daemon service",
    "--help": "help man usage",
    "--version": "version",
}
_MEANT = {word: verb for verb, words in _CALLED.items() for word in words.split()}
_MEANT_OF_DOMAINS = {"rm": "undefine", "delete": "undefine", "remove": "undefine", "ls": "list", "create": "define"}
_OPTIONS = ("--root", "--json", "--verbose", "--help", "--version")
_SPELLING = 0.6  # as `difflib` measures it


def _verbs(app: App, before: str = "") -> list[str]:
    """Return all verbs, those of groups with the group's name before them."""
    found = []
    for name in app:
        if not name.startswith("-"):
            found += [f"{before}{name}", *_verbs(app[name], f"{before}{name} ")]
    return found


def meant(app: App, group: str, word: str) -> str:
    """Return the verb that somebody meant, with its group, or an empty string.

    Args:
        app: the program.
        group: the words before it: empty, or for example ``domain``.
        word: what is no verb there.
    """
    verbs = _verbs(app)
    if group == "domain" and word in _MEANT_OF_DOMAINS:
        return f"domain {_MEANT_OF_DOMAINS[word]}"
    last = {verb.rpartition(" ")[2]: verb for verb in reversed(verbs)}
    if word in _MEANT:
        return _MEANT[word]
    if word in last:
        return last[word]
    near = {verb.removeprefix(f"{group} "): verb for verb in verbs if not group or verb.startswith(f"{group} ")}
    for known in (near, last):
        if close := get_close_matches(word, known, 1, _SPELLING):
            return known[close[0]]
    return ""


def in_words(app: App, error: CycloptsError) -> str:
    """Return what is wrong with the use of the command line, and what was meant as far as that can be guessed."""
    if not isinstance(error, UnknownCommandError) or not error.unused_tokens:
        return _misused(error)
    word, *rest = error.unused_tokens
    group = " ".join(error.command_chain or ())
    if word.startswith("-"):
        close = get_close_matches(word, _OPTIONS, 1, _SPELLING)
        return f"there is no option {word}{_ask(close[0] if close else '')}"
    if word in {"snapshot", "snap"} and rest and (rest[0] in app or rest[0] in _MEANT):
        verb = rest[0] if rest[0] in app else _MEANT[rest[0]]  # `snapshot restore web one`
    else:
        verb = meant(app, group, word)
    return f"there is no verb {f'{group} {word}'.strip()!r}{_ask(f'snaporch {verb}' if verb else '')}"


def _misused(error: CycloptsError) -> str:
    """Return what is wrong with the arguments or options of a verb, and what says how they are."""
    verb = " ".join(error.command_chain or ())
    words = str(error).strip().rstrip(".")
    if isinstance(error, MissingArgumentError) and error.argument is not None and not error.tokens_so_far:
        words = f"{error.argument.name.lstrip('-')} is missing"
    if isinstance(error, UnusedCliTokensError):
        words = f"{', '.join(map(repr, error.unused_tokens or ()))}: one word too many"
    how = " ".join(["snaporch", *verb.split(), "--help"])
    return f"{f'{verb}: ' if verb else ''}{words}; `{how}` says how it is used"


def _ask(what: str) -> str:
    return f"; did you mean `{what}`? `snaporch --help` lists all" if what else "; see `snaporch --help`"
