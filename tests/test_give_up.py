"""Nothing is stuck for good: operations that cannot be mended are given up, and what is said of it is true."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from snaporch.catalog import Change
from snaporch.cli import execute
from snaporch.drivers.local.files import LocalStorage
from snaporch.engine.run import Operation
from snaporch.engine.states import OperationState, State
from snaporch.errors import NotFound, OperationFailed, Refused, Stranded
from snaporch.model.convert import dumps
from snaporch.model.record import OperationKind
from snaporch.model.rfc import CreateFlag, DomainSnapshot
from snaporch.operations.trial import plan_trial
from snaporch.orchestrator import catalog_of
from tests.image_place import MIB, Place, content, opened, write


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path) as made:
        yield made


async def _fails(*_: object, **__: object) -> None:
    await trio.lowlevel.checkpoint()
    raise OSError(5, "Input/output error", "/somewhere")


@contextmanager
def broken(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(LocalStorage, name, _fails)
        yield


async def only_operation(place: Place) -> str:
    return (await catalog_of(place.orch).unfinished())[0][0].id


async def test_a_delete(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot is gone, the guest's data is where it is said to be, and the next delete merges what is left."""
    await place.define("one", place.image("disk.qcow2"))
    write(await place.snapshot("one", "s1"), 0x66)
    overlay = await place.snapshot("one", "s2")
    write(overlay, 0x67, MIB)
    before = content(overlay)
    with broken(monkeypatch, "commit_image", "rebase"):
        with pytest.raises(Stranded, match="where it cannot, `snaporch operations give-up"):
            await place.orch.delete("one", "s1")
        with pytest.raises(Stranded):
            await place.snapshot("one", "s3")  # which first tries to mend it
        identifier = await only_operation(place)
        would = await place.orch.give_up(identifier, dry_run=True)
        assert not would.done
        assert await only_operation(place) == identifier
        given = await place.orch.give_up(identifier)
    assert (given.kept, given.lost) == (would.kept, would.lost)
    assert f"vda of one: on {overlay}" in given.kept
    assert given.lost == ("snapshot s1 of one, as was asked for",)
    assert [(record.name, record.parent) for record in await place.orch.list("one")] == [("s2", None)]
    assert (await place.orch.verify("one", "s2")).ok
    await place.snapshot("one", "s3")
    assert (await place.orch.delete("one", "s3")).steps, "what was not merged merges now"
    assert content(await place.active("one")) == before
    with pytest.raises(Refused, match="has ended"):
        await place.orch.give_up(identifier)


async def test_a_create(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The domain is on the overlay that could not be removed; there is no snapshot, and the next one works."""
    disk = place.image("disk.qcow2")
    await place.define("one", disk)
    with broken(monkeypatch, "seal", "remove"), pytest.raises(Stranded):
        await place.orch.create("one", DomainSnapshot("s1"), CreateFlag.DISK_ONLY)
    with broken(monkeypatch, "remove"):
        given = await place.orch.give_up(await only_operation(place))
    overlay = await place.active("one")
    assert overlay != str(disk)
    assert given.kept == (f"vda of one: on {overlay}",)
    assert given.lost == ("snapshot s1 of one, which was never complete",)
    assert await place.orch.list("one") == ()
    write(overlay, 0x66)
    await place.snapshot("one", "s2")
    assert (await place.orch.verify("one", "s2")).ok
    await place.orch.delete("one", "s2")
    assert await place.active("one") == str(disk)
    assert content(disk)[:MIB] == b"\x66" * MIB


async def test_a_revert(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The domain is where it was; what the revert had made is told of, and fsck removes it."""
    await place.define("one", place.image("disk.qcow2"))
    overlay = await place.snapshot("one", "s1")

    async def full(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OperationFailed("no")

    with broken(monkeypatch, "remove"), monkeypatch.context() as patch:
        patch.setattr("snaporch.operations.revert.commit", full)
        with pytest.raises(Stranded):
            await place.orch.revert("one", "s1")
        given = await place.orch.give_up(await only_operation(place))
    assert await place.active("one") == overlay
    (left,) = (text.partition(":")[0] for text in given.kept if "--repair" in text)
    assert given.lost == ()
    assert [found.subject for found in await place.orch.fsck(repair=True)] == [left]
    assert not Path(left).exists()
    assert await place.orch.fsck() == ()


async def test_a_look_strands_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verify that cannot remove what it has made blocks nothing; fsck removes it once that is possible."""
    await place.define("one", place.image("disk.qcow2"))
    await place.snapshot("one", "s1")
    context, operation = place.orch._context, Operation(OperationKind.VERIFY, "one", "s1")
    operation.machine = OperationState(State.LOADING)
    domain, record = await context.catalog.domain("one"), await context.catalog.snapshot("one", "s1")
    plan = plan_trial(domain, record, directory=context.directory("one"), operation=operation.id)
    left = plan.disks[0].path
    await context.drivers["qemu"].storage.make_overlay(left, plan.frozen["vda"], MIB)
    await context.catalog.write(Change(operation=operation.record(), begins=True, plan=dumps([plan])))
    with broken(monkeypatch, "remove"):
        await place.orch.recover()
        await place.snapshot("one", "s2")
    assert [found.subject for found in await place.orch.fsck(repair=True)] == [left]
    assert not Path(left).exists()


async def test_what_is_not_there(place: Place) -> None:
    """An operation that nobody knows is not given up."""
    with pytest.raises(NotFound, match="there is no operation '00000000'"):
        await place.orch.give_up("00000000")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a command of its own, and `operations` with a domain's name is still a list."""
    assert execute(["--root", str(tmp_path), "operations", "give-up", "00000000"]) == NotFound.exit_code
    assert "there is no operation '00000000'" in capsys.readouterr().err
    assert execute(["--root", str(tmp_path), "operations"]) == 0
