"""Kills a batch with SIGKILL at random, goes on with it, and counts what there is in the end.

    scripts/proof batch-kill [--kills 20] [--guests 4] [--seed N] [--qemu VERSION] [--out FILE]

Real guests, and `snaporch batch run` as a process of its own, killed after a random time, again and again, until
the batch has come to its end all the same; then the next one begins, until there were as many kills as asked for.
After each batch, each domain must have exactly one snapshot of it, under the batch's name, verified whole; `fsck`
must find nothing; and each guest must run and find nothing wrong with its memory and its disks. In the very end
each domain is reverted to each of its snapshots, and the guest must go on from there.

Exit status: 0 when all is so, 1 when not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import attrs
import trio
from benchlib.crowd import Crowd, running_crowd
from benchlib.lab import CACHE, ROOT, GuestPlan, Qemu, pick, qemus, workplace

from snaporch.batch import store
from snaporch.batch.store import BatchRecord, Stage
from snaporch.guest.report import count_starts, parse, parse_errors
from snaporch.orchestrator import catalog_of

MIB = 2**20
PLAN = """
name = "killed"
select = {{ globs = ["*"] }}
snapshot = {{ name = "{name}" }}
limits = {{ per_host = 2, bandwidth = "{bandwidth}" }}
"""
RAM_MIB = 64
BANDWIDTH = "40MiB/s"
FIRST, LAST = 0.4, 5.0  # seconds after which a run is killed: from before the first create to after the last
RESTORED_SECONDS = 30.0


@attrs.define
class Tally:
    """What came out."""

    kills: int = 0
    batches: int = 0
    snapshots: int = 0
    wrong: list[str] = attrs.field(factory=list)


def command(crowd: Crowd, *words: str) -> Sequence[str]:
    """Return the command line of a run of snaporch."""
    return [sys.executable, "-m", "snaporch", "--root", str(crowd.root), *words]


def environment(qemu: Qemu) -> dict[str, str]:
    """Return ours, with this QEMU's qemu-img first."""
    paths = [os.path.dirname(qemu.img), os.environ.get("PATH", "")]
    return os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}


async def kill_one(crowd: Crowd, qemu: Qemu, plan: Path, seconds: float) -> bool:
    """Run the plan and kill it after some time; return whether it was still running then."""
    process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs here
        command(crowd, "batch", "run", str(plan)),
        env=environment(qemu),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:  # noqa: ASYNC110 - it tells nobody
        await trio.sleep(0.01)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


async def run_to_the_end(crowd: Crowd, qemu: Qemu, plan: Path) -> None:
    """Run the plan, undisturbed."""
    words = command(crowd, "batch", "run", str(plan))
    await trio.run_process(words, env=environment(qemu), capture_stdout=True, check=False)


async def last_batch(crowd: Crowd, name: str) -> BatchRecord | None:
    """Return the batch of a name if it has come to its end."""
    found = await store.latest(catalog_of(crowd.orchestrator), "killed")
    return found if found is not None and found.ended and found.snapshot == name else None


async def cut_short_in(crowd: Crowd, name: str) -> str:
    """Return what a killed run leaves: how many snapshots there are, and in what states creates were cut short."""
    taken = [d.name for d in await catalog_of(crowd.orchestrator).domains() if name in await names(crowd, d.name)]
    states = sorted(operation.state for operation, _ in await catalog_of(crowd.orchestrator).unfinished())
    return f"{len(taken)} taken, {', '.join(states) or 'nothing'} cut short"


async def names(crowd: Crowd, domain: str) -> list[str]:
    """Return the names of a domain's snapshots."""
    return [record.name for record in await crowd.orchestrator.list(domain)]


