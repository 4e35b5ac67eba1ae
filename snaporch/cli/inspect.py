"""``snaporch operations``, ``recover``, ``fsck`` and ``doctor``: what was done, and what can be done."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from cyclopts import App

from snaporch.catalog.root import default_root
from snaporch.cli.logs import log_of_a_command
from snaporch.cli.session import Answer, Here
from snaporch.errors import InvalidInput, ServiceGone
from snaporch.model import documents
from snaporch.model.convert import converter
from snaporch.model.record import Event, EventKind
from snaporch.model.units import parse_duration
from snaporch.service.owner import owner

SHOWN = 20  # operations, where nothing is said of how many


def instant(text: str) -> float:
    """Return the seconds since the epoch of a date (UTC, unless it says otherwise), or of so long ago.

    Raises:
        InvalidInput: it is neither.
    """
    with suppress(ValueError):
        at = datetime.fromisoformat(text)
        return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    try:
        return time.time() - parse_duration(text)
    except InvalidInput:
        raise InvalidInput(
            f"{text!r} is no instant: write for example 2h, 3d, 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from None


async def operations(
    domain: str | None = None,
    /,
    *,
    last: int | None = None,
    since: str | None = None,
    running: bool = False,
    failed: bool = False,
    session: Here,
) -> Answer:
    """List running and past operations, oldest first: state, phases with their times, outcome.

    Parameters
    ----------
    domain
        Only of this domain.
    last
        Only so many, the newest; by default the last 20, or all with --since or --json.
    since
        Only those that began then or later: 2h, 3d, or a date as 2026-01-31 or 2026-01-31T12:00:00Z.
    running
        Only those that have not ended.
    failed
        Only those that ended otherwise than complete.
    """
    if running and failed:
        raise InvalidInput("--running and --failed exclude each other: what runs has not failed")
    if last is not None and last < 1:
        raise InvalidInput(f"--last {last}: at least 1")
    outcome = "running" if running else "failed" if failed else None
    begun = None if since is None else instant(since)
    async with session.read() as known:
        few = last is None and since is None and not session.as_json
        asked = SHOWN + 1 if few else last  # one more says whether there are more
        records = await known.operations(domain, last=asked, since=begun, outcome=outcome)
    more = few and len(records) > SHOWN
    shown = records[-SHOWN:] if more else records
    answers = [documents.operation(record) for record in shown]
    return Answer(answers, lambda human: human.operations(shown, more=more))


async def give_up(identifier: str, /, *, dry_run: bool = False, session: Here) -> Answer:
    """End an operation that cannot be mended: what is kept and what is lost is said, and nothing is removed.

    Parameters
    ----------
    identifier
        The operation's id.
    dry_run
        Only say it.
    """
    session.only_reads = dry_run
    async with session.open(recover=False) as orchestrator:
        found = await orchestrator.give_up(identifier, dry_run=dry_run)
    return Answer(documents.given_up(found), lambda human: human.given_up(found))


async def recover(*, session: Here) -> Answer:
    """Finish or undo what a crash left, and say what that was; every other command does it too, silently."""
    async with session.open(recover=False) as orchestrator:
        records = await orchestrator.recover()
    return Answer([documents.operation(record) for record in records], lambda human: human.recovered(records))


async def fsck(domain: str | None = None, /, *, repair: bool = False, session: Here) -> Answer:
    """Compare catalog, files and running hypervisors. Exit status 1 when something is left that is not right.

    Parameters
    ----------
    domain
        Only this domain.
    repair
        Do what is certain and takes nothing from anybody; without, nothing is touched.
    """
    session.only_reads = not repair
    async with session.open(recover=False) if repair else session.look() as orchestrator:
        found = await orchestrator.fsck(domain, repair=repair)
    answers = [documents.finding(each) for each in found]
    left = [each for each in found if not each.repaired]
    return Answer(answers, lambda human: human.checked(found), status=int(bool(left)))


async def doctor(domain: str | None = None, /, *, session: Here) -> Answer:
    """Say what this machine, and a domain, can do, and what prevents the rest.

    Parameters
    ----------
    domain
        This domain, too.
    """
    async with session.look() as orchestrator:
        found = await orchestrator.doctor(domain)
    return Answer(found, lambda human: human.findings(found))


def _told(event: Event) -> str:
    at = datetime.fromtimestamp(event.time, UTC).strftime("%H:%M:%SZ")
    how_far = f" {event.done:,} of {event.total:,}" if event.kind is EventKind.PROGRESS else ""
    words = f": {event.text}" if event.text else ""
    return f"{at} {', '.join(event.domains)} {event.operation[:8]} {event.state}{how_far}{words}"


async def watch(domain: str = "", /, *, session: Here) -> Answer:
    """Show what happens, as it happens, in the service that owns the root; until Ctrl-C.

    Parameters
    ----------
    domain
        Only what happens to this domain.
    """
    session.interrupted = "watched"
    root = session.root or default_root()
    if owner(root) is None:
        raise InvalidInput(f"no service runs on {root}, and each command shows its own progress: `snaporch serve`")
    async with session.open() as orchestrator:
        if domain:
            await orchestrator.domain_info(domain)
        async with orchestrator.events() as events:
            async for event in events:
                if not domain or domain in event.domains:
                    session.line(json.dumps(converter.unstructure(event)) if session.as_json else _told(event))
    raise ServiceGone(f"the service on {root} has stopped")


async def demo(
    *, keep: bool = False, tiny: bool = False, accel: Literal["auto", "kvm", "tcg"] = "auto", session: Here
) -> Answer:
    """Show it all on a real guest of its own: a live checkpoint, damage, the way back.

    Parameters
    ----------
    keep
        Leave the guest running, and its files, and say where.
    tiny
        With the small guest, which needs no more than a compiler and is up at once.
    accel
        What the guest's CPU runs on: by default KVM, where a guest really runs under it.
    """
    log_of_a_command(session.verbose)
    from snaporch import demo as story  # noqa: PLC0415 - nothing else needs the guests

    say = session.say if session.as_json else session.tell
    end = await story.run(say, keep=keep, tiny=tiny, accel=accel)
    document = end.document | {"tree": documents.tree(end.records, end.current)}
    return Answer(document, lambda human: human.tree(story.NAME, end.records, end.current))


past = App(name="operations")
past.default(operations)
past.command(give_up)
