"""Faults by errno at every file operation, answers of QEMU that are lost, a catalog that cannot be written to.

On a real guest: each is complete, or undone with everything as it was; what is stranded is mended by `recover`.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import attrs
import pytest
import trio

from snaporch.catalog import Change, writing
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qmp import QMPClient
from snaporch.drivers.qmp.stream import QemuStream
from snaporch.engine.states import State
from snaporch.errors import OutcomeUnknown, SnaporchError, Stranded
from snaporch.model.request import Strategy
from snaporch.model.rfc import CreateFlag
from tests.live.world import NAME, MakeWorld, World

pytestmark = pytest.mark.live

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EROFS)
FILE_OPERATIONS = (
    "make_directory",
    "make_file",
    "make_overlay",
    "seal",
    "remove",
    "inspect",
    "chain",
    "rebase",
    "commit_image",
)


@attrs.define
class Fault:
    """Strikes at the n-th call."""

    at: int
    calls: int = 0

    @property
    def struck(self) -> bool:
        """Whether it has."""
        return self.calls >= self.at

    def due(self) -> bool:
        """Count a call; return whether it is the one."""
        self.calls += 1
        return self.calls == self.at


NEVER = Fault(10**9)


@contextmanager
def failing(owner: Any, name: str, fault: Fault, error: Callable[[], Exception], *, after: bool) -> Iterator[None]:
    """Have a coroutine method raise at one call: before it does anything, or after it has."""
    original = getattr(owner, name)

    async def method(*arguments: Any, **options: Any) -> Any:
        due = fault.due()
        if due and not after:
            raise error()
        result = await original(*arguments, **options)
        if due:
            raise error()
        return result

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


async def fails_cleanly(world: World, call: Callable[[], Any], what: str) -> None:
    """Assert that a call that fails has changed nothing; one that strands is mended by `recover`."""
    before = await world.everything()
    try:
        await call()
    except Stranded:
        pass
    except SnaporchError:
        await world.check_same(before, what)
    for record in await world.orch.recover():  # a complete revert may have left something to tidy up
        assert record.state in {State.COMPLETE, State.ROLLED_BACK}, what
    await world.check_no_orphans()
    await world.check_runs(2)


def oserror(code: int) -> OSError:
    """Return an error as the kernel makes it."""
    return OSError(code, os.strerror(code), "somewhere")


async def settle(world: World, wanted: tuple[str, ...]) -> None:
    """Have exactly these snapshots."""
    there = [r.name for r in await world.orch.list(NAME)]
    if there != list(wanted):
        for name in reversed(there):
            await world.orch.delete(NAME, name)
        for name in wanted:
            await world.create(name)


async def test_file_operations(make_world: MakeWorld) -> None:
    """ENOSPC, EIO and EROFS in turn at every file operation of a create, a revert and a delete.

    The first call of each with one QEMU and the second, which is for another disk, with the other one: no file
    operation is a QEMU's.
    """
    world = await make_world()
    codes = (ERRNOS[number % len(ERRNOS)] for number in count())
    at = 1 if world.qemu.old else 2
    verbs: tuple[tuple[str, tuple[str, ...], Callable[[], Any]], ...] = (
        ("create", (), partial(world.create, "new")),
        ("revert", ("a",), partial(world.revert, "a")),
        ("delete", ("a", "b"), partial(world.orch.delete, NAME, "a")),
    )
    struck = set()
    for verb, names, call in verbs:
        for name in FILE_OPERATIONS:
            await settle(world, names)
            fault, code = Fault(at), next(codes)
            with failing(LocalStorage, name, fault, partial(oserror, code), after=False):
                await fails_cleanly(world, call, f"{verb}: {errno.errorcode[code]} at {name} #{at}")
            if fault.struck:
                struck.add(name)
    assert struck >= {"make_overlay", "seal", "remove", "inspect", *(["make_file"] if at == 1 else [])}


async def test_offline_merges(make_world: MakeWorld) -> None:
    """The same at every file operation of a delete of an inactive domain: it fails, and `recover` finishes it."""
    world = await make_world()
    await world.check_runs(2)
    await world.orch.destroy(NAME)
    codes = (ERRNOS[number % len(ERRNOS)] for number in count())
    struck, fresh = set(), count()
    for name in ("inspect", "chain", "commit_image", "rebase", "seal", "remove"):
        for which in (0, 1):  # the first one's children go down into its large image, a middle one's go up
            while len(names := [record.name for record in await world.orch.list(NAME)]) < 3:
                await world.create(f"s{next(fresh)}", flags=CreateFlag.DISK_ONLY)
            fault, code = Fault(1), next(codes)
            what = f"{errno.errorcode[code]} at {name}"
            fails = failing(LocalStorage, name, fault, partial(oserror, code), after=False)
            with fails, suppress(SnaporchError):
                await world.orch.delete(NAME, names[which])
            ended = await world.orch.recover()
            assert {record.state for record in ended} <= {State.COMPLETE}, what
            for record in await world.orch.list(NAME):
                assert (await world.orch.verify(NAME, record.name)).ok, what
            await world.check_no_orphans()
            struck |= {name} if fault.struck else set()
    assert struck >= {"inspect", "commit_image", "rebase", "seal", "remove"}
    await world.check_nothing_lost()


COMMANDS = (
    "getfd",
    "blockdev-add",
    "migrate-set-capabilities",
    "stop",
    "transaction",
    "migrate",
    "cont",
    "query-migrate",
)
OTHERS = {
    "revert": ("stop", "migrate-incoming", "cont"),
    "a": ("block-commit", "blockdev-del"),
    "b": ("block-stream",),
}


@contextmanager
def losing(command: str, *, arrives: bool = True) -> Iterator[Fault]:
    """Have QEMU's first answer to a command lost, after it has done it; or the command itself."""
    fault, execute = Fault(1), QMPClient.execute

    async def executed(self: QMPClient, name: str, *arguments: Any, **options: Any) -> Any:
        due = name == command and fault.due()
        answer = await execute(self, name, *arguments, **options) if arrives or not due else None
        if due:
            raise OutcomeUnknown(NAME, name, 5.0)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QMPClient, "execute", executed)
        yield fault
    assert fault.struck, command


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("strategy", [Strategy.BACKGROUND, Strategy.PAUSED])
async def test_lost_answers(make_world: MakeWorld, strategy: Strategy, *, arrives: bool) -> None:
    """QEMU does what it was told or has not been, and no answer comes: complete, or undone, and the guest runs."""
    world = await make_world()
    for command in COMMANDS:
        with losing(command, arrives=arrives):
            await fails_cleanly(world, partial(world.create, f"lost-{command}", strategy), f"{command} unanswered")
    await world.create("point", strategy)
    await world.revert("point")
    await world.check_consistent()


