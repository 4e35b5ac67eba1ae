"""What a QEMU, as it is now, can do, and what it has against it: asked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import trio

from snaporch.drivers.base import Capabilities, GuestVerb, Trait
from snaporch.drivers.qmp import flash
from snaporch.drivers.qmp.blocks import names_of
from snaporch.drivers.qmp.given_up import STANDS, gave_up
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.drivers.qmp.protocol import QMP
from snaporch.drivers.qmp.run_states import GONE, refusal
from snaporch.errors import CommandRefused

# Seen on 7.2.22 on a busy host, with a bare `migrate` to a file too; never on 10.0 (docs/explanation/point.md).
_LOSES_PAGES = "QEMU before 9.0 without KVM can miss pages that the guest writes to during a precopy"
# A guest agent is another question.
MACHINE_TRAITS = frozenset(
    [
        Trait.MEMORY_STREAMS,
        Trait.LOADS_MEMORY,
        Trait.LOADS_LAZILY,
        Trait.OVERLAYS,
        Trait.LIVE_MERGES,
        Trait.LIVE_COPIES,
        Trait.POINTS_INSIDE,
        Trait.DIRTY_RATE,
        Trait.RESETS,
        Trait.SCREENS,
    ]
)


class Able:
    """The part of a machine that finds out its `Capabilities`."""

    qmp: QMP
    cwd: str
    _agent: str
    _process: QemuProcess

    async def _ask_capabilities(self, *, looking: bool) -> Capabilities:
        names = {c["capability"] for c in await self.qmp.execute("query-migrate-capabilities")}
        commands = {c["name"] for c in await self.qmp.execute("query-commands")}
        machine = await self.qmp.execute("qom-get", {"path": "/machine", "property": "type"})
        memory = await self.qmp.execute("query-memory-size-summary")
        # QEMU itself knows best whether RAM can be write-protected (kernel, file-backed or shared RAM, VFIO).
        blocker = "this QEMU has no background-snapshot" if "background-snapshot" not in names else ""
        if not blocker and not looking:
            blocker = await self._background_blocker()
        tcg = not (await self.qmp.execute("query-kvm"))["enabled"]
        caveat = _LOSES_PAGES if tcg and "mapped-ram" not in names else ""
        blocks = await self.qmp.execute("query-block")
        if flash.stores(blocks):
            caveat = flash.UNWATCHED
        version = ".".join(map(str, self.qmp.greeting.version))
        status = await self._run_state()
        # Since 9.0 QEMU leaves the guest as it was before `migrate`; that release also brought mapped-ram, which
        # can be asked for, while the behaviour cannot.
        return Capabilities(
            hypervisor=f"QEMU {version}",
            background=not blocker,
            background_blocker=blocker,
            ends_blocker=self._ends_blocker(blocks),
            precopy_caveat=caveat,
            memory_blocker=refusal(status, GuestVerb.CREATE)
            or await self._memory_blocker(aborts=tcg and "mapped-ram" in names),
            keeps_paused="mapped-ram" in names and status in {"running", "paused"},
            versions={"machine": machine.removesuffix("-machine")},
            ram=memory["base-memory"],
            traits=MACHINE_TRAITS
            | ({Trait.GUEST_AGENT} if self._agent else set())
            | ({Trait.BACKGROUND_STREAMS} if not blocker else set())
            | ({Trait.LATE_STOPS} if not blocker and "blockdev-set-active" in commands else set()),  # both: 10.0
            features=tuple(sorted(names | ({"blockdev-set-active"} & commands))),
        )

    async def _run_state(self) -> str:
        """Return QEMU's word for what the guest does, or ours for one that runs elsewhere."""
        status = str((await self.qmp.execute("query-status"))["status"])
        return GONE if status == STANDS and await self._gave_up() else status

    async def _gave_up(self) -> bool:
        return await gave_up(self.qmp)

    async def _memory_blocker(self, *, aborts: bool) -> str:
        """Return why QEMU cannot save this machine's memory now, in its words, or an empty string.

        Args:
            aborts: it is a QEMU that dies when it looks which pages of an NVDIMM the guest has written to: seen on
                10.0 with TCG (tlb_reset_dirty_range_all), not on 7.2.
        """
        if aborts and any(each["type"] == "nvdimm" for each in await self.qmp.execute("query-memory-devices")):
            return "without KVM this QEMU dies when it saves the memory of a machine that has an NVDIMM"
        reasons = (await self.qmp.execute("query-migrate")).get("blocked-reasons", [])
        return f"QEMU cannot save its memory: {'; '.join(reasons)}" if reasons else ""

    def _ends_blocker(self, blocks: Iterable[dict[str, Any]]) -> str:
        """Return why QEMU cannot let go of its images, as it does at a stream's end, or an empty string.

        It opens them for reading only then, by their names; where it cannot, the stream fails.
        """
        images = (block["inserted"]["image"] for block in blocks if "inserted" in block)
        name = next((name for image in images for name in names_of(image) if not os.path.isabs(name)), "")
        with suppress(OSError):
            if name and os.readlink(f"/proc/{self._process.local.pid}/cwd") != self.cwd:
                return (
                    f"QEMU cannot open {name} anew, as it has left {self.cwd} since (-daemonize): only a "
                    "background snapshot (--live) could be taken; start it with absolute paths"
                )
        return ""

    async def _background_blocker(self) -> str:
        """Return QEMU's reason against a background snapshot: it checks when the capability is set."""
        if (await self.qmp.execute("query-migrate")).get("status", "").startswith("postcopy"):
            return "its memory is still being loaded"  # which may need its capabilities at any moment
        capabilities = await self.qmp.execute("query-migrate-capabilities")
        if any(c["state"] for c in capabilities if c["capability"] == "background-snapshot"):
            return ""
        others = [c | {"state": False} for c in capabilities if c["capability"] != "background-snapshot"]
        wanted = [*others, {"capability": "background-snapshot", "state": True}]
        try:
            await self.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        except CommandRefused as error:
            return error.description
        finally:
            # Also where the answer was lost or is not waited for any more: QEMU may have set it by then.
            with trio.CancelScope(shield=True):
                await self.qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
        return ""
