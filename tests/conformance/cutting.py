"""Operations that are cut short at any of their steps, and what has to be right afterwards, in the simulator."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import trio
from trio.testing import MockClock

from snaporch import (
    CloneOptions,
    CreateFlag,
    CreateOptions,
    DeleteFlag,
    DeviceDisk,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    OperationFailed,
    Orchestrator,
    Refused,
    RevertFlag,
    Stranded,
    Strategy,
    open_orchestrator,
)
from snaporch.catalog import Catalog
from snaporch.drivers.local.guard import SILENCE
from snaporch.engine.verdict import END, Verdict
from snaporch.model.domain import Handle
from snaporch.operations import create
from snaporch.testing import (
    GuestModel,
    SimulatedDriver,
    SimulatedHost,
    SimulatedKill,
    SimulatedWorld,
    ThreadsHoldTime,
    open_simulated_world,
)

T = TypeVar("T")
Operation = Callable[[Orchestrator, str], Awaitable[object]]


@attrs.frozen
class Kind:
    """A kind of operation.

    Attributes:
        run: performs it.
        inactive: the domain is, before.
        strands: cut short, it may say so by an error: it is finished later, or it cannot give back what it took.
        changes: the snapshots that are there after it or, where they are there before, no longer.
        first: what is there before: nothing, a checkpoint (of a hypervisor that is hung since), a snapshot of the
            disks of the inactive domain, or a tree.
        fault: where it fails by itself (a place of the simulated driver), before or after that, and is rolled back.
        nth: of how many calls of that it is the last.
        alone: old and new guests cannot be there at one time; in between there is none.
    """

    run: Operation
    inactive: bool = False
    strands: bool = False
    changes: frozenset[str] = frozenset()
    first: str = ""
    fault: tuple[str, bool] | None = None
    nth: int = 1
    alone: bool = False


NEW = frozenset({"new"})
LONG = 1000.0
CLONES = ("copy-1", "copy-2")
HOWS = ("us", "both", "cancel", "stop")
TREE = ("root", "side", "point", "tip")  # side and point over root, tip over point


def _create(strategy: Strategy, flags: CreateFlag = CreateFlag.LIVE, *, late_stop: bool = False) -> Operation:
    options = CreateOptions(strategy=strategy, late_stop=late_stop)
    return lambda orch, domain: orch.create(domain, DomainSnapshot("new"), flags, options)


async def _inside(orch: Orchestrator, domain: str, name: str = "new") -> None:
    disks = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
    await orch.create(domain, DomainSnapshot(name, disks=disks))


def _delete(name: str = "point", flags: DeleteFlag = DeleteFlag(0)) -> Operation:  # noqa: B008 - immutable
    return lambda orch, domain: orch.delete(domain, name, flags)


def _revert(flags: RevertFlag = RevertFlag(0)) -> Operation:  # noqa: B008 - immutable
    return lambda orch, domain: orch.revert(domain, "point", flags)


def _clone(orch: Orchestrator, domain: str) -> Awaitable[object]:
    return orch.clone(domain, "point", "copy", CloneOptions(count=len(CLONES)))


async def _missed(orch: Orchestrator, domain: str) -> None:
    """Stop the guest a second after the point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create, "LEAD_SECONDS", -1.0)
        await _create(Strategy.BACKGROUND, late_stop=True)(orch, domain)


