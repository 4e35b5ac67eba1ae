"""Which paths in the root a request may name: those below the domain's own directory."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import PurePath

import attrs

from snaporch.drivers.base import Driver, Storage
from snaporch.engine.context import Context
from snaporch.errors import InvalidInput
from snaporch.model.domain import NVRAM, DomainDefinition, DomainRecord, VariableStore
from snaporch.model.names import check_text
from snaporch.model.reserved import check_command_line, check_domain_name
from snaporch.model.rfc import DeviceDisk

NVRAM_FILE = "nvram.fd"

MOST_BYTES = 1023  # of the name of a backing file in a qcow2 header


def paths_of(definition: DomainDefinition) -> dict[str, str]:
    """Return the paths in a definition, by what they are for; those that are empty are left out."""
    paths = {f"disk {disk.target}": disk.path for disk in definition.disks}
    paths |= {"nvram": definition.nvram.path} if definition.nvram else {}
    paths |= {"kernel": definition.kernel, "initrd": definition.initrd, "serial": definition.serial}
    return {what: path for what, path in paths.items() if path}


def check_nvram(definition: DomainDefinition) -> None:
    """Refuse a variable store that is given twice.

    Raises:
        InvalidInput: so it is.
    """
    if definition.nvram and any(disk.target == NVRAM for disk in definition.disks):
        raise InvalidInput(f"{definition.name}: `nvram` is the disk {NVRAM} already; leave out one of them")


async def completed(context: Context, definition: DomainDefinition) -> tuple[DomainDefinition, str]:
    """Return a definition with the variable store of its firmware among the disks, and its path if it was made.

    A store that is not there is made; one that the definition does not name is in the domain's directory.

    Raises:
        InvalidInput: it is given twice, its path is the root's own, or its directory is not there.
        Unsupported: there is no such firmware here, or none that fits the store.
    """
    check_domain_name(definition.name)
    check_nvram(definition)
    driver = context.driver(DomainRecord(definition))
    if definition.tpm is not None:
        driver.need_tpm(definition.name)
    if definition.firmware == "bios":
        return definition, ""
    if (disk := next((disk for disk in definition.disks if disk.target == NVRAM), None)) is None:
        given = definition.nvram or VariableStore(f"{context.directory(definition.name)}/{NVRAM_FILE}")
        disk = DeviceDisk(NVRAM, given.path, given.format)
    await driver.storage.check_place(str(context.root), definition.name, disk.path, NVRAM)
    await check_directory(context, driver.storage, definition.name, disk.path, NVRAM)
    made = await driver.make_nvram(definition, disk)
    others = tuple(other for other in definition.disks if other.target != NVRAM)
    return attrs.evolve(definition, nvram=None, disks=(*others, disk)), made


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
    wrong = [
        f"{definition.name}: extra_args: the guest would write to {path} ({word}), which would be in no snapshot: "
        "name it under [[disks]], or let it only be read (readonly=on)"
        for path, word in context.driver(DomainRecord(definition)).drives_beside(definition).items()
    ]
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
    """Remove the directory of a domain that is no more, these files and what snaporch made, if that is all."""
    directory, own = context.directory(domain), {*driver.info.logs, NVRAM_FILE}
    for path in files:
        if PurePath(path).is_relative_to(directory):
            await driver.storage.remove(path)
    with suppress(OSError):
        if set(os.listdir(directory)) <= own:
            for name in own:
                await driver.storage.remove(os.path.join(directory, name))
            os.rmdir(directory)
