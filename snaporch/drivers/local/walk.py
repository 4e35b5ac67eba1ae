"""Opens a path one directory after the other, so that no other user can lead it elsewhere meanwhile.

A path that was checked and is opened later by its name may be another file's by then: a user who may change one of
the directories on the way, or a link, decides. So each directory is opened from the one before (``openat`` with
``O_NOFOLLOW``), links are followed here, and a directory that others may write to ends the walk. What is left to
change the way is root and the users that are trusted.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Collection
from typing import Self

from snaporch.errors import Forbidden

_MOST_LINKS = 40  # as the kernel has it
_OPEN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def resolve(path: str, trusted: Collection[int]) -> str:
    """Return where a path leads; what is not there yet is taken as it is named.

    Args:
        path: absolute.
        trusted: ids of the users, beside root, who may write to what is on the way.

    Raises:
        Forbidden: somebody else could lead it elsewhere.
        OSError: a directory on the way cannot be looked at.
    """
    with _Walk({0, *trusted}) as walk:
        return walk.to(path)


class _Walk:
    """Where a walk has come to: a descriptor of each directory from the first on."""

    def __init__(self, trusted: Collection[int]) -> None:
        self._trusted = trusted
        self._places = [os.open("/", _OPEN | os.O_DIRECTORY)]
        self._real = "/"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._back_to(0)

    def _back_to(self, depth: int) -> None:
        while len(self._places) > depth:
            os.close(self._places.pop())

    def to(self, path: str) -> str:
        """Walk a path to its end, or to where there is nothing any more, and return where that is."""
        todo, links = _parts(path), 0
        while todo:
            name = todo.pop()
            if name == "..":
                self._back_to(max(1, len(self._places) - 1))
                self._real = os.path.dirname(self._real)
                continue
            entry = self._look(name)
            if entry is None:
                if ".." in todo:
                    raise Forbidden(f"{path}: {name} does not exist, so it is not known where `..` leads from it")
                return os.path.join(self._real, name, *reversed(todo))
            if stat.S_ISLNK(entry.st_mode):
                if (links := links + 1) > _MOST_LINKS:
                    raise Forbidden(f"{path}: too many symbolic links")
                todo += self._follow(name)
                continue
            if todo:
                self._places.append(os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=self._places[-1]))
            self._real = os.path.join(self._real, name)
        return self._real

    def _look(self, name: str) -> os.stat_result | None:
        """Return what an entry of the present directory is, None where there is none.

        Raises:
            Forbidden: somebody else could change it.
        """
        place = os.fstat(self._places[-1])
        _check_directory(place, self._real, self._trusted)
        try:
            entry = os.lstat(name, dir_fd=self._places[-1])
        except FileNotFoundError:
            return None
        if place.st_mode & (stat.S_IWOTH | stat.S_IWGRP) and entry.st_uid not in self._trusted:
            # In a directory such as /tmp everybody may put things, and only their owner may move them.
            raise _foreign(os.path.join(self._real, name), entry.st_uid)
        return entry

    def _follow(self, name: str) -> list[str]:
        target = os.readlink(name, dir_fd=self._places[-1])
        if target.startswith("/"):
            self._back_to(1)
            self._real = "/"
        return _parts(target)


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in {"", "."}]


def _check_directory(status: os.stat_result, path: str, trusted: Collection[int]) -> None:
    if status.st_uid not in trusted:
        raise _foreign(path, status.st_uid)
    shared = status.st_mode & (stat.S_IWOTH | (0 if _private(status.st_gid, trusted) else stat.S_IWGRP))
    if shared and not status.st_mode & stat.S_ISVTX:
        raise Forbidden(
            f"{path} may be written to by others, who could lead a path elsewhere: `chmod go-w {path}`, or use "
            "another directory"
        )


def check_content(status: os.stat_result, path: str, trusted: Collection[int]) -> None:
    """Refuse a file whose words about other files somebody else could change at any time.

    Raises:
        Forbidden: so it is.
    """
    if status.st_uid not in {0, *trusted}:
        raise _foreign(path, status.st_uid)
    if status.st_mode & stat.S_IWOTH:
        raise Forbidden(f"{path} can be written to by every user, who could make any file its backing file")


def _foreign(path: str, uid: int) -> Forbidden:
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return Forbidden(
        f"{path} is {name}'s, who could lead it elsewhere at any time: let root or the service's user own it, or "
        f"name {name} among the `owners` in the service's configuration"
    )


def _private(gid: int, trusted: Collection[int]) -> bool:
    """Return whether a group is root's, or a trusted user's own with nobody else in it."""
    if gid == 0:
        return True
    try:
        group = grp.getgrgid(gid)
        owners = {pwd.getpwuid(uid).pw_name for uid in trusted}
    except KeyError:
        return False
    return group.gr_name in owners and set(group.gr_mem) <= owners
