"""One running domain of libvirt's.

Rules:

1. What libvirt has a call for is done by that call: libvirt does not notice what is done to disks behind its back.
2. In the pause there is ``virDomainSuspend``, one snapshot of the disks, QEMU's `migrate`, and ``virDomainResume``:
   libvirt takes disk leases up again only in its own resume.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import (
    Capabilities,
    Guard,
    Overlay,
    PauseNote,
    PivotNote,
    Progress,
    Stream,
    StreamPlan,
    Trait,
    untold,
)
from snaporch.drivers.libvirt import domain_xml, guard
from snaporch.drivers.libvirt.connection import Connection, open_connection
from snaporch.drivers.libvirt.process import LibvirtDomain
from snaporch.drivers.libvirt.qmp import LibvirtQMP
from snaporch.drivers.libvirt.save_image import LENGTH, OFFSET, read_header
from snaporch.drivers.libvirt.stream import LibvirtStream
from snaporch.drivers.local.leash import GuardProcess
from snaporch.drivers.qmp.able import MACHINE_TRAITS as QEMU_TRAITS
from snaporch.drivers.qmp.blocks import image_file
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    HypervisorError,
    NotConverging,
    OutcomeUnknown,
    Unsupported,
)
from snaporch.model.domain import DiskStatus, DomainState
from snaporch.model.request import MergeOptions, OnTimeout

SWITCH_SECONDS = 15.0  # libvirt waits for jobs of its own for up to 30 s, and the guest is paused meanwhile
EVENT_SECONDS = 2.0  # for libvirtd to pass on an event of QEMU's
POLL_SECONDS = 0.05
END_SECONDS = 30.0
AGENT_SECONDS = 10
PIVOT_SECONDS = 120.0
LOAD_SECONDS = 600.0
MARK, MARK_URI = "snaporch", "urn:snaporch:merging"
MACHINE_TRAITS = QEMU_TRAITS - {Trait.POINTS_INSIDE, Trait.LOADS_LAZILY}
_TO_THE_END = MergeOptions(on_timeout=OnTimeout.PAUSE)


class LibvirtMachine(QemuMachine):
    """See Machine."""

    def __init__(self, qmp: LibvirtQMP, domain: LibvirtDomain) -> None:
        super().__init__(qmp, QemuProcess(domain.local, "", attached=True))
        self._known = domain
        self._session = qmp
        self._connection: Connection = qmp.connection
        self._domain = qmp.domain
        self._libvirt = qmp.connection.libvirt
        self._xml = ""

    @asynccontextmanager
    async def opened(self, *, looking: bool = False) -> AsyncIterator[LibvirtMachine]:
        """See QemuMachine."""
        flags = self._libvirt.VIR_DOMAIN_XML_MIGRATABLE | self._libvirt.VIR_DOMAIN_XML_SECURE
        self._xml = await self._call("virDomainGetXMLDesc", self._domain.XMLDesc, flags)
        async with super().opened(looking=looking):
            yield self

    async def _call(self, what: str, function: Any, *arguments: Any, timeout: float | None = None) -> Any:
        options = {} if timeout is None else {"timeout": timeout}
        return await self._session.call(what, function, *arguments, **options)

    async def _ask_capabilities(self, *, looking: bool) -> Capabilities:
        found = await super()._ask_capabilities(looking=looking)
        root = domain_xml.parse(self._xml)
        blocker = found.memory_blocker or domain_xml.memory_blocker(root)
        if not blocker and not looking:
            blocker = await self._job_blocker()
        version = await self._call("virConnectGetLibVersion", self._connection.raw.getLibVersion)
        words = f"libvirt {version // 1_000_000}.{version // 1000 % 1000}, {found.hypervisor}"
        agent = {Trait.GUEST_AGENT} if domain_xml.has_agent(root) else set()
        return attrs.evolve(
            found,
            hypervisor=words,
            memory_blocker=blocker,
            traits=MACHINE_TRAITS | agent,
            copies_into_middle=False,
        )

    async def _gave_up(self) -> bool:
        """See QemuMachine: libvirt ends a QEMU whose guest has migrated."""
        return False

    async def _jobs_of_others(self) -> str:
        """See QemuMachine: libvirt's own words are in `_job_blocker`."""
        return ""

    async def _job_blocker(self) -> str:
        """Return which job of libvirt's keeps a snapshot from being taken, or an empty string."""
        kind = (await self._call("virDomainGetJobInfo", self._domain.jobInfo))[0]
        if kind != self._libvirt.VIR_DOMAIN_JOB_NONE:
            return "libvirt runs a job on the domain (`virsh domjobinfo` shows it): wait for its end"
        for disk in domain_xml.disks(domain_xml.parse(await self._live_xml())):
            if await self._job(disk.target):
                return (
                    f"a block job runs on {disk.target} (`virsh blockjob DOMAIN {disk.target}` shows it): "
                    "wait for its end"
                )
        return ""

    async def _live_xml(self) -> str:
        return str(await self._call("virDomainGetXMLDesc", self._domain.XMLDesc, 0))

    async def disks(self) -> tuple[DiskStatus, ...]:
        """See Machine.

        Raises:
            HypervisorError: libvirt and QEMU have different images.
        """
        seen = domain_xml.disks(domain_xml.parse(await self._live_xml()))
        blocks = {
            domain_xml.alias_in(block.get("qdev", ""), [disk.alias for disk in seen]): block["inserted"]
            for block in await self.qmp.execute("query-block")
            if block.get("inserted")
        }
        return tuple(self._status(disk, blocks[disk.alias]) for disk in seen if disk.alias in blocks)

    def _status(self, disk: domain_xml.XmlDisk, inserted: Mapping[str, Any]) -> DiskStatus:
        active = image_file(inserted["image"])
        if os.path.realpath(active) != os.path.realpath(disk.chain[0]):
            raise HypervisorError(
                f"{self.qmp.label}: {disk.target} is on {active} in QEMU, and libvirt has {disk.chain[0]}: its "
                "disks were changed behind libvirt's back; shut it down, and look at its chain with qemu-img"
            )
        return DiskStatus(
            target=disk.target,
            active=disk.chain[0],
            format=disk.format,
            readonly=disk.readonly,
            virtual_size=inserted["image"]["virtual-size"],
            chain=disk.chain,
            node=inserted["node-name"],
        )

    def _bitmaps(self, inserted: Mapping[str, Any]) -> list[str]:  # noqa: ARG002 - none of them is in the way
        """Return none: libvirt looks for its own in every image of a chain, and says which is missing."""
        return []

    async def pause(self) -> None:
        """See Machine."""
        await self._call("virDomainSuspend", self._domain.suspend)
        await self._check_paused()

    async def resume(self) -> None:
        """See Machine; over a new connection where this one has not answered a call."""
        try:
            await self._resume(self._connection, self._domain)
        except (ConnectionGone, OutcomeUnknown):
            async with open_connection(self._known.uri, self.qmp.label) as fresh:
                await self._resume(fresh, await fresh.domain(self._known.uuid))
        await self._hear_resume()

    async def _resume(self, connection: Connection, domain: Any) -> None:
        try:
            await connection.call("virDomainResume", domain.resume)
        except CommandRefused as error:
            self._session.check_lost(error)
            # It runs already: QEMU before 9.0 starts it by itself when it has taken the point.
            state, _ = await connection.call("virDomainGetState", domain.state)  # noqa: ASYNC120 - re-raised
            if state != self._libvirt.VIR_DOMAIN_RUNNING:
                raise

    async def _hear_resume(self) -> None:
        """Wait for the event of the end of a pause, which comes by another way than the answer to the call."""
        self.pause_times()
        with trio.move_on_after(EVENT_SECONDS):
            while "STOP" in self._times and "RESUME" not in self._times:
                self._account(await self._pauses.receive())

    def guard(self, note: PauseNote) -> Guard:
        """See Machine."""
        rival = LibvirtDomain.of(note.rival).uuid if note.rival is not None else "-"
        thaw = "thaw" if note.thaw else "-"
        return self._guard("pause", rival, str(note.verdict or "-"), thaw)

    def _guard(self, what: str, *arguments: str) -> Guard:
        site = str(Path(self._libvirt.__file__).parent)
        return GuardProcess(guard.__file__, (what, site, self._known.uri, self._known.uuid, *arguments))

    # The guest agent, whose socket is libvirtd's.

    async def check_agent(self) -> None:
        """See GuestAgent."""
        ping, seconds = '{"execute": "guest-ping"}', AGENT_SECONDS
        try:
            command = self._connection.qemu.qemuAgentCommand
            await self._call("guest-ping", command, self._domain, ping, seconds, 0, timeout=2.0 * seconds)
        except HypervisorError as error:
            raise Unsupported(f"{self.qmp.label}: no guest agent answers: {error}") from None

    async def freeze(self) -> None:
        """See GuestAgent."""
        respond = self._domain.agentSetResponseTimeout
        await self._call("virDomainAgentSetResponseTimeout", respond, AGENT_SECONDS, 0)
        count = await self._call("virDomainFSFreeze", self._domain.fsFreeze, None, 0, timeout=2.0 * AGENT_SECONDS)
        if not count:
            raise Unsupported(f"{self.qmp.label}: the guest agent has found no file system that it can freeze")

    async def thaw(self) -> None:
        """See GuestAgent."""
        await self._call("virDomainFSThaw", self._domain.fsThaw, None, 0, timeout=2.0 * AGENT_SECONDS)

    async def set_clock(self) -> float:
        """See GuestAgent."""
        now = time.time()
        parts = {"seconds": int(now), "nseconds": int(now % 1 * 1e9)}
        # An agent may set the clock and fail to set the hardware's: what counts is the time that it then has.
        with suppress(HypervisorError):
            await self._call("virDomainSetTime", self._domain.setTime, parts, 0, timeout=2.0 * AGENT_SECONDS)
        found = await self._call("virDomainGetTime", self._domain.getTime, 0, timeout=2.0 * AGENT_SECONDS)
        return time.time() - int(found["seconds"]) - int(found["nseconds"]) / 1e9

    # Disks: libvirt opens an overlay when it switches to it, and closes what a merge leaves.

    async def open_overlay(self, overlay: Overlay) -> None:
        """See Overlays."""

    async def close_overlay(self, overlay: Overlay) -> None:
        """See Overlays."""

    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """See Overlays."""
        libvirt = self._libvirt
        wanted = {overlay.target: overlay.path for overlay in overlays}
        others = [target for target in domain_xml.targets(domain_xml.parse(self._xml)) if target not in wanted]
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        )
        xml, make = domain_xml.overlays_xml(wanted, others), self._domain.snapshotCreateXML
        await self._call("virDomainSnapshotCreateXML", make, xml, flags, timeout=SWITCH_SECONDS)

    async def merge_back(self, overlay: Overlay, note: PivotNote) -> None:
        """See Overlays."""
        await self.commit_image(overlay.path, overlay.base.active, note=note, options=_TO_THE_END, progress=untold)

    async def commit_image(
        self, top: str, base: str, *, note: PivotNote, options: MergeOptions, progress: Progress
    ) -> None:
        """See LiveMerges."""
        disk, libvirt = await self._disk_with(top), self._libvirt
        active = disk.active == top
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if active else 0
        arguments = (disk.target, base, None if active else top, options.bandwidth, flags)
        async with self._merging(disk.target):
            await self._call("virDomainBlockCommit", self._domain.blockCommit, *arguments)
            if active:
                await self._catch_up(disk.target, options, progress)
                await self._pivot(disk.target, note)
            else:
                await self._ended(disk.target, progress)
        await self._check_merged(top, disk.target)

    async def stream_image(self, top: str, base: str | None, *, options: MergeOptions, progress: Progress) -> None:
        """See LiveCopies."""
        disk = await self._disk_with(top)
        if disk.active != top:
            raise Unsupported(f"{self.qmp.label}: libvirt copies into the active image only, and {top} is below it")
        flags = self._libvirt.VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES
        async with self._merging(disk.target):
            rebase = self._domain.blockRebase
            await self._call("virDomainBlockRebase", rebase, disk.target, base, options.bandwidth, flags)
            await self._ended(disk.target, progress)
        below = (await self._disk_with(top)).chain[1:]
        if below[:1] != ((base,) if base else ()):
            raise HypervisorError(f"{self.qmp.label}: {top} was not merged with what is below it")

    async def settle_merges(self, active: Mapping[str, str]) -> None:
        """See Overlays; only what is marked as ours."""
        now = {disk.target: disk.active for disk in await self.disks()}
        for target in await self._marked():
            if await self._job(target):
                moves = active.get(target) not in {None, now.get(target)}
                await self._end_job(target, pivot=moves)
        await self._mark("")

    async def _disk_with(self, image: str) -> DiskStatus:
        return next(disk for disk in await self.disks() if image in disk.chain)

    async def _check_merged(self, top: str, target: str) -> None:
        if any(top in disk.chain for disk in await self.disks() if disk.target == target):
            raise HypervisorError(f"{self.qmp.label}: {top} was not merged into what is below it")

    async def _job(self, target: str) -> dict[str, int]:
        """Return how far the block job on a disk is; empty where there is none."""
        found = await self._call("virDomainGetBlockJobInfo", self._domain.blockJobInfo, target, 0)
        return dict(found or {})

    async def _ended(self, target: str, progress: Progress) -> None:
        """Return when there is no job on a disk any more."""
        while job := await self._job(target):
            progress(job["cur"], job["end"])
            await trio.sleep(POLL_SECONDS)

    async def _catch_up(self, target: str, options: MergeOptions, progress: Progress) -> None:
        """Return when an active image and the one below are the same but for what the guest writes just now.

        Raises:
            NotConverging: the guest writes faster, for too long, and is not to be paused.
        """
        seconds = float("inf") if options.max_seconds is None else options.max_seconds
        with trio.move_on_after(seconds):
            while not _is_ready(job := await self._job(target)):
                if not job:
                    raise HypervisorError(f"{self.qmp.label}: the merge on {target} ended early")
                progress(job["cur"], job["end"])
                await trio.sleep(POLL_SECONDS)
            return
        if options.on_timeout is OnTimeout.FAIL:
            raise NotConverging(f"{self.qmp.label}: the guest writes to {target} faster than it is merged")

    async def _pivot(self, target: str, note: PivotNote) -> None:
        """Have a disk go over to the image below, the guest paused meanwhile."""
        ran = await self.state() is DomainState.RUNNING
        keeper = self._guard("pivot", target, str(note.verdict))
        if ran:
            await keeper.post()
        try:
            with trio.CancelScope(deadline=trio.current_time() + PIVOT_SECONDS, shield=True) as scope:
                await self._pivot_paused(target, note, ran=ran)
            if scope.cancelled_caught:
                raise HypervisorError(f"{self.qmp.label}: merging {target} does not end")
        finally:
            await keeper.dismiss()  # noqa: ASYNC102 - it shields itself, with a deadline

    async def _pivot_paused(self, target: str, note: PivotNote, *, ran: bool) -> None:
        if ran:
            await self.pause()
        try:
            while not _is_ready(await self._job(target)):  # noqa: ASYNC110 - libvirt has no event for it
                await trio.sleep(POLL_SECONDS)
            await note.write()
            await self._end_job(target, pivot=True)
        finally:
            if ran:
                await self.resume()  # noqa: ASYNC102 - the caller shields it, with a deadline

    async def _end_job(self, target: str, *, pivot: bool) -> None:
        flags = self._libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT if pivot else 0
        await self._call("virDomainBlockJobAbort", self._domain.blockJobAbort, target, flags, timeout=END_SECONDS)

    # A mark in libvirt's own record of the running domain: its block jobs have no names of ours.

    @asynccontextmanager
    async def _merging(self, target: str) -> AsyncIterator[None]:
        """Mark a disk while the body has a job on it; a body that fails leaves no job."""
        await self._mark(target)
        try:
            yield
        except BaseException:
            with trio.move_on_after(END_SECONDS, shield=True), suppress(HypervisorError):
                if await self._job(target):
                    await self._end_job(target, pivot=False)
            raise
        await self._mark("")

    async def _mark(self, target: str) -> None:
        libvirt = self._libvirt
        element = f"<merging target='{target}'/>" if target else None
        arguments = (libvirt.VIR_DOMAIN_METADATA_ELEMENT, element, MARK, MARK_URI, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        try:
            await self._call("virDomainSetMetadata", self._domain.setMetadata, *arguments)
        except CommandRefused:
            if target:  # there is nothing to remove where nothing was marked
                raise

    async def _marked(self) -> list[str]:
        libvirt = self._libvirt
        arguments = (libvirt.VIR_DOMAIN_METADATA_ELEMENT, MARK_URI, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        try:
            text = await self._call("virDomainGetMetadata", self._domain.metadata, *arguments)
        except CommandRefused:
            return []
        target = domain_xml.parse(text).get("target", "")
        return [target] if target else []

    # Memory.

    def stream(self, plan: StreamPlan) -> Stream:
        """See MemoryStreams."""
        return LibvirtStream(self.source(), plan, xml=domain_xml.without_chains(self._xml), running=True)

    async def load(self, path: str, offset: int = 0) -> None:
        """See LoadsMemory; behind libvirt's header, where there is one."""
        await self._set_plain_capabilities()
        begin = offset or (await trio.to_thread.run_sync(stream_offset, path))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.lseek(fd, begin, os.SEEK_SET)
            await self.qmp.execute("getfd", {"fdname": "snaporch-incoming"}, fds=(fd,))
        finally:
            os.close(fd)
        await self.qmp.execute("migrate-incoming", {"uri": "fd:snaporch-incoming"})
        with trio.fail_after(LOAD_SECONDS):
            await self._loaded()

    async def shutdown(self) -> None:
        """See Machine."""
        await self._call("virDomainShutdown", self._domain.shutdown)

    async def quit(self) -> None:
        """See Machine."""
        with suppress(CommandRefused):  # it has ended by itself
            await self._call("virDomainDestroy", self._domain.destroy)


def _is_ready(job: Mapping[str, int]) -> bool:
    """Return whether both images of an active commit are the same but for what is written just now."""
    return bool(job) and job["cur"] == job["end"] > 0


def stream_offset(path: str) -> int:
    """Return where the memory stream begins in a file that has libvirt's header."""
    with open(path, "rb") as file:
        start = file.read(OFFSET)
    return read_header(start, path).offset if len(start) >= LENGTH else 0
