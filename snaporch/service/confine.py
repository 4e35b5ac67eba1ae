"""Paths that come from outside stay in the configured directories; nothing is looked at outside of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from snaporch.errors import Forbidden, InvalidInput
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DomainSnapshot


def confined(path: str, directories: Sequence[str], what: str) -> None:
    """Refuse a path that does not lead into one of `directories`, whatever links are on the way.

    Raises:
        InvalidInput: it is not absolute, or no path at all.
        Forbidden: it leads elsewhere.
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidInput(f"{what}: {path!r} is not an absolute path")
    real = os.path.realpath(path)
    for directory in directories:
        base = os.path.realpath(directory)
        if os.path.commonpath([real, base]) == base and real != base:
            return
    raise Forbidden(
        f"{what}: {path} is outside the directories that the service may use ({', '.join(directories)}); "
        "`directories` in its configuration says which"
    )


def check_definition(definition: DomainDefinition, directories: Sequence[str], *, local: bool) -> None:
    """Refuse a definition that leads out of the directories, or has something run that only a local user may.

    Raises:
        InvalidInput: as `confined`.
        Forbidden: as `confined`; or it names a program or arguments and does not come over the unix socket.
    """
    if not local and (definition.emulator or definition.extra_args):
        raise Forbidden("emulator and extra_args can have anything run: they are taken over the unix socket only")
    paths = {f"disk {disk.target}": disk.path for disk in definition.disks}
    paths |= {"kernel": definition.kernel, "initrd": definition.initrd, "serial": definition.serial}
    _all(((path, what) for what, path in paths.items()), directories)


def check_snapshot(snapshot: DomainSnapshot, directories: Sequence[str]) -> None:
    """Refuse a request for a snapshot whose files are to be outside the directories; see `confined`."""
    paths = [(snapshot.memory_file, "memory_file")]
    paths += [(disk.external_sn.path, f"disk {disk.disk.target}") for disk in snapshot.disks if disk.external_sn]
    _all(paths, directories)


def _all(paths: Iterable[tuple[str, str]], directories: Sequence[str]) -> None:
    for path, what in paths:
        if path:
            confined(path, directories, what)
