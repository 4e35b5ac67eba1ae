"""The façade: what library, command line and service all use."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import structlog
import trio

from snaporch.catalog import Catalog, Change, Page, open_catalog
from snaporch.catalog.schema import CATALOG
from snaporch.drivers.base import Address, Binary, Driver
from snaporch.drivers.local.confine import Confinement
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.registry import Registry
from snaporch.engine.context import Context
from snaporch.engine.events import Broadcast
from snaporch.engine.run import Engine, Operation
from snaporch.engine.states import State
from snaporch.errors import (
    Busy,
    InvalidInput,
    NotFound,
    OperationFailed,
    Refused,
    SnaporchError,
    Stranded,
    TargetExists,
)
from snaporch.model.archive import Exported, Imported
from snaporch.model.convert import load_definition
from snaporch.model.domain import Discovered, DomainDefinition, DomainInfo, DomainRecord
from snaporch.model.merge import MergePlan
from snaporch.model.names import check_name, in_order, new_uuid
from snaporch.model.record import (
    Estimate,
    Event,
    Finding,
    GivenUp,
    OperationKind,
    OperationRecord,
    RevertRecord,
    SnapshotRecord,
    Unreadable,
    VerifyReport,
)
from snaporch.model.request import CreateOptions, MergeOptions, Strategy
from snaporch.model.reserved import check_domain_name
from snaporch.model.rfc import CreateFlag, DeleteFlag, DomainSnapshot, RevertFlag
from snaporch.operations import lifecycle as power
from snaporch.operations import places
from snaporch.operations.bandwidth import SharedBandwidth
from snaporch.operations.create import create
from snaporch.operations.delete import delete
from snaporch.operations.discover import discover
from snaporch.operations.disks import adopted, check_attached, check_forgettable, check_new, redefined
from snaporch.operations.doctor import doctor, foretell
from snaporch.operations.edit import edit
from snaporch.operations.exporting import export, export_disk
from snaporch.operations.flatten import ON_ITS_BASE, flatten, keep_short
from snaporch.operations.fsck import fsck
from snaporch.operations.give_up import give_up
from snaporch.operations.group import check_alone, check_ids, check_one_point, those_left
from snaporch.operations.importing import import_archive
from snaporch.operations.recover import reconnected, recover, sweep
from snaporch.operations.revert import revert
from snaporch.operations.room import expected_room
from snaporch.operations.verify import intact, verify

_log = structlog.get_logger("snaporch")

SHUTDOWN_SECONDS = 60.0  # for the guest to power off by itself
JOURNAL_SECONDS, JOURNAL_OPERATIONS = 365 * 86_400.0, 100_000  # that the journal goes back, at most
ADOPTION_SECONDS = 2.0  # that opening waits for a memory stream; the domain's next operation waits for the rest


@attrs.define
class Orchestrator:
    """Everything that snaporch does, on one root directory; `open_orchestrator` makes one.

    All methods are coroutines, may be called side by side, and may be cancelled at any time: see each one's
    guarantee. Errors are `SnaporchError`s.
    """

    _context: Context

    @property
    def root(self) -> Path:
        """The directory that holds all."""
        return self._context.root

    @property
    def broadcast(self) -> Broadcast:
        """Where everything that happens is told; for what is built on top of this."""
        return self._context.events

    @property
    def catalog(self) -> Catalog:
        """What is known; for what is built on top of this."""
        return self._context.catalog

    def confine(self, confinement: Confinement) -> None:
        """Follow images only to where `confinement` allows, from now on; for a service."""

        def follow(driver: Driver) -> None:
            if isinstance(driver.storage, LocalStorage):
                driver.storage.confinement = confinement

        self._context.drivers.set_up(follow)

    async def _mended(self, domain: str) -> None:
        """Finish or undo what a crash left of this domain; a memory stream is waited for.

        Raises:
            Stranded: something cannot be undone, and nothing else is begun on top of it.
        """
        await recover(self._context, domain=domain)

    # --- domains ---

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
            await check_new(self._context, operation, record)
            yours = await adopted(self._context, record)
            await self._context.catalog.write(Change(domains=(record,), gone=yours))
        return record

    async def undefine(self, name: str) -> None:
        """Forget an inactive domain that has no snapshots; its images stay.

        Raises:
            Refused: it runs, or has snapshots, or is on an overlay, which nobody would know of.
        """
        async with self._context.locked(Operation(OperationKind.UNDEFINE, name, "")):
            async with self._context.machine_of(name) as (record, machine):
                if machine is not None and record.template is None:
                    raise Refused(f"{name} is running: shut it down first")
            if snapshots := await self._context.catalog.snapshots(name):
                names = ", ".join(record.name for record in snapshots)
                raise Refused(f"{name} has snapshots ({names}): delete them first")
            await check_forgettable(self._context, record)
            await self._context.catalog.drop_domain(name)
            await places.leave_nothing(self._context, name, self._context.driver(record))

    async def attach(
        self, name: str, socket: str = "", *, driver: str = "qemu", uri: str = "", of: str = ""
    ) -> DomainInfo:
        """Take charge of a domain that something else started.

        Args:
            name: the name it is to have here.
            socket: its control socket (QEMU: ``-qmp unix:PATH,server=on,wait=off``).
            driver: the hypervisor driver's name.
            uri: of the manager that has it, where the driver has managers.
            of: its name there, where that is another one.

        Raises:
            InvalidInput: there is no such driver, it takes no such address, or the socket is one of the root's own.
            TargetExists: there is a domain of that name, and it runs.
            HypervisorError: nothing answers there.
        """
        address = Address(socket, uri, of)
        check_domain_name(name)
        chosen = self._context.driver_of(name, driver)
        if socket:
            await chosen.storage.check_place(str(self.root), name, os.path.abspath(socket), "socket")
        operation = Operation(OperationKind.ATTACH, name, "")
        async with self._context.locked(operation):
            with suppress(NotFound):
                async with self._context.machine_of(name) as (_, machine):
                    if machine is not None:
                        raise TargetExists(f"there is a running domain {name!r} already; choose another name")
            definition, handle = await chosen.attach(name, address)
            snapshots = await self._context.catalog.snapshots(name)
            current = snapshots[-1].name if snapshots else None
            async with chosen.connect(handle, name) as machine:
                shape = await machine.shape()
                record = DomainRecord(definition, current=current, handle=handle, template=handle, shape=shape)
                record = attrs.evolve(record, way_back=await chosen.way_back(record, machine))
            await check_attached(self._context, operation, record)
            await self._context.catalog.write(Change(domains=(record,)))
        return await self.domain_info(name)

    async def discover(self, driver: str = "") -> tuple[Discovered, ...]:
        """Return what could be attached to, and what stands in the way; nothing is touched by that.

        Args:
            driver: only by this driver; by default by all that can say it: of one that cannot be used here the
                answer has the reason.

        Raises:
            InvalidInput: there is no such driver.
            Unsupported: it cannot be used here, or cannot say it.
            HypervisorError: nobody answers it.
        """
        return await discover(self._context, driver)

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

    async def domains(self, after: str = "", limit: int | None = None) -> tuple[DomainInfo, ...]:
        """Return domains as they are this moment, by name; one that cannot be looked at says so in `problem`.

        Args:
            after: only those whose names come after this one.
            limit: no more than so many.
        """
        records = [record for record in await self._context.catalog.domains() if record.name > after]
        return await power.infos(self._context, records[:limit])

    async def domain_info(self, name: str) -> DomainInfo:
        """Return a domain as it is this moment; also while an operation runs on it."""
        return await power.info(self._context, await self._context.catalog.domain(name))

    async def is_active(self, name: str) -> bool:
        """Return whether a domain has a process: whether there is any memory to take."""
        record = await self._context.catalog.domain(name)
        return await self._context.driver(record).present(record) is not None

    async def room_for(self, domains: Sequence[str], *, memory: bool) -> tuple[int, int]:
        """Return what a snapshot of domains is expected to take until the next one, and what is free for it.

        What it takes is memory, as large as that of the last ones (the median; without any, all RAM), where that is
        taken and they have a process; and what guests write to the new overlays: as much as they have written since
        the last snapshot.

        Returns:
            Bytes that it takes of the root's file system, and bytes that are free there.
        """
        return await expected_room(self._context, domains, memory=memory)

    async def tag(self, name: str, tags: Collection[str]) -> DomainInfo:
        """Give a domain these tags, in place of those that it has: batches select domains by them."""
        for each in tags:
            check_name(each, "tag")
        async with self._context.locked(Operation(OperationKind.TAG, name, "")):
            record = attrs.evolve(await self._context.catalog.domain(name), tags=tuple(sorted(set(tags))))
            await self._context.catalog.write(Change(domains=(record,)))
        return await self.domain_info(name)

    # --- snapshots ---

    async def create(
        self,
        domain: str,
        snapshot: DomainSnapshot | None = None,
        flags: CreateFlag = CreateFlag(0),  # noqa: B008 - an immutable value
        options: CreateOptions | None = None,
        *,
        bandwidth: SharedBandwidth | None = None,
    ) -> SnapshotRecord:
        """Create a snapshot of a domain; `libxl_domain_snapshot_create`.

        Args:
            domain: the domain's name.
            snapshot: what is to be taken; by default everything, under a name made from the time.
            flags: DISK_ONLY, LIVE, QUIESCE.
            options: strategy, bandwidth, limit on time, disks to leave out.
            bandwidth: shared with other creates; while this one streams, its part changes as others come and go.

        Returns:
            The record: all files are fsynced, their sizes and checksums in it, and the catalog has it.

        Raises:
            Refused: before anything was touched.
            Busy: another operation runs on the domain.
            OperationFailed: rolled back: the domain in the run state that it had, every disk on the image that it
                was on, no file, node or row left. So it is when the call is cancelled.
            Stranded: the hypervisor is gone or refuses to undo.
        """
        (record,) = await self.create_group((domain,), snapshot, flags, options, bandwidth=bandwidth)
        return record

    async def create_group(
        self,
        domains: Sequence[str],
        snapshot: DomainSnapshot | None = None,
        flags: CreateFlag = CreateFlag(0),  # noqa: B008 - an immutable value
        options: CreateOptions | None = None,
        *,
        bandwidth: SharedBandwidth | None = None,
    ) -> tuple[SnapshotRecord, ...]:
        """Create a snapshot of each of several domains, all at one point: a consistency group.

        There is an instant at which all guests are paused: none has received what another has not sent. What is on
        its way between two of them then is in no snapshot, as if the network had lost it. Either all are taken or
        none is.

        Args:
            domains: the domains' names, each once.
            snapshot: what is taken of each, under one name; the files are named by snaporch.
            flags: as of `create`. With LIVE all go by the background strategy, or it is refused.
            options: as of `create`; a bandwidth is of all streams together, a limit on time of each.
            bandwidth: as of `create`.

        Returns:
            The records in the order of `domains`; `SnapshotRecord.group` is in each.

        Raises:
            Refused: before anything was touched: one of them cannot, or not together with the others.
            Busy: another operation runs on one of them, which the error names.
            OperationFailed: all are rolled back, see `create`. So it is when the call is cancelled.
            Stranded: a hypervisor is gone or refuses to undo; the others are rolled back.
        """
        for domain in domains:
            await self._mended(domain)
        snapshot, options = snapshot or DomainSnapshot(), options or CreateOptions()
        try:
            records = await create(self._context, domains, snapshot, flags, options, bandwidth=bandwidth)
        except Stranded as error:
            ended = await self._reconnected(domains[0], error)
            records = tuple([await self.catalog.snapshot(domain, ended.subject) for domain in domains])
        await keep_short(self._context, domains)
        return records

    async def revert(
        self,
        domain: str,
        name: str,
        flags: RevertFlag = RevertFlag(0),  # noqa: B008 - an immutable value
        *,
        save_current: str = "",
        ids: Collection[str] = (),
    ) -> RevertRecord:
        """Bring a domain back to a snapshot; `libxl_domain_snapshot_revert`.

        The snapshot stays as it is, and can be reverted to again. The new guest is made ready beside the old one,
        which is paused only while they change places. Where the hypervisor cannot have both at one time, a
        throw-away copy first shows that the snapshot loads; then the old guest's memory is kept in a file until
        the new guest is there, and put back if that fails.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            flags: RUNNING or PAUSED in place of the state at the point; FORCE gives up the present guest; ALONE: of
                a group (`create_group`) this domain only.
            save_current: first keep the domain's present state in a snapshot of this name.
            ids: the id that the snapshot must have (`SnapshotRecord.id`); none: whichever has the name.

        Returns:
            How it went back, and how long its guest was paused.

        Raises:
            Refused: before anything was touched; DamagedSnapshot when a file is not what was saved; NotEnoughSpace
                when there is too little RAM for a throw-away copy, or too little space to keep the guest's memory.
            OperationFailed: the domain is exactly as it was, its running guest included.
            Stranded: the old guest had to be ended, the new one did not come up, and with FORCE there is no other;
                without FORCE, the old guest could not be put back, and its file is kept for `recover`.
        """
        (record,) = await self.revert_group((domain,), name, flags, save_current=save_current, ids=ids)
        return record

    async def revert_group(
        self,
        domains: Sequence[str],
        name: str,
        flags: RevertFlag = RevertFlag(0),  # noqa: B008 - an immutable value
        *,
        save_current: str = "",
        ids: Collection[str] = (),
    ) -> tuple[RevertRecord, ...]:
        """Take the domains of a group (`create_group`) back to its point, as one operation: all or none.

        Old and new guests never run at one time. What was on its way between the guests at the point is lost.

        Args:
            domains: the domains' names, each once: all that still have their part of the group.
            name: the snapshots' name.
            flags: as of `revert`, for all; ALONE: only these domains, though there are more.
            save_current: first keep the present state of all in a group of this name.
            ids: as of `revert`, of all of them.

        Returns:
            How each went back, in the order of `domains`.

        Raises:
            Refused: before anything was touched; Unsupported when these are no group, or not all of it.
            Busy: another operation runs on one of them, which the error names.
            OperationFailed: all are exactly as they were, their running guests included.
            Stranded: as of `revert`.
        """
        in_order(domains)  # each once
        for domain in domains:
            await self._mended(domain)
        records = [await self.catalog.snapshot(domain, name) for domain in domains]
        check_ids(records, ids)
        check_one_point(records, "revert")
        if RevertFlag.ALONE not in flags:
            await check_alone(self.catalog, records, "revert")
        mend = partial(self._reconnected, domains[0])
        return await revert(self._context, records, flags, save_current=save_current, mend=mend)

    async def _reconnected(self, domain: str, error: Stranded) -> OperationRecord:
        """Return an operation that is complete after all, over a new connection; see `reconnected`.

        Raises:
            OperationFailed: it is undone.
            Stranded: it is neither.
        """
        ended = await reconnected(self._context, domain, error)
        if ended.state != State.COMPLETE:
            raise OperationFailed(f"{error.what}; everything is as it was before") from error
        return ended

    async def delete(
        self,
        domain: str,
        name: str | Collection[str],
        flags: DeleteFlag = DeleteFlag(0),  # noqa: B008 - an immutable value
        options: MergeOptions | None = None,
        *,
        ids: Collection[str] = (),
        dry_run: bool = False,
    ) -> MergePlan:
        """Delete a snapshot; `libxl_domain_snapshot_delete`.

        What the guest and every remaining snapshot see does not change. Without flags the changes of the snapshot
        merge into its children.

        Args:
            domain: the domain's name.
            name: the snapshot's; of several, what is between two that stay is merged once.
            flags: CHILDREN: this one and its descendants; CHILDREN_ONLY: its descendants; ALONE: what is of a group
                (`create_group`) goes here and stays with the others.
            options: bandwidth, and what to do about a guest that writes faster than a merge copies: by default
                its writes are slowed down and, where that does not help either, an image stays to merge another
                time; the plan has it under `kept`.
            ids: as of `revert`, of all that are named.
            dry_run: only plan.

        Returns:
            The plan: which images merge where, bytes to move, files to unlink; as it was carried out in the end.

        Raises:
            Refused: before anything was touched.
            Stranded: merging was cut short; every remaining snapshot is whole, and `recover` finishes it. So it is
                when the call is cancelled.
        """
        return (await self.delete_group((domain,), name, flags, options, ids=ids, dry_run=dry_run))[domain]

    async def delete_group(
        self,
        domains: Sequence[str],
        name: str | Collection[str],
        flags: DeleteFlag = DeleteFlag(0),  # noqa: B008 - an immutable value
        options: MergeOptions | None = None,
        *,
        ids: Collection[str] = (),
        dry_run: bool = False,
    ) -> dict[str, MergePlan]:
        """Delete a group (`create_group`) as one operation: from its beginning on, none of it can be reverted to.

        Args:
            domains: the domains' names, each once: all that still have their part of the group.
            name: the snapshots' name; of several groups, each is of these domains. A domain that does not have it
                any more is no error.
            flags: as of `delete`, for each domain; ALONE: only these domains, though there are more.
            options: as of `delete`.
            ids: as of `revert`, of all that are named.
            dry_run: only plan.

        Returns:
            Each domain's plan, see `delete`.

        Raises:
            Refused: before anything was touched; Unsupported when these are no group, or not all of it.
            Busy: another operation runs on one of them, which the error names.
            Stranded: merging was cut short; `recover` finishes all of it, see `delete`.
        """
        in_order(domains)  # each once
        for domain in domains if not dry_run else ():
            await self._mended(domain)
        names = (name,) if isinstance(name, str) else tuple(name)
        chosen: dict[str, list[str]] = {domain: [] for domain in domains}
        for each in names:
            for record in await those_left(self.catalog, domains, each):
                chosen[record.domain].append(each)
        return await delete(self._context, chosen, flags, options or MergeOptions(), ids=ids, dry_run=dry_run)

    async def flatten(
        self,
        domain: str,
        name: str = "",
        depth: int = 1,
        options: MergeOptions | None = None,
        *,
        dry_run: bool = False,
    ) -> MergePlan:
        """Shorten the chains of a domain, or of one of its snapshots, by copying up; no guest or snapshot changes.

        Args:
            domain: the domain's name, running or not.
            name: a snapshot's: its frozen images get short chains. By default those that the domain writes to.
            depth: images that may be left in a chain, the lowest of those that are there; 1: none but itself.
            options: bandwidth.
            dry_run: only plan.

        Returns:
            The plan, as it was carried out: what was copied, and files that nobody needed afterwards.

        Raises:
            Refused: before anything was touched; NotEnoughSpace when what is to be copied may not fit.
            OperationFailed: it was given up, as when the call is cancelled: all snapshots are whole, chains that
                are not short yet are as they were.
        """
        if not dry_run:
            await self._mended(domain)
        return await flatten(self._context, domain, name, depth, options or MergeOptions(), dry_run=dry_run)

    async def limit_depth(self, domain: str, depth: int) -> DomainInfo:
        """Have a domain's chains flattened onto their bases whenever a create makes one longer than `depth` images.

        Deletes keep chains short by themselves: this is for domains that keep very many snapshots. Each of the
        copies takes as much room as what the guest has written since the base.

        Args:
            domain: the domain's name.
            depth: more than 2; or 0: never.
        """
        if depth and depth <= ON_ITS_BASE:
            raise InvalidInput(
                f"a chain cannot be kept at {depth} images: more than {ON_ITS_BASE}, or 0 for no limit"
            )
        async with self._context.locked(Operation(OperationKind.LIMIT_DEPTH, domain, "")):
            record = attrs.evolve(await self._context.catalog.domain(domain), max_depth=depth)
            await self._context.catalog.write(Change(domains=(record,)))
        return await self.domain_info(domain)

    async def verify(
        self, domain: str, name: str, *, boot: bool = False, ids: Collection[str] = ()
    ) -> VerifyReport:
        """Read every file of a snapshot in full and compare it with what was saved.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            boot: also load it in a throw-away copy without network, and let that run for a few seconds.
            ids: as of `revert`.

        Returns:
            What was found; damage is an answer here, not an error.
        """
        return await verify(self._context, domain, name, boot=boot, ids=ids)

    async def intact(self, domain: str, name: str) -> bool:
        """Return whether a snapshot's files are there and are what was saved, as far as is quickly seen.

        `verify` reads them in full.
        """
        return await intact(self._context, await self._context.catalog.snapshot(domain, name))

    async def pin(
        self, domain: str, name: str, *, pinned: bool = True, ids: Collection[str] = ()
    ) -> SnapshotRecord:
        """Keep retention from deleting a snapshot, or allow it again; for `ids` see `revert`."""
        async with self._context.locked(Operation(OperationKind.PIN, domain, name)):
            record = attrs.evolve(await self._context.catalog.snapshot(domain, name), pinned=pinned)
            check_ids([record], ids)
            await self._context.catalog.write(Change(updated=(record,)))
        return record

    async def edit(
        self,
        domain: str,
        name: str,
        *,
        new_name: str = "",
        description: str | None = None,
        ids: Collection[str] = (),
    ) -> SnapshotRecord:
        """Give a snapshot another name, another description, or both; its files stay as they are.

        It gets its new name wherever the old one is, in one transaction: in its children, and in the domain whose
        current snapshot it is. Its id stays.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            new_name: the one that it is to have; by default it keeps its name.
            description: free text; None: it keeps the one that it has.
            ids: see `revert`.

        Returns:
            The record as it is now.

        Raises:
            InvalidInput: the name or the description is none that a snapshot may have, or nothing is to change.
            TargetExists: there is a snapshot of that name.
            Unsupported: it is to be renamed, and others of its group are there: they have one name.
            OtherSnapshot: the name means another snapshot by now.
            Busy: an operation runs on the domain.
            Stranded: one that was cut short, and names the snapshot perhaps, cannot be mended.
        """
        await self._mended(domain)
        return await edit(self._context, domain, name, new_name=new_name, description=description, ids=ids)

    async def export(
        self, domain: str, name: str, output: Path | str | Binary, *, ids: Collection[str] = ()
    ) -> Exported:
        """Write a snapshot, with all that is needed to go back to it, to one file: see docs/archives.md.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            output: a file that is not there yet, which appears when it is complete; or a stream of bytes.
            ids: see `revert`.

        Raises:
            TargetExists: there is such a file.
            NotEnoughSpace: each disk is copied first, beside the domain's files, and that may not fit.
            Unsupported: the domain was attached to, or the snapshot does not hold all of its disks.
            DamagedSnapshot, OperationFailed: a file is not what was saved, or cannot be written; nothing is left
                but what was written to a stream.
        """
        await self._mended(domain)
        output = str(output) if isinstance(output, Path) else output
        return await export(self._context, domain, name, output, version=version("snaporch"), ids=ids)

    async def export_disk(
        self,
        domain: str,
        name: str,
        target: str,
        output: Path | str | Binary,
        *,
        format_: str = "qcow2",
        ids: Collection[str] = (),
    ) -> Exported:
        """Copy one disk of a snapshot, whole, to an image that needs no other.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            target: the disk.
            output: as of `export`.
            format_: ``qcow2`` or ``raw``.
            ids: see `revert`.

        Raises:
            As `export`.
        """
        await self._mended(domain)
        output = str(output) if isinstance(output, Path) else output
        return await export_disk(self._context, domain, name, target, output, format_=format_, ids=ids)

    async def import_archive(
        self,
        path: Path | str,
        *,
        name: str = "",
        trust: bool = False,
        same_identity: bool = False,
        disks_only: bool = False,
    ) -> Imported:
        """Make an inactive domain, with one snapshot, of an archive, which may be anybody's.

        Args:
            path: the archive.
            name: the domain's; by default the one that it had.
            trust: take over what it says that runs on this host: the emulator and QEMU's further options.
            same_identity: the domain keeps its UUID.
            disks_only: leave out the memory.

        Raises:
            InvalidInput: it is no archive, or its memory needs what is not trusted.
            TargetExists: there is such a domain, or one of that UUID.
            DamagedSnapshot: it is not what its manifest says; nothing is left of it.
            Unsupported: its memory cannot be loaded here; likewise.
        """
        return await import_archive(
            self._context,
            str(path),
            name=name,
            trust=trust,
            same_identity=same_identity,
            disks_only=disks_only,
        )

    async def list(self, domain: str) -> tuple[SnapshotRecord, ...]:
        """Return a domain's snapshots, oldest first; what cannot be read is in `unreadable`."""
        await self._context.catalog.domain(domain)
        return await self._context.catalog.readable_snapshots(domain)

    async def current(self, domain: str) -> str | None:
        """Return the name of the snapshot that a domain descends from now; None where there is none."""
        return (await self._context.catalog.domain(domain)).current

    async def show(self, domain: str, name: str) -> SnapshotRecord:
        """Return one snapshot."""
        return await self._context.catalog.snapshot(domain, name)

    async def tree(self, domain: str) -> Mapping[str | None, tuple[str, ...]]:
        """Return the names of each snapshot's children; those without a parent are under None."""
        children: dict[str | None, tuple[str, ...]] = {}
        for record in await self.list(domain):
            children[record.parent] = (*children.get(record.parent, ()), record.name)
        return children

    # --- the rest ---

    async def unreadable(self, domain: str | None = None, kind: str | None = None) -> tuple[Unreadable, ...]:
        """Return what there is of one domain, or of all, whose record cannot be read, with the reason.

        `kind` is ``domain``, ``snapshot`` or ``operation``; by default all are looked at.

        A record that is damaged, or that a newer snaporch has written, blocks only what depends on it.
        """
        return await self._context.catalog.unreadable(domain, kind)

    async def recover(
        self, *, domain: str | None = None, patience: float = float("inf")
    ) -> tuple[OperationRecord, ...]:
        """Finish or undo what a crash left; also done when an orchestrator is opened. Idempotent.

        Args:
            domain: only what was done to this one.
            patience: seconds to wait for the memory stream of a checkpoint that is still going; one that takes
                longer is left as it is, for the next call, or for the next operation on its domain.

        Raises:
            Stranded: something still cannot be undone.
        """
        ended = await recover(self._context, domain=domain, patience=patience)
        if patience == float("inf") and domain is None:
            for record in await self._context.catalog.domains():
                with suppress(Busy):
                    async with self._context.locked(Operation(OperationKind.RECOVER, record.name, "")):
                        await sweep(self._context, await self._context.catalog.domain(record.name), end=True)
        return ended

    async def prune_journal(self, seconds: float = JOURNAL_SECONDS, most: int = JOURNAL_OPERATIONS) -> int:
        """Have the journal forget operations that ended so long ago, and the oldest of too many.

        Args:
            seconds: how far back it goes.
            most: how many it has.

        Returns:
            How many were forgotten (opening does it, too): a thousand at most, so that nobody waits for it long.
        """
        return await self._context.catalog.prune_journal(time.time() - seconds, most)

    def leave(self) -> None:
        """Leave creates, from now on, as soon as their point is held: for a process that is about to end.

        The call raises `Left`. The hypervisor goes on with the operation, and the next process that opens the root
        completes it.
        """
        self._context.engine.leave()

    async def fsck(self, domain: str | None = None, *, repair: bool = False) -> tuple[Finding, ...]:
        """Compare the catalog, the files and the running hypervisors, and say what is not as it should be.

        Args:
            domain: only this one; by default all.
            repair: do what is certain: recover, end processes that nobody knows, remove files that snaporch made
                and that nothing needs. No image is written to, and no file of anybody else's is removed.

        Returns:
            What was found, with what was repaired; damage is an answer here, not an error.
        """
        return await fsck(self._context, domain, repair=repair)

    async def give_up(self, operation: str, *, dry_run: bool = False) -> GivenUp:
        """End an operation that was cut short and that `recover` cannot mend; nothing is removed by that.

        Args:
            operation: its id.
            dry_run: only say what would be kept and what would be lost.

        Raises:
            NotFound: there is no such operation.
            Refused: it has ended; or a domain of it runs and does not answer.
            Busy: it still runs.
        """
        return await give_up(self._context, operation, dry_run=dry_run)

    async def operations(
        self,
        domain: str | None = None,
        *,
        last: int | None = None,
        since: float | None = None,
        outcome: str | None = None,
    ) -> tuple[OperationRecord, ...]:
        """Return running and past operations, oldest first.

        Args:
            domain: only of this one.
            last: only so many, the newest.
            since: only those that began at this instant or later, in seconds since the epoch.
            outcome: ``complete``, ``rolled-back`` or ``stranded``; ``running``: those that have not ended;
                ``failed``: those that ended otherwise than complete.
        """
        if domain is not None:
            await self._context.catalog.domain(domain)
        page = Page(-1 if last is None else last, domain=domain, since=since, outcome=outcome)
        return (await self._context.catalog.operations_page(page))[::-1]

    @asynccontextmanager
    async def events(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """Give a channel of everything that happens in this orchestrator from now on.

        A listener never holds anything up: one that is far behind misses progress events, and its channel ends
        rather than miss a change of state.
        """
        with self._context.events.listen() as channel:
            yield channel

    async def estimate(self, domain: str, strategy: Strategy = Strategy.BACKGROUND) -> Estimate:
        """Predict what a checkpoint would take, by the last ones and by how much the guest writes just now.

        A running guest is watched for a second. Nothing is changed.

        Args:
            domain: the domain's name; it must be active.
            strategy: how its memory would be saved: BACKGROUND, PRECOPY, PAUSED or INTERNAL.

        Raises:
            Refused: the domain is inactive.
            InvalidInput: the strategy is none by which memory is saved.
        """
        return await foretell(self._context, domain, strategy)

    async def doctor(self, domain: str | None = None, *, measure: bool = True) -> dict[str, Any]:
        """Return what this host, and a domain, can do, and what prevents the rest.

        Args:
            domain: the domain's name, or None.
            measure: watch a running guest for a second, for which no operation may run on it; without, nothing is
                asked that could get into an operation's way.

        Raises:
            Busy: an operation runs on the domain, which is not to be asked by trying things out.
        """
        return await doctor(
            self._context, None if domain is None else await self.domain_info(domain), measure=measure
        )


def default_root() -> Path:
    """Return ``$SNAPORCH_ROOT``, or the place for a user's (root: the system's) state."""
    if root := os.environ.get("SNAPORCH_ROOT"):
        return Path(root)
    if os.geteuid() == 0:
        return Path("/var/lib/snaporch")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "snaporch"


def _make_root(root: Path, *, parents: bool) -> None:
    try:
        root.mkdir(mode=0o700, parents=parents, exist_ok=True)
        (root / "locks").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot use {root}: {error.strerror}") from None


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
        InvalidInput: the root cannot be made or is not writable.
    """
    chosen = root is not None or "SNAPORCH_ROOT" in os.environ
    root = Path(os.path.realpath(root or default_root()))  # one root by two names is one: its files have one name
    if not read_only:
        _make_root(root, parents=not chosen)
    events = Broadcast()
    async with open_catalog(root / CATALOG, read_only=read_only) as catalog:
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
