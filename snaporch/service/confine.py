"""Paths that come from outside stay in the configured directories; nothing is looked at outside of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from snaporch.drivers.local.confine import Confinement
from snaporch.drivers.local.look import looked_at
from snaporch.errors import Forbidden, InvalidInput
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DomainSnapshot
from snaporch.operations.places import paths_of


async def check_definition(definition: DomainDefinition, confinement: Confinement, *, local: bool) -> None:
    """Refuse a definition that leads out of the directories, or has something run that only a local user may.

    Raises:
        InvalidInput: as `Confinement.check`.
        Forbidden: as `Confinement.check`, for each image of a chain too; or it names a program or arguments and
            does not come over the unix socket.
    """
    if not local and (definition.emulator or definition.extra_args):
        raise Forbidden("emulator and extra_args can run any program: they are accepted over the unix socket only")
    images = {f"disk {disk.target}": disk.format for disk in definition.disks}
    images |= {"nvram": definition.nvram.format} if definition.nvram else {}
    for what, path in paths_of(definition).items():
        if format_ := images.get(what):
            await _looked(path, partial(confinement.check_image, path, format_, definition.name, what))
        else:
            await check_path(confinement, path, definition.name, what)


async def check_path(confinement: Confinement, path: str, domain: str, what: str) -> None:
    """Refuse a path that leads out of the directories; see `Confinement.check`."""
    await _looked(path, partial(confinement.check, path, domain, what))


async def check_snapshot(snapshot: DomainSnapshot, confinement: Confinement, domain: str) -> None:
    """Refuse a request for a snapshot whose files are to be outside the directories; see `Confinement.check`."""
    paths = [(snapshot.memory_file, "memory_file")]
    paths += [(disk.external_sn.path, f"disk {disk.disk.target}") for disk in snapshot.disks if disk.external_sn]
    for path, what in paths:
        if path:
            await check_path(confinement, path, domain, what)


async def _looked(path: str, look: Callable[[], None]) -> None:
    if "\0" in path:
        raise InvalidInput(f"{path!r} is no path")
    await looked_at(path, look)
