"""The guard of a simulated guest: it acts when the program that posted it is killed."""

from __future__ import annotations

from snaporch.drivers.base import Guard
from snaporch.drivers.simulated.client import Client
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.models import Process


class SimulatedGuard(Guard):
    """See Guard."""

    def __init__(
        self, client: Client, process: SimulatedProcess, *, keep_stream: bool, rival: Process | None, thaw: bool
    ) -> None:
        self._client = client
        self._process = process
        self._keep_stream = keep_stream
        self._rival = rival
        self._thaw = thaw

    async def post(self) -> None:
        """See Guard."""
        await self._client.call("guard.post", self._process.name, lambda: self._client.on_death.add(self._act))

    async def dismiss(self) -> None:
        """See Guard."""
        await self._client.call(
            "guard.dismiss", self._process.name, lambda: self._client.on_death.discard(self._act)
        )

    def _act(self) -> None:
        """Do what the guard is for."""
        if self._rival is not None and (rival := self._client.host.find(self._rival)) is not None:
            rival.settle()
            rival.end("its guard has ended it")
        self._process.settle()
        if self._process.ended or self._process.hung:
            return
        migration = self._process.migration
        if migration is not None and not self._keep_stream:
            migration.cancel()
        self._process.cont()
        if self._thaw:
            self._process.thaw()
