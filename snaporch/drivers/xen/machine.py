"""One Xen domain: its CPUs and memory by libxl, its disks by the QEMU that serves them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio

from snaporch.drivers.base import (
    Capabilities,
    Guard,
    MemoryStreams,
    Overlay,
    PauseNote,
    PivotNote,
    Progress,
    StreamPlan,
    Trait,
)
from snaporch.drivers.base.machine import Stream
from snaporch.drivers.qmp.blocks import Blocks, chain_of
from snaporch.drivers.qmp.protocol import QMP
from snaporch.drivers.xen import config as configs
from snaporch.drivers.xen.client import HelperClient
from snaporch.drivers.xen.domain import XenDomain
from snaporch.drivers.xen.guards import pause_guard, pivot_guard
from snaporch.drivers.xen.stream import XenStream
from snaporch.errors import CommandRefused, ConnectionGone, HypervisorError, OutcomeUnknown
from snaporch.model.domain import DiskStatus, DomainState
from snaporch.model.request import MergeOptions

MACHINE_TRAITS = frozenset([Trait.MEMORY_STREAMS, Trait.OVERLAYS, Trait.LIVE_MERGES, Trait.LIVE_COPIES])
_WHOLE = re.compile("(?<=[a-z])0$")  # QEMU says xvda0 of a whole disk: its partition 0
_PAUSED = (
    "the guest is paused, and a Xen guest takes part in the saving of its memory: let it run first "
    "(`snaporch domain resume`)"
)
_NO_LOG_DIRTY = (
    "this Xen cannot see which memory a PV guest writes to (no shadow paging: cap_shadow of `xl info`), so its "
    "memory cannot be saved while it runs: leave out --live, and the guest is paused for as long as that takes"
)


class XenMachine(Blocks, MemoryStreams):
    """See Machine.

    Args:
        qmp: of the QEMU that serves the disks.
        helper: calls libxl.
        domain: which one it is.
        found: its configuration as libxl has it.
    """

    def __init__(self, qmp: QMP, helper: HelperClient, domain: XenDomain, found: configs.Config) -> None:
        self.qmp = qmp
        self.helper = helper
        self.domain = domain
        self._config = found
        self._suspended: float | None = None
        self._resumed: float | None = None
        self._changes = 0
        self._moved = False
        self.capabilities: Capabilities

    async def open(self) -> None:
        """Ask what can be done with the domain."""
        host = await self.helper.ask("hello")
        kind, version = configs.kind_of(self._config), str(host["version"])
        log_dirty = host["physinfo"].get("cap_shadow") if kind == configs.PV else host["physinfo"].get("cap_hap")
        paused = await self.state() is DomainState.PAUSED
        self.capabilities = Capabilities(
            hypervisor=f"Xen {version}",
            background=False,
            background_blocker="Xen cannot write-protect a guest's memory",
            memory_blocker=_PAUSED if paused else "",
            live_blocker="" if log_dirty else _NO_LOG_DIRTY,
            keeps_paused=False,
            versions={"xen": version, "kind": kind},
            ram=int(self._config["b_info"]["max_memkb"]) << 10,
            traits=MACHINE_TRAITS,
            stops_itself=True,
            limits_streams=False,
        )

    async def _info(self) -> dict[str, Any]:
        found = await self.helper.ask("info", domid=self.domain.domid)
        if found is None or found["uuid"] != self.domain.uuid:
            raise ConnectionGone(f"{self.helper.label}: the domain is gone")
        if found.get("shutdown") and (why := found.get("shutdown_reason", "poweroff")) != "suspend":
            raise ConnectionGone(f"{self.helper.label}: the guest is down ({why})")
        return dict(found)

    async def state(self) -> DomainState:
        """See Machine; one that is suspended is PAUSED by us."""
        info = await self._info()
        return DomainState.PAUSED if info.get("paused") or info.get("shutdown") else DomainState.RUNNING

    async def disks(self) -> tuple[DiskStatus, ...]:
        """See Machine."""
        found = []
        for block in await self.qmp.execute("query-block"):
            if (inserted := block.get("inserted")) is None:
                continue
            vdev = await self.qmp.execute("qom-get", {"path": block["qdev"], "property": "vdev"})
            image = inserted["image"]
            chain = tuple(chain_of(image, self.cwd))
            found.append(
                DiskStatus(
                    target=_WHOLE.sub("", vdev),
                    active=chain[0],
                    format="raw" if inserted["drv"] == "file" else inserted["drv"],
                    readonly=inserted["ro"],
                    virtual_size=image["virtual-size"],
                    chain=chain,
                    node=inserted["node-name"],
                )
            )
        return tuple(sorted(found, key=lambda disk: disk.target))

    async def pause(self) -> None:
        """See Machine."""
        await self.helper.ask("pause", domid=self.domain.domid)
        self._changes += 1
        self._suspended = None

    async def resume(self) -> None:
        """See Machine; also after a stream has suspended the guest."""
        was = await self.state()
        try:
            ran = await self.helper.ask("run", domid=self.domain.domid)
        except CommandRefused as error:
            raise HypervisorError(f"{self.helper.label}: {error.description}") from error
        if was is DomainState.PAUSED:
            self._changes += 1
            self._resumed = float(ran)
        await self.tell()

    async def tell(self) -> None:
        """Have libxl know which images the disks are on, where that has changed: a reboot starts from them."""
        if not self._moved:
            return
        images = {disk.target: [disk.active, disk.format] for disk in await self.disks()}
        await self.helper.ask("tell", domid=self.domain.domid, disks=images)
        self._moved = False

    def _is_suspended(self, since: float) -> None:
        self._suspended, self._resumed = since, None
        self._changes += 1

    def guard(self, note: PauseNote) -> Guard:
        """See Machine."""
        return pause_guard(self.domain, note)

    def pivot_guard(self, job: str, note: PivotNote) -> Guard:
        """See Blocks."""
        return pivot_guard(self.domain, self.qmp, job, note)

    def is_ours(self, node: str) -> bool:
        """See Blocks."""
        return node.startswith("sp-")

    def pause_times(self) -> tuple[float, float] | None:
        """See Machine: the guest's suspension as libxl tells it, and the return of the call that let it run."""
        if self._suspended is None or self._resumed is None:
            return None
        return self._suspended, self._resumed

    def run_changes(self) -> int:
        """See Machine: ours; others' are not told."""
        return self._changes

    def forget_pauses(self) -> None:
        """See Machine."""
        self._suspended, self._resumed, self._changes = None, None, 0

    async def settings(self) -> dict[str, Any]:
        """See MemoryStreams: there are none."""
        await trio.lowlevel.checkpoint()
        return {}

    def stream(self, plan: StreamPlan) -> Stream:
        """See MemoryStreams."""
        ram = self.capabilities.ram
        return XenStream(self.helper, self.domain.domid, plan, ram, self._is_suspended)

    # Whatever changes the images that disks are on, libxl is told once the guest runs.

    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """See Overlays."""
        await super().switch(overlays)
        self._moved = True

    async def commit_image(
        self, top: str, base: str, *, note: PivotNote, options: MergeOptions, progress: Progress
    ) -> None:
        """See LiveMerges."""
        self._moved = True
        await super().commit_image(top, base, note=note, options=options, progress=progress)
        await self.tell()

    async def shutdown(self) -> None:
        """See Machine: by xenstore's control/shutdown."""
        await self.helper.ask("shutdown", domid=self.domain.domid)

    async def quit(self) -> None:
        """See Machine."""
        with suppress(ConnectionGone, OutcomeUnknown):
            await self.helper.ask("destroy", domid=self.domain.domid)
