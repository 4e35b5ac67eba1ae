"""Chains of images in the catalog: each link is there once, and what it is for is never lost."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.catalog import Catalog, Change, links, open_catalog
from snaporch.catalog.links import file_record
from snaporch.errors import UnreadableRecord
from snaporch.model.convert import dumps, loads
from snaporch.model.domain import DomainDefinition, DomainRecord, DomainState
from snaporch.model.record import FileRecord, SnapshotRecord
from snaporch.model.request import Strategy
from snaporch.model.rfc import DomainSnapshot
from tests.catalog import NAME, ask, change, golden_root

LONG = 400


def image(number: int) -> FileRecord:
    """Return an image as it was sealed."""
    return FileRecord(
        f"/images/a-name-as-long-as-they-are/{number}.qcow2", 2**20, "xxh3-128:0", (1, number, 2, 3, 4)
    )


def snapshot(number: int, *above: FileRecord, domain: str = "web") -> SnapshotRecord:
    """Return a snapshot in a line: its image is above those of all before it, but for what is `above` these."""
    chain = (*above, *(image(each) for each in range(number, -1, -1)))
    return SnapshotRecord(
        domain,
        DomainSnapshot(f"s{number}"),
        f"s{number - 1}" if number else None,
        DomainState.INACTIVE,
        Strategy.NONE,
        "",
        float(number),
        None,
        {"vdb": (), "vda": chain},
        DomainDefinition(domain),
    )


async def begin(catalog: Catalog, count: int, domain: str = "web") -> tuple[SnapshotRecord, ...]:
    """Put a line of snapshots there."""
    await catalog.write(Change(domains=(DomainRecord(DomainDefinition(domain)),)))
    for number in range(count):
        await catalog.write(Change(snapshots=(snapshot(number, domain=domain),)))
    return await catalog.snapshots(domain)


def numbers(path: Path) -> int:
    """Return how many links there are."""
    return int(ask(path, "SELECT count(*) FROM link")[0][0])


async def test_a_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no more for each snapshot than a short one; and an image is read once, whoever has it."""
    path = tmp_path / NAME
    async with open_catalog(path) as catalog:
        found = await begin(catalog, LONG)
        assert [attrs.evolve(each, id="") for each in found] == [snapshot(number) for number in range(LONG)]
        assert list(found[-1].images) == ["vdb", "vda"]
    assert numbers(path) == LONG
    (records,) = ask(path, "SELECT sum(length(record)) FROM snapshot")[0]
    assert records < LONG * len(dumps(snapshot(1)))
    read = 0

    def count(text: str, kind: type) -> object:
        nonlocal read
        read += kind is FileRecord
        return loads(text, kind)

    monkeypatch.setattr(links, "loads", count)
    file_record.cache_clear()
    async with open_catalog(path) as catalog:
        for _ in range(3):
            found = await catalog.snapshots("web")
            assert await catalog.paths_of_snapshots("web") == {image(number).path for number in range(LONG)}
            rows = (await catalog.frozen_but(()))["web"]
        assert {path: name for name, path, _ in rows} == {image(n).path: f"s{n}" for n in range(LONG)}
        assert {inode for *_, inode in rows} == set(range(LONG))
        assert len(rows) == LONG
    assert read == LONG
    assert found[3].images["vda"][1] is found[200].images["vda"][-3]


async def test_what_goes_takes_its_links_with_it(tmp_path: Path) -> None:
    """And nobody else's."""
    path = tmp_path / NAME
    async with open_catalog(path) as catalog:
        await begin(catalog, 4)
        await begin(catalog, 2, "db")
        assert numbers(path) == 4
        branch = attrs.evolve(snapshot(1, image(9)), snapshot=DomainSnapshot("branch"))
        await catalog.write(Change(snapshots=(branch,)))
        await catalog.write(Change(dropped=(("web", "s3"), ("web", "s2"))))
        assert numbers(path) == 3
        moved = attrs.evolve(branch, images={"vda": (image(8),)})
        await catalog.write(Change(updated=(moved,), dropped=(("web", "s1"), ("web", "nothing"))))
        assert numbers(path) == 3
        await catalog.write(Change(updated=(attrs.evolve(snapshot(1, image(7)), snapshot=DomainSnapshot("no")),)))
        await catalog.write(Change(dropped=(("db", "s1"), ("db", "s0"))))
        assert [each.images["vda"] for each in await catalog.snapshots("web")] == [(image(0),), (image(8),)]
        assert numbers(path) == 2
        await catalog.write(Change(dropped=(("web", "s0"), ("web", "branch"))))
        assert ask(path, "SELECT * FROM link") == ask(path, "SELECT * FROM image") == []
        before = (await begin(catalog, 1, "db"))[0].images
    async with open_catalog(path) as catalog:
        assert (await catalog.snapshot("db", "s0")).images == before


