"""The catalog: of earlier versions, of newer ones, with damaged rows, and where nothing can be written."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from snaporch.batch import store
from snaporch.batch.store import End
from snaporch.catalog import Change, Page, domain_lock, open_catalog
from snaporch.catalog.copied import in_memory
from snaporch.errors import Busy, Refused, SnaporchError, TargetExists, UnreadableRecord
from snaporch.model.names import new_id, short
from snaporch.model.record import OperationKind, OperationRecord
from tests.catalog import ask, change, golden_root


def _operation(identifier: str, *domains: str, begun: float = 1.0, state: str = "preparing") -> OperationRecord:
    return OperationRecord(identifier, OperationKind.CREATE, domains, "s", state, begun)


# --- earlier versions ---

VERSIONS = ("0.1", "0.1-schema-6", "0.1-schema-7")


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_catalog_of_an_earlier_version_is_read(tmp_path: Path, version: str) -> None:
    """All in it, the operation that was cut short and batches included; a second opening changes nothing."""
    path = golden_root(tmp_path, version)
    async with open_catalog(path) as catalog:
        domains = {record.name: record for record in await catalog.domains()}
        assert set(domains) == {"app", "cache", "db", "still", "web"}
        assert len({record.uuid for record in domains.values()}) == 5
        snapshots = [each for name in domains for each in await catalog.snapshots(name)]
        assert len({each.id for each in snapshots}) == len(snapshots) > 10
        assert not await catalog.unreadable()
        ((cut, plan),) = await catalog.unfinished("app")
        assert cut.domains == ("app", "cache")
        assert [record.id for record in await catalog.operations("cache")][-1] == cut.id
        assert json.loads(plan)
        batch = await store.latest(catalog, "nightly")
        assert batch is not None
        assert {item.end async for item in store.items(catalog, batch.id)} <= {End.DONE, End.UNDONE, End.FAILED}
    before = path.read_bytes()
    async with open_catalog(path) as catalog:
        assert {record.name: record for record in await catalog.domains()} == domains
    assert path.read_bytes() == before


async def test_before_it_is_changed_a_catalog_is_copied(tmp_path: Path) -> None:
    """As it was, for its owner only: who wants to go back has it."""
    path = golden_root(tmp_path)
    (before,) = ask(path, "SELECT group_concat(record) FROM operation")
    async with open_catalog(path):
        pass
    copy = tmp_path / "catalog.sqlite3.schema-5"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert ask(copy, "PRAGMA user_version") == [(5,)]
    assert ask(copy, "SELECT group_concat(record) FROM operation") == [before]
    assert not list(tmp_path.glob("*.new"))


async def test_what_was_sealed_is_known_of_the_first_schema(tmp_path: Path) -> None:
    """The table of sealed images is filled from the snapshots of a catalog that has none yet."""
    path = golden_root(tmp_path)
    known = [each for (each,) in ask(path, "SELECT path FROM sealed")]
    for statement in (
        "DROP INDEX operation_unfinished", "DROP INDEX snapshot_name", "DROP INDEX operation_group",
        "DROP TABLE sealed", "DROP TABLE batch_item", "DROP TABLE batch",
        "DROP INDEX operation_begun", "DROP TABLE idempotency", "PRAGMA user_version = 1",
    ):  # fmt: skip
        change(path, statement)
    in_snapshots = {
        file["path"]
        for (text,) in ask(path, "SELECT record FROM snapshot")
        for chain in json.loads(str(text))["images"].values()
        for file in chain
    }
    async with open_catalog(path) as catalog:
        found = await catalog.sealed([*known, "/nowhere"])
    assert set(found) == in_snapshots


async def test_a_guard_of_the_earlier_version_still_finds_what_it_asks_for(tmp_path: Path) -> None:
    """It may be at work while the catalog is brought to the present schema."""
    path = golden_root(tmp_path)
    ((identifier,),) = ask(path, "SELECT id FROM operation WHERE ended IS NULL")
    active = json.loads(str(ask(path, "SELECT record FROM domain WHERE name = 'web'")[0][0]))["active"]
    async with open_catalog(path):
        states = dict(ask(path, "SELECT id, json_extract(record, '$.state') FROM operation"))
        assert states[identifier] == "streaming"
        ((disks,),) = ask(path, "SELECT json_extract(record, '$.active') FROM domain WHERE name = 'web'")
        assert json.loads(str(disks))["vda"]["path"] == active["vda"]["path"]


async def test_nothing_is_changed_under_an_operation_of_the_earlier_version(tmp_path: Path) -> None:
    """It could not go on; who waits for its end can open the root."""
    path = golden_root(tmp_path)
    async with domain_lock(tmp_path / "locks", "web", "0123abcd", "create nightly"):
        with pytest.raises(Busy, match="web is busy: create nightly runs"):
            async with open_catalog(path):
                pass
    assert ask(path, "PRAGMA user_version") == [(5,)]
    async with open_catalog(path):
        pass


async def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    """Also where a process that is just being started has a copy of all open files."""
    reader, writer = os.pipe()
    async with domain_lock(tmp_path, "web", "0123abcd", "pause"):
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # until the test is over
            os._exit(0)
    os.close(reader)
    try:
        async with domain_lock(tmp_path, "web", "4567abcd", "delete nightly"):
            pass
    finally:
        os.close(writer)
        os.waitpid(child, 0)  # noqa: ASYNC222 - it ends at once


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_newer_catalog_is_refused_untouched(tmp_path: Path, version: str) -> None:
    """With words; no file is written to or made."""
    path = golden_root(tmp_path, version)
    change(path, "PRAGMA user_version = 99")
    change(path, "PRAGMA journal_mode = DELETE")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}
    for read_only in (False, True):
        with pytest.raises(Refused, match=r"a newer snaporch \(schema 99; .* nothing was touched"):
            async with open_catalog(path, read_only=read_only):
                pass
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()} == before


# --- rows that cannot be read ---

BROKEN = {
    "no JSON": ("'{'", "Expecting"),
    "a key of a newer version": ("json_set(record, '$.later', 1)", "unknown key 'later'"),
    "a newer format": ("json_set(record, '$.format', 9)", "of format 9 was written by a newer snaporch"),
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_a_row_that_cannot_be_read_is_one_row(tmp_path: Path, broken: str) -> None:
    """A domain's, a snapshot's, an operation's: it is told of with the reason, and all others are there."""
    path, (value, reason) = golden_root(tmp_path), BROKEN[broken]
    async with open_catalog(path):
        pass
    for where in (
        "domain {} WHERE name = 'db'",
        "snapshot {} WHERE name = 'paused'",
        "operation {} WHERE ended IS NULL",
    ):
        change(path, f"UPDATE {where.format(f'SET record = {value}')}")
    async with open_catalog(path) as catalog:
        assert [record.name for record in await catalog.domains()] == ["app", "cache", "still", "web"]
        pages = [await catalog.domains(after, 2) for after in ("", "app", "cache", "web")]
        named = [[record.name for record in page] for page in pages]
        assert named == [["app", "cache"], ["cache", "still"], ["still", "web"], []]
        assert "paused" not in [record.name for record in await catalog.readable_snapshots("web")]
        assert await catalog.has_snapshot("web", "paused")
        for ask_for in (catalog.domain("db"), catalog.snapshots("web"), catalog.snapshot("web", "paused")):
            with pytest.raises(UnreadableRecord, match=reason):
                await ask_for
        found = await catalog.unreadable()
        assert {(each.kind, each.domain) for each in found} == {
            ("domain", "db"), ("snapshot", "web"), ("operation", "app"), ("operation", "cache"),
        }  # fmt: skip
        assert all(reason in each.reason for each in found)
        assert [each.domain for each in await catalog.unfinished_unreadable("cache")] == ["app", "cache"]
        assert not await catalog.unfinished("cache")
        assert not await catalog.unfinished_unreadable("web")


