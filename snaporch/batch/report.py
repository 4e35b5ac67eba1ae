"""What a batch did, as JSON, as JUnit XML and as one HTML page with a timeline.

Items are read from the record page by page and written as they come: a report of ten thousand is no larger in
memory than one of ten. A file that is there already is replaced only if it is such a report.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from html import escape
from string import Template
from xml.sax.saxutils import quoteattr

import trio

from snaporch.batch import store
from snaporch.batch.plan import Reports
from snaporch.batch.store import BatchRecord, End, ItemRecord
from snaporch.batch.timeline import Timeline, duration, printable
from snaporch.catalog import Catalog
from snaporch.errors import TargetExists
from snaporch.model.convert import converter

Items = Callable[[], AsyncGenerator[ItemRecord, None]]

_JSON_HEAD = '{"snaporch_batch": '
_JUNIT_HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<testsuites name="snaporch"'
_HTML_HEAD = '<!doctype html>\n<html lang="en">\n<meta name="generator" content="snaporch batch">'


def document(record: ItemRecord) -> dict[str, object]:
    """Return an item for ``--json`` and for the JSON report."""
    return {
        "name": record.item.name,
        "domains": list(record.item.members),
        "snapshot": record.snapshot,
        "end": str(record.end),
        "taken": record.taken,
        "attempts": record.attempts,
        "begun": record.begun,
        "ended": record.ended,
        "expected_seconds": record.expected,
        "pause_seconds": record.pause,
        "memory_bytes": record.bytes,
        "verified": record.verified,
        "error": record.error,
        "deleted": list(record.deleted),
        "problems": list(record.problems),
    }


def summary(batch: BatchRecord) -> dict[str, object]:
    """Return a batch, but for its items, for ``--json`` and for the JSON report."""
    full: dict[str, object] = converter.unstructure(batch)
    return full | {"outcome": str(batch.stage)}


# --- JSON ---------------------------------------------------------------------------------------------------------


async def as_json(batch: BatchRecord, items: Items) -> AsyncGenerator[str, None]:
    """Yield a JSON document: the batch, and its items one a line."""
    yield f'{_JSON_HEAD}{json.dumps(summary(batch))},\n"items": [\n'
    before = ""
    async for record in items():
        yield before + json.dumps(document(record))
        before = ",\n"
    yield "\n]}\n"


# --- JUnit --------------------------------------------------------------------------------------------------------

_JUNIT = {End.FAILED: "failure", End.STRANDED: "error", End.SKIPPED: "skipped", End.WAITING: "skipped"}


def _case(record: ItemRecord, plan: str) -> str:
    seconds = record.ended - record.begun
    head = f"<testcase classname={_attr(plan)} name={_attr(record.item.name)} time={_attr(f'{seconds:.3f}')}"
    if (tag := _JUNIT.get(record.end)) is None:
        return f"{head}/>\n"
    return f"{head}><{tag} message={_attr(record.error)}/></testcase>\n"


def _attr(text: str) -> str:
    return quoteattr(printable(text))


async def as_junit(batch: BatchRecord, items: Items) -> AsyncGenerator[str, None]:
    """Yield a JUnit document: each item is a test case."""
    counts = {"tests": sum(batch.counts.values())}
    counts |= {f"{tag}s": 0 for tag in ("failure", "error")} | {"skipped": 0}
    for end, tag in _JUNIT.items():
        counts["skipped" if tag == "skipped" else f"{tag}s"] += batch.counts.get(end, 0)
    said = " ".join(f'{name}="{count}"' for name, count in counts.items())
    seconds = (batch.ended or batch.begun) - batch.begun
    yield f'{_JUNIT_HEAD}>\n<testsuite name={_attr(batch.name)} {said} time="{seconds:.3f}">\n'
    async for record in items():
        yield _case(record, batch.name)
    yield "</testsuite>\n</testsuites>\n"


# --- HTML ---------------------------------------------------------------------------------------------------------

_PAGE = Template("""
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1.5rem; }
dt { font-weight: 600; } dd { margin: 0; }
svg { width: 100%; height: auto; background: color-mix(in srgb, currentColor 4%, transparent); }
svg text { font-size: 11px; fill: currentColor; } svg line { stroke: currentColor; opacity: .15; }
.done { fill: #2e9e5b; } .failed { fill: #d9822b; } .stranded { fill: #c23030; } .undone { fill: #7d6fb0; }
.skipped, .waiting { fill: #8a9ba8; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .1rem .8rem .1rem 0; }
td.error { color: #c23030; }
</style>
<h1>$title</h1>
<dl>$facts</dl>
<h2>What ran when</h2>
""")


def _facts(batch: BatchRecord) -> str:
    ended = batch.ended or batch.begun
    facts = {
        "outcome": str(batch.stage),
        "begun": _utc(batch.begun),
        "ended": f"{_utc(ended)}, after {duration(ended - batch.begun)}, in {batch.runs} run(s)",
        "snapshots": ", ".join(f"{count} {end}" for end, count in batch.counts.items()),
        "their name": batch.snapshot,
        "deleted by retention": str(batch.deleted),
        "problems": "; ".join(batch.problems) or (f"of {batch.troubled} below" if batch.troubled else "none"),
    }
    return "".join(f"<dt>{escape(name)}<dd>{escape(printable(value))}" for name, value in facts.items())


def _utc(instant: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(instant))


def _row(record: ItemRecord) -> str:
    pause = "" if record.pause is None else duration(record.pause)
    cells = (record.item.name, record.end, duration(record.ended - record.begun), pause, f"{record.bytes:,}")
    row = "".join(f"<td>{escape(str(cell))}" for cell in cells)
    troubles = "; ".join(filter(None, (record.error, *record.problems)))
    return f'<tr>{row}<td>{record.attempts}<td class="error">{escape(printable(troubles))}\n'


async def as_html(batch: BatchRecord, items: Items) -> AsyncGenerator[str, None]:
    """Yield a page that needs nothing from anywhere else: facts, a timeline, a table."""
    title = escape(f"Batch {batch.name} {batch.id}")
    yield _HTML_HEAD + _PAGE.substitute(title=title, facts=_facts(batch))
    timeline = Timeline(batch.begun, batch.ended or batch.begun)
    async for record in items():  # once to see how many lanes there are
        timeline.lane(record)
    yield timeline.head()
    async for record in items():
        yield timeline.bar(record)
    yield "</svg>\n<h2>Snapshots</h2>\n<table><tr><th>domain<th>end<th>took<th>pause<th>bytes<th>attempts<th>\n"
    async for record in items():
        yield _row(record)
    yield "</table>\n"


# --- writing ------------------------------------------------------------------------------------------------------

_KINDS = (("json", as_json, _JSON_HEAD), ("junit", as_junit, _JUNIT_HEAD), ("html", as_html, _HTML_HEAD))


async def write_reports(catalog: Catalog, batch: BatchRecord, reports: Reports) -> tuple[str, ...]:
    """Write the reports that a plan asks for, and return their paths.

    Raises:
        TargetExists: there is something else at a path.
        OSError: it cannot be written.
    """
    written = []
    for kind, render, head in _KINDS:
        if path := getattr(reports, kind).replace("{batch}", batch.id):
            _check_ours(path, head)
            await _write(path, render(batch, lambda: store.items(catalog, batch.id)))
            written.append(path)
    return tuple(written)


def _check_ours(path: str, head: str) -> None:
    try:
        with open(path, "rb") as file:
            if file.read(len(head)) == head.encode():
                return
    except FileNotFoundError:
        return
    raise TargetExists(f"{path} exists and is not a report of snaporch: it is not overwritten", path)


async def _write(path: str, parts: AsyncIterator[str]) -> None:
    """Write a file beside its place, and put it there when it is whole."""
    new = f"{path}.new"
    await trio.to_thread.run_sync(partial(os.makedirs, os.path.dirname(path), mode=0o700, exist_ok=True))
    try:
        async with await trio.open_file(new, "x", encoding="utf-8", opener=_private) as file:
            at_hand: list[str] = []
            async for part in parts:
                at_hand.append(part)
                if len(at_hand) == store.PAGE:
                    await file.write("".join(at_hand))
                    at_hand.clear()
            await file.write("".join(at_hand))
        os.replace(new, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(new)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def lines(batch: BatchRecord) -> Iterator[str]:
    """Yield what there is to say in short."""
    took = duration((batch.ended or batch.begun) - batch.begun)
    ends = ", ".join(f"{count} {end}" for end, count in batch.counts.items()) or "nothing"
    yield f"batch {batch.name} ({batch.id}) {batch.stage}: {ends}, in {took}; snapshots are named {batch.snapshot}"
    if batch.deleted:
        yield f"  retention deleted {batch.deleted} older snapshot(s)"
    for problem in batch.problems:
        yield f"  {problem}"
