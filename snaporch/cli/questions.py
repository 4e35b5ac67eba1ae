"""What whoever sits at a terminal is asked before a verb does what cannot be had back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from snaporch.errors import SnaporchError
from snaporch.model.request import Strategy

if TYPE_CHECKING:
    from snaporch.protocol import AnyOrchestrator

LONG_PAUSE_SECONDS = 5.0  # of a guest: from here on it is a question


async def long_pause(orchestrator: AnyOrchestrator, domains: Sequence[str], strategy: Strategy) -> str:
    """Return a question where a create would pause a guest for long; else, or where nobody knows, nothing."""
    from snaporch.cli.human import human_size  # noqa: PLC0415 - slow, and only for a terminal

    for domain in domains:
        with suppress(SnaporchError):  # it is inactive, or busy: the create says so, if that is in its way
            expected = await orchestrator.estimate(domain, strategy)
            if expected.pause is not None and expected.pause > LONG_PAUSE_SECONDS:
                return (
                    f"{domain} would be paused for about {expected.pause:.0f} s, until its memory "
                    f"({human_size(expected.bytes)}) is saved; with --live it runs meanwhile. Pause it?"
                )
    return ""


async def loss(orchestrator: AnyOrchestrator, domain: str, name: str) -> str:
    """Return what a revert would lose, as a question; raises as `revert` does where there is no such snapshot."""
    await orchestrator.show(domain, name)
    info = await orchestrator.domain_info(domain)
    since = f"since {info.current}" if info.current else "so far"
    lost = (
        f"{domain} is {info.state}, and what it has become {since} is in no snapshot: --save-current NAME keeps it"
    )
    return f"{lost}. Lose it, and go back to {name}?"
