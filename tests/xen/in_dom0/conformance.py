"""The conformance suite's part for Xen's traits, in dom0; what each check came to is a line of JSON.

python3 -m tests.xen.in_dom0.conformance [CHECK…]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import attrs
import pytest
import trio

from snaporch import DeviceDisk, DiskSnapshot, DomainSnapshot, DomainState, Strategy
from snaporch.drivers.base import Launch
from snaporch.drivers.xen.driver import XenDriver
from snaporch.drivers.xen.stream import XenStream
from snaporch.drivers.xen.xenstore import open_xenstore
from snaporch.orchestrator import Orchestrator
from snaporch.testing import Check, checks_for
from tests.xen.in_dom0.proof import children, in_the_stream, judged
from tests.xen.in_dom0.world import NAME, World, destroy_all, open_world

TOO_LONG = "x" * 300  # for a file's name, which nothing can know before it tries
STILL_SECONDS = 2.0


@attrs.define
class XenWorld:
    """See `snaporch.testing.World`."""

    xen: World

    @property
    def orchestrator(self) -> Orchestrator:
        """See World."""
        return self.xen.orch

    @property
    def domain(self) -> str:
        """See World."""
        return NAME

    @property
    def slow(self) -> int:
        """See World: Xen knows no limit, and takes seconds without one."""
        return 0

    def of(self, domain: str) -> XenWorld:
        """See World."""
        raise AssertionError(f"{domain}: the Xen driver makes no clones")

    async def number(self) -> int:
        """See World."""
        return (await self.xen.reports(1))[0].seq

    async def go_on(self) -> None:
        """See World."""
        await self.xen.reports(3)

    async def check_consistent(self) -> None:
        """See World."""
        await self.xen.check_consistent()

    async def check_still(self) -> None:
        """See World."""
        assert await self.xen.state() is DomainState.PAUSED
        await trio.sleep(STILL_SECONDS / 2)  # what it has said before may be on its way
        before = self.xen.positions()
        await trio.sleep(STILL_SECONDS)
        assert self.xen.positions() == before

    async def start(self) -> None:
        """See World."""
        await self.xen.ready()

    async def everything(self) -> Mapping[str, object]:
        """See World."""
        files = {
            str(path.relative_to(self.xen.directory)): path.stat().st_mode
            for path in sorted(self.xen.directory.rglob("*"))
            if path.is_file() and not path.match("root/catalog*") and not path.match("root/locks/*.lock")
        }
        async with open_xenstore() as xenstore:
            names = [await xenstore.name(domid) for domid in await xenstore.domids()]
        return {"files": files, "domains": names}

    async def damage(self, path: str) -> None:
        """See World."""
        fd = os.open(path, os.O_RDWR)
        middle = os.fstat(fd).st_size // 2
        os.pwrite(fd, bytes([os.pread(fd, 1, middle)[0] ^ 1]), middle)
        os.close(fd)
        await trio.lowlevel.checkpoint()

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """See World."""

        async def blocker(_driver: XenDriver, _launch: Launch) -> str:
            await trio.lowlevel.checkpoint()
            return "two have no room here"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(XenDriver, "beside_blocker", blocker)
            yield

    def troubles(self, strategy: Strategy) -> Sequence[str]:  # noqa: ARG002 - the interface has it
        """See World."""
        return "overlay", "memory file", "libxl-save-helper"

    @asynccontextmanager
    async def break_next(self, trouble: str) -> AsyncIterator[DomainSnapshot]:
        """See World."""
        directory = self.xen.directory / "root" / NAME
        if trouble == "libxl-save-helper":
            with in_the_stream(_kill_save_helper):
                yield DomainSnapshot("broken")
        elif trouble == "memory file":
            yield DomainSnapshot("broken", memory_file=f"{directory}/{TOO_LONG}")
        else:
            overlay = DeviceDisk("xvdb", f"{directory}/{TOO_LONG}")
            yield DomainSnapshot("broken", disks=(DiskSnapshot(DeviceDisk("xvdb"), external_sn=overlay),))


async def _kill_save_helper(stream: XenStream) -> None:
    for pid in children(stream.helper._program.process.pid):
        os.kill(pid, signal.SIGKILL)
    await trio.lowlevel.checkpoint()


async def _check(check: Check) -> None:
    await destroy_all()
    async with judged(check=check.__name__.removeprefix("check_")), open_world() as world:
        await check(XenWorld(world))


def main(wanted: Sequence[str]) -> None:
    """Make the checks that are named; without names all that are for Xen's traits."""
    for check in checks_for(XenDriver().info):
        if not wanted or check.__name__.removeprefix("check_") in wanted:
            trio.run(_check, check)


if __name__ == "__main__":
    main(sys.argv[1:])