@pytest.mark.parametrize("arrives", [True, False])
async def test_lost_answers_of_others(make_world: MakeWorld, *, arrives: bool) -> None:
    """The same of a revert, and of deletes of a first snapshot (committed down) and a middle one (streamed up)."""
    world = await make_world()
    for verb, commands in OTHERS.items():
        for command in commands:
            await settle(world, ("a", "b", "c"))
            call = partial(world.revert, "a") if verb == "revert" else partial(world.orch.delete, NAME, verb)
            with losing(command, arrives=arrives):
                await fails_cleanly(world, call, f"{verb}: {command} unanswered")
    for record in await world.orch.list(NAME):
        await world.revert(record.name)
        await world.check_consistent()


async def no_answer(*_: object) -> None:
    await trio.lowlevel.checkpoint()
    raise OutcomeUnknown(NAME, "query-migrate", 5.0)


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("verb", ["create", "delete"])
async def test_pivot_not_confirmed(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, verb: str, *, arrives: bool
) -> None:
    """Once it is noted that a disk goes over it does, heard of or not: QEMU dies later, and nothing is lost."""
    world = await make_world()
    calls: dict[str, Callable[[str], Awaitable[object]]] = {
        "create": world.create,
        "delete": partial(world.orch.delete, NAME),
    }
    if verb == "delete":
        await world.create("point")
    else:
        monkeypatch.setattr(QemuStream, "armed", no_answer)  # so that it is rolled back
    with losing("job-finalize", arrives=arrives), pytest.raises(Stranded):
        await calls[verb]("point")
    await world.check_runs(3)
    os.kill(await world.pid(), signal.SIGKILL)
    assert await world.orch.recover()
    await world.check_no_orphans()
    await world.check_nothing_lost()


async def test_catalog_full(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite has no room, or is locked for too long, at every write of a create, a revert and a delete.

    The odd ones with one QEMU, and the even ones with the other: the catalog does not know of it.
    """
    world = await make_world()
    monkeypatch.setattr("snaporch.catalog.store.apply", apply := Applying(writing.apply))
    verbs: tuple[tuple[str, tuple[str, ...], Callable[[], Any]], ...] = (
        ("create", (), partial(world.create, "new")),
        ("revert", ("a",), partial(world.revert, "a")),
        ("delete", ("a", "b"), partial(world.orch.delete, NAME, "a")),
    )
    for verb, names, call in verbs:
        for at in count(1 if world.qemu.old else 2, 2):
            await settle(world, names)
            apply.fault = Fault(at)
            await fails_cleanly(world, call, f"{verb}: write #{at}")
            struck, apply.fault = apply.fault.struck, NEVER
            if not struck:
                break


@attrs.define
class Applying:
    """The catalog's change of the database, with a fault in it."""

    apply: Callable[..., None]
    fault: Fault = NEVER

    def __call__(self, connection: sqlite3.Connection, change: Change) -> None:
        """Apply a change, or fail as SQLite does."""
        if self.fault.due():
            words = ("database or disk is full", "database is locked")
            raise sqlite3.OperationalError(words[self.fault.at % len(words)])
        self.apply(connection, change)
