"""Domains become known, run, stop, and are forgotten."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from snaporch.catalog import Change
from snaporch.drivers.base import Address
from snaporch.engine.run import Operation
from snaporch.errors import DeadlineExceeded, HypervisorError, NotFound, Refused, TargetExists
from snaporch.model.convert import load_definition
from snaporch.model.domain import DomainDefinition, DomainInfo, DomainRecord
from snaporch.model.limits import SHUTDOWN_SECONDS
from snaporch.model.names import check_name, check_socket, new_uuid
from snaporch.model.record import OperationKind, SyncReport
from snaporch.model.reserved import check_domain_name
from snaporch.operations import lifecycle as power
from snaporch.operations import places
from snaporch.operations.disks import adopted, check_attached, check_forgettable, check_new, reattached, redefined
from snaporch.operations.pins import discarded, without_disks
from snaporch.operations.records import sync
from snaporch.orchestrator.looking import Looking


@attrs.define
class Domains(Looking):
    """The part of an orchestrator that has to do with domains."""

    async def define(self, definition: DomainDefinition | Path | str) -> DomainRecord:
        """Make a domain known, or replace the definition of one that is inactive.

        Args:
            definition: a definition, or the path of a TOML file of one.

        Raises:
            InvalidInput: the definition makes no sense.
            Refused: the domain is running; or the definition does not fit the overlays that its disks are on; or
                its guest would write to an image that others read.
        """
        if not isinstance(definition, DomainDefinition):
            definition = load_definition(Path(definition))
        definition, made = await places.completed(self._context, definition)
        try:
            return await self._define(definition)
        except BaseException:
            if made:
                with trio.CancelScope(shield=True), suppress(OSError):
                    await self._context.driver(DomainRecord(definition)).storage.remove(made)
                    os.rmdir(self._context.directory(definition.name))  # unless there is more in it
            raise

    async def _define(self, definition: DomainDefinition) -> DomainRecord:
        await places.check_definition(self._context, definition)
        operation = Operation(OperationKind.DEFINE, definition.name, "")
        async with self._context.locked(operation):
            try:
                async with self._context.machine_of(definition.name) as (known, machine):
                    if machine is not None:
                        raise Refused(f"{definition.name} is running: shut it down before it is defined anew")
                    record = await redefined(self._context, known, definition)
            except NotFound:
                record = DomainRecord(definition, uuid=new_uuid())
            self._context.driver(record)
            reads = await check_new(self._context, operation, record)
            record = attrs.evolve(record, reads=tuple(sorted(reads)))
            yours = await adopted(self._context, record)
            await self._context.catalog.write(Change(domains=(record,), gone=yours))
        return record

    async def undefine(self, name: str, *, discard: bool = False) -> None:
        """Forget an inactive domain that has no snapshots; its images stay.

        Args:
            name: the domain's name.
            discard: of a clone: remove what its guest has written since it was cloned, with its logs.

        Raises:
            Refused: it runs, or has snapshots, or is on an overlay, which nobody would know of; or it is a clone,
                and `discard` was not given, or others read its images.
        """
        operation = Operation(OperationKind.UNDEFINE, name, "")
        async with self._context.locked(operation):
            async with self._context.machine_of(name) as (record, machine):
                if machine is not None and record.template is None:
                    raise Refused(f"{name} is running: shut it down first")
            if snapshots := await self._context.catalog.snapshots(name):
                names = ", ".join(record.name for record in snapshots)
                how = f"snaporch domain undefine {name} --snapshots"
                raise Refused(f"{name} has snapshots ({names}): `{how}` deletes them first")
            files = await discarded(self._context, operation, record, discard=discard)
            if not files:
                await check_forgettable(self._context, record)
            else:
                await self._context.catalog.write(Change(domains=(without_disks(record),)))
            if record.tpm:
                await self._context.driver(record).remove_tpm(record.tpm)
            await places.leave_nothing(self._context, name, self._context.driver(record), files)
            await self._context.catalog.write(Change(gone=files))
            await self._context.catalog.drop_domain(name)

    async def attach(
        self,
        name: str,
        socket: str = "",
        *,
        driver: str = "qemu",
        uri: str = "",
        of: str = "",
        records: bool = True,
    ) -> DomainInfo:
        """Take charge of a domain that something else started.

        Args:
            name: the name it is to have here.
            socket: its control socket (QEMU: ``-qmp unix:PATH,server=on,wait=off``).
            driver: the hypervisor driver's name.
            uri: of the manager that has it, where the driver has managers.
            of: its name there, where that is another one.
            records: its snapshots are put into the list that its manager has, where it has one.

        Raises:
            InvalidInput: there is no such driver, it takes no such address, or the socket is one of the root's
                own, or no path of a unix socket.
            TargetExists: there is a domain of that name, and it runs.
            Refused: nothing answers there, or nothing that could be a hypervisor.
        """
        check_socket(socket)
        address = Address(socket, uri, of)
        check_domain_name(name)
        chosen = self._context.driver_of(name, driver)
        if socket:
            await chosen.storage.check_place(str(self.root), name, os.path.abspath(socket), "socket")
        operation = Operation(OperationKind.ATTACH, name, "")
        async with self._context.locked(operation):
            known = None
            with suppress(NotFound):
                async with self._context.machine_of(name) as (known, machine):
                    if machine is not None:
                        raise TargetExists(f"there is a running domain {name!r} already; choose another name")
            try:
                definition, handle = await chosen.attach(name, address)
            except (HypervisorError, DeadlineExceeded) as error:  # nothing was lost: it was only looked at
                raise Refused(f"{error}; `snaporch domain discover` lists what can be attached to") from error
            snapshots = await self._context.catalog.snapshots(name)
            current = snapshots[-1].name if snapshots else None
            async with chosen.connect(handle, name) as machine:
                shape = await machine.shape()
                record = DomainRecord(
                    definition, current=current, handle=handle, template=handle, shape=shape, records=records
                )
                record = attrs.evolve(record, way_back=await chosen.way_back(record, machine))
            reads = await check_attached(self._context, operation, record)
            record = attrs.evolve(record, reads=tuple(sorted(reads)))
            if known is not None:
                record = await reattached(self._context, known, record)
            await self._context.catalog.write(Change(domains=(record,)))
        return await self.domain_info(name)

    async def sync(self, name: str, *, records: bool | None = None) -> SyncReport:
        """Bring the list of snapshots that a domain's manager has and snaporch's into agreement, both ways.

        Snapshots that others have taken are known here from then on, their files are snaporch's to merge and to
        remove; a domain that others have put back to a snapshot is followed. What snaporch has taken is put into
        the manager's list.

        Args:
            name: the domain's name.
            records: whether snapshots of snaporch's are put into that list from now on; where they are not, those
                that are there are taken out. None: as it was said at `attach`.

        Raises:
            NotFound: there is no such domain.
            Unsupported: its hypervisor has no such list.
            Refused: its disks are on images that nobody here knows.
            Busy: an operation runs on the domain.
            HypervisorError: its manager does not answer.
        """
        await self._mended(name)
        return await sync(self._context, name, records=records)

    async def start(self, name: str, *, paused: bool = False) -> DomainInfo:
        """Start an inactive domain; its process outlives this one.

        Raises:
            Refused: it is running, or cannot start: the hypervisor's words are in the error.
            DamagedSnapshot: a frozen image under one of its disks is not what it was.
        """
        await self._mended(name)
        await power.start(self._context, name, paused=paused)
        return await self.domain_info(name)

    async def shutdown(self, name: str, *, timeout: float = SHUTDOWN_SECONDS) -> DomainInfo:
        """Ask the guest to power off, and wait until it has.

        Raises:
            Refused: the domain is not running.
            HypervisorError: the guest did not power off within `timeout` seconds.
        """
        await power.shutdown(self._context, name, timeout=timeout)
        return await self.domain_info(name)

    async def destroy(self, name: str) -> DomainInfo:
        """End a domain's process at once, as pulling the plug does, also while a shutdown waits for its guest.

        An inactive domain stays so.
        """
        await power.destroy(self._context, name)
        return await self.domain_info(name)

    async def pause(self, name: str) -> DomainInfo:
        """Stop the CPUs of a running domain."""
        await power.set_running(self._context, name, running=False)
        return await self.domain_info(name)

    async def resume(self, name: str) -> DomainInfo:
        """Let the CPUs of a paused domain run."""
        await power.set_running(self._context, name, running=True)
        return await self.domain_info(name)

    async def reset(self, name: str) -> DomainInfo:
        """Boot the guest of a running domain anew, as the reset button does; its process and its disks stay.

        What the guest has not written to its disks is lost. A guest that its user has paused is paused before its
        first instruction; one that has powered off, panicked or met an error runs.

        Raises:
            Refused: the domain is not running, or its hypervisor cannot reset it in its present state.
            Unsupported: its hypervisor resets no guests.
        """
        await power.reset(self._context, name)
        return await self.domain_info(name)

    async def reboot(self, name: str, *, timeout: float = SHUTDOWN_SECONDS) -> DomainInfo:
        """Ask the guest to power off, wait until it has, and start it on the same disks.

        Raises:
            Refused: the domain is not running, or was shut down and cannot be started: the words say which.
            HypervisorError: the guest did not power off within `timeout` seconds; it runs on.
        """
        await self.shutdown(name, timeout=timeout)
        return await self.start(name)

    async def screenshot(self, name: str) -> bytes:
        """Return a picture of the screen of a running domain, as a PNG.

        Raises:
            Refused: the domain is not running.
            Unsupported: it has no screen.
        """
        return await power.screenshot(self._context, name)

    async def tag(self, name: str, tags: Collection[str]) -> DomainInfo:
        """Give a domain these tags, in place of those that it has: batches select domains by them."""
        for each in tags:
            check_name(each, "tag")
        async with self._context.locked(Operation(OperationKind.TAG, name, "")):
            record = attrs.evolve(await self._context.catalog.domain(name), tags=tuple(sorted(set(tags))))
            await self._context.catalog.write(Change(domains=(record,)))
        return await self.domain_info(name)
