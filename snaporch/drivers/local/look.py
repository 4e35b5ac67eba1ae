"""A look at a file has a deadline: behind a name may be a dead mount, which never answers.

A system call that hangs cannot be taken back: its thread stays in it. So the threads that look at what is in one
directory are few, and none of those that everything else is done in. Where all of them hang, the next look there is
refused at once: repeated requests do not wait, and use no threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import attrs
import trio

from snaporch.errors import Refused

T = TypeVar("T")

LOOK_SECONDS = 5.0
PATIENT_SECONDS = 15.0  # for an operation, which is refused then: the host may be very busy
THREADS = 4  # for one directory


@attrs.define(eq=False)
class _Place:
    """A directory in which something is looked at.

    Attributes:
        threads: those that look; one that hangs has its token for as long as it does.
        begun: when each of them began.
        users: looks that are not over.
    """

    threads: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(THREADS))
    begun: dict[object, float] = attrs.field(factory=dict)
    users: int = 0

    def hangs(self) -> bool:
        late = time.monotonic() - LOOK_SECONDS
        return len(self.begun) >= THREADS and all(began < late for began in tuple(self.begun.values()))


_places: dict[str, _Place] = {}


async def looked_at(path: str, look: Callable[[], T], *, patient: bool = False) -> T:
    """Return what `look` returns, in a thread, if that is soon.

    Args:
        path: what is looked at.
        look: does it.
        patient: wait for longer.

    Raises:
        Refused: it takes longer than `LOOK_SECONDS`, or what is in its directory has not answered for long.
    """
    seconds = PATIENT_SECONDS if patient else LOOK_SECONDS
    directory = os.path.dirname(path)
    place = _places.setdefault(directory, _Place())
    token = object()

    def noted() -> T:
        place.begun[token] = time.monotonic()
        try:
            return look()
        finally:
            del place.begun[token]

    place.users += 1
    try:
        if not place.hangs():
            with trio.move_on_after(seconds):
                return await trio.to_thread.run_sync(noted, abandon_on_cancel=True, limiter=place.threads)
    finally:
        place.users -= 1
        if not place.users and not place.begun:
            _places.pop(directory, None)
    raise Refused(f"cannot read {path}: the file system has not answered for {seconds:g} s")
