"""Which places in the root a request may name: a path of a domain lies below its own directory there."""

from __future__ import annotations

from snaporch.engine.context import Context
from snaporch.model.domain import DomainDefinition, DomainRecord
from snaporch.model.reserved import check_command_line, check_domain_name


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
    check_command_line(definition)
    storage = context.driver(DomainRecord(definition)).storage
    for what, path in paths_of(definition).items():
        await storage.check_place(str(context.root), definition.name, path, what)
