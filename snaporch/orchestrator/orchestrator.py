"""The façade: what library, command line and service all use."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import structlog

from snaporch.catalog import Catalog, open_catalog
from snaporch.catalog.known import catalog_of
from snaporch.catalog.root import default_root, real_root
from snaporch.catalog.schema import CATALOG
from snaporch.drivers.base import Driver
from snaporch.drivers.local.confine import Confinement
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.registry import Registry
from snaporch.engine.context import Context
from snaporch.engine.events import Broadcast
from snaporch.engine.run import Engine
from snaporch.errors import InvalidInput, SnaporchError
from snaporch.orchestrator.archives import Archives
from snaporch.orchestrator.cloning import Cloning
from snaporch.orchestrator.domains import Domains
from snaporch.orchestrator.snapshots import Snapshots
from snaporch.orchestrator.upkeep import Upkeep

__all__ = ["Orchestrator", "catalog_of", "default_root", "open_orchestrator"]

_log = structlog.get_logger("snaporch")

ADOPTION_SECONDS = 2.0  # that opening waits for a memory stream; the domain's next operation waits for the rest


@attrs.define
class Orchestrator(Domains, Snapshots, Cloning, Archives, Upkeep):
    """Everything that snaporch does, on one root directory; `open_orchestrator` makes one.

    All methods are coroutines, may be called side by side, and may be cancelled at any time: see each one's
    guarantee. Errors are of the class `SnaporchError`.
    """

    @property
    def broadcast(self) -> Broadcast:
        """Where everything that happens is told; for what is built on top of this."""
        return self._context.events

    def confine(self, confinement: Confinement) -> None:
        """Follow images only to where `confinement` allows, from now on; for a service."""

        def follow(driver: Driver) -> None:
            if isinstance(driver.storage, LocalStorage):
                driver.storage.confinement = confinement

        self._context.drivers.set_up(follow)


def _make_root(root: Path, *, parents: bool) -> None:
    try:
        root.mkdir(mode=0o700, parents=parents, exist_ok=True)
        (root / "locks").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot use {root}: {error.strerror}") from None


async def _known_as(catalog: Catalog, root: Path) -> Path:
    """Return the root by the name under which its newest files are known: it may be mounted at several places."""
    for path, domain in await catalog.newest_files(20):
        name = Path(path.partition(f"/{domain}/")[0])
        with suppress(OSError):
            if name.is_absolute() and name.samefile(root):
                return name
    return root


@asynccontextmanager
async def open_orchestrator(
    root: Path | str | None = None,
    *,
    drivers: Mapping[str, Driver] | None = None,
    recover: bool = True,
    realtime: bool = False,
    read_only: bool = False,
) -> AsyncIterator[Orchestrator]:
    """Open the orchestrator on a root directory, made where it is missing (0700), in a directory that is there.

    Args:
        root: holds the catalog and, by default, all files; `default_root` when None.
        drivers: hypervisor drivers by name; by default all of `snaporch.drivers.registry`, made when they are used.
        recover: first finish or undo what a crash left; without, it is for the caller to do.
        realtime: while a guest is paused this thread has real-time priority, if permitted, so that it is not
            a CPU that the guest waits for, and Python's garbage collector is off. Both are the process's: a program
            says whether it wants that. The command line and the service do.
        read_only: for a look: nothing is made or written in the root, so that it may be on a file system that is
            read-only or full, and no lock is waited for. What was cut short stays so.

    Raises:
        InvalidInput: the root is no directory, cannot be made, or is not writable.
    """
    chosen = root is not None or "SNAPORCH_ROOT" in os.environ
    root = real_root(root)
    if not read_only:
        _make_root(root, parents=not chosen)
    elif not root.is_dir():
        raise InvalidInput(f"root: {root} is no directory")
    events = Broadcast()
    async with open_catalog(root / CATALOG, read_only=read_only) as catalog:
        root = await _known_as(catalog, root)
        engine = Engine(catalog, events, realtime)
        orchestrator = Orchestrator(Context(root, catalog, Registry(drivers), events, engine))
        if recover and not read_only:
            try:
                await orchestrator.recover(patience=ADOPTION_SECONDS)
            except SnaporchError as error:  # to be seen in `operations`; all other domains can be worked with
                _log.warning("not every interrupted operation could be finished or undone", error=str(error))
            with suppress(SnaporchError):  # the disk is full: there is another time
                await orchestrator.prune_journal()
        yield orchestrator
