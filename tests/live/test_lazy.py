"""Lazy reverts: a guest runs before its memory is there, and judges itself that it is the right one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.catalog import Change
from snaporch.drivers.local.durable import identity
from snaporch.drivers.qmp import index, lazy, pages
from snaporch.engine.states import State
from snaporch.errors import DamagedSnapshot, OperationFailed
from snaporch.model.finding import Trouble
from snaporch.model.record import OperationKind, RevertRecord, SnapshotRecord
from snaporch.model.rfc import RevertFlag
from snaporch.orchestrator import catalog_of
from tests.live.test_crash import killed
from tests.live.world import NAME, SECONDS, MakeWorld, World, processes

pytestmark = pytest.mark.live

# The page server, which sends only what is asked for as long as the file GO is not there.
HELD = """
import os
from importlib.machinery import SourceFileLoader
pages = SourceFileLoader("pages", {real!r}).load_module()
rest = pages.Server._rest
def held(server):
    for each in rest(server):
        while not os.path.exists({go!r}):
            server.status.beat()
            server._listen(0.005)
            if server._asked:
                server._answer()
        yield each
pages.Server._rest = held
pages.main()
"""


def servers(world: World) -> list[int]:
    """Return the processes that serve pages in a world."""
    return [pid for pid, words in processes(world.directory).items() if any("pages.py" in w for w in words)]


@attrs.frozen
class Held:
    """A lazy revert that is held while its guest runs: it gets what it asks for, and nothing else.

    Attributes:
        world: where.
        go: the file that lets the rest come, too.
        done: what came of the revert.
    """

    world: World
    go: Path
    done: list[RevertRecord | OperationFailed]

    async def runs(self) -> None:
        """See the guest run at the point, with its memory still to come."""
        await self.world.check_consistent(3)
        assert not self.done

    async def server(self, but: int = 0) -> int:
        """Return the one page server that there is, when it is another than one of before."""
        with trio.fail_after(SECONDS):
            while not (found := [pid for pid in servers(self.world) if pid != but]):  # noqa: ASYNC110
                await trio.sleep(0.01)
        (server,) = found
        return server


@asynccontextmanager
async def held(world: World, patch: pytest.MonkeyPatch) -> AsyncIterator[Held]:
    """Begin a lazy revert, and hold it while its guest runs; afterwards the rest comes, and it ends."""
    place = world.directory / "program"
    place.mkdir()
    go, program = place / "go", place / "pages.py"
    program.write_text(HELD.format(real=pages.__file__, go=str(go)))
    story = Held(world, go, [])
    loading = trio.Event()

    async def revert() -> None:
        try:
            story.done.append(await world.revert("point", RevertFlag.LAZY))
        except OperationFailed as error:
            story.done.append(error)

    async def look(*, task_status: trio.TaskStatus[None]) -> None:
        async with world.orch.events() as events:
            task_status.started()
            async for event in events:
                if event.state == State.LOADING:
                    loading.set()
                    return

    with patch.context() as patched:
        patched.setattr(pages, "__file__", str(program))
        async with trio.open_nursery() as nursery:
            await nursery.start(look)
            nursery.start_soon(revert)
            with trio.fail_after(SECONDS):
                await loading.wait()
            yield story
            go.touch()
    shutil.rmtree(place)


async def check_index(world: World, record: SnapshotRecord) -> None:
    """Compare RAM, of a paused guest, with what its index says of it."""
    assert record.memory is not None
    dump, size = world.directory / "ram", world.definition.memory
    await world.qmp("pmemsave", val=0, size=size, filename=str(dump))
    memory, ram, found = Path(record.memory.path).read_bytes(), dump.read_bytes(), index.load(record.index)
    main = max(found.rams, key=lambda each: len(each.kinds))
    assert len(main.kinds) * index.PAGE == size
    for page in range(2**20 // index.PAGE, len(main.kinds)):  # below it the firmware has places of its own
        contents = ram[page * index.PAGE : (page + 1) * index.PAGE]
        offset = main.offsets[page]
        full = main.kinds[page] == index.FULL
        assert contents == (memory[offset : offset + index.PAGE] if full else bytes(index.PAGE)), page
    dump.unlink()


async def test_story(world: World) -> None:
    """There and back, by the index that the create has made, without one, and with one that is damaged."""
    record = await world.create("point")
    assert os.stat(record.index).st_mode & 0o777 == 0o600
    for state in ("made", "missing", "damaged"):
        if state == "missing":
            os.unlink(record.index)
        elif state == "damaged":
            os.truncate(record.index, os.path.getsize(record.index) - 1)
        back = await world.revert("point", RevertFlag.LAZY)
        assert (back.lazy, back.lazy_reason, back.way) == (True, "", "beside")
        await world.check_consistent()
        assert not servers(world)
        assert not list(world.directory.rglob("loading"))
        index.load(record.index)
    assert not await world.orch.fsck(NAME)
    await world.orch.pause(NAME)
    still = await world.create("next")
    await check_index(world, still)
    await world.revert("next", RevertFlag.RUNNING)
    await world.check_consistent()
    await world.orch.delete(NAME, "point")
    assert not os.path.exists(record.index)
    await world.check_no_orphans()


@pytest.mark.window("a file that the page server waits for")
async def test_servers_come_and_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed, twice in a row, and one that stands still, get a successor; the guest notices nothing."""
    await world.create("point")
    async with held(world, monkeypatch) as story:
        await story.runs()
        first = await story.server()
        os.kill(first, signal.SIGKILL)
        second = await story.server(first)
        os.kill(second, signal.SIGKILL)
        third = await story.server(second)
        await story.runs()
        monkeypatch.setattr(lazy, "STILL_SECONDS", 0.9)
        os.kill(third, signal.SIGSTOP)
        await story.server(third)
        monkeypatch.setattr(lazy, "STILL_SECONDS", 10.0)
        await story.runs()
        (running,) = await world.orch.operations(NAME, outcome="running")
        assert (running.kind, running.state) == (OperationKind.REVERT, State.LOADING)
    (back,) = story.done
    assert isinstance(back, RevertRecord)
    assert back.lazy
    await world.check_consistent()
    assert not servers(world)


