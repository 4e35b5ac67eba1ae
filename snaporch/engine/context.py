"""What the operations share: catalog, engine, events, drivers, and the way to a domain's machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import structlog
import trio

from snaporch.catalog import Catalog, Change, domain_lock
from snaporch.drivers.base import Driver, KeepsRecords, Machine, has
from snaporch.drivers.registry import Registry
from snaporch.engine.events import Broadcast
from snaporch.engine.gone import is_gone
from snaporch.engine.run import Engine, Operation
from snaporch.engine.verdict import Verdict
from snaporch.errors import (
    Busy,
    HypervisorError,
    InvalidInput,
    NotFound,
    OperationFailed,
    Refused,
    SnaporchError,
)
from snaporch.model.domain import DiskStatus, DomainRecord, Handle
from snaporch.model.names import check_name, short

ASKED_SECONDS = 2.0  # before anything is begun: who has asked waits for it
PUBLISH_SECONDS = 20.0
_log = structlog.get_logger("snaporch")
at_work: set[str] = set()  # ids of the operations of this process, in whichever orchestrator


@attrs.frozen
class Context:
    """Everything that an operation needs and that outlives it.

    Attributes:
        root: the directory that holds all.
        catalog: what is known.
        drivers: by name.
        events: where what happens is told.
        engine: runs steps.
    """

    root: Path
    catalog: Catalog
    drivers: Registry
    events: Broadcast
    engine: Engine

    def driver(self, domain: DomainRecord) -> Driver:
        """Return the driver of a domain."""
        return self.driver_of(domain.name, domain.definition.driver).serving(domain, self.directory(domain.name))

    def driver_of(self, domain: str, name: str) -> Driver:
        """Return a driver by its name.

        Raises:
            InvalidInput: there is none of that name; the domain is in the error.
        """
        if name not in self.drivers:
            raise InvalidInput(f"{domain}: there is no driver {name!r}; there are {', '.join(self.drivers)}")
        return self.drivers[name]

    def directory(self, domain: str) -> str:
        """Return where a domain's files go that are given no other place."""
        return str(self.root / domain)

    def run_directory(self, domain: str, operation: str) -> Path:
        """Return the directory for the process that an operation launches."""
        return self.root / domain / f"run-{short(operation)}"

    def verdict(self, what: str) -> Verdict:
        """Return what is decided of an operation, by its id, or of where a disk goes, by ``DOMAIN.TARGET``."""
        return Verdict(self.root / "locks" / f"{what}.verdict")

    @asynccontextmanager
    async def locked(
        self, operation: Operation, *, wait: bool = False, only_looks: bool = False
    ) -> AsyncIterator[None]:
        """Hold the lock of an operation's domain, of a group's all; see `domain_lock`.

        Its claims of images (`snaporch.operations.claims`) end with it, unless it is to be recovered.

        Args:
            operation: what is done.
            wait: for another operation, instead of raising.
            only_looks: it changes nothing, and takes no lock: nobody who may only look keeps others from working.

        Raises:
            Busy: another operation holds one; no other is then kept.
            OperationFailed: a file could not be looked at, before anything was touched: the engine, which knows
                what to undo, lets no other error of the system out.
        """
        for name in operation.domains:
            check_name(name, "domain")  # it becomes part of a path, before anybody knows it
        running = operation.what
        only_looks = only_looks or self.catalog.read_only
        at_work.add(operation.id)
        try:
            async with AsyncExitStack() as stack:
                for name in operation.domains if not only_looks else ():
                    keep = partial(self.catalog.knows, name)
                    lock = domain_lock(self.root / "locks", name, operation.id, running, wait=wait, keep=keep)
                    await stack.enter_async_context(lock)
                if not only_looks:
                    stack.push_async_callback(self._release, operation)
                    if not operation.kind.only_reads:
                        await stack.enter_async_context(self._telling(operation))
                yield
        except OSError as error:
            what = f"{running} of {operation.who} failed"
            words = (error.strerror or str(error)) + (f" ({error.filename})" if error.filename else "")
            raise OperationFailed(f"{what}: {words}; nothing was touched") from error
        finally:
            at_work.discard(operation.id)

    def _untold(self, domain: str) -> Path:
        """Return the file that is there while a domain's manager may not know of the last operation."""
        return self.root / "locks" / f"{domain}.untold"

    async def _begin_telling(self, operation: Operation) -> tuple[Path, ...]:
        """Note that managers are to be told; return what was not noted already."""
        noted = []
        for name in operation.domains:
            with suppress(SnaporchError):
                path = self._untold(name)
                if has(self.driver(await self.catalog.domain(name)), KeepsRecords) and not path.exists():
                    path.touch(mode=0o600)
                    noted.append(path)
        return tuple(noted)

    @asynccontextmanager
    async def _telling(self, operation: Operation) -> AsyncIterator[None]:
        """Tell managers afterwards what was done meanwhile."""
        noted = await self._begin_telling(operation)
        touched = True
        try:
            yield
        except Refused:  # then what others have done is not to be undone
            touched = False
            raise
        finally:
            for path in noted if not touched else ():
                path.unlink(missing_ok=True)
            for name in operation.domains if touched else ():
                await self._tell(name)  # noqa: ASYNC102 - it shields itself

    async def _tell(self, name: str) -> None:
        """Tell a domain's manager of its images and snapshots; what fails is told by the next operation."""
        with trio.move_on_after(PUBLISH_SECONDS, shield=True):
            try:
                record = await self.catalog.domain(name)
                await self.driver(record).publish(record, await self.catalog.snapshots(name))
            except NotFound:
                pass
            except (SnaporchError, OSError) as error:
                _log.warning(
                    "the domain's manager was not told of its images and snapshots", domain=name, error=str(error)
                )
                return
            with suppress(OSError):
                self._untold(name).unlink(missing_ok=True)

    async def tell_what_is_untold(self, domain: str | None = None) -> None:
        """Tell the managers of domains what a snaporch that was killed has not told them.

        Args:
            domain: only of this one.
        """
        for path in sorted(self._untold("x").parent.glob("*.untold")) if not self.catalog.read_only else ():
            name = path.name.removesuffix(".untold")
            if domain in {None, name}:
                with suppress(Busy):  # who holds it tells it
                    async with domain_lock(self.root / "locks", name, "", "recover"):
                        await self._tell(name)

    async def _release(self, operation: Operation) -> None:
        with trio.CancelScope(shield=True):
            await self.catalog.release_claims(operation.id)

    @asynccontextmanager
    async def machine_of(
        self, name: str, *, hung_is_none: bool = False
    ) -> AsyncIterator[tuple[DomainRecord, Machine | None]]:
        """Yield a domain's record and a connection to its machine, None when it is inactive.

        To be used under the domain's lock: it also notes in the catalog that a machine is gone, or that
        another one runs the domain.

        Args:
            name: the domain's name.
            hung_is_none: yield None for a process that runs but does not answer, too; the record still has it.

        Raises:
            NotFound: there is no such domain.
            ConnectionGone: its process runs but does not answer.
        """
        record = await self.catalog.domain(name)
        driver = self.driver(record)
        handle = await driver.present(record)
        if handle is not None:
            record = await self._found(record, handle)
            async with AsyncExitStack() as stack:
                machine, failure = None, None
                try:
                    machine = await stack.enter_async_context(driver.connect(handle, name))
                except HypervisorError as error:
                    failure = error
                if failure is None or not await is_gone(driver, handle, ASKED_SECONDS):
                    if failure is not None and not hung_is_none:
                        raise failure
                    yield record, machine
                    return
        if (gone := record.handle) is not None:
            record = attrs.evolve(record, handle=None)
            if not self.catalog.read_only:
                await driver.forget(gone)
                await self.catalog.write(Change(domains=(record,)))
        yield record, None

    async def _found(self, record: DomainRecord, handle: Handle) -> DomainRecord:
        """Return a domain's record with the machine that runs it at present, and note one that is news."""
        if record.handle is not None and (record.handle, record.handle.data) == (handle, handle.data):
            return record
        record = attrs.evolve(record, handle=handle)
        if not self.catalog.read_only:
            await self.catalog.write(Change(domains=(record,)))
        return record

    @asynccontextmanager
    async def seen(self, name: str) -> AsyncIterator[tuple[DomainRecord, Machine | None]]:
        """As `machine_of`, without the domain's lock, for a look beside whatever runs: nothing is noted.

        Raises:
            NotFound: there is no such domain.
            HypervisorError: its process does not answer beside what it is asked by others.
        """
        record = await self.catalog.domain(name)
        driver = self.driver(record)
        record = attrs.evolve(record, handle=await driver.present(record))
        if record.handle is None:
            yield record, None
            return
        async with driver.query(record.handle, name) as machine:
            yield record, machine

    async def disks_of(
        self, record: DomainRecord, machine: Machine | None, *, unread: list[str] | None = None
    ) -> tuple[DiskStatus, ...]:
        """Return a domain's disks, asked of its machine or, inactive, read from the images.

        Args:
            record: the domain's.
            machine: its machine.
            unread: gets why an image cannot be read, whose size and what backs it are then left out; None: that is
                an error.

        Raises:
            Refused: an image cannot be read.
        """
        if machine is not None:
            return await machine.disks()
        storage = self.driver(record).storage
        found = []
        for disk in record.disks:
            chain: tuple[str, ...] = (disk.path,)
            size = 0
            try:
                chain = tuple(link.path for link in await storage.chain(disk.path, disk.format))
                size = await storage.virtual_size(disk.path, disk.format)
            except Refused as error:
                if unread is None:
                    raise
                unread.append(str(error))
            found.append(DiskStatus(disk.target, disk.path, disk.format, disk.readonly, size, chain))
        return tuple(found)