KINDS = {
    "create background": Kind(_create(Strategy.BACKGROUND), changes=NEW),
    "create late": Kind(_create(Strategy.BACKGROUND, late_stop=True), changes=NEW, first="checkpoint"),
    "create too late": Kind(_missed, changes=NEW, first="checkpoint"),
    "create precopy": Kind(_create(Strategy.PRECOPY), changes=NEW),
    "create paused": Kind(_create(Strategy.AUTO, CreateFlag(0)), changes=NEW),
    "create disks": Kind(_create(Strategy.AUTO, CreateFlag.DISK_ONLY), changes=NEW, inactive=True),
    "revert": Kind(_revert(), first="checkpoint"),
    "revert by force": Kind(_revert(RevertFlag.FORCE), strands=True, first="hung"),
    "revert one after the other": Kind(_revert(), first="checkpoint", alone=True),
    "revert to inactive": Kind(_revert(), first="disks"),
    **{
        f"delete {what}": Kind(
            _delete(name, flags), changes=frozenset(gone), first="tree", inactive=inactive, strands=True
        )
        for what, name, flags, gone, inactive in (
            ("in a chain", "point", DeleteFlag(0), {"point"}, False),
            ("what it runs on", "tip", DeleteFlag(0), {"tip"}, False),
            ("beside it", "side", DeleteFlag(0), {"side"}, False),
            ("a fork", "root", DeleteFlag(0), {"root"}, False),
            ("all but the root", "root", DeleteFlag.CHILDREN_ONLY, set(TREE[1:]), False),
            ("offline", "point", DeleteFlag(0), {"point"}, True),
            ("all offline", "root", DeleteFlag.CHILDREN, set(TREE), True),
        )
    },
    "flatten": Kind(lambda orch, domain: orch.flatten(domain), first="tree", strands=True),
    "create inside": Kind(_inside, changes=NEW),
    "revert inside": Kind(_revert(), first="inside"),
    "delete inside": Kind(_delete(), changes=frozenset({"point"}), first="inside", strands=True),
    "verify": Kind(lambda orch, domain: orch.verify(domain, "point", boot=True), first="checkpoint"),
    "clone": Kind(_clone, first="checkpoint"),
    "clone disks": Kind(_clone, first="disks"),
}
# Those that fail by themselves are cut in their rollback, too.
KINDS |= {
    f"{name}, {how}": attrs.evolve(KINDS[name], fault=fault, nth=nth, strands=True)
    for name, how, fault, nth in (
        ("create background", "failing", ("stream.seal", False), 1),
        ("create background", "failing last", ("stream.forget", True), 1),
        ("create precopy", "failing", ("stream.seal", False), 1),
        ("create paused", "failing", ("stream.seal", False), 1),
        ("create disks", "failing", ("storage.seal", False), 1),
        ("create inside", "failing", ("storage.seal_inside", False), 1),
        ("revert", "not loading", ("machine.load", False), 1),
        ("revert inside", "not loading", ("machine.load_inside", False), 1),
        ("revert inside", "failing", ("machine.load_inside", True), 1),
        ("verify", "not loading", ("machine.load", False), 1),
        ("clone", "not loading", ("machine.load", False), 2),
        ("clone", "failing", ("machine.resume", True), 2),
        # The first is the copy's, the second that of the new guest.
        ("revert one after the other", "not proved", ("machine.load", False), 1),
        ("revert one after the other", "not kept", ("stream.finished", False), 1),
        ("revert one after the other", "not loading", ("machine.load", False), 2),
        ("revert one after the other", "failing", ("machine.resume", True), 2),
    )
}


@attrs.define(eq=False)
class Steps(trio.abc.Instrument):
    """Counts steps of tasks, and kills at one of them.

    Attributes:
        at: which.
        kill: kills.
        count: how many there were.
        stood: a program was stopped, and its guest paused meanwhile.
        ends: it has said that the old guest is about to end.
    """

    at: float = float("inf")
    kill: Callable[[], None] = lambda: None
    count: int = 0
    stood: bool = False
    ends: bool = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - it is the same for all
        """Kill, or not."""
        self.count += 1
        if self.count == self.at:
            self.kill()


@attrs.frozen
class Cut:
    """What happens, and after which share of all steps: ``us`` dies, or ``both``, or ``cancel``, or ``stop``."""

    share: float
    how: str


@attrs.define
class Place:
    """Where somebody is killed: a call of the simulated driver; before it has an effect, or with that.

    Attributes:
        call: its name.
        before: it has none.
        nth: of how many calls it is the last.
    """

    call: str
    before: bool = False
    nth: int = 1

    def watch(self, host: SimulatedHost, kill: Callable[[], None]) -> None:
        """Kill there."""

        def come(call: str, _domain: str) -> None:
            self.nth -= call == self.call
            if call == self.call and self.nth == 0:
                kill()

        if self.before:
            host.on_call = come
        else:
            host.on_effect = come


