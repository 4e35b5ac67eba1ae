"""Is a hypervisor that does not answer gone, or just silent?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from snaporch.drivers.base import Driver
from snaporch.errors import ConnectionGone, OutcomeUnknown
from snaporch.model.domain import Handle

DYING_SECONDS = 5.0  # from a lost connection to the end of a process with much memory


async def is_gone(driver: Driver, handle: Handle, seconds: float | None = None) -> bool:
    """Return whether a machine that does not answer is gone; one that is dying gets so many seconds for it."""
    with trio.move_on_after(DYING_SECONDS if seconds is None else seconds):
        await driver.wait_gone(handle)
    return not await driver.alive(handle)


async def unless_gone(driver: Driver, handle: Handle | None, call: Callable[[], Awaitable[object]]) -> bool:
    """Ask something of a machine; return False, instead of raising, where the machine is gone.

    Raises:
        ConnectionGone: it is there, and does not answer; so does OutcomeUnknown.
    """
    try:
        await call()
    except (ConnectionGone, OutcomeUnknown):
        if handle is not None and not await is_gone(driver, handle):  # noqa: ASYNC120 - it re-raises where it matters
            raise
        return False
    return True
