"""What is known of snapshots and operations: it is read from the catalog alone, and no hypervisor is asked."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs

from snaporch.catalog.page import Page
from snaporch.catalog.root import real_root
from snaporch.catalog.schema import CATALOG
from snaporch.catalog.store import Catalog, open_catalog
from snaporch.model.finding import Unreadable
from snaporch.model.record import OperationRecord, SnapshotRecord


class Known(abc.ABC):
    """The part of an orchestrator that reads its catalog."""

    __slots__ = ()

    @property
    @abc.abstractmethod
    def _catalog(self) -> Catalog: ...

    async def list(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """Return a domain's snapshots, oldest first; what cannot be read is in `unreadable`."""
        await self._catalog.domain(domain)
        return await self._catalog.readable_snapshots(domain)

    async def current(self, domain: str) -> str | None:
        """Return the name of the snapshot that a domain descends from now; None where there is none."""
        return (await self._catalog.domain(domain)).current

    async def show(self, domain: str, name: str) -> SnapshotRecord:
        """Return one snapshot."""
        return await self._catalog.snapshot(domain, name)

    async def tree(self, domain: str) -> Mapping[str | None, tuple[str, ...]]:
        """Return the names of each snapshot's children; those without a parent are under None."""
        children: dict[str | None, tuple[str, ...]] = {}
        for record in await self.list(domain):
            children[record.parent] = (*children.get(record.parent, ()), record.name)
        return children

    async def unreadable(self, domain: str | None = None, kind: str | None = None) -> tuple[Unreadable, ...]:
        """Return what there is of one domain, or of all, whose record cannot be read, with the reason.

        `kind` is ``domain``, ``snapshot`` or ``operation``; by default all are looked at.

        A record that is damaged, or that a newer snaporch has written, blocks only what depends on it.
        """
        return await self._catalog.unreadable(domain, kind)

    async def operations(
        self,
        domain: str | None = None,
        *,
        last: int | None = None,
        since: float | None = None,
        outcome: str | None = None,
    ) -> tuple[OperationRecord, ...]:
        """Return running and past operations, oldest first.

        Args:
            domain: only of this one.
            last: only so many, the newest.
            since: only those that began at this instant or later, in seconds since the epoch.
            outcome: ``complete``, ``rolled-back`` or ``stranded``; ``running``: those that have not ended;
                ``failed``: those that ended otherwise than complete.
        """
        if domain is not None:
            await self._catalog.domain(domain)
        page = Page(-1 if last is None else last, domain=domain, since=since, outcome=outcome)
        return (await self._catalog.operations_page(page))[::-1]


def catalog_of(known: Known) -> Catalog:
    """Return the catalog itself, for what is built on top of it here: no part of the public interface."""
    return known._catalog  # noqa: SLF001 - its own module


@attrs.define
class _Reader(Known):
    _catalog: Catalog


@asynccontextmanager
async def open_known(root: Path | str | None) -> AsyncIterator[Known]:
    """Read the catalog of a root beside whoever works with it; nothing is written, and no lock is waited for.

    Raises:
        InvalidInput: this cannot be a root.
    """
    async with open_catalog(real_root(root) / CATALOG, read_only=True) as catalog:
        yield _Reader(catalog)
