"""What bench and soak both need: QEMUs, a directory that goes away again, and a guest that talks."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio

from snaporch import DeviceDisk, DomainDefinition, Orchestrator, open_orchestrator
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.guest.build import build_tiny
from snaporch.guest.report import Report, count_starts, parse, parse_errors

ROOT = Path(__file__).resolve().parents[2]
CACHE = (ROOT / ".cache").resolve()  # an orchestrator has its root by its real name
DOMAIN = "guest"
UP_SECONDS = 30.0
REPORT_SECONDS = 30.0  # a guest that says nothing for so long is dead
ALL_RAM = 2**20  # as ram=, in MiB: the guest lowers it to what there is


@attrs.frozen
class Qemu:
    """One line of .cache/qemu-versions."""

    version: str
    emulator: str
    img: str


def qemus(cache: Path) -> dict[str, Qemu]:
    """Return the QEMUs that scripts/setup has found, oldest first."""
    try:
        lines = (cache / "qemu-versions").read_text().splitlines()
    except FileNotFoundError:
        sys.exit(f"{cache}/qemu-versions is missing: run scripts/setup")
    found = [Qemu(*line.split()) for line in lines]
    return {qemu.version: qemu for qemu in sorted(found, key=lambda q: [int(n) for n in q.version.split(".")])}


def pick(found: dict[str, Qemu], version: str | None) -> Qemu:
    """Return the QEMU of that version; the newest when it is None."""
    if version is None:
        return list(found.values())[-1]
    if version not in found:
        sys.exit(f"there is no QEMU {version} here, only {', '.join(found)}")
    return found[version]


@contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """Yield a directory for guests and their files, removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="lab-", dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@attrs.frozen
class GuestPlan:
    """The guest to run.

    Attributes:
        ram: bytes.
        dirty: MB of RAM dirtied a second.
        rate: numbers written to the disks a second; 0 is as many as possible.
        touched: MiB of RAM that it fills and checks.
        report: milliseconds between reports.
        disks: how many.
        filled: MiB on each that the guest does not touch.
        bulk: MB/s written to the first disk besides.
        pour: MB/s written to a disk more, and never flushed.
        extra: arguments of QEMU.
        span: MiB that `bulk` or `pour` goes over again and again.
    """

    ram: int
    dirty: int
    rate: int = 50
    touched: int = ALL_RAM
    report: int = 50
    disks: int = 2
    filled: int = 0
    bulk: int = 0
    pour: int = 0
    span: int = 32
    extra: tuple[str, ...] = ()


