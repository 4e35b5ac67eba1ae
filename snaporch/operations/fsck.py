"""Fsck: the catalog, the files and the running hypervisors compared with one another, domain by domain.

People may have changed things between two commands: a file deleted, an image resized, a domain started by its old
command line. `fsck` says what differs from the catalog; `repair` does only what is *certain* and loses nothing: no
file is removed that snaporch did not make, and no image is written to.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import attrs

from snaporch.catalog import Change
from snaporch.drivers.base import Driver, Machine
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import Busy, DamagedSnapshot, HypervisorError, Refused, SnaporchError
from snaporch.model.domain import DomainRecord, Handle
from snaporch.model.finding import Finding, Trouble, Unreadable
from snaporch.model.record import FileRecord, OperationKind, SnapshotRecord
from snaporch.operations.places import paths_of
from snaporch.operations.readers import kept_for, processes_of, tips
from snaporch.operations.recover import recover, sweep
from snaporch.operations.unchanged import check_below
from snaporch.operations.verify import check_chains


@attrs.frozen
class Examined:
    """One domain as it is, under its lock."""

    context: Context
    record: DomainRecord
    snapshots: tuple[SnapshotRecord, ...]
    machine: Machine | None
    own: frozenset[str]

    @property
    def driver(self) -> Driver:
        """The domain's."""
        return self.context.driver(self.record)

    def finding(self, trouble: Trouble, subject: str, text: str, *, certain: bool = False) -> Finding:
        """Return a finding about this domain."""
        return Finding(self.record.name, trouble, subject, text, certain=certain)

    def frozen(self) -> dict[str, FileRecord]:
        """Return the images that snapshots hold, by path."""
        return {file.path: file for snapshot in self.snapshots for file in snapshot.frozen}

    async def needed(self) -> set[str]:
        """Return the files of the domain, its machine and its snapshots, as far as their chains can be read."""
        paths = set(await self.context.catalog.paths_of_snapshots(self.record.name))
        paths |= set(paths_of(self.record.definition).values())
        paths |= set(self.record.origin.files) if self.record.origin is not None else set()
        paths |= {snapshot.index for snapshot in self.snapshots if snapshot.memory is not None}
        for disk in tips(self.record):
            paths.add(disk.path)
            with suppress(Refused):
                paths |= {link.path for link in await self.driver.storage.trace(disk.path, disk.format)}
        return paths


async def fsck(context: Context, domain: str | None = None, *, repair: bool = False) -> tuple[Finding, ...]:
    """Check one domain or all; see `snaporch.Orchestrator.fsck`."""
    records = await context.catalog.domains() if domain is None else [await context.catalog.domain(domain)]
    found = [_unreadable(each) for each in await context.catalog.unreadable(domain)]
    for record in records:
        found += await _unfinished(context, record.name, repair=repair)
        try:
            async with context.locked(Operation(OperationKind.FSCK, record.name, "")):
                found += await _domain(context, record.name, repair=repair)
        except Busy as error:
            found.append(Finding(record.name, Trouble.BUSY, error.operation, f"not looked at: {error}"))
    return tuple(found)


def _unreadable(each: Unreadable) -> Finding:
    """Report a record that cannot be read."""
    text = f"the record of {each.kind} {each.name} cannot be read: {each.reason}"
    return Finding(each.domain, Trouble.UNREADABLE, each.name, text)


async def _unfinished(context: Context, domain: str, *, repair: bool) -> list[Finding]:
    """Report what was cut short; with `repair` it is recovered, and reported with what came of that."""
    found, rows = [], [row for row, _ in await context.catalog.unfinished(domain)]
    words = ""
    if repair and rows:
        try:
            await recover(context, domain=domain)
        except SnaporchError as error:
            words = f": {error}"
    left = {row.id for row, _ in await context.catalog.unfinished(domain)} if repair else {row.id for row in rows}
    for row in rows:
        text = f"{row.kind} {row.subject} was interrupted when {row.state}{words if row.id in left else ''}"
        found.append(Finding(domain, Trouble.UNFINISHED, row.id, text, certain=True, repaired=row.id not in left))
    return found


async def _domain(context: Context, domain: str, *, repair: bool) -> list[Finding]:
    before = await context.catalog.domain(domain)
    async with context.machine_of(domain, hung_is_none=True) as (record, machine):
        snapshots, own = await context.catalog.readable_snapshots(domain), await context.catalog.own_files(domain)
        examined = Examined(context, record, snapshots, machine, own)
        found = _gone_process(examined, before)
        found += await _processes(examined, repair=repair)
        found += await _disks(examined)
        found += await _snapshots(examined)
        found += await _writers(examined)
        found += await _tpms(examined, repair=repair)
        found += await _files(examined, repair=repair)
    return found


def _gone_process(examined: Examined, before: DomainRecord) -> list[Finding]:
    """Report a process that the catalog had and that is gone: the look itself has noted it."""
    if before.handle is None or examined.record.handle is not None:
        return []
    subject = _named(examined.driver, before.handle)
    text = f"its process {subject} has ended, and snaporch did not end it"
    done = examined.finding(Trouble.GONE_PROCESS, subject, text, certain=True)
    return [attrs.evolve(done, repaired=True)]


def _named(driver: Driver, handle: Handle) -> str:
    return str(driver.pid(handle) or handle.id)


