"""The proof of a revert: a throw-away copy shows that the point loads, before the old guest ends."""

from __future__ import annotations

import os

import attrs
import structlog

from snaporch.engine.run import perform
from snaporch.engine.ways import WAYS
from snaporch.errors import Refused, Unsupported
from snaporch.model.record import EventKind
from snaporch.model.way import Way
from snaporch.operations.checks import check_ram
from snaporch.operations.restoring import in_their_places
from snaporch.operations.revert_undo import RevertUndo
from snaporch.operations.trial import Trial, plan_trial

_log = structlog.get_logger("snaporch")


@attrs.define
class Proving(RevertUndo):
    """The part of a revert that tries the point in a copy."""

    async def _copy(self) -> Trial:
        """Return the throw-away copy; always the same one."""
        plan = plan_trial(
            self.plan.domain,
            self.plan.snapshot,
            directory=os.path.dirname(self.plan.directory),
            operation=f"p-{self.plan.operation}",
        )
        plan = await in_their_places(self.driver, plan)
        return Trial(plan, self.operation, self.context, self.driver, None, rival=self.old is not None)

    async def prove(self) -> None:
        """See a throw-away copy of the guest load the point, and run.

        Where the old guest is given up anyway and there can be no copy, that is said and gone on without.
        """
        if self.plan.way is Way.DISPLACE and (why := await self._unprovable()):
            text = f"{self.name}: {self.plan.snapshot.name} was not tried in a copy beforehand: {why}"
            self.context.events.publish(self.operation.event(EventKind.NOTE, text=text))
            _log.warning("not tried beforehand", domain=self.name, why=why)
            return
        proof = await self._copy()
        for phase in WAYS[Way.VERIFY].phases:
            await perform(phase, [proof])
        await proof.clean_up()

    async def _unprovable(self) -> str:
        """Return why there can be no throw-away copy, or an empty string."""
        if self.plan.snapshot.memory is None:
            return "it has no memory that could fail to load"
        try:
            await self._copy()
            await check_ram(self.driver, self.plan.snapshot.definition.memory)
        except Refused as error:
            return str(error)
        return ""

    async def end_proof(self) -> None:
        """Remove the copy, wherever it was; also a compensation."""
        try:
            proof = await self._copy()
        except Unsupported:
            return  # there never was one
        await proof.find()
        await proof.clean_up()