async def go_on_later(host: SimulatedHost, driver: SimulatedDriver, steps: Steps) -> None:
    """Have a program that is stopped go on, long after the guards have seen to it that its guests run."""
    await trio.sleep(SILENCE + 1)
    found = [host.guest(process) for process in host.processes()]
    guests = [guest for guest in found if guest.changes]  # one that has never run is nobody's yet
    before = [guest.ticks for guest in guests]
    await trio.sleep(SILENCE)
    hung = any(host._get(process).hung for process in host.processes())
    steps.stood = bool(guests) and not hung and all(g.ticks <= n for g, n in zip(guests, before, strict=True))
    driver.go_on()


@contextmanager
def cut_short(
    host: SimulatedHost, driver: SimulatedDriver, how: str, at: float, place: Place | None = None
) -> Iterator[Steps]:
    """Have the body cut at a step, or at a call; a dead program's catalog takes nothing any more."""
    scope, transact, decide = trio.CancelScope(), Catalog.transact, Verdict.decide

    def kill() -> None:
        if how == "stop":
            driver.stop()
            trio.lowlevel.spawn_system_task(go_on_later, host, driver, steps)
            return
        driver.die()
        for process in host.processes() if how == "both" else ():
            host.crash(process)

    async def alive(catalog: Catalog, work: Callable[..., Any]) -> Any:
        await driver._client.check_works()
        return await transact(catalog, work)

    async def decides(verdict: Verdict, word: str) -> str:
        await driver._client.check_works()
        decided = await decide(verdict, word)
        steps.ends |= decided == END
        return decided

    steps = Steps(at, scope.cancel if how == "cancel" else kill)
    trio.lowlevel.add_instrument(steps)
    if place is not None:
        place.watch(host, steps.kill)
    with pytest.MonkeyPatch.context() as patch, scope:
        patch.setattr(Catalog, "transact", alive)
        patch.setattr(Verdict, "decide", decides)
        try:
            yield steps
        finally:
            trio.lowlevel.remove_instrument(steps)
            if place is not None:
                host.on_call = host.on_effect = lambda _call, _domain: None


async def perform(
    world: SimulatedWorld,
    operation: Operation,
    how: str,
    at: float = float("inf"),
    *,
    place: Place | None = None,
    strands: bool = False,
) -> int:
    """Run a program that does one thing to the world's domain and is cut; return how many steps there were."""
    call = partial(_called, operation, world.domain)
    return await perform_on(world.host, world.root, call, how, at, place=place, strands=strands)


async def _called(operation: Operation, domain: str, orch: Orchestrator) -> None:
    await operation(orch, domain)


async def perform_on(
    host: SimulatedHost,
    root: Path,
    call: Callable[[Orchestrator], Awaitable[object]],
    how: str,
    at: float = float("inf"),
    *,
    place: Place | None = None,
    strands: bool = False,
) -> int:
    """As `perform`, on whatever there is on a host."""
    driver = SimulatedDriver(host)
    try:
        async with open_orchestrator(root, drivers={driver.name: driver}, recover=False) as orch:
            with cut_short(host, driver, how, at, place) as steps:
                await call(orch)
    except* SimulatedKill:
        pass
    except* (Stranded, OperationFailed, Refused):
        if not strands and how != "stop":
            raise
    # From when its end is decided until then, a moment later, a guest stays paused: what is kept may be put back.
    assert steps.ends or not steps.stood, "its guest was paused while it was stopped"
    return steps.count


async def prepare(world: SimulatedWorld, kind: Kind) -> None:
    """Have the domain as the kind wants it."""
    orch, domain = world.orchestrator, world.domain
    for name in TREE if kind.first == "tree" else ():
        await orch.create(domain, DomainSnapshot(name), CreateFlag.LIVE)
        await trio.sleep(len(name))
        if name == "side":
            await orch.revert(domain, "root")
            await trio.sleep(1)
    if kind.inactive or kind.first == "disks":
        await orch.destroy(domain)
    if kind.first == "disks":
        await orch.create(domain, DomainSnapshot("point"), CreateFlag.DISK_ONLY)
        await world.start()
    elif kind.first == "inside":
        await _inside(orch, domain, "point")
    elif kind.first in {"checkpoint", "hung"}:
        await orch.create(domain, DomainSnapshot("point"), CreateFlag.LIVE)
    await trio.sleep(LONG)  # so that it can be told which of the two a guest is
    if kind.fault is not None:
        world.host.faults.add(kind.fault[0], after=kind.fault[1], nth=kind.nth)
    world.host.alone = kind.alone
    if kind.first == "hung":
        world.host.hang(world.process())