@pytest.mark.parametrize(
    "wrong", ["record || '}'", "json_set(record, '$.format', 999)", "json_set(record, '$.new', 1)"]
)
async def test_a_record_that_cannot_be_read_has_its_images(tmp_path: Path, wrong: str) -> None:
    """All of them count as needed."""
    path, all_of_them = tmp_path / NAME, {image(number).path for number in range(3)}
    async with open_catalog(path) as catalog:
        await begin(catalog, 3)
    change(path, f"UPDATE snapshot SET record = {wrong} WHERE name <> 's0'")  # noqa: S608
    async with open_catalog(path) as catalog:
        assert await catalog.paths_of_snapshots("web") >= all_of_them
        assert {path for _, path, _ in (await catalog.frozen_but(()))["web"]} >= all_of_them
        assert [each.name for each in await catalog.readable_snapshots("web")] == ["s0"]
        with pytest.raises(UnreadableRecord, match="the record of snapshot s1 of web cannot be read"):
            await catalog.snapshots("web")
        found = await catalog.unreadable("web")
        assert [each.name for each in found] == ["s1", "s2"]
        assert set(found[-1].paths) >= all_of_them


@pytest.mark.parametrize(
    "wrong", ["DELETE FROM link WHERE below = 0", "UPDATE link SET record = '[]' WHERE below = 0"]
)
async def test_a_link_that_is_not_there(tmp_path: Path, wrong: str) -> None:
    """It is what cannot be read, and never a chain that is shorter."""
    async with open_catalog(tmp_path / NAME) as catalog:
        await begin(catalog, 2)
    change(tmp_path / NAME, wrong)
    async with open_catalog(tmp_path / NAME) as catalog:
        assert not await catalog.readable_snapshots("web")
        with pytest.raises(UnreadableRecord, match="an image of its chains is not in the catalog"):
            await catalog.snapshot("web", "s1")


async def test_records_of_an_earlier_schema(tmp_path: Path) -> None:
    """They have their chains in them until they are written anew, and look the same before and after."""
    path = golden_root(tmp_path)
    async with open_catalog(path) as catalog:
        before = await catalog.snapshots("web")
        assert numbers(path) == 0
        files, frozen = await catalog.paths_of_snapshots("web"), await catalog.frozen_but(())
        await catalog.write(Change(updated=before))
        assert numbers(path) > 0
        assert await catalog.snapshots("web") == before
        assert await catalog.paths_of_snapshots("web") == files
        assert {name: set(rows) for name, rows in (await catalog.frozen_but(())).items()} == {
            name: set(rows) for name, rows in frozen.items()
        }


async def test_a_page_is_told_as_ever(tmp_path: Path) -> None:
    """With whole chains, and as many as are asked for."""
    async with open_catalog(tmp_path / NAME) as catalog:
        found = await begin(catalog, 4)
        page = await catalog.snapshots_after("web", "s0", 2)
    assert page is not None
    rows, more = page
    assert ([name for name, _ in rows], more) == (["s1", "s2"], True)
    assert [json.loads(text) for _, text in rows] == [json.loads(dumps(each)) for each in found[1:3]]


async def test_what_is_read_is_of_one_moment(tmp_path: Path) -> None:
    """A snapshot that goes while it is read is read whole."""
    async with open_catalog(tmp_path / NAME) as catalog:
        await begin(catalog, 50)
        gone = tuple(("web", f"s{number}") for number in range(25, 50))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(catalog.write, Change(dropped=gone))
            counts = {len(await catalog.snapshots("web")) for _ in range(200)}
        assert counts <= {25, 50}
        assert len(await catalog.snapshots("web")) == 25
