"""The root's own names: what a domain may not be called, and what no path of a request may be; no I/O."""

from __future__ import annotations

import re
from pathlib import PurePath

from snaporch.errors import InvalidInput
from snaporch.model.domain import DomainDefinition
from snaporch.model.names import check_name

# Compared without regard to case: a file system may make no difference either.
DIRECTORIES = frozenset({"plans", "locks", "reports", "run", "archives"})
_FILES = re.compile(r"(catalog\.sqlite3|tokens\.|reserve\.|hooks\.toml|service\.(toml|sock|lock)).*", re.IGNORECASE)
# Below a domain's directory: the directories of its processes, with their sockets, and their log.
_OF_A_DOMAIN = re.compile(r"run-.*|tpm-.*|qemu\.log|.*\.sock|.*\.pid", re.IGNORECASE)

_PROPERTIES = (
    "acpi|dump-guest-core|graphics|hmat|hpet|i8042|kernel-irqchip|mem-merge|memory-backend|nvdimm|pcspk|pflash0|pflash1|pic|pit|sata|smbus|smm|"
    "suppress-vmdesc|usb|vmport"
)
MACHINE = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,63}}(,({_PROPERTIES})=[A-Za-z0-9_-]{{1,32}})*")
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{0,2047}")
_MODULE = re.compile(r"[^\s,\x00-\x1f\x7f]*")
MOST_MEMORY, MOST_VCPUS = 2**50, 4096  # a pebibyte; more than any hypervisor takes


def check_domain_name(name: str) -> str:
    """Return `name` when a domain may be called so: its directory in the root would be nothing else.

    Raises:
        InvalidInput: it is no name, or the root has something of that name.
    """
    check_name(name, "domain")
    if is_reserved(name):
        raise InvalidInput(f"a domain cannot be called {name!r}: snaporch uses this name itself")
    return name


def is_reserved(name: str) -> bool:
    """Return whether an entry of the root is, or may become, one of snaporch's own."""
    return name.casefold() in DIRECTORIES or _FILES.fullmatch(name) is not None or name.startswith(".")


def check_in_root(inside: PurePath, domain: str, what: str) -> None:
    """Refuse a path in the root that is not of one domain, or that is one of snaporch's own names there.

    Args:
        inside: the path, relative to the root, with neither links nor dots in it.
        domain: whose request it is in.
        what: what the path is for.

    Raises:
        InvalidInput: so it is.
    """
    first, *rest = inside.parts or ("",)
    if first != domain or is_reserved(first) or not rest or _OF_A_DOMAIN.fullmatch(rest[0]):
        raise InvalidInput(
            f"{what}: {inside} in the root is not for this: there, a path of {domain} begins with {domain}/, and "
            "names of control files, sockets and logs are snaporch's own"
        )


def check_command_line(definition: DomainDefinition) -> None:
    """Refuse values that would mean more on a hypervisor's command line than they say, or that nothing can have.

    Raises:
        InvalidInput: the first of them.
    """
    name = definition.name
    if definition.machine and not MACHINE.fullmatch(definition.machine):
        raise InvalidInput(
            f"{name}: machine {definition.machine!r} is not a machine type with switches such as smm=off after it; "
            "kernel and initrd have keys of their own"
        )
    if not _PRINTABLE.fullmatch(definition.append):
        raise InvalidInput(f"{name}: append is to be one line of up to 2,047 printable characters")
    for what in ("kernel", "initrd"):
        if not _MODULE.fullmatch(getattr(definition, what)):
            raise InvalidInput(f"{name}: {what}: a path with a comma or a space in it means several files")
    if definition.memory > MOST_MEMORY or definition.vcpus > MOST_VCPUS:
        raise InvalidInput(f"{name}: at most 1 PiB of memory and {MOST_VCPUS} vcpus")
