"""A world inside dom0: an orchestrator on a root there, and a PV guest that tells whether it is whole."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from snaporch.drivers.local import look
from snaporch.drivers.xen.client import open_helper
from snaporch.drivers.xen.domain import XenDomain
from snaporch.drivers.xen.driver import XenDriver
from snaporch.drivers.xen.xenstore import open_xenstore
from snaporch.guest.report import Report, count_starts, parse, parse_errors
from snaporch.model.domain import DomainDefinition, DomainState
from snaporch.model.rfc import DeviceDisk
from snaporch.orchestrator import Orchestrator, catalog_of, open_orchestrator

NAME = "guest"
MIB = 2**20
SECONDS = 300.0  # for anything that a guest is to do: it is emulated, and so is the hypervisor that it runs under
PLACE = Path("/guest/world")
LOGS = Path("/var/log/xen/console")
TARGETS = ("xvda", "xvdb")
RAM_MIB = 4
SWEEP_SECONDS = RAM_MIB / 6  # eight pages each time, and it rests for five milliseconds in between
WORKLOAD = f"console=hvc0 rdinit=/init mitigations=off loglevel=4 snaporch.ram={RAM_MIB} snaporch.report=200"


@attrs.define
class World:
    """One domain, NAME, and all around it.

    Attributes:
        directory: of everything, the root among it.
        orch: the orchestrator.
    """

    directory: Path
    orch: Orchestrator

    # --- the guest: a domain that takes the place of another goes on in the log of the name that it was made under

    @staticmethod
    def positions() -> dict[Path, int]:
        """Return where each log of the guest's ends now."""
        return {path: path.stat().st_size for path in LOGS.glob(f"guest-{NAME}*.log")}

    async def wait_report(self, wanted: Callable[[list[Report]], bool], since: dict[Path, int]) -> list[Report]:
        """Return the guest's reports since positions in its logs, once they are as wanted.

        Raises:
            AssertionError: the guest has found something wrong, or began anew, or says nothing more.
        """
        text = ""
        with trio.move_on_after(SECONDS):
            while True:
                for path in self.positions():
                    text = path.read_bytes()[since.get(path, 0) :].decode(errors="replace")
                    assert not parse_errors(text), f"{path}: {parse_errors(text)}"
                    if (found := parse(text)) and wanted(found):
                        assert not found[-1].errors, f"{path}: {found[-1]}"
                        return found
                await trio.sleep(0.1)
        raise AssertionError(f"the guest never said that; the last was\n{text[-2000:]}")

    async def reports(self, count: int = 2) -> list[Report]:
        """Return the next reports of the guest: it runs."""
        return await self.wait_report(lambda found: len(found) >= count, self.positions())

    async def check_consistent(self, numbers: int = 5) -> Report:
        """Assert that the guest goes on and says: memory and all disks are of one instant. Return its last report.

        It compares all slots of its disks at each sequence number, and all RAM in a sweep.
        """
        since = self.positions()

        def far(found: list[Report]) -> bool:
            first, last = found[0], found[-1]
            return last.seq >= first.seq + numbers and last.up_ms >= first.up_ms + 1000 * SWEEP_SECONDS

        found = await self.wait_report(far, since)
        assert found[-1].ram_mb == RAM_MIB
        for path, position in since.items():
            assert not count_starts(path.read_bytes()[position:].decode(errors="replace")), "it began anew"
        return found[-1]

    # --- what Xen has

    async def domain(self) -> XenDomain:
        """Return the domain as the catalog knows it."""
        record = await catalog_of(self.orch).domain(NAME)
        assert record.handle is not None
        return XenDomain.of(record.handle)

    async def images(self) -> dict[str, str]:
        """Return the active images."""
        return {disk.target: disk.active for disk in (await self.orch.domain_info(NAME)).disks}

    async def check_told(self) -> None:
        """Assert that libxl knows the images that the disks are on: a reboot starts from them."""
        domid = (await self.domain()).domid
        async with open_helper(NAME) as helper:
            config = await helper.ask("config", domid=domid)
        assert {disk["vdev"]: disk["pdev_path"] for disk in config["disks"]} == await self.images()

    async def check_alone(self) -> None:
        """Assert that Xen runs this one domain, under its name."""
        async with open_xenstore() as xenstore:
            names = [await xenstore.name(domid) for domid in await xenstore.domids()]
        assert names == [NAME]

    async def state(self) -> DomainState:
        """Return what the domain does."""
        return (await self.orch.domain_info(NAME)).state

    async def ready(self) -> None:
        """Have the guest run."""
        if (state := await self.state()) is DomainState.INACTIVE:
            await self.orch.start(NAME)
        elif state is DomainState.PAUSED:
            await self.orch.resume(NAME)
        await self.reports(2)


def make_disks(directory: Path) -> tuple[DeviceDisk, ...]:
    """Make empty images for a guest."""
    disks = tuple(DeviceDisk(target, f"{directory}/{target}.qcow2") for target in TARGETS)
    for disk in disks:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk.path, "64M"], check=True)
    return disks


def _definition(directory: Path, rate: int, dirty: int, memory: int) -> DomainDefinition:
    return DomainDefinition(
        NAME,
        memory=memory * MIB,
        kernel="/guest/vmlinuz",
        initrd="/guest/initrd",
        append=f"{WORKLOAD} snaporch.rate={rate} snaporch.dirty={dirty}",
        disks=make_disks(directory),
        driver="xen",
    )


async def destroy_all() -> None:
    """End every domain, and remove all that worlds have left."""
    driver = XenDriver()
    async with open_xenstore() as xenstore:
        left = [XenDomain(await xenstore.uuid(domid), domid, "left") for domid in await xenstore.domids()]
    for domain in left:
        await driver.kill(domain.handle("xen"))
    shutil.rmtree(PLACE, ignore_errors=True)
    for log in World.positions():
        log.unlink()


@asynccontextmanager
async def open_world(
    *, rate: int = 20, dirty: int = 0, memory: int = 128, ready: bool = True
) -> AsyncIterator[World]:
    """Go on with the world that is there, or make one; it stays when the body is over.

    Args:
        rate: numbers that the guest writes to its disks in a second.
        dirty: MiB of its memory that it writes to in a second.
        memory: of the guest, in MiB.
        ready: have the guest run.
    """
    look.LOOK_SECONDS = SECONDS  # no disk is dead here, but all of it may stand still where the host is busy
    PLACE.mkdir(exist_ok=True)
    async with open_orchestrator(PLACE / "root") as orch:
        world = World(PLACE, orch)
        if not await orch.domains():
            await orch.define(_definition(PLACE, rate, dirty, memory))
        if ready:
            await world.ready()
        yield world
