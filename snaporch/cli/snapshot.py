"""``snaporch create``, ``list``, ``tree``, ``show``, ``revert``, ``delete``, …: a domain's snapshots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from snaporch.cli import progress
from snaporch.cli.asked import all_internal, create_flags, in_sequence, known, limits, parse_disks, rate, subject
from snaporch.cli.asked import columns as asked_columns
from snaporch.cli.questions import long_pause, loss
from snaporch.cli.session import Answer, Here
from snaporch.errors import InvalidInput, Refused
from snaporch.model import documents
from snaporch.model.domain import DomainState
from snaporch.model.names import in_order
from snaporch.model.record import Boot
from snaporch.model.request import CloneOptions, CreateOptions, MergeOptions, OnTimeout, Strategy
from snaporch.model.rfc import DeleteFlag, DomainSnapshot, RevertFlag
from snaporch.model.units import parse_duration


async def create(
    domain: str = "",
    name: str = "",
    /,
    *,
    group: str = "",
    live: bool = False,
    disk_only: bool = False,
    quiesce: bool = False,
    strategy: Literal["auto", "background", "precopy"] = "auto",
    internal: bool = False,
    description: str = "",
    memory_file: Path | None = None,
    disk: Annotated[list[str] | None, Parameter(show_default=False)] = None,
    max_seconds: float | None = None,
    on_timeout: OnTimeout | None = None,
    bandwidth: str = "",
    wait: bool = False,
    even_if_no_way_back: Annotated[bool, Parameter(negative=())] = False,
    late_stop: bool = False,
    expires: str = "",
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], negative=())] = False,
    session: Here,
) -> Answer:
    """Take a snapshot of a domain: its memory and all its disks, at one point in time.

    Parameters
    ----------
    domain
        The domain; with --group none.
    name
        The snapshot's name; by default made from the UTC time.
    group
        Several domains, for example web,db: all at one point, or none of them.
    live
        The guest runs while its memory is saved, instead of being paused until that is done.
    disk_only
        No memory, only the disks of an inactive domain.
    quiesce
        Let the guest agent freeze the file systems around the point.
    strategy
        How the memory of a running guest is saved: `background` holds the point at the start, `precopy` at the end;
        `auto` takes background where it is possible.
    internal
        Inside the qcow2 files, with the guest paused meanwhile, instead of in files of its own.
    description
        Free text.
    memory_file
        Where the memory goes; by default under the root.
    disk
        What is done with one disk: TARGET, TARGET=FILE (its new overlay), TARGET=none (left out) or
        TARGET=internal. May be repeated; disks that are not named are taken.
    max_seconds
        The time that saving memory live may take.
    on_timeout
        What happens then: `pause` the guest and finish, or `fail` and roll back (the default).
    bandwidth
        What saving memory may write a second, for example 100MiB.
    wait
        Wait for an operation that runs on the domain instead of refusing.
    even_if_no_way_back
        Take a checkpoint also where `domain show` says that the domain could never go back to it.
    late_stop
        With --live: let the guest run through most of what QEMU reads before the point, where that is worth it.
    expires
        How long it is needed, for example 12h or 7d. Then a service deletes it, and so does `prune`, unless it is
        pinned or has clones; by default it never expires.
    yes
        Do not ask on a terminal whether the guest may be paused for long.
    """
    flags = create_flags(live=live, disk_only=disk_only, quiesce=quiesce, memory_file=memory_file)
    seconds, end = limits(max_seconds, on_timeout)
    request = parse_disks(disk or ())
    options = CreateOptions(
        strategy=Strategy(strategy),
        bandwidth=rate(bandwidth),
        max_seconds=seconds,
        on_timeout=end,
        exclude=request.exclude,
        wait=wait,
        even_if_no_way_back=even_if_no_way_back,
        late_stop=late_stop,
        expires=parse_duration(expires) if expires else None,
    )
    members, name = subject("create", domain, name, group)
    if group and internal:
        raise InvalidInput("--group, and --internal: choose one")
    session.interrupted = "nothing was touched"
    async with session.open() as orchestrator:
        if session.asks and not (yes or live or disk_only):
            how = Strategy.INTERNAL if internal else Strategy.PAUSED
            question = await long_pause(orchestrator, members, how)
            if question and not await session.agrees(question):
                raise Refused("nothing was touched; with --live the guest runs while its memory is saved")
        session.about(members, name)
        async with progress.shown(orchestrator, in_order(members)):
            if internal:
                request = all_internal(request, await orchestrator.domain_info(domain))
            file = os.path.abspath(memory_file) if memory_file else ""
            snapshot = DomainSnapshot(name, description, memory_file=file, disks=request.disks)
            if group:
                records = await orchestrator.create_group(members, snapshot, flags, options)
            else:
                records = (await orchestrator.create(domain, snapshot, flags, options),)
    document = documents.created_group(records) if group else documents.created(records[0])
    return Answer(document, lambda human: human.created(records))


async def revert(
    domain: str = "",
    name: str = "",
    /,
    *,
    group: str = "",
    alone: bool = False,
    running: bool = False,
    paused: bool = False,
    force: bool = False,
    save_current: str = "",
    keep_clock: Annotated[bool, Parameter(negative=())] = False,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], negative=())] = False,
    lazy: Annotated[bool, Parameter(negative="--no-lazy")] = False,
    no_wait: bool = False,  # noqa: ARG001 - see its help
    session: Here,
) -> Answer:
    """Take a domain back to a snapshot. What it holds now, and no snapshot does, is lost: see --save-current.

    Parameters
    ----------
    domain
        The domain; with --group none.
    name
        The snapshot.
    group
        Several domains, for example web,db, of which it was taken at one point: all go back, or none of them does.
    alone
        Only this domain, though others were taken with it at one point.
    running
        It runs afterwards, whatever it did at the point.
    paused
        The guest is paused afterwards, also if it ran at the point.
    force
        Replace whatever is there: a guest that hangs, a definition that has changed.
    save_current
        First keep what the domain holds now, in a snapshot of this name.
    keep_clock
        Leave the guest's clock at the time of the snapshot, where its agent would set it.
    yes
        Do not ask on a terminal whether what would be lost may be.
    lazy
        Let the guest run before its memory is there, where that can be: what it asks for comes first. Until all of
        it is there the guest of before is kept, paused. Default: all memory is loaded first.
    no_wait
        Return when the guest runs: as every revert does but a lazy one, for the time being.
    """
    flags = RevertFlag.RUNNING if running else RevertFlag(0)
    flags |= RevertFlag.PAUSED if paused else RevertFlag(0)
    flags |= RevertFlag.FORCE if force else RevertFlag(0)
    flags |= RevertFlag.ALONE if alone else RevertFlag(0)
    flags |= RevertFlag.KEEP_CLOCK if keep_clock else RevertFlag(0)
    flags |= RevertFlag.LAZY if lazy else RevertFlag(0)
    members, name = known("revert", domain, name, group)
    session.interrupted = "nothing was touched"
    async with session.open() as orchestrator:
        for member in () if yes or save_current else members:
            if not await session.agrees(await loss(orchestrator, member, name)):
                raise Refused("nothing was touched; --save-current NAME keeps what a revert would lose")
        session.about(members, name)
        async with progress.shown(orchestrator, in_order(members)):
            if group:
                records = await orchestrator.revert_group(members, name, flags, save_current=save_current)
            else:
                records = (await orchestrator.revert(domain, name, flags, save_current=save_current),)
        infos = [await orchestrator.domain_info(record.domain) for record in records]
    answers = [documents.reverted(*each, save_current) for each in zip(records, infos, strict=True)]
    document = documents.of_group(name, answers) if group else answers[0]
    return Answer(document, lambda human: human.reverted(records, infos))


async def delete(
    domain: str = "",
    name: str = "",
    /,
    *,
    group: str = "",
    alone: bool = False,
    children: bool = False,
    children_only: bool = False,
    dry_run: bool = False,
    bandwidth: str = "",
    max_seconds: float | None = None,
    on_timeout: OnTimeout | None = None,
    session: Here,
) -> Answer:
    """Delete a snapshot; what the guest and every other snapshot hold stays the same.

    Parameters
    ----------
    domain
        The domain; with --group none.
    name
        The snapshot.
    group
        Several domains, for example web,db, of which it was taken at one point: it goes from all of them.
    alone
        Only from this domain, though others were taken with it at one point.
    children
        This one and all that descend from it.
    children_only
        All that descend from it, but not this one.
    dry_run
        Only say what would merge where, and which files would go.
    bandwidth
        What merging may write a second, for example 100MiB.
    max_seconds
        The time in which a merge has to catch up with a guest that writes; then the guest's writes are slowed down,
        and it has as much time again.
    on_timeout
        What happens then: `pause` the guest and finish, or `fail`: the image stays and merges another time (the
        default).
    """
    seconds, end = limits(max_seconds, on_timeout)
    options = MergeOptions(rate(bandwidth), seconds, end)
    flags = DeleteFlag.CHILDREN if children else DeleteFlag(0)
    flags |= DeleteFlag.CHILDREN_ONLY if children_only else DeleteFlag(0)
    flags |= DeleteFlag.ALONE if alone else DeleteFlag(0)
    members, name = known("delete", domain, name, group)
    session.about(members, name)
    session.only_reads = dry_run
    async with session.open() as orchestrator, progress.shown(orchestrator, in_order(members)):
        if group:
            plans = await orchestrator.delete_group(members, name, flags, options, dry_run=dry_run)
        else:
            plans = {domain: await orchestrator.delete(domain, name, flags, options, dry_run=dry_run)}
    answers = [documents.deleted(member, name, plan, dry_run=dry_run) for member, plan in plans.items()]
    document = documents.of_group(name, answers) if group else answers[0]
    return Answer(document, lambda human: human.deleted(plans, dry_run=dry_run))


async def flatten(
    domain: str,
    name: str = "",
    /,
    *,
    depth: int = 1,
    dry_run: bool = False,
    bandwidth: str = "",
    session: Here,
) -> Answer:
    """Shorten the chains of images of a domain, or of a snapshot, by copying up; nobody sees a difference.

    Parameters
    ----------
    domain
        The domain.
    name
        A snapshot; by default what the domain writes to.
    depth
        How many images may be left in a chain: 1 is alone, 2 is on the chain's base, which is not copied.
    dry_run
        Only say what would be copied, and which files would go.
    bandwidth
        What copying may write a second, for example 100MiB.
    """
    session.about((domain,), name)
    options = MergeOptions(rate(bandwidth))
    session.only_reads = dry_run
    async with session.open() as orchestrator, progress.shown(orchestrator, domain):
        plan = await orchestrator.flatten(domain, name, depth, options, dry_run=dry_run)
    document = documents.flattened(domain, name, plan, dry_run=dry_run)
    return Answer(document, lambda human: human.flattened(domain, plan, dry_run=dry_run))


async def clone(
    domain: str,
    name: str,
    new: str,
    /,
    *,
    count: int | None = None,
    start: bool = False,
    paused: bool = False,
    network: Literal["keep"] | None = None,
    session: Here,
) -> Answer:
    """Make new domains from a snapshot: on overlays over its images, with its memory; all or none.

    With memory a clone has the network addresses and ids that the guest had at the point; ports that the host
    forwards to it are other ones, which the answer names.

    Parameters
    ----------
    domain
        The original, which may do whatever it does.
    name
        The snapshot.
    new
        The clone's name.
    count
        How many: they are called NEW-1, NEW-2 and so on.
    start
        Let them run; by default they do what the original did at the point.
    paused
        Let them be paused.
    network
        `keep`: they may be in the original's network with its addresses.
    """
    if start and paused:
        raise InvalidInput("--start and --paused exclude each other")
    state = DomainState.RUNNING if start else DomainState.PAUSED if paused else None
    session.about((domain,), name)
    async with session.open() as orchestrator:
        options = CloneOptions(count, state, keep_network=network == "keep")
        records = await orchestrator.clone(domain, name, new, options)
    return Answer(documents.cloned(records), lambda human: human.cloned(records))


async def verify(
    domain: str,
    name: str = "",
    /,
    *,
    boot: bool = False,
    everything: Annotated[bool, Parameter(name="--all")] = False,
    session: Here,
) -> Answer:
    """Read all files of a snapshot and compare them with what was saved.

    Exit status 1 when it is damaged, 2 when the files are good and a copy cannot be tried here.

    Parameters
    ----------
    domain
        The domain.
    name
        The snapshot.
    boot
        Also load it in a throw-away copy without network, and let that run for a few seconds.
    everything
        All snapshots of the domain.
    """
    if everything == bool(name):
        raise InvalidInput("verify: name one snapshot, or write --all")
    async with session.open() as orchestrator, progress.shown(orchestrator, domain):
        names = [record.name for record in await orchestrator.list(domain)] if everything else [name]
        reports = [await orchestrator.verify(domain, each, boot=boot) for each in names]
    answers = [documents.verified(report) for report in reports]
    if damaged := [report.name for report in reports if not report.ok]:
        session.say(f"snaporch: {domain}: damaged: {', '.join(damaged)}")
    untried = [report for report in reports if report.boot is Boot.NOT_POSSIBLE]
    for report in untried:
        session.say(f"snaporch: {domain}: a copy of {report.name} cannot be tried here: {report.reason}")
    return Answer(
        answers if everything else answers[0],
        lambda human: human.verified(domain, reports),
        status=1 if damaged else 2 if untried else 0,
    )


async def list_(
    domain: str,
    /,
    *,
    names: bool = False,
    columns: str = "",
    sort: Literal["age", "name", "size"] = "age",
    session: Here,
) -> Answer:
    """List the snapshots of a domain, oldest first.

    Parameters
    ----------
    domain
        The domain.
    names
        Only the names, one a line.
    columns
        These columns, in this order, for example name,size; by default all that there is room for.
    sort
        By `age`, the oldest first; by `name`; or by `size`, the largest first.
    """
    only = asked_columns(columns)
    async with session.read() as known:
        records = in_sequence(await known.list(domain), sort)
        current = await known.current(domain)
        lost = await known.unreadable(domain, "snapshot")
    if names:
        shown = [record.name for record in records]
        return Answer(shown, lambda human: human.lines(shown))
    return Answer(
        documents.listed(records, current, lost),
        lambda human: human.snapshots(domain, records, current, lost, only),
    )


async def tree(domain: str, /, *, session: Here) -> Answer:
    """Show the snapshots of a domain as a tree."""
    async with session.read() as known:
        records = await known.list(domain)
        current = await known.current(domain)
    return Answer(documents.tree(records, current), lambda human: human.tree(domain, records, current))


async def show(domain: str, name: str, /, *, session: Here) -> Answer:
    """Show one snapshot: its point, its files, how it was taken."""
    async with session.read() as known:
        record = await known.show(domain, name)
        current = await known.current(domain)
    return Answer(documents.shown(record, current), lambda human: human.snapshot(record, current))


async def pin(domain: str, name: str, /, *, off: bool = False, session: Here) -> Answer:
    """Let no retention delete a snapshot.

    Parameters
    ----------
    domain
        The domain.
    name
        The snapshot.
    off
        Let retention delete it again.
    """
    async with session.open() as orchestrator:
        record = await orchestrator.pin(domain, name, pinned=not off)
    said = f"{domain} {name} is {'no longer pinned' if off else 'pinned'}"
    document = {"domain": domain, "name": name, "pinned": record.pinned}
    return Answer(document, lambda human: human.line(said))


async def edit(
    domain: str,
    old: Annotated[str, Parameter(name="NAME")],
    /,
    *,
    name: str = "",
    description: str | None = None,
    expires: str = "",
    session: Here,
) -> Answer:
    """Give a snapshot another name, another description, or another end; its files stay as they are.

    Parameters
    ----------
    domain
        The domain.
    old
        The snapshot.
    name
        The name that it is to have.
    description
        Free text, in place of what is there.
    expires
        How long it is needed from now on, for example 7d; or never. See `create --expires`.
    """
    life = None if not expires else 0.0 if expires == "never" else parse_duration(expires)
    async with session.open() as orchestrator:
        known = (await orchestrator.show(domain, old)).id
        record = await orchestrator.edit(
            domain, old, new_name=name, description=description, expires_in=life, ids=[known]
        )
        current = await orchestrator.current(domain)
    if record.name != old:
        did = f"is {record.name} now"
    else:
        did = "is described anew" if description is not None else "has another end"
    said = f"{old} of {domain} {did}"
    return Answer(documents.shown(record, current), lambda human: human.line(said))
