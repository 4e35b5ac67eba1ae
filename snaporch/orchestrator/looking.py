"""What there is, and how it is: nothing is changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.catalog import Catalog
from snaporch.catalog.known import Known
from snaporch.engine.context import Context
from snaporch.model.domain import Discovered, DomainInfo
from snaporch.model.record import Estimate, Event, VerifyReport
from snaporch.model.request import Strategy
from snaporch.operations import lifecycle as power
from snaporch.operations.discover import discover
from snaporch.operations.doctor import doctor, foretell
from snaporch.operations.recover import recover
from snaporch.operations.room import expected_room
from snaporch.operations.verify import intact, verify


@attrs.define
class Looking(Known):
    """The part of an orchestrator that looks."""

    _context: Context

    @property
    def _catalog(self) -> Catalog:
        return self._context.catalog

    @property
    def root(self) -> Path:
        """The directory that holds all."""
        return self._context.root

    async def _mended(self, domain: str) -> None:
        """Finish or undo what a crash left of this domain; a memory stream is waited for.

        Raises:
            Stranded: something cannot be undone, and nothing else is begun on top of it.
        """
        await recover(self._context, domain=domain)

    async def domains(self, after: str = "", limit: int | None = None) -> tuple[DomainInfo, ...]:
        """Return domains as they are this moment, by name; one that cannot be looked at says so in `problem`.

        Args:
            after: only those whose names come after this one.
            limit: no more than so many.
        """
        return await power.infos(self._context, await self._context.catalog.domains(after, limit))

    async def domain_info(self, name: str) -> DomainInfo:
        """Return a domain as it is this moment; also while an operation runs on it."""
        return await power.info(self._context, await self._context.catalog.domain(name))

    async def is_active(self, name: str) -> bool:
        """Return whether a domain has a process: whether there is any memory to take."""
        record = await self._context.catalog.domain(name)
        return await self._context.driver(record).present(record) is not None

    async def discover(self, driver: str = "") -> tuple[Discovered, ...]:
        """Return what could be attached to, and what stands in the way; nothing is touched by that.

        Args:
            driver: only by this driver; by default by all that can say it: of one that cannot be used here the
                answer has the reason.

        Raises:
            InvalidInput: there is no such driver.
            Unsupported: it cannot be used here, or cannot say it.
            HypervisorError: nobody answers it.
        """
        return await discover(self._context, driver)

    async def verify(
        self, domain: str, name: str, *, boot: bool = False, ids: Collection[str] = ()
    ) -> VerifyReport:
        """Read every file of a snapshot in full and compare it with what was saved.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            boot: also load it in a throw-away copy without network, and let that run for a few seconds.
            ids: as of `revert`.

        Returns:
            What was found; damage is an answer here, not an error.
        """
        return await verify(self._context, domain, name, boot=boot, ids=ids)

    async def intact(self, domain: str, name: str) -> bool:
        """Return whether a snapshot's files are there and are what was saved, as far as is quickly seen.

        `verify` reads them in full.
        """
        return await intact(self._context, await self._context.catalog.snapshot(domain, name))

    @asynccontextmanager
    async def events(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """Give a channel of everything that happens in this orchestrator from now on.

        A listener never holds anything up: one that is far behind misses progress events, and its channel ends
        rather than miss a change of state.
        """
        with self._context.events.listen() as channel:
            yield channel

    async def estimate(self, domain: str, strategy: Strategy = Strategy.BACKGROUND) -> Estimate:
        """Predict what a checkpoint would take, by the last ones and by how much the guest writes just now.

        A running guest is watched for a second, unless it would be paused all the while. Nothing is changed.

        Args:
            domain: the domain's name; it must be active.
            strategy: how its memory would be saved: BACKGROUND, PRECOPY, PAUSED or INTERNAL.

        Raises:
            Refused: the domain is inactive.
            InvalidInput: the strategy is none by which memory is saved.
        """
        return await foretell(self._context, domain, strategy)

    async def doctor(self, domain: str | None = None, *, measure: bool = True) -> dict[str, Any]:
        """Return what this host, and a domain, can do, and what prevents the rest.

        Args:
            domain: the domain's name, or None.
            measure: watch a running guest for a second, for which no operation may run on it; without, nothing is
                asked that could get into an operation's way.

        Raises:
            Busy: an operation runs on the domain, which is not to be asked by trying things out.
        """
        return await doctor(
            self._context, None if domain is None else await self.domain_info(domain), measure=measure
        )

    async def room_for(self, domains: Sequence[str], *, memory: bool) -> tuple[int, int]:
        """Return what a snapshot of domains is expected to take until the next one, and what is free for it.

        What it takes is memory, as large as that of the last ones (the median; without any, all RAM), where that is
        taken and they have a process; and what guests write to the new overlays: as much as they have written since
        the last snapshot.

        Returns:
            Bytes that it takes of the root's file system, and bytes that are free there.
        """
        return await expected_room(self._context, domains, memory=memory)