async def _processes(examined: Examined, *, repair: bool) -> list[Finding]:
    """Report processes that were launched for the domain and that nobody knows."""
    found = await sweep(examined.context, examined.record, end=repair)
    return [
        attrs.evolve(
            examined.finding(
                Trouble.ORPHAN_PROCESS,
                _named(examined.driver, handle),
                f"process {_named(examined.driver, handle)} was launched for it and is not its process: "
                "it is left from a start that was interrupted",
                certain=True,
            ),
            repaired=repair,
        )
        for handle in found
    ]


async def _disks(examined: Examined) -> list[Finding]:
    """Report images that cannot be read, and those on which a running domain is other than the catalog says."""
    found, chains = [], []
    for disk in examined.record.disks:
        try:
            chains.append([link.path for link in await examined.driver.storage.chain(disk.path, disk.format)])
        except Refused as error:
            found.append(examined.finding(Trouble.BROKEN_DISK, disk.path, f"{disk.target}: {error}"))
    try:
        await check_below(examined.driver.storage, examined.record, chains)
    except Refused as error:
        found.append(examined.finding(Trouble.BROKEN_DISK, "", str(error)))
    if examined.machine is None:
        return found
    wanted = {disk.target: disk.path for disk in examined.record.disks}
    try:
        there = {disk.target: disk.active for disk in await examined.machine.disks()}
    except HypervisorError as error:
        return [*found, examined.finding(Trouble.OTHER_IMAGE, "", f"its hypervisor does not answer: {error}")]
    for target, path in wanted.items():
        if target in there and os.path.realpath(there[target]) != os.path.realpath(path):
            text = f"{target} is on {there[target]}, and was left on {path}: another program has switched it"
            found.append(examined.finding(Trouble.OTHER_IMAGE, target, text))
    return found


async def _snapshots(examined: Examined) -> list[Finding]:
    """Report snapshots of which a file is missing or is not what was saved; nothing is read that is unchanged."""
    found = []
    for snapshot in examined.snapshots:
        problems = []
        for file in {file.path: file for file in snapshot.files}.values():
            try:
                await examined.driver.storage.check(file)
            except DamagedSnapshot as error:
                problems.append(str(error))
        problems = problems or list(await check_chains(examined.driver, snapshot))
        found += [examined.finding(Trouble.DAMAGED_SNAPSHOT, snapshot.name, text) for text in problems]
    return found


async def _writers(examined: Examined) -> list[Finding]:
    """Report who else has a frozen image open for writing."""
    text = "has it open for writing, and a snapshot needs it unchanged"
    return [
        examined.finding(Trouble.FROZEN_WRITTEN, writer.path, f"{writer.who} {text}")
        for writer in await examined.driver.writers_of(examined.frozen(), examined.record.handle)
    ]


async def _tpms(examined: Examined, *, repair: bool) -> list[Finding]:
    """Report a TPM whose state is gone, and states that nobody needs."""
    found, present = [], examined.record.tpm
    if present and examined.machine is None and examined.record.handle is None:
        try:
            await examined.driver.check_tpm(present)
        except Refused as error:
            found.append(examined.finding(Trouble.BROKEN_DISK, present, str(error)))
    for path in sorted(Path(examined.context.directory(examined.record.name)).glob("tpm-*")):
        if path.is_dir() and str(path) != present:
            if repair:
                await examined.driver.remove_tpm(str(path))
            text = "it is the state of a TPM that no machine has any more"
            orphan = examined.finding(Trouble.ORPHAN_FILE, str(path), text, certain=True)
            found.append(attrs.evolve(orphan, repaired=repair))
    return found


async def _files(examined: Examined, *, repair: bool) -> list[Finding]:
    """Report files that nobody needs, and rows of files that are gone."""
    needed = {os.path.realpath(path) for path in await examined.needed()}
    storage = examined.driver.storage
    found, gone = [], []
    surplus = [path for path in sorted(examined.own) if os.path.realpath(path) not in needed]
    kept = await _kept(examined, surplus)
    for path in surplus:
        if path in kept:
            continue
        if there := await storage.exists(path):
            if repair:
                await storage.remove(path)
            text = "snaporch made it, and nothing needs it any more"
            orphan = examined.finding(Trouble.ORPHAN_FILE, path, text, certain=True)
            found.append(attrs.evolve(orphan, repaired=repair))
        if not there or repair:
            gone.append(path)
    if repair:
        await examined.context.catalog.write(Change(gone=tuple(gone)))
    strangers = [path for path in _in_directory(examined) if os.path.realpath(path) not in needed | examined.own]
    text = "it is in the domain's directory, and snaporch did not make it; remove it by hand if nothing needs it"
    return found + [examined.finding(Trouble.ORPHAN_FILE, path, text) for path in strangers]


async def _kept(examined: Examined, surplus: list[str]) -> dict[str, str]:
    """Return the files that the domain needs no more and that others read, or may read.

    What cannot be seen through in the domain's own chains may read them as well.
    """
    try:
        for disk in tips(examined.record):
            await examined.driver.storage.trace(disk.path, disk.format)
    except Refused as error:
        return dict.fromkeys(surplus, str(error))
    return await kept_for(
        examined.context, examined.record.name, surplus, processes_of(examined.driver, examined.record)
    )


def _in_directory(examined: Examined) -> list[str]:
    directory = Path(examined.context.directory(examined.record.name))
    if not directory.is_dir():
        return []
    return sorted(
        str(path) for path in directory.iterdir() if path.is_file() and path.name not in examined.driver.info.logs
    )
