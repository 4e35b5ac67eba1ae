"""``snaporch batch``: many snapshots by one plan."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio
from cyclopts import App

from snaporch.catalog.known import catalog_of
from snaporch.cli.session import Answer, Here, Session
from snaporch.model.names import check_name

if TYPE_CHECKING:
    from snaporch.batch.plan import Plan
    from snaporch.batch.store import BatchRecord, ItemRecord
    from snaporch.orchestrator import Orchestrator

app = App(name="batch", help="Many snapshots by one plan, a TOML file.")

FAILED, STRANDED = 1, 5
SHOWN = 20  # items that failed


async def _load(file: Path) -> Plan:
    from snaporch.batch.plan import load_plan  # noqa: PLC0415 - other verbs do without it, and start sooner

    return await trio.to_thread.run_sync(load_plan, file)


@app.command
async def check(file: Path, /, *, session: Here) -> Answer:
    """Check a plan, and say every place that is wrong."""
    del session
    plan = await _load(file)
    return Answer({"plan": plan.name, "ok": True}, lambda human: human.line(f"{file}: plan {plan.name} is well"))


@app.command(name="plan")
async def plan_(file: Path, /, *, session: Here) -> Answer:
    """Say what a plan would do now: which domains it takes, and which snapshots retention would delete."""
    from snaporch.batch import prune, store  # noqa: PLC0415 - as in `_load`

    plan = await _load(file)
    async with session.open_here() as orchestrator:
        items = await store.select(catalog_of(orchestrator), str(orchestrator.root), plan)
        cut = await store.unfinished(catalog_of(orchestrator), plan.name)
        now = time.time()
        deletes: dict[str, dict[str, str]] = {}
        for item in items:
            verdicts = await prune.prune_by_plan(orchestrator, plan, item.name, item.members, now=now, dry_run=True)
            deletes |= {name: verdict.delete for name, verdict in verdicts.items()}
    document = {
        "plan": plan.name,
        "goes_on_with": cut.id if cut else None,
        "domains": [item.name for item in items],
        "delete": {name: found for name, found in deletes.items() if found},
    }
    lines = [f"{len(items)} domain(s), {plan.limits.per_host} at once: {', '.join(item.name for item in items)}"]
    lines += [f"goes on with batch {cut.id}, which was interrupted"] if cut else []
    lines += [f"{name}: would delete {each} ({why})" for name, d in deletes.items() for each, why in d.items()]
    return Answer(document, lambda human: human.lines(lines))


@app.command
async def rehearse(file: Path, /, *, html: Path | None = None, session: Here) -> Answer:
    """Run a plan on simulated machines of the same sizes: how long it would take, how large it would be.

    Nothing is touched. Sizes and speeds are those of each domain's last snapshots. Exit status 1 when not all would
    be taken.

    Parameters
    ----------
    file
        The plan.
    html
        Where to put a page with a timeline.
    """
    from snaporch.batch import rehearsal  # noqa: PLC0415 - as in `_load`

    plan = await _load(file)
    async with session.open_here() as orchestrator:
        forecast = await rehearsal.rehearse(orchestrator, plan, html=os.path.abspath(html) if html else "")
    status = FAILED if set(forecast.counts) != {"done"} else 0
    return Answer(attrs.asdict(forecast), lambda human: human.lines(rehearsal.lines(forecast)), status)


@app.command
async def schedule(directory: Path, /, *, session: Here) -> Answer:
    """Run the plans of a directory when they are due, until a signal ends it; the service does the same.

    Plans that come, change and go are seen. Interrupted, it rolls back what it is just doing; the next one goes on.

    Parameters
    ----------
    directory
        Of plans with a schedule, *.toml.
    """
    from snaporch.batch.schedule import Scheduler  # noqa: PLC0415 - as in `_load`
    from snaporch.service.config import NAME, load_config  # noqa: PLC0415

    session.interrupted = "what it was doing is rolled back; the next one goes on where it was"
    async with session.open_here() as orchestrator:
        config = await trio.to_thread.run_sync(load_config, orchestrator.root / NAME)
        await Scheduler(orchestrator, directory, min_free=lambda: int(config.min_free)).run()


@app.command
async def run(file: Path, /, *, anew: bool = False, session: Here) -> Answer:
    """Run a plan; where its last batch was cut short, go on with that.

    Exit status: 0 all were taken; 1 some were not; 5 something is stranded; 130 interrupted: run it again to go on.

    Parameters
    ----------
    file
        The plan.
    anew
        Begin another batch even where one was cut short.
    """
    from snaporch.batch.runner import run_batch  # noqa: PLC0415 - as in `_load`

    plan = await _load(file)
    session.interrupted = "what it was doing is rolled back; run it again to go on where it was"
    async with session.open_here() as orchestrator:
        batch = await run_batch(orchestrator, plan, anew=anew, tell=_teller(session))
        return await _answer(orchestrator, batch, items=session.as_json)


def _teller(session: Session) -> Any:
    """Return what tells of each item: failures always, the others on a terminal."""
    terminal = sys.stderr.isatty()

    def tell(record: ItemRecord) -> None:
        if wrong := " ".join("; ".join(filter(None, (record.error, *record.problems))).split()):
            session.say(f"snaporch: {record.item.name}: {wrong}")
        elif terminal:
            session.say(f"{record.item.name}: {record.end} in {record.ended - record.begun:.1f} s")

    return tell


async def _answer(orchestrator: Orchestrator, batch: BatchRecord, *, items: bool) -> Answer:
    from snaporch.batch import report, store  # noqa: PLC0415 - as in `_load`
    from snaporch.batch.store import End, Stage  # noqa: PLC0415

    found = store.items(catalog_of(orchestrator), batch.id)
    documents = [report.document(record) async for record in found] if items else []
    status = 0 if batch.stage is Stage.COMPLETE else STRANDED if End.STRANDED in batch.counts else FAILED
    lines = list(report.lines(batch))
    failed = await store.failures(catalog_of(orchestrator), batch.id, SHOWN + 1)
    lines += [f"  {each}" for each in failed[:SHOWN]] + ["  … and more: --json has all"] * (len(failed) > SHOWN)
    return Answer(report.summary(batch) | {"items": documents}, lambda human: human.lines(lines), status)


@app.command(name="list")
async def list_(*, session: Here) -> Answer:
    """List all batches, oldest first."""
    from snaporch.batch import report, store  # noqa: PLC0415 - as in `_load`

    async with session.open_here() as orchestrator:
        found = await store.batches(catalog_of(orchestrator))
    lines = [line for batch in found for line in report.lines(batch)] or ["no batches"]
    return Answer([report.summary(batch) for batch in found], lambda human: human.lines(lines))


@app.command
async def show(plan: str, /, *, session: Here) -> Answer:
    """Show the last batch of a plan, by the plan's name."""
    from snaporch.batch import store  # noqa: PLC0415 - as in `_load`
    from snaporch.errors import NotFound  # noqa: PLC0415

    check_name(plan, "plan")
    async with session.open_here() as orchestrator:
        if (batch := await store.latest(catalog_of(orchestrator), plan)) is None:
            raise NotFound(f"no batch of a plan {plan!r}; `snaporch batch list` lists all")
        answer = await _answer(orchestrator, batch, items=session.as_json)
    return Answer(answer.document, answer.human)


