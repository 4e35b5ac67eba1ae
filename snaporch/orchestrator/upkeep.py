"""What was cut short is mended, and what is not as it should be is found."""

from __future__ import annotations

import time
from contextlib import suppress

import attrs

from snaporch.engine.run import Operation
from snaporch.errors import Busy
from snaporch.model.finding import Finding
from snaporch.model.record import GivenUp, OperationKind, OperationRecord
from snaporch.operations.fsck import fsck
from snaporch.operations.give_up import give_up
from snaporch.operations.recover import recover, sweep
from snaporch.orchestrator.looking import Looking

JOURNAL_SECONDS, JOURNAL_OPERATIONS = 365 * 86_400.0, 100_000  # that the journal goes back, at most


@attrs.define
class Upkeep(Looking):
    """The part of an orchestrator that keeps a root in order."""

    async def recover(
        self, *, domain: str | None = None, patience: float = float("inf")
    ) -> tuple[OperationRecord, ...]:
        """Finish or undo what a crash left; also done when an orchestrator is opened. Idempotent.

        Args:
            domain: only what was done to this one.
            patience: seconds to wait for the memory stream of a checkpoint that is still going; one that takes
                longer is left as it is, for the next call, or for the next operation on its domain.

        Raises:
            Stranded: something still cannot be undone.
        """
        ended = await recover(self._context, domain=domain, patience=patience)
        if patience == float("inf") and domain is None:
            for record in await self._context.catalog.domains():
                with suppress(Busy):
                    async with self._context.locked(Operation(OperationKind.RECOVER, record.name, "")):
                        await sweep(self._context, await self._context.catalog.domain(record.name), end=True)
        return ended

    async def prune_journal(self, seconds: float = JOURNAL_SECONDS, most: int = JOURNAL_OPERATIONS) -> int:
        """Have the journal forget operations that ended so long ago, and the oldest of too many.

        Args:
            seconds: how far back it goes.
            most: how many it has.

        Returns:
            How many were forgotten (opening does it, too): a thousand at most, so that nobody waits for it long.
        """
        return await self._context.catalog.prune_journal(time.time() - seconds, most)

    def leave(self) -> None:
        """Leave creates, from now on, as soon as their point is held: for a process that is about to end.

        The call raises `Left`. The hypervisor goes on with the operation, and the next process that opens the root
        completes it.
        """
        self._context.engine.leave()

    async def fsck(self, domain: str | None = None, *, repair: bool = False) -> tuple[Finding, ...]:
        """Compare the catalog, the files and the running hypervisors, and say what is not as it should be.

        Args:
            domain: only this one; by default all.
            repair: do what is certain: recover, end processes that nobody knows, remove files that snaporch made
                and that nothing needs. No image is written to, and no file of anybody else's is removed.

        Returns:
            What was found, with what was repaired; damage is an answer here, not an error.
        """
        return await fsck(self._context, domain, repair=repair)

    async def give_up(self, operation: str, *, dry_run: bool = False) -> GivenUp:
        """End an operation that was cut short and that `recover` cannot mend; nothing is removed by that.

        Args:
            operation: its id.
            dry_run: only say what would be kept and what would be lost.

        Raises:
            NotFound: there is no such operation.
            Refused: it has ended; or a domain of it runs and does not answer.
            Busy: it still runs.
        """
        return await give_up(self._context, operation, dry_run=dry_run)
