"""Groups: snapshots of several domains at one point. An operation on one of them is an operation on all.

A part of a group is worth less than the whole. A domain that goes back alone is at another instant than the others,
which may have received packets that it has not sent yet; a member that is deleted alone leaves a group that cannot
be reverted to. So both are refused without ALONE.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from snaporch.catalog import Catalog
from snaporch.errors import NotFound, OtherSnapshot, Unsupported
from snaporch.model.record import SnapshotRecord


async def siblings(catalog: Catalog, record: SnapshotRecord) -> tuple[SnapshotRecord, ...]:
    """Return the others of a snapshot's group that are still there, by domain; none where it is of none."""
    found = []
    for name in record.group.members if record.group is not None else ():
        with suppress(NotFound):
            if name != record.domain and (other := await catalog.snapshot(name, record.name)).group == record.group:
                found.append(other)
    return tuple(found)


async def those_left(catalog: Catalog, domains: Sequence[str], name: str) -> tuple[SnapshotRecord, ...]:
    """Return the snapshots of a group that are still there.

    Raises:
        NotFound: there is none, or no such domain.
        Unsupported: they are of no one group.
    """
    found, missed = [], None
    for domain in domains:
        await catalog.domain(domain)
        try:
            found.append(await catalog.snapshot(domain, name))
        except NotFound as error:
            missed = error
    if missed is not None and not found:
        raise missed
    check_one_point(found, "delete")
    return tuple(found)


def check_ids(records: Iterable[SnapshotRecord], ids: Collection[str]) -> None:
    """Refuse snapshots that are not those that were meant: their names are used again.

    Args:
        records: what is there under the names.
        ids: of all that were meant; none: whatever has the names.

    Raises:
        OtherSnapshot: one has another id.
    """
    for record in records:
        if ids and record.id not in ids:
            raise OtherSnapshot(
                f"{record.name} of {record.domain} is another snapshot now (id {record.id}): the one that was "
                f"meant is gone, and its name is used again; `snaporch list {record.domain}` shows what there is"
            )


def check_one_point(records: Sequence[SnapshotRecord], what: str) -> None:
    """Refuse to do something as one operation with snapshots that are of no one group.

    Raises:
        Unsupported: they are not.
    """
    if len(records) > 1 and (records[0].group is None or len({record.group for record in records}) > 1):
        domains = ", ".join(record.domain for record in records)
        raise Unsupported(f"{records[0].name} of {domains} was not taken at one point: {what} each by itself")


async def check_alone(catalog: Catalog, chosen: Iterable[SnapshotRecord], what: str) -> None:
    """Refuse to do something with a part of a group.

    Args:
        catalog: where the others are.
        chosen: the snapshots that it is done with.
        what: that, for the error.

    Raises:
        Unsupported: another of a snapshot's group is there and is not among them.
    """
    chosen = tuple(chosen)
    names = {(record.domain, record.name) for record in chosen}
    for record in chosen:
        others = [each.domain for each in await siblings(catalog, record) if (each.domain, each.name) not in names]
        if others:
            raise Unsupported(
                f"{record.name} of {record.domain} is one point with that of {', '.join(others)}: {what} the "
                "group, or with --alone this part of it only"
            )
