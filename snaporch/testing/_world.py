"""What a check is given: one domain with all that is around it, and ways to look at it and to break it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Protocol

from snaporch.engine.states import State
from snaporch.model.request import Strategy
from snaporch.model.rfc import DomainSnapshot
from snaporch.orchestrator import Orchestrator


class World(Protocol):
    """A domain for one check.

    A check gets it running, with two or more writable disks and without snapshots, and may leave it in any state.
    Its guest counts: it writes one growing number to RAM and to all disks, over and over, and finds out by itself
    when these are not of one point. Methods named ``check_`` raise AssertionError.
    """

    @property
    def orchestrator(self) -> Orchestrator:
        """The orchestrator, with the driver that is checked; nobody else uses it."""

    @property
    def domain(self) -> str:
        """The domain's name."""

    @property
    def slow(self) -> int:
        """A bandwidth, in bytes a second, at which the guest's memory takes a second or more; 0: it always does."""

    def of(self, domain: str) -> World:
        """Return the same world about a clone of the domain: `number`, `go_on`, `check_consistent` are of that."""

    async def number(self) -> int:
        """Return how far the running guest has come, as it says itself; never more than is on its disks."""

    async def go_on(self) -> None:
        """Return when the guest has come clearly further: more than it does between two calls of `number`."""

    async def check_consistent(self) -> None:
        """Check that the guest runs and goes on, and that its memory and all its disks are of one point."""

    async def check_still(self) -> None:
        """Check that the guest is paused."""

    async def start(self) -> None:
        """Start the domain, which is inactive, by the orchestrator, and return when its guest counts."""

    async def everything(self) -> Mapping[str, object]:
        """Return what a rollback must leave as it was: files, processes, nodes, settings; not logs."""

    async def damage(self, path: str) -> None:
        """Change the content of a file, but not its size."""

    def one_at_a_time(self) -> AbstractContextManager[None]:
        """While the body runs, let two guests of the domain not be there at one time, but for a throw-away copy."""

    def troubles(self, strategy: Strategy) -> Sequence[str]:
        """Return names of what can be made to go wrong in a create of a strategy: each fails it without fail."""

    def break_next(self, trouble: str) -> AbstractAsyncContextManager[DomainSnapshot]:
        """While the body runs, let a create meet some trouble; yields what that create is to be asked for.

        After the body the trouble is over, and nothing is left of it.
        """


class CrashWorld(World, Protocol):
    """A world in which snaporch can be killed."""

    async def kill_in(self, strategy: Strategy, state: State, name: str) -> None:
        """Let another snaporch, on the same root, create a snapshot; kill it (SIGKILL) as soon as it is in a state.

        Returns when that is gone, and all its locks with it. What it asked of the hypervisor goes on.
        """
