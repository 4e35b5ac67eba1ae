"""What the command line prints for people, and nothing that decides anything."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from snaporch.cli.asked import COLUMNS
from snaporch.cli.fitted import Fitted
from snaporch.cli.tree import Drawing
from snaporch.engine.states import State
from snaporch.model.domain import Discovered, DomainInfo, DomainState
from snaporch.model.finding import Finding, Unreadable
from snaporch.model.merge import MergePlan
from snaporch.model.names import NAME
from snaporch.model.record import (
    Boot,
    CloneRecord,
    FileRecord,
    GivenUp,
    OperationRecord,
    RevertRecord,
    SnapshotRecord,
    SyncReport,
    Timings,
    VerifyReport,
)
from snaporch.model.rfc import DiskSnapshot

_KIB = 1024
_CLOCK_SET = 2.0  # seconds that a guest's clock may be behind and is said to be set: it was asked for the time
_STATE_STYLES = {DomainState.RUNNING: "green", DomainState.PAUSED: "yellow", DomainState.INACTIVE: "dim"}
_OPERATION_STYLES = {State.COMPLETE: "green", State.ROLLED_BACK: "yellow", State.STRANDED: "bold red"}
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def human_size(number: int) -> str:
    """Return for example ``23.4 MiB``."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < _KIB:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= _KIB
    return f"{value:.1f} TiB"


def human_duration(seconds: float | None) -> str:
    """Return for example ``12.3 ms`` or ``4.56 s``."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def age(instant: float) -> str:
    """Return for example ``5 min ago``."""
    words = _rounded(time.time() - instant)
    return f"{words} ago" if words else "just now"


def _time_left(instant: float) -> str:
    """Return for example ``5 h``."""
    return _rounded(instant - time.time()) or "0 s"


def _rounded(seconds: float) -> str:
    """Return seconds in the largest unit that there is one of, or an empty string."""
    return next((f"{int(seconds // unit)} {name}" for unit, name in _AGES if seconds >= unit), "")


def _text(words: str, style: str = "") -> Text:
    """Return text without control characters, which could move a terminal's cursor."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words), style)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _facts(facts: Iterable[tuple[str, RenderableType]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def line(words: str) -> RenderableType:
    """Return one line."""
    return _text(words)


def lines(words: Iterable[str]) -> RenderableType:
    """Return several."""
    return Group(*(_text(each) for each in words))


def created(records: Sequence[SnapshotRecord]) -> RenderableType:
    """Return what was done, in two lines for each domain."""
    return Group(*(line for record in records for line in _created(record)))


def _created(record: SnapshotRecord) -> tuple[RenderableType, ...]:
    timings = record.timings
    pause = f"pause {human_duration(timings.pause)}, " if timings.pause is not None else ""
    memory = f", memory {human_size(record.memory.size)}" if record.memory else ""
    memory = f", {human_size(record.size)} inside the images" if record.inside else memory
    disks = ", ".join(disk.disk.target for disk in record.snapshot.disks) or "no disks"
    return (
        _text(f"{record.domain}: {record.kind} {record.name}{_with(record)} ({record.strategy}: {record.reason})"),
        _text(f"{pause}total {human_duration(timings.total)}{memory}, {disks}"),
    )


def _with(record: SnapshotRecord) -> str:
    """Return with whom a snapshot is one point."""
    members = record.group.members if record.group is not None else ()
    return f", one point with {', '.join(name for name in members if name != record.domain)}" if members else ""


def reverted(records: Sequence[RevertRecord], infos: Sequence[DomainInfo]) -> RenderableType:
    """Return what was done, in a line for each domain."""
    return Group(*(_text(_reverted(*each)) for each in zip(records, infos, strict=True)))


def _reverted(record: RevertRecord, info: DomainInfo) -> str:
    text = f"{record.domain} is back at {record.name} ({age(record.point)}), {info.state}"
    text += f", in {human_duration(record.total_seconds)}"
    if record.outage_seconds is not None:
        text += f"; its guest was paused for {human_duration(record.outage_seconds)} ({record.way})"
    if (behind := record.clock_behind_seconds) is not None and behind > _CLOCK_SET:
        text += f"; its clock is {human_duration(behind)} behind"
    return "; ".join((text, *record.problems))


def cloned(records: Sequence[CloneRecord]) -> RenderableType:
    """Return a line for each new domain, with the ports behind which it is."""
    return lines(_cloned(record) for record in records)