def rot(record: SnapshotRecord) -> SnapshotRecord:
    """Damage a byte of a memory file that no device has to do with, and have nobody notice it before.

    It is in the middle of the pattern that the guest looks after, which is nearly all that there is. At either end
    are rings and tables: loading the devices can ask for those, before the guest runs.
    """
    assert record.memory is not None
    found = index.load(record.index)
    ram = max(found.rams, key=lambda ram: len(ram.kinds))
    full = [page for page, kind in enumerate(ram.kinds) if kind == index.FULL]
    offset = ram.offsets[full[len(full) // 2]]
    with open(record.memory.path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return attrs.evolve(record, memory=attrs.evolve(record.memory, identity=identity(record.memory.path)))


async def test_damaged(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not what was saved never gets to the guest: it ends, the old one runs on, and the damage is known.

    So it is where there is no index: who makes one sees the damage before.
    """
    record = await world.create("point")
    record = rot(record)
    aside = shutil.copy(record.index, world.directory / "aside")
    os.unlink(record.index)
    await catalog_of(world.orch).write(Change(updated=(record,)))
    with pytest.raises(DamagedSnapshot):
        await world.revert("point", RevertFlag.LAZY)
    await world.check_runs()
    shutil.move(aside, record.index)
    await catalog_of(world.orch).write(Change(updated=(record,)))
    before = await world.everything()
    async with held(world, monkeypatch) as story:
        with trio.fail_after(SECONDS):
            while not servers(world) and not story.done:  # noqa: ASYNC110 - the guest may have met the damage by now
                await trio.sleep(0.01)
    (error,) = story.done
    assert isinstance(error, OperationFailed)
    assert "is not what was saved, from byte" in str(error)
    assert "the new guest had run for" in str(error)
    assert "everything is as it was before" in str(error)
    await world.check_runs()
    del before["snapshots"]  # the file is read as a whole from now on
    await world.check_same(before)
    (found,) = await world.orch.fsck(NAME)
    assert found.trouble is Trouble.DAMAGED_SNAPSHOT


async def test_snaporch_is_killed(world: World) -> None:
    """Anywhere: as long as it is not complete the old guest runs on, and nothing of the new one is left."""
    await world.create("point")
    for place in ("after:begin_loading#1", State.LOADING, State.COMPLETE):
        before, old = await world.everything(), await world.pid()
        await killed(world, place, "revert", "point", "lazy")
        (ended,) = await world.orch.recover()
        if place == State.COMPLETE:
            assert await world.pid() != old
            await world.check_consistent()
        else:
            assert ended.state == State.ROLLED_BACK, place
            await world.check_runs(3)
            await world.check_same(before, place)
        assert not servers(world)
        await world.check_no_orphans()


async def test_not_lazy(make_world: MakeWorld) -> None:
    """RAM that others may share cannot come page by page: all of it is loaded first, and the answer says why."""
    shared = ["-object", "memory-backend-memfd,id=m,size=96M,share=on", "-machine", "memory-backend=m"]
    world = await make_world(extra_args=tuple(shared))
    await world.create("point")
    for flags, why in ((RevertFlag.LAZY, "m is shared"), (RevertFlag.LAZY | RevertFlag.PAUSED, "not to run")):
        back = await world.revert("point", flags)
        assert not back.lazy
        assert why in back.lazy_reason
    await world.orch.resume(NAME)
    await world.check_consistent()