def new_world(root: Path) -> AbstractAsyncContextManager[SimulatedWorld]:
    """Make a world whose guest makes its disks' images larger all the time."""
    return open_simulated_world(root, host=SimulatedHost(model=GuestModel(disk_rate=1e6)))


async def steps_of(kind: Kind, root: Path) -> int:
    async with new_world(root) as world:
        await prepare(world, kind)
        return await perform(world, kind.run, "us", strands=kind.strands)


async def recover(orch: Orchestrator, _domain: str) -> None:
    await orch.recover()


async def check_clones(world: SimulatedWorld, *, complete: bool) -> None:
    """Check that all clones are there, each as a domain of the point, or none; discard them."""
    orch = world.orchestrator
    names = {info.name for info in await orch.domains()} - {world.domain}
    assert names == (set(CLONES) if complete else set())
    assert complete == bool(await orch.clones(world.domain))
    for name in names:
        clone = attrs.evolve(world, domain=name)
        if not world.host.processes(name):
            await clone.start()
        await clone.check_consistent()
        await orch.destroy(name)
        await orch.undefine(name, discard=True)


async def check_goes_on(world: SimulatedWorld, kind: Kind, old: Sequence[Handle] = ()) -> None:
    """Check that a guest that is there comes further, with nobody's help.

    Where old and new guests cannot be there at one time, that is the old one, until it has ended.
    """
    await trio.sleep(1)  # by then it has gone back, where it is to
    processes = world.host.processes()
    if kind.alone:
        processes = tuple(process for process in processes if process in old)
    guests = [world.host.guest(process) for process in processes]
    before = [guest.ticks for guest in guests]
    await trio.sleep(1)
    assert (
        kind.first == "hung"
        or not guests
        or any(guest.ticks > was for guest, was in zip(guests, before, strict=True))
    )


async def numbers(world: SimulatedWorld) -> dict[str, int]:
    """Return the number that all parts of each snapshot hold."""
    found = {}
    for record in await world.orchestrator.list(world.domain):
        held = {world.host.number(record.memory.path)} if record.memory else set()
        for disk in record.snapshot.disks:
            if disk.external:
                held.add(world.host.number(disk.disk.path))
            else:
                point = world.host.disk.image(disk.disk.path).point(disk.name)
                held |= {point.content} | ({point.memory.number} if point.memory else set())
        assert len(held) == 1, f"{record.name} holds {held}"
        found[record.name] = held.pop()
    return found


async def check(world: SimulatedWorld, before: Mapping[str, Any], *, complete: bool) -> None:
    """Check that an operation is complete or undone, and that no guest has lost anything."""
    orch, after = world.orchestrator, await world.everything()
    assert not list((world.root / "locks").glob("*.verdict*"))
    if not complete:
        assert after["files"] == before["files"]
    processes = world.host.processes()
    assert len(processes) <= 1
    if not processes:
        assert (await orch.domain_info(world.domain)).state is DomainState.INACTIVE
        await world.start()
    elif not complete:
        assert after == {**before, "files": after["files"]}
    await world.check_consistent()
    for record in await orch.list(world.domain):
        assert (await orch.verify(world.domain, record.name)).ok


@cache
def counted(kind: str) -> int:
    """Return how many steps a kind of operation has."""
    with tempfile.TemporaryDirectory() as root:
        return run(steps_of, KINDS[kind], Path(root))


def run(call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run a coroutine under virtual time."""
    clock = MockClock(autojump_threshold=0)
    return trio.run(partial(call, *arguments), clock=clock, instruments=[ThreadsHoldTime(clock)])