def _cloned(record: CloneRecord) -> str:
    ports = ", ".join(f"{port.was} is {port.port}" for port in record.ports)
    at = f", port {ports}" if ports else ""
    return f"{record.name} is {record.state}, from {record.snapshot} of {record.domain}{at}"


def deleted(plans: Mapping[str, MergePlan], *, dry_run: bool) -> RenderableType:
    """Return, for each domain, what is done to which image, as a tree, and a line that says it in short."""
    return Group(*(_deleted(name, plan, dry_run=dry_run) for name, plan in plans.items()))


def _deleted(domain_name: str, plan: MergePlan, *, dry_run: bool) -> RenderableType:
    names = ", ".join(sorted(plan.doomed)) or "nothing"
    moved, files = human_size(plan.bytes), f"{len(plan.unlink)} file{'' if len(plan.unlink) == 1 else 's'}"
    summary = f"{domain_name}: {names} deleted, {moved} merged, {files} removed"
    if dry_run:
        summary = f"{domain_name}: nothing is touched; it would delete {names}, merge {moved}, remove {files}"
    return _merges(plan, "", summary)


def _merges(plan: MergePlan, title: str, summary: str) -> RenderableType:
    from snaporch.images.merge import render  # noqa: PLC0415 - most verbs show no merges, and it takes time to import

    return Group(*(_text(each) for each in [*render(plan, title), summary]))


def flattened(domain_name: str, plan: MergePlan, *, dry_run: bool) -> RenderableType:
    """Return what is done to which image, as a tree, and a line that says it in short."""
    if not plan.steps:
        return line(f"{domain_name}: its chains are short enough")
    did = "nothing is touched; it would copy" if dry_run else "copied"
    summary = f"{domain_name}: {did} {human_size(plan.bytes)}"
    return _merges(plan, f"flatten {domain_name}", summary)


def verified(domain_name: str, reports: Sequence[VerifyReport]) -> RenderableType:
    """Return a line for each snapshot, and one for each thing that is wrong."""
    if not reports:
        return line(f"{domain_name} has no snapshots")
    lines: list[RenderableType] = []
    for report in reports:
        booted = {Boot.RAN: ", a copy runs", Boot.NOT_POSSIBLE: "; no copy can be tried here"}.get(
            report.boot or Boot.FAILED, ""
        )
        verdict = f"ok: every file is what was saved{booted}" if report.ok else "DAMAGED"
        lines.append(_text(f"{domain_name} {report.name}: {verdict}", "green" if report.ok else "bold red"))
        lines += [_text(f"  {problem}") for problem in report.problems]
    return Group(*lines)


def recovered(records: Sequence[OperationRecord]) -> RenderableType:
    """Return a line for each operation that was finished or undone."""
    if not records:
        return line("nothing to recover")
    return Group(*(_text(f"{r.kind} {r.who} {r.subject} ({r.id}): {r.state}") for r in records))


def given_up(found: GivenUp) -> RenderableType:
    """Return what is kept and what is lost by giving an operation up."""
    rows = [f"kept: {text}" for text in found.kept] + [f"lost: {text}" for text in found.lost or ("nothing",)]
    end = f"operation {found.operation} " + ("is given up" if found.done else "would be given up")
    return Group(*(_text(row) for row in (*rows, end)))


def checked(found: Sequence[Finding]) -> RenderableType:
    """Return a line for each thing that `fsck` found."""
    if not found:
        return line("all is as the catalog has it")
    return Group(*(_text(f"{f.domain}: {f.trouble}: {f.text}{_subject(f)}{_remedy(f)}") for f in found))


def _subject(found: Finding) -> str:
    return "" if not found.subject or found.subject in found.text else f" ({found.subject})"


def _remedy(found: Finding) -> str:
    if found.repaired:
        return ": repaired"
    return "; --repair mends it" if found.certain else ""


