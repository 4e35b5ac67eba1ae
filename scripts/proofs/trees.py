"""Proves that deletes change nothing: random creates, reverts and deletes, and each snapshot reverted to.

    scripts/proof trees --count 60 [--qemu VERSION] [--seed N] [--page FILE]

After each operation the guest goes on, every snapshot's files are what was saved, and every file of the domain is
in a chain or a record. After every 15 and in the end each remaining snapshot is reverted to, and the guest, which
writes one number to all disks and compares them with its memory, finds no error.

With --page the run is added to a page.

Exit status: 0 all is consistent, 1 not all.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio
from benchlib.lab import CACHE, DOMAIN, Guest, GuestPlan, Qemu, pick, qemus, running_guest, workplace
from benchlib.tree import Tree

from snaporch import SnaporchError
from snaporch.guest.report import Report

EVERY = 15  # operations, then all snapshots are reverted to
NUMBERS = 20  # that the guest has to write and compare
RAM = 64  # MiB
TOUCHED = 16  # MiB of it that the guest compares, 32 a second
WORD_SECONDS = 30.0


def enough(reports: list[Report]) -> bool:
    """Say whether a guest has written and compared enough, or found an error."""
    if not reports:
        return False
    first, last = reports[0], reports[-1]
    return bool(last.errors) or (
        last.checked > 0 and last.seq >= first.seq + NUMBERS and last.up_ms >= first.up_ms + 1000 * TOUCHED / 32
    )


async def ask(guest: Guest, what: str) -> None:
    """Raise AssertionError when the guest is not well."""
    serial = guest.serial
    mark = serial.mark()
    with trio.move_on_after(WORD_SECONDS):
        # The first report may be put together from the halves of two, the old guest's and the new one's.
        while not enough(serial.reports(mark)[1:]):  # noqa: ASYNC110 - as in benchlib/lab.py
            await trio.sleep(0.01)
    reports = serial.reports(mark)[1:]
    assert enough(reports), "the guest is silent"  # noqa: S101 - a check is what this is
    assert not reports[-1].errors, f"{reports[-1].errors} errors: {serial.troubles(mark)[:3]}"  # noqa: S101
    troubles = serial.troubles(mark)
    assert what == "boots" or not troubles, "; ".join(troubles[:3])  # noqa: S101


async def prove(qemu: Qemu, place: Path, cache: Path, *, count: int, seed: int, said: list[str]) -> tuple[int, str]:
    """Do random operations, each said in a line; return how many went well, and what is wrong."""

    def say(line: str) -> None:
        said.append(line)
        print(line, flush=True)

    plan = GuestPlan(ram=RAM * 2**20, dirty=20, rate=0, touched=TOUCHED, report=20)
    done = 0
    async with running_guest(place, cache, qemu, plan) as guest:
        originals = tuple(guest.place.glob("*.qcow2"))
        chance = random.Random(seed)  # noqa: S311 - no secret
        home = guest.place / "root" / DOMAIN
        tree = Tree(guest.orchestrator, DOMAIN, home, chance, partial(ask, guest), originals)
        try:
            while done < count:
                words = await tree.step()
                done += 1
                say(f"{done:4}/{count}  {words}")
                if done % EVERY == 0 or done == count:
                    say(f"           {await tree.revert_to_all()} snapshots reverted to: consistent")
        except (SnaporchError, AssertionError) as error:
            return done, f"{type(error).__name__}: {error}"
    return done, ""


def write_page(path: Path, heading: str, said: Sequence[str]) -> None:
    """Add a run to a page, which begins with what this script says of itself."""
    if not path.exists():
        what = __doc__.split("\n\n")[2]
        path.write_text(
            f"# Random trees of snapshots on a real guest\n\nWritten by `scripts/proof trees`.\n{what}\n"
        )
    with path.open("a") as file:
        file.write(f"\n## {heading}\n\n```\n" + "\n".join(said) + "\n```\n")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/proof trees", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=60, metavar="N", help="operations (default: %(default)s)")
    parser.add_argument("--qemu", metavar="VERSION", help="7.2 or 10.0; default: the newest")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of what happens")
    parser.add_argument(
        "--work", type=Path, default=CACHE / "soak", metavar="DIR", help="for guests and their files"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="what scripts/setup has made")
    parser.add_argument("--page", type=Path, metavar="FILE", help="add the run to this page")
    return parser.parse_args()


def main() -> None:
    """Prove, or find the opposite."""
    options = arguments()
    qemu = pick(qemus(options.cache), options.qemu)
    print(f"seed {options.seed}")
    began = time.monotonic()
    said: list[str] = []
    with workplace(options.work) as place:
        run = partial(prove, qemu, place, options.cache, count=options.count, seed=options.seed, said=said)
        done, trouble = trio.run(run)
    verdict = "NOT every" if trouble else "every"
    ended = [f"WRONG after {done} operations: {trouble}"] if trouble else []
    ended += [f"{done} of {options.count} operations, {verdict} remaining snapshot consistent"]
    ended += [f"QEMU {qemu.version}, seed {options.seed}, {time.monotonic() - began:.0f} s"]
    print(*ended, sep="\n")
    if options.page:
        write_page(
            options.page, f"QEMU {qemu.version}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", [*said, "", *ended]
        )
    sys.exit(1 if trouble else 0)


if __name__ == "__main__":
    main()
