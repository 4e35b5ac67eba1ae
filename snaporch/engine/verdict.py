"""A decision that an operation and its guard may both have to make, and that is made only once.

The operation decides when it passes the point after which it is never undone; its guard decides when the
operation's process is dead or stopped. The second of the two obeys the first, and so does recovery. The words are:

- ``complete``: the new guest has taken the old one's place (a revert).
- ``load``: the point inside the images may have begun to load (a revert).
- ``put-back``: the state that the guest had before was loaded inside its images, and is to be loaded again (a
  revert that fails).
- ``end``: the old guest, which is kept in a file, is being ended and stays paused until then (a revert). Its guard
  replaces that by ``undone`` where snaporch is dead and the old guest is still there.
- ``undone``: the old guest runs on, whatever happens afterwards (a revert).
- ``stay``: a disk stays on the image that it is on (a merge); any other word is the image that it moves to.

The decision is a file in the root, so that a guard needs no catalog.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from snaporch.drivers.local.filework import remove
from snaporch.drivers.local.guard import decide, revise
from snaporch.errors import HypervisorError

COMPLETE = "complete"
LOAD = "load"
PUT_BACK = "put-back"
END = "end"
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
        """Replace the decision; only for the process that made it, when it cannot carry it out."""
        await trio.to_thread.run_sync(revise, str(self.path), word)

    def read(self) -> str:
        """Return what is decided, or an empty string."""
        with suppress(FileNotFoundError):
            return os.readlink(self.path)
        return ""

    async def forget(self) -> None:
        """Forget it; there is no guard any more. Durable on return.

        The next operation on the disk makes a decision of the same name: one that a power cut brought back would
        have an overlay removed that holds what the guest has written since.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(remove, str(self.path))


def guard_acted(domain: str) -> str:
    """Return what to say of a guest that its guard has let run."""
    return f"{domain}: snaporch was stopped while the guest was paused, so the guest's guard has let the guest run"