async def check(crowd: Crowd, tally: Tally, name: str) -> None:
    """Look at everything after a batch."""
    batch = await last_batch(crowd, name)
    if batch is None or batch.stage is not Stage.COMPLETE:
        tally.wrong.append(f"{name}: the batch is not complete: {batch}")
    for domain in crowd.guests:
        found = await names(crowd, domain)
        if found.count(name) != 1 or len(found) != tally.batches:
            tally.wrong.append(f"{name}: {domain} has {found}")
            continue
        tally.snapshots += 1
        if not (report := await crowd.orchestrator.verify(domain, name)).ok:
            tally.wrong.append(f"{name}: {domain} is damaged: {report.problems}")
    tally.wrong += [f"{name}: {finding.domain}: {finding.text}" for finding in await crowd.orchestrator.fsck()]
    await crowd.alive()


async def go_back(crowd: Crowd, tally: Tally) -> int:
    """Revert every domain to each of its snapshots; return how many were good."""
    good = 0
    for domain, serial in crowd.guests.items():
        for name in reversed(await names(crowd, domain)):
            await crowd.orchestrator.revert(domain, name)
            mark = serial.mark()
            await serial.more(mark, 12, RESTORED_SECONDS)
            text = serial.since(mark)
            if count_starts(text) or parse_errors(text) or parse(text)[-1].errors:
                tally.wrong.append(f"{domain} is not whole when reverted to {name}: {text[-300:]}")
            else:
                good += 1
    return good


async def run(options: argparse.Namespace, qemu: Qemu, place: Path) -> tuple[Tally, int]:
    """Kill and count."""
    chance, tally = random.Random(options.seed), Tally()  # noqa: S311 - no secret
    plan = GuestPlan(ram=RAM_MIB * MIB, dirty=5, rate=100, touched=16, disks=1)
    async with running_crowd(place, CACHE, qemu, plan, options.guests) as crowd:
        file = crowd.place / "plan.toml"
        while tally.kills < options.kills:
            tally.batches += 1
            name = f"batch-{tally.batches}"
            file.write_text(PLAN.format(name=name, bandwidth=BANDWIDTH))
            while tally.kills < options.kills:
                if not await kill_one(crowd, qemu, file, chance.uniform(FIRST, LAST)):
                    break
                tally.kills += 1
                left = await cut_short_in(crowd, name)
                print(f"{tally.kills:3}/{options.kills}  {name}  {left}", flush=True)
            if (await last_batch(crowd, name)) is None:
                await run_to_the_end(crowd, qemu, file)
            await check(crowd, tally, name)
        return tally, await go_back(crowd, tally)


def report(options: argparse.Namespace, qemu: Qemu, tally: Tally, good: int) -> str:
    """Return the page."""
    expected = tally.batches * options.guests
    wrong = "\n".join(f"- {each}" for each in tally.wrong) or "Nothing was wrong."
    return f"""# A batch that is killed again and again

Written by `scripts/proof batch-kill {" ".join(sys.argv[1:])}`
on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; QEMU {qemu.version}, TCG, {options.guests} guests of {RAM_MIB} MiB,
2 at a time, seed {options.seed}. What is looked at is said in the script's head.

- {tally.kills} times SIGKILL, after {FIRST:g} to {LAST:g} s, in {tally.batches} batches, each gone on with to its
  end;
- {tally.snapshots} of {expected} times a domain had exactly the one snapshot of the batch that it should have,
  verified whole;
- {good} of {expected} snapshots were reverted to, and the guest was whole by its own word.

{wrong}
"""


def main() -> None:
    """Kill, count, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--guests", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311 - as above
    parser.add_argument("--qemu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with workplace(CACHE / "lab") as place:
        tally, good = trio.run(run, options, pick(qemus(CACHE), options.qemu), place)
    page = report(options, pick(qemus(CACHE), options.qemu), tally, good)
    print(page)
    if options.out:
        options.out.write_text(page)
    expected = tally.batches * options.guests
    sys.exit(0 if not tally.wrong and tally.snapshots == good == expected else 1)


if __name__ == "__main__":
    main()
