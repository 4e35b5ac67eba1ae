"""Snapshots are taken, gone back to, and deleted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial

import attrs

from snaporch.catalog import Change
from snaporch.engine.run import Operation
from snaporch.engine.states import State
from snaporch.errors import InvalidInput, OperationFailed, Stranded
from snaporch.model.domain import DomainInfo
from snaporch.model.merge import MergePlan
from snaporch.model.names import in_order
from snaporch.model.record import OperationKind, OperationRecord, RevertRecord, SnapshotRecord
from snaporch.model.request import CreateOptions, MergeOptions
from snaporch.model.rfc import CreateFlag, DeleteFlag, DomainSnapshot, RevertFlag
from snaporch.operations.bandwidth import SharedBandwidth
from snaporch.operations.create import create
from snaporch.operations.delete import delete
from snaporch.operations.edit import edit
from snaporch.operations.flatten import ON_ITS_BASE, flatten, keep_short
from snaporch.operations.group import check_alone, check_ids, check_one_point, those_left
from snaporch.operations.hooks import after_revert, load_hooks
from snaporch.operations.recover import reconnected
from snaporch.operations.revert import revert
from snaporch.orchestrator.looking import Looking


@attrs.define
class Snapshots(Looking):
    """The part of an orchestrator that has to do with snapshots."""

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
            records = tuple([await self._context.catalog.snapshot(domain, ended.subject) for domain in domains])
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
                a group (`create_group`) this domain only; KEEP_CLOCK: the guest's clock is not set by its agent;
                LAZY: the guest runs before its memory is there, where that can be, and the guest of before is kept
                until all of it is.
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
            How each went back, in the order of `domains`; the hooks of the root (``hooks.toml``) have run.

        Raises:
            Refused: before anything was touched; Unsupported when these are no group, or not all of it.
            Busy: another operation runs on one of them, which the error names.
            OperationFailed: all are exactly as they were, their running guests included.
            Stranded: as of `revert`.
        """
        in_order(domains)  # each once
        for domain in domains:
            await self._mended(domain)
        records = [await self._context.catalog.snapshot(domain, name) for domain in domains]
        check_ids(records, ids)
        check_one_point(records, "revert")
        if RevertFlag.ALONE not in flags:
            await check_alone(self._context.catalog, records, "revert")
        root, mend = self._context.root, partial(self._reconnected, domains[0])
        hooks = load_hooks(root)
        reverted = await revert(self._context, records, flags, save_current=save_current, mend=mend)
        return tuple([await after_revert(hooks, root, each) for each in reverted])

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
        chosen = await self._left(domains, (name,) if isinstance(name, str) else name)
        return await delete(self._context, chosen, flags, options or MergeOptions(), ids=ids, dry_run=dry_run)

    async def retire(self, records: Sequence[SnapshotRecord]) -> dict[str, MergePlan]:
        """Delete snapshots that retention has decided about, in one operation; else as `delete_group`.

        Args:
            records: as they were when that was decided: of one domain, or of several that have each of them.

        Raises:
            Refused: as `delete_group`; also when one was pinned or given another end since, or is another by now.
            NotFound: one is gone.
        """
        domains = in_order({record.domain for record in records})
        for domain in domains:
            await self._mended(domain)
        chosen = await self._left(domains, dict.fromkeys(record.name for record in records))
        ids = [record.id for record in records]
        return await delete(self._context, chosen, DeleteFlag(0), MergeOptions(), ids=ids, decided=records)

    async def _left(self, domains: Sequence[str], names: Iterable[str]) -> dict[str, list[str]]:
        """Return, by domain, those of the names that it still has a snapshot of."""
        chosen: dict[str, list[str]] = {domain: [] for domain in domains}
        for name in names:
            for record in await those_left(self._context.catalog, domains, name):
                chosen[record.domain].append(name)
        return chosen

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
        expires_in: float | None = None,
        ids: Collection[str] = (),
    ) -> SnapshotRecord:
        """Give a snapshot another name, another description, or another end; its files stay as they are.

        It gets its new name wherever the old one is, in one transaction: in its children, and in the domain whose
        current snapshot it is. Its id stays.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            new_name: the one that it is to have; by default it keeps its name.
            description: free text; None: it keeps the one that it has.
            expires_in: seconds from now until it expires, see `SnapshotRecord.expires`; 0: never; None: as it is.
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
        return await edit(
            self._context, domain, name, new_name=new_name, description=description, expires_in=expires_in, ids=ids
        )
