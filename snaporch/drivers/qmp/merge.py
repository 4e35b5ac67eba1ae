"""Merges of images that a QEMU has open: block-commit and block-stream, and what is left of those cut short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import trio

from snaporch.drivers.base import PauseNote, PivotNote, Progress
from snaporch.drivers.local.leash import posted
from snaporch.drivers.qmp import blockjob
from snaporch.drivers.qmp.blockjob import PREFIX, BlockJob, Brake, braked
from snaporch.errors import CommandRefused, HypervisorError
from snaporch.model.domain import DiskStatus
from snaporch.model.request import MergeOptions

if TYPE_CHECKING:
    from snaporch.drivers.qmp.blocks import Blocks

PIVOT_SECONDS = 120.0


@attrs.frozen
class Merger:
    """Merges in one QEMU."""

    machine: Blocks

    def _brake(self, disk: DiskStatus) -> Brake:
        guard = self.machine.guard(PauseNote(keep_stream=True))
        return Brake(disk.node, f"{PREFIX}{disk.target}", guard, self.machine, self.machine.qmp)

    async def _disk_with(self, image: str) -> DiskStatus:
        return next(disk for disk in await self.machine.disks() if image in disk.chain)

    async def commit(self, top: str, base: str, note: PivotNote, options: MergeOptions, progress: Progress) -> None:
        """See Machine.commit_image: block-commit, of the active image (then it pivots) or of one below it."""
        nodes, disk = await self.machine.image_nodes(), await self._disk_with(top)
        arguments: dict[str, Any] = {"device": disk.node, "base-node": nodes[base]}
        active = disk.active == top
        arguments |= {"auto-finalize": False} if active else {"top-node": nodes[top]}
        qmp, name = self.machine.qmp, f"{PREFIX}{disk.target}"
        async with blockjob.started(
            qmp, name, "block-commit", arguments, bandwidth=options.bandwidth, progress=progress
        ) as job:
            if active:
                async with posted(self.machine.pivot_guard(job.id, note)):
                    await self._pivot(job, disk, note, options)
            else:
                await job.reach("BLOCK_JOB_COMPLETED")
        chain = disk.chain[disk.chain.index(top) : disk.chain.index(base)]
        await self._close(nodes[path] for path in chain)

    async def _pivot(self, job: BlockJob, disk: DiskStatus, note: PivotNote, options: MergeOptions) -> None:
        """See a commit of an active image through to its end.

        It is not let finalize itself: while it is pending QEMU holds what the guest writes to the disk, and both
        images are the same. The guard ends that if snaporch dies.
        """
        qmp = self.machine.qmp
        async with braked(self._brake(disk)) as brake:
            await brake.catch_up(job, "BLOCK_JOB_READY", options)
            await qmp.execute("job-complete", {"id": job.id})
            await brake.catch_up(job, "BLOCK_JOB_PENDING", options)
            with trio.CancelScope(deadline=trio.current_time() + PIVOT_SECONDS, shield=True) as scope:
                await note.write()
                job.way_out = "job-finalize"
                with suppress(CommandRefused):  # a guard has done so, as snaporch was stopped
                    await qmp.execute(job.way_out, {"id": job.id})
                await job.event("BLOCK_JOB_COMPLETED")
            if scope.cancelled_caught:
                raise HypervisorError(f"{qmp.label}: merging {job.id} does not end")

    async def stream(self, top: str, base: str | None, options: MergeOptions, progress: Progress) -> None:
        """See Machine.stream_image: block-stream."""
        nodes, disk = await self.machine.image_nodes(), await self._disk_with(top)
        arguments = {"device": nodes[top]} | ({"base-node": nodes[base]} if base else {})
        qmp, name = self.machine.qmp, f"{PREFIX}{disk.target}"
        async with blockjob.started(
            qmp, name, "block-stream", arguments, bandwidth=options.bandwidth, progress=progress
        ) as job:
            await job.reach("BLOCK_JOB_COMPLETED")
        end = disk.chain.index(base) if base else len(disk.chain)
        await self._close(nodes[path] for path in disk.chain[disk.chain.index(top) + 1 : end])

    async def settle(self, active: Mapping[str, str]) -> None:
        """See Machine.settle_merges."""
        qmp, now = self.machine.qmp, {disk.target: disk.active for disk in await self.machine.disks()}
        await blockjob.unthrottle(qmp)
        for job in await qmp.execute("query-jobs"):
            if (name := job["id"]).startswith(PREFIX):
                target = name.removeprefix(PREFIX)
                noted = job["status"] == "pending" and active.get(target) != now.get(target)
                with trio.fail_after(PIVOT_SECONDS):
                    await blockjob.end(qmp, name, "job-finalize" if noted else "job-cancel")
        disks = await self.machine.disks()
        used, written = {path for disk in disks for path in disk.chain}, {disk.active for disk in disks}
        for path, node in (await self.machine.image_nodes()).items():
            if path not in used and self.machine.is_ours(node):
                with suppress(CommandRefused):  # something else has it
                    await qmp.execute("blockdev-del", {"node-name": node})
        for path, node in (await self.machine.image_nodes(writable=True)).items():
            if path in used - written:
                await self._write_protect(node)

    async def _write_protect(self, node: str) -> None:
        """Have QEMU open a frozen image for reading only again.

        A job opens it for writing and, where it cannot be flushed at the job's end (EIO, no space), QEMU leaves it
        so: no other QEMU could then read it. Only qemu-io's `reopen` takes a node that QEMU has named itself.
        """
        await self.machine.qmp.execute("human-monitor-command", {"command-line": f'qemu-io {node} "reopen -r"'})

    async def _close(self, nodes: Iterable[str]) -> None:
        """Close nodes that are in no chain any more; some go with those over them."""
        for node in nodes:
            if node in await self.machine.nodes():
                await self.machine.qmp.execute("blockdev-del", {"node-name": node})
