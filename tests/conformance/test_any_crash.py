"""Whatever is killed or cancelled, at whichever await, and recovery too: complete, or as it was before.

An operation is cancelled, or snaporch is killed, or the hypervisor with it, at any step of any of its tasks (Trio
says when one is taken: after each await). What follows in a program that is dead reaches neither the host nor the
catalog.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from snaporch import (
    CreateFlag,
    CreateOptions,
    DomainSnapshot,
    DomainState,
    Orchestrator,
    RevertFlag,
    Stranded,
    Strategy,
    open_orchestrator,
)
from snaporch.catalog.store import Catalog
from snaporch.states import State
from snaporch.testing import (
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
        strands: it takes away what cannot be brought back.
        first: the snapshot that is there before: none, a checkpoint (of a hypervisor that is hung since), or one of
            the disks of the inactive domain.
    """

    run: Operation
    inactive: bool = False
    strands: bool = False
    first: str = ""


def _create(strategy: Strategy, flags: CreateFlag = CreateFlag.LIVE) -> Operation:
    options = CreateOptions(strategy=strategy)
    return lambda orch, domain: orch.create(domain, DomainSnapshot("new"), flags, options)


def _revert(flags: RevertFlag = RevertFlag(0)) -> Operation:  # noqa: B008 - immutable
    return lambda orch, domain: orch.revert(domain, "point", flags)


KINDS = {
    "create background": Kind(_create(Strategy.BACKGROUND)),
    "create precopy": Kind(_create(Strategy.PRECOPY)),
    "create paused": Kind(_create(Strategy.AUTO, CreateFlag(0))),
    "create disks": Kind(_create(Strategy.AUTO, CreateFlag.DISK_ONLY), inactive=True),
    "revert": Kind(_revert(), first="checkpoint"),
    "revert by force": Kind(_revert(RevertFlag.FORCE), strands=True, first="hung"),
    "revert to inactive": Kind(_revert(), first="disks"),
    "verify": Kind(lambda orch, domain: orch.verify(domain, "point", boot=True), first="checkpoint"),
}


@attrs.define(eq=False)
class Steps(trio.abc.Instrument):
    """Counts steps of tasks, and kills at one of them."""

    at: float = float("inf")
    kill: Callable[[], None] = lambda: None
    count: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - it is the same for all
        """Kill, or not."""
        self.count += 1
        if self.count == self.at:
            self.kill()


@attrs.frozen
class Cut:
    """What happens, and after which share of all steps: ``us`` dies, or ``both``, or ``cancel``."""

    share: float
    how: str


@contextmanager
def cut_short(host: SimulatedHost, driver: SimulatedDriver, how: str, at: float) -> Iterator[Steps]:
    """Have the body cut at a step; where the program dies of that, its catalog takes nothing any more."""
    scope, transact = trio.CancelScope(), Catalog.transact

    def kill() -> None:
        driver.die()
        for process in host.processes() if how == "both" else ():
            host.crash(process)

    async def alive(catalog: Catalog, work: Callable[..., Any]) -> Any:
        driver._client.check_alive()
        return await transact(catalog, work)

    steps = Steps(at, scope.cancel if how == "cancel" else kill)
    trio.lowlevel.add_instrument(steps)
    with pytest.MonkeyPatch.context() as patch, scope:
        patch.setattr(Catalog, "transact", alive)
        try:
            yield steps
        finally:
            trio.lowlevel.remove_instrument(steps)


async def perform(
    world: SimulatedWorld, operation: Operation, how: str, at: float = float("inf"), *, strands: bool = False
) -> int:
    """Run a program that does one thing to the world's domain and is cut at a step; return how many there were."""
    call = partial(_called, operation, world.domain)
    return await perform_on(world.host, world.root, call, how, at, strands=strands)


async def _called(operation: Operation, domain: str, orch: Orchestrator) -> None:
    await operation(orch, domain)


