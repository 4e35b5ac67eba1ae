"""Progress of an operation, on a terminal, to standard error."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from snaporch.model.names import one_or_more
from snaporch.model.record import EventKind

if TYPE_CHECKING:
    from rich.progress import Progress

    from snaporch.client import Client
    from snaporch.model.record import Event
    from snaporch.orchestrator import Orchestrator


@asynccontextmanager
async def shown(orchestrator: Orchestrator | Client, domains: str | Sequence[str]) -> AsyncIterator[None]:
    """Show what happens to domains while the body runs; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    async with orchestrator.events() as events, trio.open_nursery() as nursery:
        nursery.start_soon(_show, events, one_or_more(domains))
        yield
        nursery.cancel_scope.cancel()


async def _show(events: trio.MemoryReceiveChannel[Event], domains: Sequence[str]) -> None:
    with _bar() as progress:
        task = progress.add_task("starting", total=None)
        async for event in events:
            if event.domains != domains:
                continue
            if event.kind is EventKind.PROGRESS:
                # Before the first pages nobody knows how much it is: then the bar only moves.
                progress.update(task, completed=event.done, total=event.total or None)
            progress.update(task, description=event.state)


def _bar() -> Progress:
    from rich.console import Console  # noqa: PLC0415 - only for a terminal, and slow
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