def domain(info: DomainInfo) -> RenderableType:
    """Return one domain with its chains."""
    facts: list[tuple[str, RenderableType]] = [
        ("name", _text(info.name)),
        ("state", _text(info.state, _STATE_STYLES[info.state])),
        ("current", _text(info.current or "-")),
        ("process", str(info.pid or "-")),
    ]
    if info.origin is not None:
        ports = ", ".join(f"{port.port} for {port.was}" for port in info.origin.ports)
        facts.append(("clone of", _text(f"{info.origin.domain}, {info.origin.name}")))
        facts += [("ports", _text(ports))] if ports else []
    for status in info.disks:
        note = ", read-only" if status.readonly else ""
        chain = Tree(_text(f"{status.active} ({status.format}, {human_size(status.virtual_size)}{note})"))
        branch = chain
        for path in status.chain[1:]:
            branch = branch.add(_text(path))
        facts.append((status.target, chain))
    if info.problem:
        facts.append(("not seen", _text(info.problem)))
    if info.way_back is not None:
        back = info.way_back
        facts.append(("way back", _text(f"{back.way.word}: {back.reason}" if back.reason else back.way.word)))
    if (behind := info.clock_behind_seconds) is not None and behind > _CLOCK_SET:
        facts.append(("clock", _text(f"{human_duration(behind)} behind since it went back to {info.current}")))
    return _facts(facts)


def domains(infos: Sequence[DomainInfo], unreadable: Sequence[Unreadable] = ()) -> RenderableType:
    """Return a table of domains, and a line for each whose record cannot be read."""
    if not infos and not unreadable:
        return line(
            "no domains; `snaporch domain define FILE` or `snaporch domain attach NAME --qmp SOCKET` adds one"
        )
    rows = [
        (
            info.name,
            _text(info.state, _STATE_STYLES[info.state]),
            " ".join(disk.target for disk in info.disks),
            info.current or "-",
        )
        for info in infos
    ]
    table = Fitted(("name", "state", "disks", "current"), rows, less=("disks", "current", "state"))
    return Group(table, *(_text(_lost(each), "bold red") for each in unreadable))


def attached(info: DomainInfo) -> RenderableType:
    """Return what a domain is now that snaporch has charge of it."""
    told = "; its snapshots will be in its manager's list of snapshots too, and keep it from being undefined or "
    told += "migrated there: --no-records leaves them out"
    return line(f"{info.name} is {info.state}{told if info.records else ''}")


def synced(report: SyncReport) -> RenderableType:
    """Return what a sync has found, a line for each."""
    lines = [f"taken over: {', '.join(report.imported)}"] if report.imported else []
    lines += [f"deleted by others: {', '.join(report.gone)}"] if report.gone else []
    if report.followed is not None:
        lines.append(f"others have put {report.domain} back to {report.followed}")
    words = "are in" if report.records else "are left out of"
    lines += [*report.problems, f"snaporch's snapshots of {report.domain} {words} its manager's list"]
    return Group(*(_text(each) for each in lines))


def discovered(found: Sequence[Discovered]) -> RenderableType:
    """Return a line for each that could be attached to, and the command that does it, or what stands in the way."""
    return Group(*(_text(_discovered(each)) for each in found)) if found else line("nothing is found")


def _discovered(each: Discovered) -> str:
    who = each.name or (f"process {each.pid}" if each.pid else "-")
    who += f" (process {each.pid}, of {each.user})" if each.name and each.pid else ""
    if each.domain:
        return f"{each.driver}  {who}: it is the domain {each.domain}"
    if each.blocker:
        return f"{each.driver}  {who}: {each.blocker}"
    where = f"--driver {each.driver}" + (f" --uri {each.uri}" if each.uri else "")
    if each.sockets:
        where = f"--qmp {shlex.quote(each.sockets[0])}"
    name = each.name if NAME.fullmatch(each.name) else "NAME"
    of = f" --of {shlex.quote(each.name)}" if not each.sockets and name != each.name else ""
    return f"{each.driver}  {who}: `snaporch domain attach {name} {where}{of}`"


def snapshots(
    domain_name: str,
    records: Sequence[SnapshotRecord],
    current: str | None,
    unreadable: Sequence[Unreadable] = (),
    only: tuple[str, ...] = (),
) -> RenderableType:
    """Return a table of snapshots, in their order, and a line for each whose record cannot be read."""
    if not records and not unreadable:
        return line(f"{domain_name} has no snapshots; `snaporch create {domain_name} --live` makes one")
    columns = ("", *COLUMNS)
    rows = [
        (
            "*" if record.name == current else "",
            record.name + _marks(record),
            record.parent or "-",
            record.domain_state,
            human_size(record.memory.size) if record.memory else "inside" if record.snapshot.memory else "-",
            human_size(record.size),
            age(record.point),
            _text(record.snapshot.description),
        )
        for record in records
    ]
    less = ("description", "memory", "state", "size", "parent", "age")
    table = Fitted(columns, rows, less, text="description", only=only)
    return Group(table, *(_text(f"{domain_name}: {_lost(each)}", "bold red") for each in unreadable))


