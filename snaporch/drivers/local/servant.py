"""A process that works on files as another user: ``servant.py UID GID GROUP,… <> socket``; see `as_user`.

It is started by root, reads all its program text, gives up root's rights for good, and only then reads its first
request: a line of JSON with the name of a function of `snaporch.drivers.local`, and its arguments. It answers with
a line: the value, or the error. It ends with its connection.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import socket
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # the package that this file is of
    sys.path.insert(0, str(Path(__file__).parents[3]))

if TYPE_CHECKING:
    from cattrs import Converter

_PACKAGE = "snaporch.drivers.local."
_MODULES = ("filework", "trace", "durable", "writeback", "process", "lineage", "qcow2")
_SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 4, 38


@cache
def codec() -> Converter:
    """Return what turns values into JSON, and back."""
    from snaporch.model.convert import converter  # noqa: PLC0415 - not before the path is known

    made = converter.copy()
    made.register_unstructure_hook(os.stat_result, tuple)
    made.register_structure_hook(os.stat_result, lambda value, _: os.stat_result(value))
    return made


def become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Give up all rights but those of a user, for good; nobody of that user can look into this process.

    Raises:
        OSError: it cannot be had.
    """
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid):
        raise PermissionError("the user cannot be changed")
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_SET_NO_NEW_PRIVILEGES, 1), (_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "its rights cannot be given up")


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    module, _, name = request["do"].rpartition(":")
    try:
        work = getattr(sys.modules[module], name)
        return {"value": codec().unstructure(work(*request["arguments"], **request["options"]))}
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else ""
        return {"error": "OSError", "errno": error.errno, "words": error.strerror or str(error), "path": path}
    except Exception as error:  # noqa: BLE001 - whoever asked is told
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "snaporch.errors"]
        return {"error": kinds[0] if kinds else "", "words": str(error), "path": getattr(error, "path", "")}


def is_over(connection: socket.socket) -> bool:
    """Return whether whoever has asked is gone, or no longer wants it: recovery may have undone it by now."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def main() -> None:
    """See the module."""
    uid, gid, groups = sys.argv[1:]
    for name in _MODULES:
        import_module(_PACKAGE + name)
    codec()
    for number in map(int, os.listdir("/proc/self/fd")):  # what root's own shell may have left open
        if number > 2:  # noqa: PLR2004 - its socket, nowhere, and our words
            with suppress(OSError):  # that of the list itself
                os.close(number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    become(int(uid), int(gid), tuple(int(each) for each in groups.split(",") if each))
    os.umask(0o077)
    os.chdir("/")
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as lines, suppress(BrokenPipeError):
        for line in lines:
            if is_over(connection):
                return
            connection.sendall(json.dumps(_answer(json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    main()