@attrs.define
class Serial:
    """What the guest says, read from the file that QEMU writes."""

    path: Path

    def mark(self) -> int:
        """Return a place in the text: what is said from now on."""
        return self.path.stat().st_size if self.path.exists() else 0

    def since(self, mark: int) -> str:
        """Return what was said after a place."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(mark)
            return file.read().decode(errors="replace")

    def reports(self, mark: int) -> list[Report]:
        """Return the reports after a place."""
        return parse(self.since(mark))

    def troubles(self, mark: int) -> list[str]:
        """Return what after a place says that the guest is not well."""
        text = self.since(mark)
        found = parse_errors(text)
        if any(report.errors for report in parse(text)) and not found:
            found.append("errors are counted")
        if count_starts(text):
            found.append("it began anew")
        return found

    async def more(self, mark: int, count: int, seconds: float = REPORT_SECONDS) -> list[Report]:
        """Wait for some reports after a place, and return all that are there then."""
        with trio.fail_after(seconds):
            while len(found := self.reports(mark)) < count:  # noqa: ASYNC110 - a file tells nobody that it grows
                await trio.sleep(0.01)
        return found


@attrs.define
class Guest:
    """A guest in an orchestrator of its own."""

    place: Path
    serial: Serial
    plan: GuestPlan
    qemu: Qemu
    booted: int = 0
    _count: int = 0
    _stack: AsyncExitStack = attrs.field(factory=AsyncExitStack)
    _orchestrator: Orchestrator | None = None

    @property
    def root(self) -> Path:
        """Where the orchestrator keeps what it knows."""
        return self.place / "root"

    @property
    def orchestrator(self) -> Orchestrator:
        """The orchestrator, which is open."""
        if self._orchestrator is None:
            raise AssertionError("it is closed")
        return self._orchestrator

    async def open(self, *, recover: bool = True) -> None:
        """Open the orchestrator."""
        drivers = {"qemu": QemuDriver(storage=LocalStorage(self.qemu.img))}
        opened = open_orchestrator(self.root, drivers=drivers, recover=recover)
        self._orchestrator = await self._stack.enter_async_context(opened)

    async def close(self) -> None:
        """Close the orchestrator; the guest runs on."""
        self._orchestrator = None
        with trio.CancelScope(shield=True):
            await self._stack.aclose()

    async def destroy(self, domain: str = DOMAIN) -> None:
        """End the guest, or another one in its orchestrator."""
        with trio.CancelScope(shield=True):
            await self.orchestrator.destroy(domain)

    def fresh_name(self) -> str:
        """Return a name that nothing has yet."""
        self._count += 1
        return f"s{self._count}"

    def socket(self) -> Path:
        """Return the QMP socket of the only process."""
        (found,) = self.place.rglob("qmp.sock")
        return found

    def check(self) -> None:
        """End the program when the guest has found something wrong."""
        if troubles := self.serial.troubles(self.booted)[:3]:
            sys.exit(f"the guest is not well: {'; '.join(troubles)}")


async def made(name: str, home: Path, cache: Path, qemu: Qemu, plan: GuestPlan) -> DomainDefinition:
    """Make fresh disks in `home`; return a domain on them, which says what it has to say to a file there."""
    disks = [DeviceDisk(f"vd{letter}", str(home / f"{name}-vd{letter}.qcow2")) for letter in "abcd"[: plan.disks]]
    content = home / f"{name}-content"
    content.write_bytes(bytes(32 * 2**20) + os.urandom(plan.filled * 2**20))
    os.truncate(content, (32 + plan.span) * 2**20)
    for disk in disks:
        await trio.run_process([qemu.img, "convert", "-f", "raw", "-O", "qcow2", str(content), disk.path])
    content.unlink()
    return DomainDefinition(
        name=name,
        memory=plan.ram,
        accel="tcg",
        machine="q35",
        kernel=str(build_tiny(cache / "guest")),
        append=f"rate={plan.rate} dirty={plan.dirty} ram={plan.touched} report={plan.report} "
        f"bulk={plan.bulk} pour={plan.pour} span={plan.span}",
        serial=str(home / f"{name}.log"),
        emulator=qemu.emulator,
        extra_args=plan.extra,
        disks=tuple(disks),
    )


@asynccontextmanager
async def running_guest(
    place: Path, cache: Path, qemu: Qemu, plan: GuestPlan, log: Path | None = None
) -> AsyncIterator[Guest]:
    """Start a guest on fresh disks under a fresh root in `place`; end it and remove its files afterwards.

    What it says goes to a file there, or to `log`.
    """
    home = Path(tempfile.mkdtemp(prefix="guest-", dir=place))
    guest = Guest(home, Serial(log or home / f"{DOMAIN}.log"), plan, qemu)
    guest.root.mkdir(mode=0o700)
    try:
        async with AsyncExitStack() as stack:
            await guest.open()
            stack.push_async_callback(guest.close)
            stack.push_async_callback(guest.destroy)
            definition = await made(DOMAIN, home, cache, qemu, plan)
            await guest.orchestrator.define(attrs.evolve(definition, serial=str(guest.serial.path)))
            await guest.orchestrator.start(DOMAIN)
            await guest.serial.more(0, 3, UP_SECONDS)
            guest.booted = guest.serial.mark()
            yield guest
    finally:
        shutil.rmtree(home, ignore_errors=True)


def size(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file that may be gone."""
    Path(path).unlink(missing_ok=True)
