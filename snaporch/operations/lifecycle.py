"""Start, shutdown, destroy, pause and resume; a domain's state is asked of its hypervisor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import attrs
import trio

from snaporch.catalog import Change
from snaporch.drivers.base import GuestAgent, GuestVerb, KeepsRecords, Launch, Machine, Resets, Screens, has, need
from snaporch.engine.context import Context
from snaporch.engine.run import Operation
from snaporch.errors import Busy, HypervisorError, Refused, SnaporchError
from snaporch.model.domain import DiskStatus, DomainInfo, DomainRecord, DomainState
from snaporch.model.record import OperationKind
from snaporch.operations.checks import check_verb
from snaporch.operations.disks import check_drives, check_start
from snaporch.operations.recover import sweep
from snaporch.operations.revert_plan import tpm_place
from snaporch.operations.shape import WantedDisk, check_shape
from snaporch.operations.unchanged import check_as_left

AT_ONCE = 64  # domains that are looked at side by side


async def start(context: Context, name: str, *, paused: bool) -> None:
    """See `snaporch.Orchestrator.start`."""
    operation = Operation(OperationKind.START, name, "")
    async with context.locked(operation):
        async with context.machine_of(name) as (record, machine):
            if machine is not None:
                raise Refused(f"{name} is {await machine.state()} already")
        await sweep(context, record, end=True)
        await check_start(context, operation, record)
        await check_as_left(context, record, still=True)
        if record.definition.tpm is None or record.tpm:
            await _check_tpm(context, record)
            await _launch(context, _anew(record), paused=paused)
            return
        driver, place = context.driver(record), tpm_place(record.definition, context.directory(name), operation.id)
        await driver.make_tpm(place)
        try:
            await _launch(context, attrs.evolve(_anew(record), tpm=place), paused=paused)
        except BaseException:
            with trio.CancelScope(shield=True):
                await context.catalog.write(Change(domains=(record,)))
                await driver.remove_tpm(place)
            raise


async def _check_tpm(context: Context, record: DomainRecord) -> None:
    """Refuse to start a domain whose TPM would be another one.

    Raises:
        Refused: its state is not there.
    """
    if record.definition.tpm is None:
        return
    try:
        await context.driver(record).check_tpm(record.tpm)
    except Refused as error:
        back = f"`snaporch revert {record.name} SNAPSHOT` brings back the TPM of a point"
        raise Refused(
            f"{record.name} is not started: {error}, and its guest would find another TPM; {back}"
        ) from None


def _anew(record: DomainRecord) -> DomainRecord:
    """Return the record of a domain that is about to boot: it knows nothing of a point any more."""
    generation = record.generation or record.definition.first_generation()
    return attrs.evolve(record, frozen=False, clock_behind_seconds=None, generation=generation)


async def _launch(context: Context, record: DomainRecord, *, paused: bool) -> None:
    """Start a process; whatever happens before the guest runs in it, it is ended."""
    driver = context.driver(record)
    directory = context.run_directory(record.name, Operation(OperationKind.START, record.name, "").id)
    handle = await driver.launch(
        Launch(
            record.definition,
            record.disks,
            directory,
            template=record.template,
            generation=record.generation,
            tpm=record.tpm if record.definition.tpm is not None else "",
        )
    )
    try:
        await context.catalog.write(Change(domains=(attrs.evolve(record, handle=handle),)))
        async with driver.connect(handle, record.name) as machine:
            await check_drives(record, machine, driver.storage)
            check_shape(record.name, await _wanted(context, record), None, await machine.shape())
            record = attrs.evolve(record, way_back=await driver.way_back(record, machine))
            if record.template is not None:
                handle = await driver.come_back(record.template, handle)
            await context.catalog.write(Change(domains=(attrs.evolve(record, handle=handle),)))
            if not paused:
                await machine.resume()
    except BaseException:
        with trio.CancelScope(shield=True):
            await driver.end(handle, directory)
            await context.catalog.write(Change(domains=(record,)))
        raise


async def _wanted(context: Context, record: DomainRecord) -> list[WantedDisk]:
    """Return what a domain's disks are to be, as their images have it."""
    storage = context.driver(record).storage
    wanted = []
    for disk in record.disks:
        links = await storage.chain(disk.path, disk.format)
        size = await storage.virtual_size(disk.path, disk.format)
        wanted.append(WantedDisk(disk, tuple(link.path for link in links), size))
    return wanted


async def shutdown(context: Context, name: str, *, timeout: float) -> None:
    """See `snaporch.Orchestrator.shutdown`."""
    async with context.locked(Operation(OperationKind.SHUTDOWN, name, "")):
        async with context.machine_of(name) as (record, machine):
            if machine is None or record.handle is None:
                raise Refused(f"{name} is inactive")
            await check_verb(name, machine, GuestVerb.SHUTDOWN)
            await machine.shutdown()
            with trio.move_on_after(timeout) as scope:
                await context.driver(record).wait_gone(record.handle)
            if scope.cancelled_caught:
                raise HypervisorError(f"{name} did not power off within {timeout:g} s; `domain destroy` ends it")
        await _forget_machine(context, record)