@app.command
async def orphans(directory: Path | None = None, /, *, session: Here) -> Answer:
    """List snapshots of no plan: of plans that are not in a directory any more. No plan's retention deletes them.

    Parameters
    ----------
    directory
        Of plans, *.toml; by default plans in the root.
    """
    from snaporch.batch import store  # noqa: PLC0415 - as in `_load`
    from snaporch.batch.schedule import names_in  # noqa: PLC0415

    async with session.open_here() as orchestrator:
        place = directory or orchestrator.root / "plans"
        known = await trio.to_thread.run_sync(names_in, place) if directory or place.exists() else frozenset()
        found = await store.snapshots_by_plan(catalog_of(orchestrator))
    lost = {plan: domains for plan, domains in found.items() if plan not in known}
    lines = [
        f"{plan}: {sum(map(len, domains.values()))} snapshot(s) of {', '.join(domains)}; "
        f"`snaporch batch adopt {plan} PLAN` gives them to another plan"
        for plan, domains in lost.items()
    ]
    document = [{"plan": plan, "snapshots": domains} for plan, domains in lost.items()]
    return Answer(
        document, lambda human: human.lines(lines or ["every snapshot that a batch has taken is of a plan"])
    )


@app.command
async def adopt(old: str, new: str, /, *, session: Here) -> Answer:
    """Give the snapshots and batches of a plan to another one, as when it is renamed.

    Parameters
    ----------
    old
        The plan that took them.
    new
        The plan whose retention is about them from now on.
    """
    from snaporch.batch import adoption  # noqa: PLC0415 - as in `_load`

    async with session.open_here() as orchestrator:
        count = await adoption.adopt(orchestrator, old, new)
    return Answer(
        {"plan": new, "batches": count}, lambda human: human.line(f"{count} batch(es) of {old} are {new}'s")
    )
