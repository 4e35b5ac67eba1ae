"""The durable record of batches, in the catalog.

Rule: what is to be taken is written down before anything is begun, the snapshot's name included, and how each item
ended is written when it has. So an interrupted batch can go on: for an item without an end, the snapshot of that
name either exists or not.
"""

from __future__ import annotations

import enum
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from statistics import median
from typing import Any, TypeVar

import attrs

from snaporch.batch.plan import Plan
from snaporch.batch.select import Item, places, selects
from snaporch.catalog import Catalog
from snaporch.catalog.reading import past_checkpoints, readable
from snaporch.errors import InvalidInput, NotFound
from snaporch.model.convert import converter, dumps, loads
from snaporch.model.domain import DomainRecord
from snaporch.model.formats import versioned
from snaporch.model.names import check_name, new_id, short
from snaporch.operations.estimate import ASSUMED_RATE, LOOK_BACK

T = TypeVar("T")

PAGE = 500


class Stage(enum.StrEnum):
    """What a batch is doing."""

    TAKING = "taking"
    UNDOING = "undoing"
    """One has failed, and the plan says that all are to be undone: what was taken is deleted."""
    PRUNING = "pruning"
    """Retention."""
    COMPLETE = "complete"
    """Every snapshot was taken."""
    FAILED = "failed"
    """Some were not."""
    UNDONE = "undone"
    ABANDONED = "abandoned"
    """It was cut short, and another was begun in its place."""


ENDED = frozenset({Stage.COMPLETE, Stage.FAILED, Stage.UNDONE, Stage.ABANDONED})


class End(enum.StrEnum):
    """What has become of an item."""

    WAITING = "waiting"
    """Not begun, or cut short with the batch."""
    DONE = "done"
    FAILED = "failed"
    """Rolled back or refused, or damaged when it was verified: `ItemRecord.taken` says whether it is there."""
    STRANDED = "stranded"
    SKIPPED = "skipped"
    UNDONE = "undone"


@versioned("batch-item")
@attrs.frozen
class ItemRecord:
    """An item of a batch, and how it went.

    Attributes:
        batch: the batch's id.
        position: its place in the order in which items are begun.
        item: what is taken.
        snapshot: the snapshot's name.
        end: what has become of it.
        taken: the snapshot is there.
        attempts: how often it was tried.
        begun: when, in seconds since the epoch; 0 when it never was.
        ended: likewise.
        pause: seconds that the guest was paused, the longest of a group's; None where none was paused by snaporch.
        bytes: of memory that was saved.
        verified: what verifying said; None when it was not asked.
        expected: seconds that it was expected to take, by which items are ordered.
        error: why it failed or was skipped.
        deleted: older snapshots of it that retention has deleted.
        problems: what went wrong beside the snapshot: hooks after it failed, undoing it, retention.
        ids: of the snapshots that were taken: what is done with them later is done with no others of the name.
    """

    batch: str
    position: int
    item: Item
    snapshot: str
    end: End = End.WAITING
    taken: bool = False
    attempts: int = 0
    begun: float = 0.0
    ended: float = 0.0
    pause: float | None = None
    bytes: int = 0
    verified: bool | None = None
    expected: float = 0.0
    error: str = ""
    deleted: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


@versioned("batch")
@attrs.frozen
class BatchRecord:
    """A batch.

    Attributes:
        id: 32 hexadecimal digits; eight in what snaporch 0.1 has written.
        name: the plan's.
        snapshot: the name of all its snapshots.
        stage: where it is.
        begun: when, in seconds since the epoch.
        due: when its schedule had it due, or 0.
        ended: when, or None.
        runs: how often it was begun or gone on with.
        prepared: the hooks before it have run.
        counts: how many items have come to which end; filled in when it ends.
        deleted: how many snapshots retention has deleted; likewise.
        troubled: how many items have problems beside their snapshots; likewise.
        problems: what went wrong beside the items: hooks, reports.
        plan: the plan, as JSON.
    """

    id: str
    name: str
    snapshot: str
    stage: Stage = Stage.TAKING
    begun: float = 0.0
    due: float = 0.0
    ended: float | None = None
    runs: int = 0
    prepared: bool = False
    counts: dict[str, int] = attrs.field(factory=dict)
    deleted: int = 0
    troubled: int = 0
    problems: tuple[str, ...] = ()
    plan: dict[str, Any] = attrs.field(factory=dict)


