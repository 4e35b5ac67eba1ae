"""Proves that a real Debian with PostgreSQL on two disks goes back to its checkpoints, as it judges itself.

    scripts/proof debian [--qemu 10.0 7.2] [--rounds 20] [--quiesced 3] [--variants plain "uefi, tpm"]

Debian 12 with systemd, the guest agent and PostgreSQL 15, whose tables are on both disks, and a judge in it
(scripts/debian_lab/judge.py): it counts in its own memory, in the database, in files on both disks, and in the TPM
where there is one, and compares, while pgbench and it itself write. Each round takes a live checkpoint, lets the
guest go on, goes back, and listens to the judge: it must go on from the count of the point, and find nothing wrong.
Then the disks alone are taken of the running guest with --quiesce; the guest is ended, goes back to them and boots.

Exit status: 0 all of it was right; 1 when not.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio
from benchlib.lab import CACHE, Qemu, pick, qemus

from scripts.debian_lab.image import Image, made
from scripts.xen_lab.debian import mirror
from snaporch import (
    CreateFlag,
    DeviceDisk,
    DomainDefinition,
    DomainSnapshot,
    Orchestrator,
    open_orchestrator,
)
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.model.domain import DomainState, TpmOptions

NAME = "debian"
MEMORY = 768 << 20
BOOT_SECONDS = 600
COUNT_SECONDS = 600  # for a few counts: a judge that needs longer is dead
AFTERWARDS = 6  # counts: among them one at which all rows are compared
VARIANTS = {"plain": {}, "uefi, tpm": {"firmware": "uefi", "tpm": TpmOptions()}}


@attrs.define
class Guest:
    """A Debian that runs, and what its judge says.

    Attributes:
        orch: has it as NAME.
        log: its serial port.
        wrong: what was not right.
    """

    orch: Orchestrator
    log: Path
    wrong: list[str] = attrs.field(factory=list)

    def mark(self) -> int:
        """Return a place in what was said: from now on."""
        return self.log.stat().st_size if self.log.exists() else 0

    def said(self, mark: int, what: str) -> list[str]:
        """Return what the judge has said of a kind after a place; lines that are whole."""
        with self.log.open("rb") as file:
            file.seek(mark)
            text = file.read().decode(errors="replace")
        return re.findall(rf"^JUDGE {what} ?(.*?)\r?\n", text, re.MULTILINE)

    def counts(self, mark: int) -> list[int]:
        """Return the counts after a place."""
        return [int(text) for text in self.said(mark, "ok") if text.isdecimal()]

    async def counted(self, mark: int, number: int, seconds: float = COUNT_SECONDS) -> list[int]:
        """Wait for so many counts after a place; note what the judge finds wrong, and that it is silent."""
        return await self._heard(mark, number, seconds, self.counts)

    async def went_back(self, mark: int, number: int) -> list[int]:
        """Wait for so many counts after the one at which it has gone back, which is later than a place."""

        def after(mark: int) -> list[int]:
            counts = self.counts(mark)
            back = [place for place in range(1, len(counts)) if counts[place] <= counts[place - 1]]
            return counts[back[-1] :] if back else []

        return await self._heard(mark, number, COUNT_SECONDS, after)

    async def _heard(self, mark: int, number: int, seconds: float, what: Callable[[int], list[int]]) -> list[int]:
        with trio.move_on_after(seconds):
            while len(what(mark)) < number and not self.said(mark, "BAD"):  # noqa: ASYNC110 - a file
                await trio.sleep(0.05)
        found = what(mark)
        if bad := self.said(mark, "BAD"):
            self.wrong.append(bad[0])
        elif len(found) < number:
            self.wrong.append(f"the judge has said {len(found)} of {number} counts in {seconds:g} s")
        return found


@asynccontextmanager
async def running(image: Image, qemu: Qemu, variant: str) -> AsyncIterator[Guest]:
    """Give a guest that has booted from copies of the disks."""
    with tempfile.TemporaryDirectory(prefix="debian-") as directory:
        place = Path(directory).resolve()
        disks = []
        for target, path in image.disks.items():
            copy = place / f"{target}.qcow2"
            await trio.run_process([qemu.img, "convert", "-f", "raw", "-O", "qcow2", str(path), str(copy)])
            disks.append(DeviceDisk(target, str(copy)))
        definition = DomainDefinition(
            name=NAME,
            memory=MEMORY,
            vcpus=2,
            accel="tcg",
            kernel=str(image.kernel),
            initrd=str(image.initrd),
            append="root=/dev/vda rw console=ttyS0 quiet loglevel=3 systemd.show_status=0",
            serial=str(place / "serial.log"),
            emulator=qemu.emulator,
            disks=tuple(disks),
            guest_agent=True,
            **VARIANTS[variant],  # type: ignore[arg-type]
        )
        drivers = {"qemu": QemuDriver(storage=LocalStorage(qemu.img))}
        async with open_orchestrator(place / "root", drivers=drivers) as orch:
            await orch.define(definition)
            guest = Guest(orch, place / "serial.log")
            await orch.start(NAME)
            try:
                await guest.counted(0, 3, BOOT_SECONDS)
                yield guest
            finally:
                with trio.CancelScope(shield=True):
                    await orch.destroy(NAME)


async def checkpoint(guest: Guest, number: int) -> tuple[float, float]:
    """Take a checkpoint, go on, go back, and listen; return the pause and the outage in seconds."""
    mark, name = guest.mark(), f"p{number}"
    before = (await guest.counted(mark, 1))[-1:]
    record = await guest.orch.create(NAME, DomainSnapshot(name), CreateFlag.LIVE)
    mark = guest.mark()
    after = await guest.counted(mark, random.randint(1, 4))  # noqa: S311 - where it is cut off
    back = await guest.orch.revert(NAME, name)
    found = await guest.went_back(mark, AFTERWARDS)
    if before and after and found:
        # The judge says a count when it has put it everywhere; the point may be just before that, or after it.
        if not before[0] <= found[0] <= after[0] + 1:
            guest.wrong.append(f"back at {found[0]}: it was taken between {before[0]} and {after[0]}")
        if found != list(range(found[0], found[0] + len(found))):
            guest.wrong.append(f"back, it has counted {found}")
    await guest.orch.delete(NAME, name)
    return record.timings.pause or 0.0, back.outage_seconds or 0.0


async def quiesced(guest: Guest, number: int) -> None:
    """Take the disks of the running guest, end it, go back to them, and let it boot."""
    name = f"q{number}"
    before = (await guest.counted(guest.mark(), 1))[-1:]
    await guest.orch.create(NAME, DomainSnapshot(name), CreateFlag.DISK_ONLY | CreateFlag.QUIESCE)
    after = await guest.counted(guest.mark(), 2)
    await guest.orch.destroy(NAME)
    await guest.orch.revert(NAME, name)
    mark = guest.mark()
    if (await guest.orch.domain_info(NAME)).state is DomainState.INACTIVE:
        await guest.orch.start(NAME)
    await guest.counted(mark, AFTERWARDS, BOOT_SECONDS)
    (booted,) = guest.said(mark, "boot")[:1] or ("",)
    numbers = [int(word) for word in booted.split()]
    if before and after and not (numbers and before[0] - 1 <= min(numbers) <= max(numbers) <= after[0] + 1):
        guest.wrong.append(f"booted with {booted!r}: it was taken between {before[0]} and {after[0]}")
    await guest.orch.delete(NAME, name)


async def prove(image: Image, qemu: Qemu, variant: str, args: argparse.Namespace) -> list[str]:
    """Do all rounds with one guest; print how it went, and return what was wrong."""
    began = time.monotonic()
    async with running(image, qemu, variant) as guest:
        booted = time.monotonic() - began
        times = [await checkpoint(guest, number) for number in range(args.rounds) if not guest.wrong]
        for number in range(args.quiesced):
            if not guest.wrong:
                await quiesced(guest, number)
        found = await guest.orch.fsck(NAME)
        wrong = [*guest.wrong, *(each.text for each in found)]
    pause, outage = ([each[part] * 1000 for each in times] or [0.0] for part in (0, 1))
    print(
        f"| {qemu.version} | {variant} | {booted:.0f} s | {len(times) - bool(wrong)} of {args.rounds} | "
        f"{args.quiesced} | {statistics.median(pause):.1f} | {max(pause):.1f} | {statistics.median(outage):.0f} | "
        f"{'; '.join(wrong) or 'nothing'} |",
        flush=True,
    )
    return wrong


async def main(args: argparse.Namespace) -> int:
    """Prove it by each QEMU."""
    image, wrong = made(CACHE, mirror()), []
    print(
        "| QEMU | variant | up in | checkpoints right | quiesced | pause, ms: median | most | outage, ms | wrong |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---|", flush=True)
    for version in args.qemu or qemus(CACHE):
        for variant in args.variants:
            wrong += await prove(image, pick(qemus(CACHE), version), variant, args)
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu", nargs="*", help="versions; by default all that scripts/setup has found")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quiesced", type=int, default=3)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    sys.exit(trio.run(main, parser.parse_args()))