async def test_what_an_unreadable_record_names_is_not_given_up(tmp_path: Path) -> None:
    """All paths in it count as needed, also where it is not even JSON."""
    path = golden_root(tmp_path)
    async with open_catalog(path) as catalog:
        paths = await catalog.paths_of_snapshots("web")
    change(path, "UPDATE snapshot SET record = record || '}' WHERE domain = 'web'")
    async with open_catalog(path) as catalog:
        assert await catalog.paths_of_snapshots("web") >= paths > set()


# --- operations ---


async def test_an_operation_never_takes_the_place_of_another(tmp_path: Path) -> None:
    """Nor do two share what names their nodes and files."""
    identifier = new_id()
    alike = short(identifier) + new_id()[len(short(identifier)) :]
    async with open_catalog(tmp_path / "catalog.sqlite3") as catalog:
        await catalog.write(Change(operation=_operation(identifier, "web"), begins=True, plan="[1]"))
        for other in (identifier, alike):
            with pytest.raises(TargetExists):
                await catalog.write(Change(operation=_operation(other, "db", begun=2.0), begins=True, plan="[2]"))
        with pytest.raises(TargetExists):  # as when it is rolled back
            await catalog.write(Change(operation=_operation(identifier, "db", begun=2.0, state="rolled-back")))
        ((record, plan),) = await catalog.unfinished()
    assert (record.domains, plan) == (("web",), "[1]")


