"""What an operation and its guard may both want to decide, and only one of them does.

The operation decides when it is past the point from which nothing goes back; its guard, when the operation's
process is dead or stopped. Whoever comes second obeys, and so does recovery. The words:

    complete   the new guest has taken the old one's place (a revert) load       what is inside the images may have
    begun to be loaded (a revert) put-back   what the guest held before was loaded inside its images, and is to be
    loaded again (a revert that fails) undone     the old guest runs on, whatever comes (a revert) stay       a disk
    stays on the image that it is on (a merge); any other word is where it goes

It is a file of the root: a guard needs no catalog for it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from snaporch.drivers.local.guard import decide
from snaporch.errors import HypervisorError

COMPLETE = "complete"
LOAD = "load"
PUT_BACK = "put-back"
UNDONE = "undone"
STAY = "stay"


@attrs.frozen
class Verdict:
    """One decision."""

    path: Path

    async def decide(self, word: str) -> str:
        """Decide by a word, unless it is decided already; return what is. Durable on return."""
        return await trio.to_thread.run_sync(decide, str(self.path), word)

    async def insist(self, word: str, domain: str) -> None:
        """Decide by a word.

        Raises:
            HypervisorError: the guard has decided otherwise.
        """
        if await self.decide(word) != word:
            raise HypervisorError(guard_acted(domain))

    async def revise(self, word: str) -> None:
        """Decide otherwise: for whoever has decided, and cannot go through with it."""
        await trio.to_thread.run_sync(self._revise, word)

    def _revise(self, word: str) -> None:
        other = f"{self.path}.new"
        with suppress(FileNotFoundError):
            os.unlink(other)
        decide(other, word)
        os.replace(other, self.path)

    def read(self) -> str:
        """Return what is decided, or an empty string."""
        with suppress(FileNotFoundError):
            return os.readlink(self.path)
        return ""

    async def forget(self) -> None:
        """Forget it; there is no guard any more."""
        await trio.lowlevel.checkpoint()
        self.path.unlink(missing_ok=True)


def guard_acted(domain: str) -> str:
    """Return what to say of a guest that its guard has let run."""
    return f"{domain}: snaporch was stopped while the guest was paused, so the guest's guard has let the guest run"
