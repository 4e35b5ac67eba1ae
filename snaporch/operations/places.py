"""Which paths in the root a request may name: those below the domain's own directory."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import PurePath

from snaporch.drivers.base import Driver, Storage
from snaporch.engine.context import Context
from snaporch.errors import InvalidInput
from snaporch.model.domain import DomainDefinition, DomainRecord
from snaporch.model.names import check_text
from snaporch.model.reserved import check_command_line, check_domain_name

MOST_BYTES = 1023  # of the name of a backing file in a qcow2 header


def paths_of(definition: DomainDefinition) -> dict[str, str]:
    """Return the paths in a definition, by what they are for; those that are empty are left out."""
    paths = {f"disk {disk.target}": disk.path for disk in definition.disks}
    paths |= {"kernel": definition.kernel, "initrd": definition.initrd, "serial": definition.serial}
    return {what: path for what, path in paths.items() if path}


async def check_definition(context: Context, definition: DomainDefinition) -> None:
    """Refuse a definition with a name or a path that is the root's own, or with words that mean more than they say.

    Raises:
        InvalidInput: so it is, or there is no such driver.
        Refused: a path could not be looked at in time.
    """
    check_domain_name(definition.name)
    for what, path in paths_of(definition).items():
        check_text(path, f"{definition.name}: {what}")
        if what.startswith("disk") and len(path.encode()) > MOST_BYTES:
            size = f"a path of {len(path.encode()):,} bytes"
            raise InvalidInput(
                f"{definition.name}: {what}: {size}: an overlay names its base in up to {MOST_BYTES:,}"
            )
    for word in (definition.append, definition.emulator, *definition.extra_args):
        check_text(word, f"{definition.name}: arguments")
    check_command_line(definition)
    storage = context.driver(DomainRecord(definition)).storage
    for what, path in paths_of(definition).items():
        await storage.check_place(str(context.root), definition.name, path, what)
    await _check_there(context, definition)


async def _check_there(context: Context, definition: DomainDefinition) -> None:
    """Refuse a definition, with all of its files that are not there, cannot be read, or are something else."""
    storage = context.driver(DomainRecord(definition)).storage
    checks: list[Callable[[], Awaitable[None]]] = []
    for disk in definition.disks:
        if not disk.path:
            raise InvalidInput(f"{definition.name}: disk {disk.target} has no path: the image that it is on")
        checks.append(partial(storage.check_given, disk.path, f"disk {disk.target}", disk.format))
    given = {"kernel": definition.kernel, "initrd": definition.initrd}
    checks += [partial(storage.check_given, path, what) for what, path in given.items() if path]
    if definition.serial:
        checks.append(partial(check_directory, context, storage, definition.name, definition.serial, "serial"))
    wrong = []
    for check in checks:
        try:
            await check()
        except InvalidInput as error:
            wrong.append(str(error))
    if wrong:
        raise InvalidInput("; ".join(wrong))


async def check_directory(context: Context, storage: Storage, domain: str, path: str, what: str) -> None:
    """Refuse a file in a directory that is not there: but for a domain's own, snaporch makes none up.

    Raises:
        InvalidInput: so it is.
    """
    directory, own = os.path.dirname(path), context.directory(domain)
    if directory != own and not directory.startswith(f"{own}/") and not await storage.exists(directory):
        raise InvalidInput(
            f"{what}: there is no directory {directory}: make it first (`mkdir -p`), or mount what belongs there"
        )


async def leave_nothing(context: Context, domain: str, driver: Driver, files: Iterable[str] = ()) -> None:
    """Remove the directory of a domain that is no more, logs and these files in it, unless there is more in it."""
    directory = context.directory(domain)
    for path in files:
        if PurePath(path).is_relative_to(directory):
            await driver.storage.remove(path)
    with suppress(OSError):
        if set(os.listdir(directory)) <= set(driver.info.logs):
            for log in driver.info.logs:
                await driver.storage.remove(os.path.join(directory, log))
            os.rmdir(directory)
