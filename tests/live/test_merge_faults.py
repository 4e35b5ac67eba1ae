"""Whatever cuts a merge of whatever kind short, nothing is lost, and it is finished afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.drivers.local.process import command_line, find_processes
from snaporch.drivers.qmp import blockjob
from snaporch.engine.states import State
from snaporch.errors import Stranded
from snaporch.model.domain import DomainState
from snaporch.model.merge import MergeStep
from snaporch.model.record import Event
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import CreateFlag
from tests.live.diskfault import EIO, ENOSPC, DiskFault
from tests.live.world import MIB, NAME, SECONDS, MakeWorld, World, when

pytestmark = pytest.mark.live

WRITES = {"memory": 40 * MIB, "append": "ram=2 dirty=1 rate=100 report=20 bulk=6 span=12"}
SLOWLY = MergeOptions(bandwidth=MIB)
LITTLE, MORE, MUCH = MIB, 2 * MIB, 7 * MIB  # of writes


@attrs.frozen
class Kind:
    """A kind of merge, and how it comes about.

    Attributes:
        name: for people.
        snapshots: taken one after the other, each once the guest has written so much since the last.
        doomed: which of them is deleted.
        step: what the plan then has for that disk: kind, where, active.
        ground: the domain has a snapshot before it is started: the image over that has little in it.
    """

    name: str
    snapshots: tuple[tuple[str, int], ...]
    doomed: str
    step: tuple[str, str, bool]
    ground: bool = False


KINDS = (
    Kind("active commit with pivot", (("a", 0),), "a", ("commit", "live", True)),
    Kind("live commit", (("a", 0), ("b", MORE)), "a", ("commit", "live", False)),
    Kind("offline commit", (("a", 0), ("b", MORE)), "a", ("commit", "offline", False)),
    Kind("live stream", (("a", MORE), ("b", MUCH)), "a", ("stream", "live", False), ground=True),
    Kind("offline stream", (("a", MORE), ("b", MUCH)), "a", ("stream", "offline", False), ground=True),
)


async def written(world: World, size: int) -> None:
    """Wait until the guest has written so much to what its first disk is on."""
    active = (await world.orch.domain_info(NAME)).disks[0].active
    with trio.fail_after(SECONDS):
        while Path(active).stat().st_blocks * 512 < size:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.02)


async def arrange(world: World, kind: Kind) -> MergeStep:
    """Have the domain as the kind wants it; return its first merge."""
    if there := [record.name for record in await world.orch.list(NAME)]:
        await world.orch.delete(NAME, there)
    if kind.ground and await world.state() is DomainState.RUNNING:
        await world.orch.destroy(NAME)
    if kind.ground:
        await world.create("ground", flags=CreateFlag.DISK_ONLY)
    if await world.state() is DomainState.INACTIVE:
        await world.orch.start(NAME)
    for name, size in kind.snapshots:
        await written(world, size)
        await world.create(name)
    await written(world, LITTLE)
    if kind.step[1] == "offline":
        await world.orch.destroy(NAME)
    step = (await world.orch.delete(NAME, kind.doomed, dry_run=True)).steps[0]
    assert (step.kind, step.where, step.active) == kind.step, kind.name
    return step


def under_way(event: Event) -> bool:
    return event.state == State.MERGING and event.done > 0


async def begun(
    world: World, kind: Kind, strike: Callable[[], object], at: Callable[[Event], bool] = under_way
) -> None:
    """Delete, strike in the middle of the first merge, and be told that it was cut short."""
    async with trio.open_nursery() as nursery:
        await nursery.start(when, world.orch, at, strike)
        with pytest.raises(Stranded):
            await world.orch.delete(NAME, kind.doomed, options=SLOWLY)
        nursery.cancel_scope.cancel()


async def cancelled(world: World, kind: Kind, _: MergeStep, __: DiskFault) -> None:
    with trio.CancelScope() as scope:
        await begun(world, kind, scope.cancel)


def tools(image: str) -> list[int]:
    """Return the qemu-img processes that merge an image."""
    found = []
    for pid in find_processes("-p"):
        with suppress(OSError):  # it has just ended
            if any(image in word for word in command_line(pid)):
                found.append(pid)
    return found


async def killed(world: World, kind: Kind, step: MergeStep, _: DiskFault) -> None:
    async def strike() -> None:
        """Kill qemu-img as soon as it is there: it may have less to move than it tells of at once."""
        with trio.fail_after(SECONDS):
            while not (found := tools(step.top)):  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.001)
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    if step.where == "live":
        pid = await world.pid()
        await begun(world, kind, lambda: os.kill(pid, signal.SIGKILL))
    else:
        await begun(world, kind, strike, lambda event: event.state == State.MERGING)


def failing(code: int) -> Callable[[World, Kind, MergeStep, DiskFault], Awaitable[None]]:
    async def strike(world: World, kind: Kind, step: MergeStep, fault: DiskFault) -> None:
        with fault.failing(step.survivor, code) as words, pytest.raises(Stranded, match=words):
            await world.orch.delete(NAME, kind.doomed)

    return strike


FAULTS = {"7.2": (cancelled, failing(EIO)), "10.0": (failing(ENOSPC), killed)}


@asynccontextmanager
async def finished_afterwards(world: World, kind: Kind) -> AsyncIterator[None]:
    """Assert that what the body cuts short is finished by `recover`, and that all is then as it should be."""
    yield
    running = await world.state() is DomainState.RUNNING
    if running:
        await world.check_runs(2)
    (ended,) = await world.orch.recover()
    assert (ended.kind, ended.subject, ended.state) == ("delete", kind.doomed, State.COMPLETE)
    assert kind.doomed not in [record.name for record in await world.orch.list(NAME)]
    await world.check_no_orphans()
    for record in await world.orch.list(NAME):
        report = await world.orch.verify(NAME, record.name)
        assert report.ok, report.problems
    if running:
        await world.check_runs(2)
    else:
        await world.check_nothing_lost()


@pytest.mark.window("the rate of the merge")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
async def test_cut_short(
    make_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Cancelled, EIO, no space, killed: half of them on each QEMU, which are alike in this."""
    fault = DiskFault.installed(tmp_path, monkeypatch)
    monkeypatch.setattr(blockjob, "STAGNANT_SECONDS", 2.0)  # its guest outruns SLOWLY, which recovery keeps to
    world = await make_world(**WRITES)
    for strike in FAULTS[world.qemu.version]:
        step = await arrange(world, kind)
        async with finished_afterwards(world, kind):
            await strike(world, kind, step, fault)
    for record in (await world.orch.list(NAME))[-1:]:  # it has all others below it
        # Beside the old guest, whose QEMU leaves an image open for writing where a merge could not.
        await world.revert(record.name)
        await world.check_runs(2)
