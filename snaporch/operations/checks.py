"""Checks that several operations make before they touch anything."""

from __future__ import annotations

import os
from collections.abc import Iterable

import attrs

from snaporch.drivers.base import Driver, GuestVerb, Machine, Storage
from snaporch.engine.gone import is_gone
from snaporch.errors import ConnectionGone, HypervisorError, NotEnoughSpace, OutcomeUnknown, Unsupported
from snaporch.model.domain import DomainState, Handle
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DiskSnapshot

# What an overlay may need while memory streams; it grows with what the guest writes, for as long as it is used.
OVERLAY_BYTES = 16 * 2**20
# One that nobody writes to yet: what its guest writes later is not the operation's.
EMPTY_OVERLAY_BYTES = 2**20
# Stream headers and device state beside RAM itself.
STREAM_BYTES = 16 * 2**20


async def check_verb(name: str, machine: Machine | None, verb: GuestVerb) -> None:
    """Ask whether a verb can be done while the guest is as it is now.

    Raises:
        Unsupported: it cannot; the error has what the guest does, and what to do.
    """
    if machine is not None and (why := await machine.refusal(verb)):
        raise Unsupported(f"{name}: {why}")


async def unlike(  # noqa: PLR0917 - what there was, and what there is
    name: str, driver: Driver, handle: Handle | None, machine: Machine | None, was: DomainState, before: str
) -> str:
    """Look whether a guest does what it did before something that was undone; return how it differs, or nothing.

    Args:
        name: the domain's.
        driver: the domain's.
        handle: of its machine.
        machine: the connection; None where there was none.
        was: what it did before.
        before: the same in the hypervisor's word; empty where that is not known.
    """
    if machine is None:
        return ""
    try:
        now, state = await machine.condition(), await machine.state()
        why = await machine.refusal(GuestVerb.CREATE)
    except (ConnectionGone, OutcomeUnknown):
        if handle is not None and not await is_gone(driver, handle):
            return f"{name} does not answer: what its guest does is not known"
        return f"{name} is inactive now: its hypervisor has ended (`snaporch domain start {name}` boots it)"
    except HypervisorError as error:
        return f"what the guest of {name} does now is not known: {error}"
    same = now == before if before else state is was
    return "" if same else f"{name} was {before or was} before, and now is {now}" + (f": {why}" if why else "")


@attrs.define
class Space:
    """What may be needed of one file system.

    Attributes:
        directory: one there.
        free: bytes.
        needed: bytes.
    """

    directory: str
    free: int
    needed: int = 0


async def spaces(needs: Iterable[tuple[Storage, str, int]]) -> dict[str, Space]:
    """Return what may be needed, by file system: all that goes to one together.

    Args:
        needs: a storage, a directory of it, and the bytes that may be needed there.
    """
    found: dict[str, Space] = {}
    for storage, directory, size in needs:
        place, free = await storage.free(directory)
        found.setdefault(place, Space(directory, free)).needed += size
    return found


async def check_space(needs: Iterable[tuple[Storage, str, int]]) -> None:
    """Compare what may be needed, see `spaces`, with what is free.

    Raises:
        NotEnoughSpace: less is free.
    """
    for space in (await spaces(needs)).values():
        if space.needed > space.free:
            raise NotEnoughSpace(space.needed, space.free, space.directory)


async def chain_problem(
    storage: Storage, record: SnapshotRecord, disk: DiskSnapshot, *, still: bool = False
) -> str:
    """Return what is wrong with the chain of one of a snapshot's disks, or an empty string.

    Raises:
        Refused: an image cannot be read or, with `still`, somebody writes to it.
    """
    found = await storage.chain(disk.disk.path, disk.disk.format, still=still)
    known = [file.path for file in record.images[disk.disk.target]]
    if not disk.external:
        known.insert(0, record.inside[disk.disk.target].path)
    if [os.path.realpath(link.path) for link in found] == [os.path.realpath(path) for path in known]:
        return ""
    return f"the backing chain of {disk.disk.path} is not what was saved"


async def check_ram(driver: Driver, needed: int) -> None:
    """Compare the RAM that another guest needs, in bytes, with what is free on the host, where that is known.

    Raises:
        NotEnoughSpace: less is free.
    """
    free = await driver.free_ram()
    if free is not None and free < needed:
        raise NotEnoughSpace(needed, free, "host memory")
