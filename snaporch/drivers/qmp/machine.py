"""One QEMU, seen through QMP."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import trio

from snaporch.drivers.base import (
    DirtyRate,
    Guard,
    GuestAgent,
    GuestVerb,
    LoadNote,
    LoadsMemory,
    MemoryStreams,
    PauseNote,
    PivotNote,
    PointsInside,
    Stream,
    StreamPlan,
)
from snaporch.drivers.local.process import wait_gone
from snaporch.drivers.qmp import agent, internal
from snaporch.drivers.qmp.able import Able
from snaporch.drivers.qmp.blockjob import PREFIX
from snaporch.drivers.qmp.blocks import Blocks, chain_of
from snaporch.drivers.qmp.console import Console
from snaporch.drivers.qmp.given_up import STANDS, take_back
from snaporch.drivers.qmp.guards import Reach, whose
from snaporch.drivers.qmp.lazy import LoadsPages
from snaporch.drivers.qmp.oddities import oddity
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.drivers.qmp.protocol import QMP
from snaporch.drivers.qmp.run_states import refusal
from snaporch.drivers.qmp.shapes import check_answer
from snaporch.drivers.qmp.stream import QemuStream, Source
from snaporch.drivers.qmp.subscription import Subscription
from snaporch.drivers.qmp.targets import targets_of
from snaporch.drivers.qmp.wire import Event
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    HypervisorError,
    LoadFailed,
    OutcomeUnknown,
    Unsupported,
)
from snaporch.images.kinds import Traced
from snaporch.model.domain import DiskStatus, DomainState, MachineShape

QUIT_SECONDS = 10.0
LOAD_SECONDS = 600.0
PORT_SECONDS = 1.0  # for a guest that goes on to tell QEMU which ports are open in it
AGENT_CHARDEV = "snaporch-agent"
SAMPLE_PAGES = 4096  # of each GiB, to see how quickly a guest writes: as many as QEMU takes
_PROTOCOLS = frozenset({"file", "host_device", "host_cdrom"})  # a disk on one has no format layer


class QemuMachine(
    Blocks, MemoryStreams, LoadsMemory, LoadsPages, PointsInside, GuestAgent, DirtyRate, Console, Able
):
    """See Machine."""

    def __init__(self, qmp: QMP, process: QemuProcess, agent: str = "", aside: str = "") -> None:
        self.qmp = qmp
        # Of what something else started, QEMU opens the agent's socket itself, in whichever process it is.
        self._agent_peer = process.local.pid if process.attached else None
        self._reach = Reach(
            qmp, whose(process.socket, process.listener), aside, whose(agent, self._agent_peer) if agent else ""
        )
        self._agent = agent
        self._process = process
        self.cwd = process.cwd
        self._pauses: Subscription
        self._migration: Subscription
        self._times: dict[str, float] = {}
        self._run_changes = 0
        self._inside_turn = trio.Lock()

    @asynccontextmanager
    async def opened(self, *, looking: bool = False) -> AsyncIterator[QemuMachine]:
        """Subscribe to what is needed later and ask what this QEMU can do.

        Args:
            looking: set nothing, not even for a moment: a create may just have set what its stream needs. What QEMU
                has against background snapshots is then not known.
        """
        self.qmp.check = check_answer
        subscribe = self.qmp.subscribe
        with subscribe("STOP", "RESUME") as self._pauses, subscribe("MIGRATION") as self._migration:
            self.capabilities = await self._ask_capabilities(looking=looking)
            yield self

    async def state(self) -> DomainState:
        """See Machine."""
        status = await self.qmp.execute("query-status")
        return DomainState.RUNNING if status["running"] else DomainState.PAUSED

    async def refusal(self, verb: GuestVerb) -> str:
        """See Machine; a disk that somebody's job works on cannot go over to an overlay."""
        if why := refusal(await self._run_state(), verb):
            return why
        return await self._jobs_of_others() if verb is GuestVerb.CREATE else ""

    async def _jobs_of_others(self) -> str:
        """Return which jobs, of other programs, keep a checkpoint from being taken, or an empty string."""
        jobs = [job for job in await self.qmp.execute("query-jobs") if job["status"] not in {"concluded", "null"}]
        words = ", ".join(f"{job['type']} {job['id']}" for job in jobs if not job["id"].startswith(PREFIX))
        return f"another program has QEMU work on its disks ({words}): wait for the end of that" if words else ""

    async def condition(self) -> str:
        """See Machine; a paused guest whose memory was saved is paused, as it was."""
        return "paused" if (status := await self._run_state()) == STANDS else status

    async def disks(self) -> tuple[DiskStatus, ...]:
        """See Machine."""
        found: dict[str, DiskStatus] = {}
        blocks = await self.qmp.execute("query-block")
        for target, block in targets_of(blocks, ours=not self._process.attached):
            if (inserted := block.get("inserted")) is None:
                continue
            image = inserted["image"]
            chain = tuple(chain_of(image, self.cwd))
            found[target] = DiskStatus(
                target=target,
                active=chain[0],
                format="raw" if inserted["drv"] in _PROTOCOLS else inserted["drv"],
                readonly=inserted["ro"],
                virtual_size=image["virtual-size"],
                chain=chain,
                node=inserted["node-name"],
            )
        return tuple(found.values())

    async def oddities(self) -> dict[str, Traced]:
        """See Machine."""
        found: dict[str, Traced] = {}
        blocks = await self.qmp.execute("query-block")
        for target, block in targets_of(blocks, ours=not self._process.attached):
            if (inserted := block.get("inserted")) is not None:
                path = next(chain_of(inserted["image"], self.cwd))
                if odd := oddity(path, inserted["drv"], inserted["image"], self._bitmaps(inserted)):
                    found[target] = odd
        return found

    def _bitmaps(self, inserted: Mapping[str, Any]) -> list[str]:
        """Return the names of a disk's dirty bitmaps, which would miss what is written to an overlay."""
        return [bitmap["name"] for bitmap in inserted.get("dirty-bitmaps", ()) if "name" in bitmap]

    async def shape(self) -> MachineShape:
        """See Machine; a device without an id of its own is known by its place among its like."""
        memory = await self.qmp.execute("query-memory-size-summary")
        devices = []
        for place in ("peripheral", "peripheral-anon"):
            children = await self.qmp.execute("qom-list", {"path": f"/machine/{place}"})
            devices += [f"{c['name']}: {c['type'][6:-1]}" for c in children if c["type"].startswith("child<")]
        return MachineShape(
            memory=memory["base-memory"] + memory.get("plugged-memory", 0),
            vcpus=len(await self.qmp.execute("query-cpus-fast")),
            disks=await self.disks(),
            devices=tuple(sorted(devices)),
        )

    async def settings(self) -> dict[str, Any]:
        """See MemoryStreams: all migration capabilities, and the parameters that a stream sets."""
        parameters = await self.qmp.execute("query-migrate-parameters")
        return {
            "capabilities": await self.qmp.execute("query-migrate-capabilities"),
            "parameters": {name: parameters[name] for name in ("max-bandwidth", "downtime-limit")},
        }

    async def pause(self) -> None:
        """See Machine.

        A background migration in any state but `paused` (after an I/O error or a panic of the guest, say) would
        make QEMU abort, so what `stop` has led to is looked at.
        """
        await self.qmp.execute("stop")
        await self._check_paused()

    async def _check_paused(self) -> None:
        if (status := await self._run_state()) != "paused":
            raise HypervisorError(f"{self.qmp.label}: the guest does not run: its state is {status!r}")

    async def resume(self) -> None:
        """See Machine."""
        await self.qmp.execute("cont")

    async def dirty_rate(self, seconds: int = 1) -> float:
        """See DirtyRate: ``calc-dirty-rate``, which samples pages."""
        await self.qmp.execute("calc-dirty-rate", {"calc-time": seconds, "sample-pages": SAMPLE_PAGES})
        # QEMU has no event for it.
        while (found := await self.qmp.execute("query-dirty-rate"))["status"] != "measured":  # noqa: ASYNC110
            await trio.sleep(0.1)
        return float(found["dirty-rate"] * 2**20)

    def guard(self, note: PauseNote) -> Guard:
        """See Machine."""
        return self._reach.pause(note)

    async def load_guard(self, note: LoadNote) -> Guard:
        """See PointsInside."""
        nodes = {disk.target: disk.node for disk in await self.disks()}
        return self._reach.load(note, [nodes[target] for target in note.targets])

    def pivot_guard(self, job: str, note: PivotNote) -> Guard:
        """See Blocks."""
        return self._reach.pivot(job, note)

    async def check_agent(self) -> None:
        """See GuestAgent."""
        if not self._agent:
            raise Unsupported(
                f"{self.qmp.label} has no channel to a guest agent; `guest_agent = true` in a definition makes one"
            )
        try:
            async with agent.open_agent(self._agent, self.qmp.label, self._agent_peer):
                pass
        except HypervisorError as error:
            raise Unsupported(str(error)) from None

    async def freeze(self) -> None:
        """See GuestAgent."""
        if not await agent.freeze(self._agent, self.qmp.label, self._agent_peer):
            raise Unsupported(f"{self.qmp.label}: the guest agent has found no file system that it can freeze")

    async def thaw(self) -> None:
        """See GuestAgent."""
        await agent.thaw(self._agent, self.qmp.label, self._agent_peer)

    async def set_clock(self) -> float:
        """See GuestAgent; one that has not opened its port is not waited for."""
        with trio.move_on_after(PORT_SECONDS) as scope:
            while not await self._agent_listens():  # noqa: ASYNC110 - QEMU's events are another's
                await trio.sleep(PORT_SECONDS / 20)
        if scope.cancelled_caught:
            raise Unsupported(f"{self.qmp.label}: no guest agent has opened its port")
        return await agent.set_clock(self._agent, self.qmp.label, self._agent_peer)

    async def _agent_listens(self) -> bool:
        """Return whether something in the guest has opened the agent's port."""
        return any(
            device["frontend-open"] and (device["label"] == AGENT_CHARDEV or self._agent in device["filename"])
            for device in await self.qmp.execute("query-chardev")
        )

    def run_times(self) -> tuple[float | None, float | None]:
        """See Machine."""
        self.pause_times()
        return self._times.get("STOP"), self._times.get("RESUME")

    def pause_times(self) -> tuple[float, float] | None:
        """See Machine."""
        with suppress(trio.WouldBlock):
            while True:
                self._account(self._pauses.receive_nowait())
        if not self._times.keys() >= {"STOP", "RESUME"}:
            return None
        return self._times["STOP"], self._times["RESUME"]

    def _account(self, event: Event) -> None:
        """Note that the guest was stopped or let run."""
        self._run_changes += 1
        if event.name == "RESUME" or "STOP" not in self._times:
            self._times[event.name] = event.timestamp

    def run_changes(self) -> int:
        """See Machine."""
        self.pause_times()
        return self._run_changes

    def forget_pauses(self) -> None:
        """See Machine."""
        self.pause_times()
        self._times.clear()
        self._run_changes = 0

    async def activate(self) -> None:
        """See Blocks."""
        await take_back(self.qmp)

    def is_ours(self, node: str) -> bool:
        """See Blocks."""
        return node.startswith("sp-") or (node.endswith("-image") and not self._process.attached)

    def stream(self, plan: StreamPlan) -> Stream:
        """See MemoryStreams."""
        return QemuStream(self.source(), plan)

    def source(self) -> Source:
        """Return what a new stream of its memory comes from."""
        self._forget_migrations()
        return Source(
            self.qmp,
            self._process.local.pid,
            self._migration,
            cancellable=self.capabilities.keeps_paused,
            standing="blockdev-set-active" not in self.capabilities.features,  # both came with 10.0
        )

    def _forget_migrations(self) -> None:
        """Pass over what earlier streams have said."""
        with suppress(trio.WouldBlock, ConnectionGone):
            while True:
                self._migration.receive_nowait()

    async def _set_plain_capabilities(self) -> None:
        """Set every migration capability as a load wants it."""
        capabilities = await self.qmp.execute("query-migrate-capabilities")
        wanted = [c | {"state": c["capability"] == "events"} for c in capabilities]
        await self.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})

    async def load(self, path: str, offset: int = 0) -> None:
        """See LoadsMemory."""
        await self._set_plain_capabilities()
        said = self._process.said()
        try:
            await self._load(path, offset)
        except HypervisorError as error:
            reason = error.description if isinstance(error, CommandRefused) else str(error)
            words = "; ".join(filter(None, (reason, self._process.said(since=said[0])[1])))
            raise LoadFailed(f"{self.qmp.label}: QEMU could not load the memory: {words}") from error

    async def _load(self, path: str, offset: int) -> None:
        fdset = None
        with _opened(path, offset) as fd:
            if "mapped-ram" in self.capabilities.features:  # the release after the one that brought file:
                fdset = await self.qmp.execute("add-fd", {}, fds=(fd,))
                uri = f"file:/dev/fdset/{fdset['fdset-id']},offset={offset}"
            else:
                await self.qmp.execute("getfd", {"fdname": "snaporch-incoming"}, fds=(fd,))
                uri = "fd:snaporch-incoming"
            await self.qmp.execute("migrate-incoming", {"uri": uri})
        with trio.fail_after(LOAD_SECONDS):
            await self._loaded()
        if fdset is not None:  # QEMU would keep the file open, and its space taken when it is deleted
            await self.qmp.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})

    async def _loaded(self) -> None:
        while (info := await self.qmp.execute("query-migrate")).get("status") != "completed":
            if info.get("status") in {"failed", "cancelled"}:
                words = info.get("error-desc", "no reason given")
                raise CommandRefused(self.qmp.label, "migrate-incoming", "GenericError", words)
            with trio.move_on_after(0.1):
                await self._migration.receive()

    async def _inside(self, verb: str, tag: str, targets: Sequence[str]) -> None:
        """Run a job on the images that disks are on: one at a time, when none is under way any more."""
        async with self._inside_turn:
            await internal.settle(self.qmp)
            nodes = {disk.target: disk.node for disk in await self.disks()}
            arguments: dict[str, Any] = {"tag": tag, "devices": [nodes[target] for target in targets]}
            if verb == "delete":
                await internal.run(self.qmp, verb, arguments)
            else:
                async with internal.plain_migration(self.qmp):
                    await internal.run(self.qmp, verb, arguments | {"vmstate": nodes[targets[0]]})

    async def save_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See PointsInside."""
        await self._inside("save", tag, targets)

    async def load_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See PointsInside."""
        await self._inside("load", tag, targets)

    async def delete_inside(self, tag: str, targets: Sequence[str]) -> None:
        """See PointsInside."""
        await self._inside("delete", tag, targets)

    async def shutdown(self) -> None:
        """See Machine."""
        await self.qmp.execute("system_powerdown")

    async def quit(self) -> None:
        """See Machine."""
        with suppress(ConnectionGone, OutcomeUnknown):
            await self.qmp.execute("quit")
        with trio.fail_after(QUIT_SECONDS):
            await wait_gone(self._process.local)


@contextmanager
def _opened(path: str, offset: int) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.lseek(fd, offset, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)
