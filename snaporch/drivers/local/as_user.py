"""Work on files as another user: in a process of that user's, which asks the kernel, and not us, what it may do.

Rule: in a directory that another user can write to, root opens, makes, renames, changes and removes nothing by its
name: between a look and the deed the name may be another file's. What the other user's own process does there, the
user could have done without us.

The process (`snaporch.drivers.local.servant`) is a child of ours with that user's ids and groups and nothing else
of ours: it is asked in JSON to call a function, and what it answers is read as data of the kind that the function
says. It cannot be looked into by other processes of that user; that it may be ended by them is an error here.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Generic, TypeVar, get_type_hints

import attrs

from snaporch import errors
from snaporch.drivers.local import servant, walk
from snaporch.errors import Forbidden, OperationFailed, SnaporchError

T = TypeVar("T")

MOST_BYTES = 64 * 2**20  # of an answer
_WITH_PATH = frozenset({"DamagedSnapshot", "TargetExists"})


@attrs.frozen
class User:
    """With which rights a process runs.

    Attributes:
        uid: its user.
        gid: its group.
        groups: the further groups, in order.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def ours(cls) -> User:
        """Return who this process runs as."""
        return cls(os.geteuid(), os.getegid(), tuple(sorted(os.getgroups())))

    @property
    def name(self) -> str:
        """The user's name, for people."""
        with suppress(KeyError):
            return pwd.getpwuid(self.uid).pw_name
        return f"user {self.uid}"

    def is_in(self, gid: int) -> bool:
        """Return whether a group is one of its own."""
        return gid == self.gid or gid in self.groups

    @property
    def rights(self) -> dict[str, Any]:
        """Options of `subprocess.Popen` that have a program run as this user, with nothing of ours."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        return {
            "user": self.uid,
            "group": self.gid,
            "extra_groups": self.groups,
            "umask": 0o077,
            "cwd": "/",
            "env": environment,
        }


def group_name(gid: int) -> str:
    """Return a group's name, for people."""
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return f"group {gid}"


def only_roots(directory: str) -> bool:
    """Return whether nobody but root can change what a directory lists, nor lead its path elsewhere."""
    try:
        place = os.stat(walk.resolve(directory, ()))
    except (Forbidden, OSError):
        return False
    return place.st_uid == 0 and stat.S_ISDIR(place.st_mode) and not place.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class _Servant:
    """One process that works as a user."""

    def __init__(self, user: User) -> None:
        self._socket, theirs = socket.socketpair()
        words = [str(user.uid), str(user.gid), ",".join(map(str, user.groups))]
        try:
            self._pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-X", "utf8", servant.__file__, *words],
                {},
                setsid=True,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                ],
            )
        finally:
            theirs.close()
        self._lines = self._socket.makefile("rb")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what it answers.

        Raises:
            OSError, ValueError: it has not answered, or not in JSON.
        """
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._lines.readline(MOST_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionError("it is gone")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("no answer")  # noqa: TRY004 - as what is no JSON at all
        return answer

    def is_there(self) -> bool:
        """Return whether it still waits for a request: it says nothing by itself, but that it has ended."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def hang_up(self) -> None:
        """Have whoever waits for an answer see that there is none; safe at any time, in any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """End it, whatever it does."""
        self._lines.close()
        self._socket.close()
        with suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


@attrs.define(eq=False)
class Asked(Generic[T]):
    """A call of a function as a user, to be made once in a thread; another thread may end it.

    Attributes:
        user: that user.
        work: the function.
        arguments: its arguments.
        options: those that have names.
    """

    user: AsUser
    work: Callable[..., T]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    _over: threading.Event = attrs.field(factory=threading.Event)
    _begun: bool = False
    _ended: bool = False
    _servant: _Servant | None = None

    def __call__(self) -> T:
        """See `AsUser.call`."""
        self._begun = True
        try:
            return self.user.answered(self)
        finally:
            self._over.set()

    def ask(self, one: _Servant, request: dict[str, Any]) -> dict[str, Any]:
        """See `_Servant.ask`."""
        self._servant = one
        try:
            if self._ended:
                raise ConnectionError("nobody waits for it")
            return one.ask(request)
        finally:
            self._servant = None

    def end(self) -> None:
        """Have the call fail, its process gone; one that has not begun does nothing. Blocks until that is so."""
        self._ended = True
        if (one := self._servant) is not None:
            one.hang_up()
        if self._begun:
            self._over.wait()


@attrs.frozen(eq=False)
class AsUser:
    """Has functions called as a user.

    Each call has a process to itself, and the next call gets the same one: one that hangs in a dead mount of the
    user's holds up nobody else.
    """

    user: User
    _idle: list[_Servant] = attrs.field(factory=list)

    def call(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return what a function of a module of `snaporch.drivers.local` returns, called as the user; blocks.

        Raises:
            OSError, SnaporchError: what the function raises.
            OperationFailed: the process has not answered.
        """
        return self.asked(work, *arguments, **options)()

    def asked(self, work: Callable[..., T], *arguments: Any, **options: Any) -> Asked[T]:
        """Return what makes such a call."""
        return Asked(self, work, arguments, options)

    def _free(self) -> _Servant:
        """Return a process that does nothing: one that was used before and is still there, or a new one."""
        while self._idle:
            with suppress(IndexError):  # another thread has it
                if (one := self._idle.pop()).is_there():
                    return one
                one.end()
        return _Servant(self.user)

    def answered(self, call: Asked[T]) -> T:
        """Return what a call comes to; see `call`."""
        work = call.work
        request = {
            "do": f"{work.__module__}:{work.__name__}",
            "arguments": call.arguments,
            "options": call.options,
        }
        one = self._free()
        try:
            answer = call.ask(one, request)
        except (OSError, ValueError, RecursionError) as error:
            one.end()
            raise OperationFailed(
                f"the process that works on files as {self.user.name} has ended without an answer: {error}"
            ) from None
        except BaseException:
            one.end()
            raise
        self._idle.append(one)
        if "error" in answer:
            raise _error(answer)
        if (kind := _kind(work)) is type(None):
            return None  # type: ignore[return-value]  # as it says
        try:
            found: T = servant.codec().structure(answer.get("value"), kind)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is not what was asked for
            raise OperationFailed(
                f"the process that works as {self.user.name} answers nonsense: {error!r:.200}"
            ) from None
        return found


@cache
def _kind(work: Callable[..., Any]) -> Any:
    return get_type_hints(work).get("return")


def _error(answer: dict[str, Any]) -> Exception:
    """Return the error that an answer is of; one that is not known failed, and that is all."""
    name, words, path = (str(answer.get(key, "")) for key in ("error", "words", "path"))
    if name == "OSError":
        number = answer.get("errno")
        return OSError(number if type(number) is int else errno.EIO, words, path or None)
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if name in _WITH_PATH and kind is not None:
        return kind(words, path)  # type: ignore[no-any-return]
    if isinstance(kind, type) and issubclass(kind, SnaporchError) and kind.__init__ is SnaporchError.__init__:
        return kind(words)
    return OperationFailed(words or name)


@cache
def as_user(user: User) -> AsUser:
    """Return what has functions called as a user."""
    return AsUser(user)
