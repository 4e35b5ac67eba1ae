"""Guests that send one another numbered messages, and the look at who has heard what at a point.

Each guest's second serial port is a socket that its QEMU listens at; a cable between two of them is ours. What is
on its way in the cable, or in the sockets at its ends, when a group is taken is in no snapshot: a lost message is
what networks do. What must never be is that somebody has heard what nobody has sent.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import trio

from snaporch import DeviceDisk, DomainDefinition, Orchestrator, open_orchestrator
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp import open_qmp
from snaporch.orchestrator import catalog_of

SECONDS = 30.0


@attrs.frozen
class Link:
    """What a guest has sent and heard; `wrong` counts numbers that came again."""

    sent: int
    heard: int
    wrong: int


@attrs.define
class Linked:
    """Running guests, each joined to the next by a cable.

    Attributes:
        orch: their orchestrator.
        names: of the domains.
        place: of all files but the cables' sockets, whose paths have to be short.
        sockets: where those are.
        address: of `guest_link` in each guest's memory.
    """

    orch: Orchestrator
    names: Sequence[str]
    place: Path
    sockets: Path
    address: int

    def log(self, name: str) -> Path:
        """Return where a guest's reports go."""
        return self.place / f"{name}.log"

    async def link(self, name: str) -> Link:
        """Look into a guest's memory; of one that runs the figures are of no one instant."""
        handle = (await catalog_of(self.orch).domain(name)).handle
        if handle is None:
            raise AssertionError(f"{name} does not run")
        path = Path(handle.data["socket"]).with_name("query.sock")
        async with open_qmp(path, label=name, timeout=SECONDS) as qmp:
            said = await qmp.execute("human-monitor-command", {"command-line": f"xp /3wx {self.address:#x}"})
        return Link(*(int(word, 16) for word in said.partition(":")[2].split()))

    async def violations(self) -> list[str]:
        """Return who has heard what was not sent, among guests that stand at a point."""
        links = {name: await self.link(name) for name in self.names}
        found = []
        for one, two in pairwise(self.names):
            for sender, receiver in ((one, two), (two, one)):
                heard, sent = links[receiver].heard, links[sender].sent
                if heard > sent:
                    found.append(f"{receiver} has heard {heard}, {sender} has sent {sent}")
        return found

    @asynccontextmanager
    async def cables(self) -> AsyncIterator[None]:
        """Plug in the cables, and pull them out in the end."""
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            for one, two in pairwise(self.names):
                ends = [
                    await stack.enter_async_context(await trio.open_unix_socket(self.sockets / f"{name}.link"))
                    for name in (one, two)
                ]
                nursery.start_soon(_pump, *ends)
                nursery.start_soon(_pump, *reversed(ends))
            yield
            nursery.cancel_scope.cancel()

    async def talk(self, messages: int = 20) -> None:
        """Wait until each has heard some more, and see that nothing came twice."""
        first = {name: await self.link(name) for name in self.names}
        with trio.fail_after(SECONDS):
            for name in self.names:
                while (now := await self.link(name)).heard < first[name].heard + messages:  # noqa: ASYNC110
                    await trio.sleep(0.01)  # nothing tells us
                if now.wrong:
                    raise AssertionError(f"{name} has heard a number twice: {now}")


async def _pump(source: trio.SocketStream, target: trio.SocketStream) -> None:
    try:
        async for data in source:
            await target.send_all(data)
    except trio.BrokenResourceError:
        pass  # a QEMU is gone


def address_of(kernel: Path) -> int:
    """Return where `guest_link` is in the tiny guest."""
    lines = subprocess.run(["nm", str(kernel)], capture_output=True, text=True, check=True).stdout.splitlines()
    return next(int(line.split()[0], 16) for line in lines if line.endswith(" guest_link"))


def defined(place: Path, sockets: Path, name: str, **how: Any) -> DomainDefinition:
    """Return the definition of one guest."""
    disk = DeviceDisk("vda", str(place / f"{name}.qcow2"))
    socket = f"socket,id=link,path={sockets}/{name}.link,server=on,wait=off"
    return DomainDefinition(
        name,
        accel="tcg",
        machine="q35",
        serial=str(place / f"{name}.log"),
        extra_args=("-chardev", socket, "-device", "isa-serial,chardev=link,index=1"),
        disks=(disk,),
        **how,
    )


@asynccontextmanager
async def linked_guests(
    place: Path,
    kernel: Path,
    emulator: str,
    qemu_img: str,
    *,
    names: Sequence[str] = ("web", "db"),
    memory: int = 48 * 2**20,
    append: str = "rate=200 dirty=10 ram=4 report=20",
) -> AsyncIterator[Linked]:
    """Start guests on fresh disks under a fresh root in `place`, and end them afterwards."""
    root = place / "root"
    root.mkdir(mode=0o700)
    drivers = {"qemu": QemuDriver(storage=LocalStorage(qemu_img))}
    with TemporaryDirectory(prefix="sp-") as short:
        sockets = Path(short)
        async with open_orchestrator(root, drivers=drivers) as orch:
            linked = Linked(orch, names, place, sockets, address_of(kernel))
            try:
                for name in names:
                    how = {"kernel": str(kernel), "emulator": emulator, "memory": memory, "append": append}
                    definition = defined(place, sockets, name, **how)
                    command = [qemu_img, "create", "-q", "-f", "qcow2", definition.disks[0].path, "16M"]
                    await trio.run_process(command)
                    await orch.define(definition)
                    await orch.start(name)
                yield linked
            finally:
                with trio.CancelScope(shield=True):
                    for name in names:
                        await orch.destroy(name)