async def perform_on(
    host: SimulatedHost,
    root: Path,
    call: Callable[[Orchestrator], Awaitable[object]],
    how: str,
    at: float = float("inf"),
    *,
    strands: bool = False,
) -> int:
    """As `perform`, on whatever there is on a host."""
    driver = SimulatedDriver(host)
    try:
        async with open_orchestrator(root, drivers={driver.name: driver}, recover=False) as orch:
            with cut_short(host, driver, how, at) as steps:
                await call(orch)
    except* SimulatedKill:
        pass
    except* Stranded:
        if not strands:
            raise
    return steps.count


async def prepare(world: SimulatedWorld, kind: Kind) -> None:
    """Have the domain as the kind wants it."""
    orch, domain = world.orchestrator, world.domain
    if kind.inactive or kind.first == "disks":
        await orch.destroy(domain)
    if kind.first == "disks":
        await orch.create(domain, DomainSnapshot("point"), CreateFlag.DISK_ONLY)
        await world.start()
    elif kind.first:
        await orch.create(domain, DomainSnapshot("point"), CreateFlag.LIVE)
    if kind.first == "hung":
        world.host.hang(world.process())


@attrs.frozen
class Story:
    """An operation that is cut, and then its recovery, once or more."""

    kind: str
    cuts: tuple[Cut, ...]


@st.composite
def stories(draw: st.DrawFn) -> Story:
    cuts = st.builds(Cut, st.floats(0, 1), st.sampled_from(["us", "both", "cancel"]))
    return Story(draw(st.sampled_from(list(KINDS))), tuple(draw(st.lists(cuts, min_size=1, max_size=3))))


async def steps_of(kind: Kind, root: Path) -> int:
    async with open_simulated_world(root) as world:
        await prepare(world, kind)
        return await perform(world, kind.run, "us")


async def recover(orch: Orchestrator, _domain: str) -> None:
    await orch.recover()


async def tell(story: Story, root: Path, steps: int) -> None:
    """Cut, recover, and check what has become of everything."""
    kind = KINDS[story.kind]
    async with open_simulated_world(root) as world:
        await prepare(world, kind)
        before = await world.everything()
        for number, cut in enumerate(story.cuts):
            operation = recover if number else kind.run
            await perform(world, operation, cut.how, 1 + int(cut.share * steps), strands=kind.strands)
        assert {record.state for record in await world.orchestrator.recover()} <= {
            State.COMPLETE,
            State.ROLLED_BACK,
        }
        assert not await world.orchestrator.recover()
        await check(world, kind, before)


async def check(world: SimulatedWorld, kind: Kind, before: Mapping[str, Any]) -> None:
    """Check that an operation is complete or undone, and that no guest has lost anything."""
    orch, after = world.orchestrator, await world.everything()
    complete = await is_complete(orch, world.domain, kind)
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


async def is_complete(orch: Orchestrator, domain: str, kind: Kind) -> bool:
    """Return whether the operation is; one that changes nothing never is."""
    subject = "point" if kind.first else "new"
    last = (await orch.operations(domain))[-1:]
    complete = [(record.subject, record.state) for record in last] == [(subject, State.COMPLETE)]
    assert {record.name for record in await orch.list(domain)} == ({subject} if complete or kind.first else set())
    return complete and last[0].kind not in {"verify", "create" if kind.first else ""}


@cache
def counted(kind: str) -> int:
    """Return how many steps a kind of operation has."""
    with tempfile.TemporaryDirectory() as root:
        return run(steps_of, KINDS[kind], Path(root))


def run(call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run a coroutine under virtual time."""
    clock = MockClock(autojump_threshold=0)
    return trio.run(partial(call, *arguments), clock=clock, instruments=[ThreadsHoldTime(clock)])


@settings(max_examples=60, deadline=None)
@given(stories())
@example(Story("revert by force", (Cut(0.5, "us"),)))
@example(Story("revert by force", (Cut(0.5, "both"), Cut(0.3, "us"))))
def test_any_crash(story: Story) -> None:
    """Cut anywhere, and its recovery again: nothing is left, nothing is lost, and there is nothing more to do."""
    steps = counted(story.kind)
    with tempfile.TemporaryDirectory() as root:
        run(tell, story, Path(root), steps)