# --- selecting ----------------------------------------------------------------------------------------------------


def _domains(connection: sqlite3.Connection) -> Iterator[DomainRecord]:
    """Yield all domains; one at a time is in memory."""
    for row in connection.execute("SELECT record FROM domain ORDER BY name"):
        yield from readable([row], DomainRecord)


Selected = tuple[Item, Sequence[DomainRecord]]


def _group(connection: sqlite3.Connection, root: str, name: str, members: tuple[str, ...]) -> Selected:
    if connection.execute("SELECT 1 FROM domain WHERE name = ?", (name,)).fetchone():
        raise InvalidInput(f"the plan's group {name!r} has the name of a domain; call it something else")
    found = [_domain(connection, member) for member in members]
    return Item(name, members, frozenset().union(*(places(root, record) for record in found))), found


def _domain(connection: sqlite3.Connection, name: str) -> DomainRecord:
    row = connection.execute("SELECT record FROM domain WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise NotFound(f"no domain {name!r}, which the plan names; `snaporch domain list` lists all domains")
    return loads(row[0], DomainRecord)


def _selected(connection: sqlite3.Connection, root: str, plan: Plan) -> Iterator[Selected]:
    """Yield what a plan is about, with the domains' records."""
    for name in plan.select.names:
        _domain(connection, name)
    for name, members in plan.select.groups.items():
        yield _group(connection, root, name, members)
    for record in _domains(connection):
        if selects(plan.select, record.name, record.tags):
            yield Item(record.name, (record.name,), places(root, record)), (record,)


Took = Callable[[sqlite3.Connection, DomainRecord], float]


def took(connection: sqlite3.Connection, domain: DomainRecord) -> float:
    """Return the seconds that a domain's last checkpoints took, or what its RAM would at an assumed rate."""
    if domain.handle is None:
        return 0.0
    last = [each.seconds for each in past_checkpoints(connection, domain.name, LOOK_BACK)]
    return median(last) if last else domain.definition.memory / ASSUMED_RATE


def _in_order(connection: sqlite3.Connection, root: str, plan: Plan, took: Took) -> list[tuple[float, Item]]:
    """Return what is selected with the seconds that each is expected to take, the longest first.

    So the end of a batch does not wait for one that was begun last. A group takes as long as its slowest member.
    """
    found = [
        (max(took(connection, record) for record in records), item)
        for item, records in _selected(connection, root, plan)
    ]
    return sorted(found, key=lambda each: (-each[0], each[1].name))


async def select(catalog: Catalog, root: str, plan: Plan) -> tuple[Item, ...]:
    """Return what a plan is about, in the order in which it is begun.

    Raises:
        NotFound: a domain that it names is not there.
        InvalidInput: a group has the name of a domain.
    """
    found = await catalog.transact(lambda connection: _in_order(connection, root, plan, took))
    return tuple(item for _, item in found)


# --- batches ------------------------------------------------------------------------------------------------------


def _name(plan: Plan, batch: str, now: float) -> str:
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    return check_name(plan.snapshot.name.format(plan=plan.name, time=at, batch=short(batch)))


def _put(connection: sqlite3.Connection, batch: BatchRecord) -> None:
    row = (batch.name, batch.ended, dumps(batch), batch.id)
    connection.execute("UPDATE batch SET name = ?, ended = ?, record = ? WHERE id = ?", row)


def _insert(connection: sqlite3.Connection, batch: BatchRecord) -> None:
    row = (batch.id, batch.name, batch.begun, batch.ended, dumps(batch))
    connection.execute("INSERT INTO batch VALUES (?, ?, ?, ?, ?)", row)


async def begin(
    catalog: Catalog, root: str, plan: Plan, *, now: float, due: float = 0.0, took: Took = took
) -> BatchRecord:
    """Write down a new batch with all its items; `took` says how long each domain is expected to take.

    Raises:
        NotFound: a domain that the plan names is not there, or it selects none.
    """
    id_ = new_id()
    batch = BatchRecord(id_, plan.name, _name(plan, id_, now), begun=now, due=due, plan=converter.unstructure(plan))

    def work(connection: sqlite3.Connection) -> None:
        _insert(connection, batch)
        for position, (expected, item) in enumerate(_in_order(connection, root, plan, took)):
            record = ItemRecord(batch.id, position, item, batch.snapshot, expected=expected)
            row = (batch.id, position, item.name, batch.snapshot, End.WAITING, dumps(record))
            connection.execute("INSERT INTO batch_item VALUES (?, ?, ?, ?, ?, ?)", row)
        if not connection.execute("SELECT 1 FROM batch_item WHERE batch = ?", (batch.id,)).fetchone():
            raise NotFound(f"plan {plan.name} selects no domain; `snaporch domain list` lists all domains")

    await catalog.transact(work)
    return batch


async def could_not_run(catalog: Catalog, plan: Plan, due: float, now: float, why: str) -> None:
    """Write down a batch that has failed before it was begun; nothing where the plan has one to go on with."""
    id_ = new_id()
    batch = BatchRecord(id_, plan.name, _name(plan, id_, now), Stage.FAILED, begun=now, due=due, ended=now)
    batch = attrs.evolve(batch, problems=(why,), plan=converter.unstructure(plan))

    def work(connection: sqlite3.Connection) -> None:
        query = "SELECT 1 FROM batch WHERE name = ? AND ended IS NULL"
        if not connection.execute(query, (plan.name,)).fetchone():
            _insert(connection, batch)

    await catalog.transact(work)


async def save(catalog: Catalog, batch: BatchRecord) -> None:
    """Write how a batch is now."""
    await catalog.transact(lambda connection: _put(connection, batch))


async def unfinished(catalog: Catalog, name: str) -> BatchRecord | None:
    """Return a plan's batch that was cut short, or None."""
    query = "SELECT record FROM batch WHERE name = ? AND ended IS NULL ORDER BY begun DESC"
    row = await catalog.read(lambda connection: connection.execute(query, (name,)).fetchone())
    return loads(row[0], BatchRecord) if row else None


async def latest(catalog: Catalog, name: str) -> BatchRecord | None:
    """Return a plan's last batch, or None."""
    query = "SELECT record FROM batch WHERE name = ? ORDER BY begun DESC LIMIT 1"
    row = await catalog.read(lambda connection: connection.execute(query, (name,)).fetchone())
    return loads(row[0], BatchRecord) if row else None


async def last_due(catalog: Catalog, name: str) -> BatchRecord | None:
    """Return the last batch of a plan that was due by its schedule, or None."""
    query = (
        "SELECT record FROM batch WHERE name = ? AND json_extract(record, '$.due') > 0 ORDER BY begun DESC LIMIT 1"
    )
    row = await catalog.read(lambda connection: connection.execute(query, (name,)).fetchone())
    return loads(row[0], BatchRecord) if row else None


async def last_success(catalog: Catalog, name: str, now: float) -> float:
    """Return when a plan's last batch ended that took every snapshot; 0: there is none.

    One that has ended after `now` has done so by a clock that was wrong.
    """
    query = "SELECT max(ended) FROM batch WHERE name = ? AND json_extract(record, '$.stage') = ? AND ended <= ?"
    values = (name, Stage.COMPLETE, now)
    row = await catalog.read(lambda connection: connection.execute(query, values).fetchone())
    return float(row[0] or 0.0)


async def failures(catalog: Catalog, batch: str, most: int = 10) -> tuple[str, ...]:
    """Return why items of a batch failed, each with its name; no more than so many."""
    query = (
        "SELECT name, json_extract(record, '$.error') FROM batch_item WHERE batch = ? AND state IN (?, ?, ?) "
        "ORDER BY position LIMIT ?"
    )
    values = (batch, End.FAILED, End.STRANDED, End.SKIPPED, most)
    rows = await catalog.read(lambda connection: connection.execute(query, values).fetchall())
    return tuple(f"{name}: {error}" for name, error in rows)


async def batches(catalog: Catalog) -> tuple[BatchRecord, ...]:
    """Return all batches, oldest first."""
    query = "SELECT record FROM batch ORDER BY begun"
    rows = await catalog.read(lambda connection: connection.execute(query).fetchall())
    return readable(rows, BatchRecord)


async def adopt(catalog: Catalog, old: str, new: str) -> int:
    """Give all batches of a plan to another one; return how many there were."""
    query = "UPDATE batch SET name = ?, record = json_set(record, '$.name', ?) WHERE name = ?"
    return await catalog.transact(lambda connection: connection.execute(query, (new, new, old)).rowcount)


async def snapshots_by_plan(catalog: Catalog) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the snapshots that are there and that batches have taken: by plan, by domain, oldest first."""
    query = (
        "SELECT DISTINCT batch.name, snapshot.domain, snapshot.name FROM batch "
        "JOIN batch_item ON batch_item.batch = batch.id, json_each(batch_item.record, '$.ids') "
        "JOIN snapshot ON snapshot.uid = value ORDER BY batch.name, snapshot.domain, snapshot.id"
    )
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for plan, domain, name in await catalog.read(lambda connection: connection.execute(query).fetchall()):
        of_plan = found.setdefault(plan, {})
        of_plan[domain] = (*of_plan.get(domain, ()), name)
    return found


# --- items --------------------------------------------------------------------------------------------------------


async def save_item(catalog: Catalog, item: ItemRecord) -> None:
    """Write how an item is now."""
    row = (item.end, dumps(item), item.batch, item.position)
    query = "UPDATE batch_item SET state = ?, record = ? WHERE batch = ? AND position = ?"
    await catalog.transact(lambda connection: connection.execute(query, row))


async def page(catalog: Catalog, batch: str, after: int = -1, end: End | None = None) -> tuple[ItemRecord, ...]:
    """Return the next few items after a position: all, or those that have come to an end."""
    where, values = ("AND state = ?", (end,)) if end else ("", ())
    query = f"SELECT record FROM batch_item WHERE batch = ? {where} AND position > ? ORDER BY position LIMIT {PAGE}"  # noqa: S608 - there is no input in it
    rows = await catalog.read(lambda connection: connection.execute(query, (batch, *values, after)).fetchall())
    return tuple(loads(text, ItemRecord) for (text,) in rows)


async def items(catalog: Catalog, batch: str, end: End | None = None) -> AsyncGenerator[ItemRecord, None]:
    """Yield the items of a batch, in order; a page of them is in memory. To be read to its end."""
    after = -1
    while found := await page(catalog, batch, after, end):
        for record in found:
            yield record
        after = found[-1].position


async def skip_the_rest(catalog: Catalog, batch: str, why: str) -> None:
    """Note that what waits still will not be taken."""

    def work(connection: sqlite3.Connection) -> None:
        connection.execute(
            "UPDATE batch_item SET state = ?, record = json_set(record, '$.end', ?, '$.error', ?) "
            "WHERE batch = ? AND state = ?",
            (End.SKIPPED, End.SKIPPED, why, batch, End.WAITING),
        )

    await catalog.transact(work)


async def counts(catalog: Catalog, batch: str) -> dict[str, int]:
    """Return how many items have come to which end."""
    query = "SELECT state, count(*) FROM batch_item WHERE batch = ? GROUP BY state ORDER BY state"
    return dict(await catalog.read(lambda connection: connection.execute(query, (batch,)).fetchall()))


async def lengths(catalog: Catalog, batch: str) -> tuple[int, int]:
    """Return how many snapshots retention has deleted, and how many items have problems beside their snapshots."""
    query = (
        "SELECT coalesce(sum(json_array_length(record, '$.deleted')), 0), "
        "coalesce(sum(json_array_length(record, '$.problems') > 0), 0) FROM batch_item WHERE batch = ?"
    )
    row: tuple[int, int] = await catalog.read(lambda connection: connection.execute(query, (batch,)).fetchone())
    return row


async def taken_by(catalog: Catalog, plan: str, item: str) -> dict[str, ItemRecord]:
    """Return what batches of a plan have taken of an item, by the snapshot's name."""
    query = (
        "SELECT batch_item.record FROM batch_item JOIN batch ON batch.id = batch_item.batch "
        "WHERE batch_item.name = ? AND batch.name = ? ORDER BY batch.begun"
    )
    rows = await catalog.read(lambda connection: connection.execute(query, (item, plan)).fetchall())
    records = (loads(json_text, ItemRecord) for (json_text,) in rows)
    return {record.snapshot: record for record in records if record.taken}
