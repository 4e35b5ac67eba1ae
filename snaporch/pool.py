"""A pool of clones that are ready: each is given out once, fresh from its snapshot, and is gone afterwards.

    async with open_pool(orch, "parser", "waiting", size=4) as pool:
        while True:
            async with pool.take() as clone:
                ...  # feed the guest of domain clone.name

For a loop that needs the same state again and again (fuzzing, tests, untrusted files): nobody waits for a guest to
go back, as the next one is made while this one is used. A clone stands at the point until it is taken.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import structlog
import trio

from snaporch.errors import InvalidInput, NotFound, SnaporchError, leaves
from snaporch.model.domain import DomainState
from snaporch.model.record import CloneRecord
from snaporch.model.request import CloneOptions
from snaporch.operations.clone import clone_names
from snaporch.protocol import AnyOrchestrator

END_SECONDS = 60.0  # for clones to be removed when the pool is given up

_log = structlog.get_logger("snaporch")


@attrs.define
class Pool:
    """See the module; `open_pool` makes one.

    Attributes:
        domain: the original.
        snapshot: the point that each clone goes on from.
        size: how many are kept ready.
    """

    domain: str
    snapshot: str
    size: int
    _orch: AnyOrchestrator
    _name: str
    _nursery: trio.Nursery
    _send: trio.MemorySendChannel[CloneRecord]
    _ready: trio.MemoryReceiveChannel[CloneRecord]
    _places: trio.Semaphore
    _made: set[str] = attrs.field(factory=set)

    @asynccontextmanager
    async def take(self) -> AsyncIterator[CloneRecord]:
        """Give a clone, whose guest begins to run now, for as long as the body lasts; waits until there is one.

        The domain may be used as any other. Afterwards it is ended and removed with its snapshots, whatever the
        body has raised; that is waited for at the pool's end only.

        Raises:
            SnaporchError: none could be made: as of `Orchestrator.clone`. The pool has ended then.
        """
        clone = await self._ready.receive()
        self._places.release()  # the next one is made meanwhile
        try:
            state = (await self._orch.resume(clone.name)).state
            yield attrs.evolve(clone, state=state)
        finally:
            self._made.discard(clone.name)
            self._nursery.start_soon(self._remove, clone.name)

    async def _fill(self) -> None:
        """Make clones, as many at a time as there is room for, until the pool ends."""
        number = 0
        while True:
            await self._places.acquire()
            count, number = 1, number + 1
            while count < self.size and self._places.value:
                self._places.acquire_nowait()
                count += 1
            options = CloneOptions(count, DomainState.PAUSED, wait=True)
            new = f"{self._name}-{number}"
            self._made.update(clone_names(new, count))  # a cancellation may come when they are complete
            for each in await self._orch.clone(self.domain, self.snapshot, new, options):
                await self._send.send(each)

    async def _remove(self, name: str) -> None:
        """Remove a clone; what stands in the way of that is logged, and the domain stays."""
        with trio.move_on_after(END_SECONDS, shield=True):
            try:
                await self._orch.destroy(name)
                if snapshots := [snapshot.name for snapshot in await self._orch.list(name)]:
                    await self._orch.delete(name, snapshots)
                await self._orch.undefine(name, discard=True)
            except NotFound:
                pass  # it was never made, or whoever had it has removed it
            except SnaporchError as error:
                _log.warning("a clone of a pool stays", domain=name, error=str(error))

    async def _remove_all(self) -> None:
        """Remove what nobody has taken."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for name in tuple(self._made):
                    nursery.start_soon(self._remove, name)


@asynccontextmanager
async def open_pool(
    orch: AnyOrchestrator, domain: str, snapshot: str, *, size: int = 2, name: str = ""
) -> AsyncIterator[Pool]:
    """Keep clones of a snapshot ready, paused at its point; when the body ends, all of them are gone.

    A program that is killed leaves them: they are domains of the root, whose names begin with `name`, and stay
    until `domain undefine --discard`.

    Args:
        orch: an orchestrator or a client.
        domain: the original's name.
        snapshot: the snapshot's.
        size: how many are kept ready: so many are made at a time, and each needs the guest's RAM.
        name: what the clones' names begin with; by default ``DOMAIN-pool-`` and something that no other pool has.

    Raises:
        SnaporchError: clones cannot be made: as of `Orchestrator.clone`.
    """
    if size < 1:
        raise InvalidInput(f"a pool of {size}: at least one clone is kept ready")
    send, ready = trio.open_memory_channel[CloneRecord](size)
    name = name or f"{domain[:40]}-pool-{secrets.token_hex(4)}"
    try:
        async with trio.open_nursery() as removers:
            pool = Pool(domain, snapshot, size, orch, name, removers, send, ready, trio.Semaphore(size))
            try:
                async with trio.open_nursery() as makers:
                    makers.start_soon(pool._fill)  # noqa: SLF001 - its own
                    yield pool
                    makers.cancel_scope.cancel()
            finally:
                await pool._remove_all()  # noqa: ASYNC102, SLF001 - it shields itself
    except BaseExceptionGroup as group:
        if len(found := list(leaves(group))) == 1:
            raise found[0] from None
        raise
