"""A lazy revert: the new guest runs before its memory is there, and the old one can run again until all of it is.

    begin_loading    the new machine has what its guest needs to run; the old guest runs
    finish_loading   the new guest runs, and all of its memory comes; the old one is paused

Each block of the memory file is compared with its checksum before the guest gets anything of it. So a file that is
damaged is found only after the guest has run from the point: it is ended, and the old one runs again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import LOADING, LazyLoad, LoadsLazily, need
from snaporch.errors import DamagedSnapshot, HypervisorError, SnaporchError
from snaporch.operations.proving import Proving


@attrs.define
class Loading(Proving):
    """The part of a revert that loads lazily.

    Attributes:
        started: when the new guest ran first, by the host's clock.
        eager: why all memory was loaded before the guest ran, though it was to come lazily.
    """

    started: float | None = None
    eager: str = ""

    @property
    def _lazy_load(self) -> LazyLoad:
        record = self.plan.snapshot
        if record.memory is None:
            raise AssertionError("a point that has no memory file is not loaded lazily")
        return LazyLoad(record.memory, record.index, f"{self.plan.directory}/{LOADING}")

    async def begin_loading(self) -> None:
        """Load what the guest needs to run; all of its memory, where it turns out that it cannot come later."""
        async with self.driver.connect(self.launched, self.name) as machine:
            await self.check_launched(machine)
            lazy = need(machine, LoadsLazily, self.name)
            async with self._marking():
                self.eager = await self._index_blocker() or await lazy.why_not_lazy(self._lazy_load)
                if not self.eager:
                    await lazy.begin_lazily(self._lazy_load)
            if self.eager:
                await self.load_memory(machine)

    async def _index_blocker(self) -> str:
        """See that the index may be made where it is missing; return why not, or an empty string."""
        catalog, path = self.context.catalog, self.plan.snapshot.index
        if path not in await catalog.own_files(self.name):
            if await self.driver.storage.exists(path):
                return f"{path} is there, and snaporch did not make it"
            await catalog.write(Change(files={self.name: (path,)}))
        return ""

    async def finish_loading(self) -> None:
        """Wait until all memory is there.

        Raises:
            HypervisorError: it will not be; the words say how long the guest has run.
        """
        if self.eager:
            return
        try:
            async with self.driver.connect(self.launched, self.name) as machine:
                lazy = need(machine, LoadsLazily, self.name)
                async with self._marking():
                    await lazy.finish_lazily(self._lazy_load, self._progress)
        except (SnaporchError, OSError) as error:
            ran = max(0.0, time.time() - self.started) if self.started is not None else 0.0
            raise HypervisorError(f"{error} (the new guest had run for {ran:.1f} s, and was ended)") from error

    @asynccontextmanager
    async def _marking(self) -> AsyncIterator[None]:
        """Where the memory file is found damaged, have every later look at the snapshot read all of that file."""
        damaged = None
        try:
            yield
        except DamagedSnapshot as error:
            damaged = error
        if damaged is None:
            return
        record = await self.context.catalog.snapshot(self.name, self.plan.snapshot.name)
        if record.memory is not None:
            record = attrs.evolve(record, memory=attrs.evolve(record.memory, identity=()))
            await self.context.catalog.write(Change(updated=(record,)))
        raise damaged
