"""A program of its own that lets a paused guest go on when snaporch dies, or is stopped, during the pause.

    python -I -S guard.py ACTION ARGUMENT... < leash

It runs from before the pause until after it, and has one end of a pipe whose other end only snaporch has:

- a ``.`` on it is a heartbeat: snaporch sends one every second;
- a ``d`` is the dismissal, after which the program ends and has done nothing;
- the pipe's end without that means that snaporch is dead;
- SILENCE seconds without a byte mean that snaporch is stopped (Ctrl-Z, SIGSTOP, a write to a pipe that nobody
reads).

Then the guest goes on. ACTION says how: the path of a Python file of a driver with a function

    act(arguments: Sequence[str], *, dead: bool, decide: Callable[..., str]) -> bool

(`decide` is the function below). It returns whether all is done; where it is not (there is nothing to do yet, or a
daemon does not answer), it is called again a second later. An OSError or a ValueError means that the hypervisor is
gone, and with it what was guarded.

Seconds are counted by this program's own looks, one a second: where it was frozen itself, together with snaporch,
that was one look, however long it took, and snaporch gets its time to send the next heartbeat.

It imports only what it needs, and nothing of snaporch: it has started within milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from types import ModuleType

READY = b"ready"
BEAT = b"."
DISMISSED = b"d"
SILENCE = 5  # seconds; a machine that is busy delays a heartbeat by less

Act = Callable[..., bool]


def decide(path: str, word: str, *, over: str = "") -> str:
    """Decide something by a word, unless it is decided already; return the word that holds, durable.

    The decision is a symbolic link that nobody follows: it is made at once, with its word in it, and only once,
    also where two processes try to, and takes no space on a full disk.

    Args:
        path: of the link.
        word: the decision.
        over: a word that `word` replaces, where that is what is decided.
    """
    try:
        os.symlink(word, path)
    except FileExistsError:
        if over and os.readlink(path) == over:
            revise(path, word)
    _sync_parent(path)
    return os.readlink(path)


def revise(path: str, word: str) -> None:
    """Replace a decision; durable on return. Whoever reads it meanwhile finds the old word or the new one."""
    other = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(other)
    os.symlink(word, other)
    os.replace(other, path)
    _sync_parent(path)


def _sync_parent(path: str) -> None:
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _action(path: str) -> Act:
    module = ModuleType("action")
    SourceFileLoader("action", path).exec_module(module)
    act: Act = module.act
    return act


def stand_by(act: Callable[[bool], bool]) -> None:
    """Return when dismissed, or when there was something to do and it is done."""
    silent, dead = 0, False
    while True:
        if dead:
            time.sleep(1)
        elif select.select([0], [], [], 1)[0]:
            said = os.read(0, 4096)
            if DISMISSED in said:
                return
            silent, dead = 0, not said
        else:
            silent += 1
        if (dead or silent >= SILENCE) and act(dead):
            return


def main() -> None:
    """See the head of this file."""
    path, *arguments = sys.argv[1:]
    act = _action(path)

    def attempt(dead: bool) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return act(arguments, dead=dead, decide=decide)
        return True

    with contextlib.suppress(BrokenPipeError):  # the task that started the guard was cancelled meanwhile
        os.write(1, READY)
    stand_by(attempt)


if __name__ == "__main__":
    main()
