"""New domains are made from snapshots of others."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import attrs

from snaporch.model.record import CloneRecord
from snaporch.model.request import CloneOptions
from snaporch.operations.clone import clone, clone_names
from snaporch.operations.pins import pins
from snaporch.orchestrator.looking import Looking


@attrs.define
class Cloning(Looking):
    """The part of an orchestrator that clones."""

    async def clone(
        self,
        domain: str,
        name: str,
        new: str,
        options: CloneOptions | None = None,
        *,
        ids: Collection[str] = (),
    ) -> tuple[CloneRecord, ...]:
        """Make new domains from a snapshot of another one: on overlays over its images, with its memory.

        They are domains like any other. The snapshot cannot be deleted while a clone reads its images. With
        memory a guest keeps the network addresses and ids that it had at the point, whatever runs beside it:
        docs/how-to/clones.md lists what is there twice then. Without memory it gets new ones from its machine.

        Args:
            domain: the original's name; it may do whatever it does.
            name: the snapshot's.
            new: the clone's name; with a count, what the names of all begin with: ``new-1`` and so on.
            options: how many, what they do, whether they may be in the original's network.
            ids: as of `revert`.

        Returns:
            The clones, all of them; the catalog has them.

        Raises:
            Refused: before anything was touched: a name is taken, the host has too little memory or room, or there
                is something of the original that cannot be there twice.
            Busy: another operation runs on the domain.
            OperationFailed: none was made, and nothing of them is left. So it is when the call is cancelled.
            Stranded: something of them could not be removed; `recover` does it.
        """
        options = options or CloneOptions()
        names = clone_names(new, options.count)
        for each in (domain, *names):
            await self._mended(each)
        return await clone(self._context, domain, name, names, options, ids=ids)

    async def clones(self, domain: str) -> Mapping[str, tuple[str, ...]]:
        """Return, by name, those of a domain's snapshots that clones need, each with these clones' names."""
        records = await self._context.catalog.readable_snapshots(domain)
        return await pins(self._context, records)