async def destroy(context: Context, name: str) -> None:
    """See `snaporch.Orchestrator.destroy`; a shutdown that waits for the guest is no reason to wait."""
    operation = Operation(OperationKind.DESTROY, name, "")
    try:
        async with context.locked(operation):
            await _end(context, name)
    except Busy as busy:
        if not busy.running.startswith(OperationKind.SHUTDOWN):
            raise
        record = await context.catalog.domain(name)
        if record.handle is not None:
            await context.driver(record).kill(record.handle)  # which is what the other one waits for
        async with context.locked(operation, wait=True):
            await _end(context, name)


async def _end(context: Context, name: str) -> None:
    record = await context.catalog.domain(name)
    if record.handle is not None:
        await context.driver(record).kill(record.handle)
        await _forget_machine(context, record)


async def _forget_machine(context: Context, record: DomainRecord) -> None:
    if record.handle is not None:
        await context.driver(record).forget(record.handle)
    await context.catalog.write(Change(domains=(attrs.evolve(record, handle=None),)))


@asynccontextmanager
async def _active(context: Context, kind: OperationKind, name: str) -> AsyncIterator[tuple[DomainRecord, Machine]]:
    """Hold the lock of a domain that has a process, with a connection to that.

    Raises:
        Refused: it has none.
    """
    async with context.locked(Operation(kind, name, "")), context.machine_of(name) as (record, machine):
        if machine is None:
            raise Refused(f"{name} is inactive; `snaporch domain start {name}` starts it")
        yield record, machine


async def set_running(context: Context, name: str, *, running: bool) -> None:
    """Let the CPUs of a domain that has a process run, or stop them.

    One that goes on from a point at which its file systems were frozen has them thawed.
    """
    kind = OperationKind.RESUME if running else OperationKind.PAUSE
    async with _active(context, kind, name) as (record, machine):
        await check_verb(name, machine, GuestVerb.RESUME if running else GuestVerb.PAUSE)
        state = await machine.state()
        if running and state is DomainState.PAUSED:
            await machine.resume()
        if running:
            await _thaw(context, record, machine)
        elif state is DomainState.RUNNING:
            await machine.pause()


async def reset(context: Context, name: str) -> None:
    """See `snaporch.Orchestrator.reset`; a guest that something else than its user has stopped runs afterwards."""
    async with _active(context, OperationKind.RESET, name) as (record, machine):
        resets = need(machine, Resets, name)
        await check_verb(name, machine, GuestVerb.RESET)
        paused = not await machine.refusal(GuestVerb.PAUSE) and await machine.state() is DomainState.PAUSED
        await resets.reset()
        await context.catalog.write(
            Change(domains=(attrs.evolve(record, frozen=False, clock_behind_seconds=None),))
        )
        if not paused and await machine.state() is DomainState.PAUSED:
            await machine.resume()


async def screenshot(context: Context, name: str) -> bytes:
    """See `snaporch.Orchestrator.screenshot`."""
    async with (
        context.locked(Operation(OperationKind.SCREENSHOT, name, "")),
        context.machine_of(name) as (_, machine),
    ):
        if machine is None:
            raise Refused(f"{name} is inactive: it has no screen")
        return await need(machine, Screens, name).screenshot()


async def _thaw(context: Context, record: DomainRecord, machine: Machine) -> None:
    if record.frozen:
        await need(machine, GuestAgent, record.name).thaw()
        await context.catalog.write(Change(domains=(attrs.evolve(record, frozen=False),)))


async def info(context: Context, record: DomainRecord) -> DomainInfo:
    """Return a domain as it is this moment; also while an operation runs on it."""
    driver = context.driver(record)
    handle = await driver.present(record)
    state, disks, pid = DomainState.INACTIVE, None, None
    problems: list[str] = []
    if handle is not None:
        state, pid = DomainState.RUNNING, driver.pid(handle)  # all that is known of one that does not answer
        try:
            async with driver.query(handle, record.name) as machine:
                state, disks = await machine.state(), await machine.disks()
        except HypervisorError as error:
            problems.append(str(error))
    if disks is None:
        disks = await context.disks_of(record, None, unread=problems)
    told = record.records if has(driver, KeepsRecords) else None
    known = attrs.evolve(_known(record), state=state, disks=disks, pid=pid, records=told)
    return attrs.evolve(known, problem="; ".join(problems))


def _known(record: DomainRecord) -> DomainInfo:
    """Return what the catalog alone says of a domain."""
    disks = tuple(DiskStatus(d.target, d.path, d.format, d.readonly, 0, (d.path,)) for d in record.disks)
    return DomainInfo(
        record.name,
        DomainState.INACTIVE,
        disks,
        record.current,
        driver=record.definition.driver,
        tags=record.tags,
        max_depth=record.max_depth,
        way_back=record.way_back,
        clock_behind_seconds=record.clock_behind_seconds if record.handle else None,
        origin=record.origin,
        generation=record.generation,
    )


async def infos(context: Context, records: Iterable[DomainRecord]) -> tuple[DomainInfo, ...]:
    """Return domains as they are this moment, looked at side by side: none waits for one that does not answer."""
    found: dict[str, DomainInfo] = {}
    limit = trio.CapacityLimiter(AT_ONCE)

    async def look(record: DomainRecord) -> None:
        async with limit:
            try:
                found[record.name] = await info(context, record)
            except (SnaporchError, OSError) as error:
                found[record.name] = attrs.evolve(_known(record), problem=str(error))

    async with trio.open_nursery() as nursery:
        for record in records:
            nursery.start_soon(look, record)
    return tuple(found[name] for name in sorted(found))