async def test_an_operation_that_ended_keeps_no_plan(tmp_path: Path) -> None:
    """Nobody goes on with it."""
    path, record = tmp_path / "catalog.sqlite3", _operation(new_id(), "web")
    async with open_catalog(path) as catalog:
        await catalog.write(Change(operation=record, begins=True, plan="[1]"))
        await catalog.write(Change(operation=attrs.evolve(record, ended=2.0, state="complete")))
    assert ask(path, "SELECT plan FROM operation") == [("",)]


async def test_the_journal_is_bounded(tmp_path: Path) -> None:
    """By age and by number; what has not ended stays."""
    async with open_catalog(tmp_path / "catalog.sqlite3") as catalog:
        for number in range(20):
            record = _operation(new_id(), "web", begun=float(number))
            ended = attrs.evolve(record, ended=number + 0.5 if number else None, state="complete")
            await catalog.write(Change(operation=ended, begins=True))
        assert await catalog.prune_journal(before=5.0, most=100) == 4
        assert await catalog.prune_journal(before=5.0, most=10) == 5
        assert await catalog.prune_journal(before=5.0, most=10) == 0
        left = await catalog.operations("web")
    assert [record.begun for record in left] == [0.0, *range(10, 20)]


async def test_pages_of_operations_are_newest_first(tmp_path: Path) -> None:
    """Of one domain or all, from an instant on, by how they ended."""
    states = ["complete", "rolled-back", "stranded", "streaming"]
    async with open_catalog(tmp_path / "catalog.sqlite3") as catalog:
        for number in range(12):
            domains = ("db", "web") if number % 3 == 0 else ("web",)
            state = states[number % 4]
            record = _operation(f"{number:032x}"[::-1], *domains, begun=float(number), state=state)
            ended = attrs.evolve(record, ended=None if state in {"stranded", "streaming"} else number + 1.0)
            await catalog.write(Change(operation=ended, begins=True))

        async def begun(page: Page) -> list[float]:
            return [record.begun for record in await catalog.operations_page(page)]

        assert await begun(Page(3)) == [11, 10, 9]
        assert await begun(Page(domain="db")) == [9, 6, 3, 0]
        assert await begun(Page(2, before=(9.0, ""), domain="db")) == [6, 3]
        assert await begun(Page(since=10.0)) == [11, 10]
        assert await begun(Page(outcome="running")) == [11, 7, 3]
        assert await begun(Page(outcome="failed")) == [10, 9, 6, 5, 2, 1]
        assert await begun(Page(outcome="complete", domain="db")) == [0]