def _lost(each: Unreadable) -> str:
    return f"the record of {each.kind} {each.name} cannot be read: {each.reason}"


def _marks(record: SnapshotRecord) -> str:
    group = " (group)" if record.group is not None else ""
    end = "" if record.expires is None else f" (expires in {_time_left(record.expires)})"
    return group + (" (deleting)" if record.deleting else "") + (" (pinned)" if record.pinned else "") + end


def _what(record: SnapshotRecord) -> str:
    what = "memory" if record.snapshot.memory else "disks only"
    return f"{what}, inside" if record.inside else what


def tree(domain_name: str, records: Sequence[SnapshotRecord], current: str | None) -> RenderableType:
    """Return the tree, the current snapshot marked."""
    return Drawing(_text(domain_name, "bold"), records, lambda record: _in_tree(record, current))


def _in_tree(record: SnapshotRecord, current: str | None) -> Text:
    here = record.name == current
    return Text.assemble(
        (record.name, "bold green" if here else ""),
        (_marks(record), "red"),
        (f"  {_what(record)}", "cyan" if record.snapshot.memory else "yellow"),
        (f"  {human_size(record.size)}  {age(record.point)}", "dim"),
        ("  <- current", "green") if here else "",
    )


def snapshot(record: SnapshotRecord, current: str | None) -> RenderableType:
    """Return one snapshot with its files."""
    timings, memory = record.timings, record.memory
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.point))
    facts = {
        "name": record.name + ("  (current)" if record.name == current else "") + _marks(record),
        "domain": f"{record.domain}, {record.domain_state} at the point",
        "description": record.snapshot.description,
        "point": f"{when} ({age(record.point)})",
        "parent": record.parent or "-",
        "group": ", ".join(record.group.members) if record.group else "",
        "kind": record.kind,
        "strategy": f"{record.strategy}: {record.reason}",
        "pause": human_duration(timings.pause),
        "late stop": _late_stop(timings),
        "total": human_duration(timings.total),
        "phases": _phases(timings.phases),
        "memory": _file(memory) if memory else "inside the first disk's image" if record.snapshot.memory else "-",
    }
    disks = {disk.disk.target: _disk(record, disk) for disk in record.snapshot.disks}
    return _facts((name, _text(value)) for name, value in (facts | disks).items() if value)


def _late_stop(timings: Timings) -> str:
    if timings.foreseen is None:
        return ""
    how = "too late, so the guest was stopped once more" if timings.missed else "in time"
    return f"{how}; setup took {human_duration(timings.setup)}, {human_duration(timings.foreseen)} were foreseen"


def _file(file: FileRecord) -> str:
    return f"{file.path} ({human_size(file.size)}, {file.checksum})"


def _disk(record: SnapshotRecord, disk: DiskSnapshot) -> str:
    chain = record.images[disk.disk.target]
    if disk.external:
        return f"{chain[0].path} ({human_size(chain[0].size)}, {len(chain)} in its chain)"
    return f"snapshot {disk.name} inside {_file(record.inside[disk.disk.target])}"


def _phases(phases: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {human_duration(seconds)}" for name, seconds in phases.items())


def operations(records: Sequence[OperationRecord], *, more: bool = False) -> RenderableType:
    """Return a table of operations, oldest first; `more`: there are older ones."""
    if not records:
        return line("no operations yet")
    table = _table("id", "what", "state", "begun", "took", "phases, or why it failed")
    for record in records:
        table.add_row(
            record.id,
            _text(f"{record.kind} {record.who} {record.subject}".strip()),
            _text(record.state, _OPERATION_STYLES.get(State(record.state), "cyan")),
            age(record.begun),
            human_duration(record.ended - record.begun if record.ended else None),
            _text(record.error or _phases(record.phases)),
        )
    said = f"the last {len(records)}; --last N shows more, --since TIME those since then, --json all"
    return Group(line(said), table) if more else table


def findings(found: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Return what `doctor` found, a heading for each driver and domain."""
    parts: list[RenderableType] = []
    for subject, facts in found.items():
        parts += [_text(subject, "bold underline"), _facts((f"  {k}", _text(_value(v))) for k, v in facts.items())]
    return Group(*parts)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(each)}" for name, each in value.items()) or "-"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_value(each) for each in value) or "-"
    return str(value) if value not in ("", None) else "-"