# --- read only ---


def _files(root: Path) -> dict[str, bytes]:
    """Return all files but those that SQLite makes for the readers of a log: shared memory, and an empty log."""
    found = {each.name: each.read_bytes() for each in root.iterdir() if each.is_file()}
    return {
        name: content for name, content in found.items() if "-shm" not in name and (content or "-wal" not in name)
    }


async def test_who_only_reads_makes_nothing(tmp_path: Path) -> None:
    """Not even the catalog, and brings none to the present schema."""
    async with open_catalog(tmp_path / "none" / "catalog.sqlite3", read_only=True) as catalog:
        assert not await catalog.domains()
        with pytest.raises(SnaporchError, match="open to be read only"):
            await catalog.drop_domain("web")
    assert not (tmp_path / "none").exists()
    path = golden_root(tmp_path)
    before = _files(tmp_path)
    async with open_catalog(path, read_only=True) as catalog:
        assert len(await catalog.domains()) == 5
        assert (await catalog.unfinished("app"))[0][0].domains == ("app", "cache")
    assert _files(tmp_path) == before


async def test_who_only_reads_waits_for_no_lock(tmp_path: Path) -> None:
    """Another process writes, and takes as long as it likes."""
    path = golden_root(tmp_path)
    async with open_catalog(path):
        pass
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        other.execute("DELETE FROM domain WHERE name = 'still'")
        with trio.fail_after(5):
            async with open_catalog(path, read_only=True) as catalog:
                assert len(await catalog.domains()) == 5


def _left_by_a_kill(path: Path, copy: Path, rows: list[list[bytes]], *, page: int = 4096) -> list[tuple[bytes]]:
    """Copy a database in which transactions are in the log only, and one is not ended; return what it holds."""
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute(f"PRAGMA page_size = {page}")
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        writer.execute("PRAGMA cache_size = 1")  # so that what was not committed is in the log, too
        writer.execute("CREATE TABLE thing (value BLOB)")
        for number, transaction in enumerate(rows):
            writer.execute("BEGIN")
            writer.executemany("INSERT INTO thing VALUES (?)", [(each,) for each in transaction])
            if number == len(rows) - 1 and number:
                break
            writer.execute("COMMIT")
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
        with closing(sqlite3.connect(path)) as reader:
            found: list[tuple[bytes]] = reader.execute("SELECT value FROM thing ORDER BY rowid").fetchall()
    return found


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.binary(max_size=9000), max_size=4), min_size=1, max_size=5),
    st.sampled_from([512, 4096, 65536]),
)
def test_a_database_and_its_log_are_read_as_sqlite_reads_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[bytes]], page: int
) -> None:
    """Whatever was committed is there, and what was not is not."""
    directory = tmp_path_factory.mktemp("wal")
    expected = _left_by_a_kill(directory / "it", directory / "copy", rows, page=page)
    before = _files(directory)
    with closing(in_memory(directory / "copy")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT value FROM thing ORDER BY rowid").fetchall() == expected
    assert _files(directory) == before


async def test_a_log_that_was_left_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    """What is in the log only is not missed: here nothing can be made beside the catalog."""
    path = golden_root(tmp_path / "root")
    async with open_catalog(path):
        pass
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        writer.execute("DELETE FROM domain WHERE name = 'still'")
        (tmp_path / "left").mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", tmp_path / "left")
    left = tmp_path / "left" / path.name
    os.mkdir(f"{left}-shm")  # SQLite can have no shared memory here, as on a read-only file system
    assert Path(f"{left}-wal").stat().st_size
    async with open_catalog(left, read_only=True) as catalog:
        assert "still" not in [record.name for record in await catalog.domains()]
