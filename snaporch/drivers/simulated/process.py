"""A simulated hypervisor process: one domain's guest, disks, block nodes and memory stream.

It lives in the host and knows nothing of who is connected but that somebody is, so it survives every connection and
every orchestrator, as a real one does. All methods are synchronous and are what the hypervisor does with a command
once it has it; how long that takes, and what can go wrong on the way, is in `client`.

Rule: whatever reads or changes anything here calls `settle` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import trio

from snaporch.drivers.base import GuestVerb, Launch, Overlay, StreamPlan
from snaporch.drivers.qmp.run_states import refusal
from snaporch.drivers.simulated.drive import Drive, Pivot
from snaporch.drivers.simulated.files import Files, Image, Inside, MemoryFile
from snaporch.drivers.simulated.guest import Guest, SimulatedSpeed
from snaporch.drivers.simulated.locks import Locks
from snaporch.drivers.simulated.migration import SAME, Migration
from snaporch.errors import CommandRefused
from snaporch.model.domain import DiskStatus, Handle
from snaporch.model.request import Strategy
from snaporch.model.rfc import DeviceDisk


@attrs.define(eq=False)
class SimulatedProcess:
    """See the module.

    Attributes:
        pid: its id.
        handle: what snaporch knows it by.
        launch: what it was launched with.
        files: the host's.
        locks: the host's.
        speed: the host's.
        versions: what its memory files are bound to.
        clock: the host's.
        forget: called when the process has ended.
        guest: its guest.
        drives: its disks, in the guest's order.
        nodes: overlays that were opened beside the disks, by path.
        settings: migration settings that are not the default's: empty unless a stream is under way, or somebody
            else has made some.
        migration: the last memory stream.
        pivot: what the guest's writes are held up for, if they are.
        guarded: by guard that hears nothing of who posted it, when it acts, and how.
        client: who holds the exclusive connection.
        hung: it answers nothing any more; its guest runs on.
        condition: the run state, of QEMU's, that its guest has got into by itself, or an empty string.
        ended: why the process is gone, or an empty string.
        changed: set, and replaced, when something happens that a waiting task must look at.
    """

    pid: int
    handle: Handle
    launch: Launch
    files: Files
    locks: Locks
    speed: SimulatedSpeed
    versions: dict[str, str]
    clock: Callable[[], float]
    forget: Callable[[SimulatedProcess], None]
    guest: Guest = attrs.field(init=False)
    drives: list[Drive] = attrs.field(factory=list)
    nodes: dict[str, Image] = attrs.field(factory=dict)
    settings: dict[str, float] = attrs.field(factory=dict)
    migration: Migration | None = None
    pivot: Pivot | None = None
    guarded: dict[object, tuple[float, Callable[[float], None]]] = attrs.field(factory=dict)
    client: object | None = None
    hung: bool = False
    condition: str = ""
    ended: str = ""
    changed: trio.Event = attrs.field(factory=trio.Event)
    _resumes: float = math.inf
    _written: int = 0
    _spread: float = 0.0

    @property
    def socket(self) -> str:
        """The path of its control socket."""
        return str(self.handle.data["socket"])

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.launch.definition.name

    @property
    def ram(self) -> int:
        """Bytes of RAM."""
        return self.launch.definition.memory

    @property
    def growing(self) -> bool:
        """Whether its files grow while nobody looks at it."""
        return bool(self.guest.model.disk_rate) or (self.migration is not None and self.migration.active)

    # --- time ---------------------------------------------------------------------------------------------

    def settle(self) -> float:
        """Bring everything up to this instant, which is returned."""
        now = self.clock()
        if self.ended:
            return now
        if self._resumes <= now:
            self.guest.start(self._resumes)
            self._resumes = math.inf
        for guard, (at, act) in tuple(self.guarded.items()):
            if at <= now:
                del self.guarded[guard]
                act(at)
        off = self.guest.off_at()
        if self.migration is not None and self.migration.active:
            self.migration.advance(min(now, off))
            off = self.guest.off_at()  # later, or never, when that has stopped the guest
            self.migration.advance(min(now, off))
        self._write(min(now, off))
        if off <= now + SAME:
            self.guest.stop(off)
            self.end("the guest powered off")
        return now

    def _write(self, now: float) -> None:
        """Let the guest write its number, and as much more as it has run for, to every writable disk."""
        number = self.guest.ticks_at(now)
        if number == self._written or not self.guest.loaded:
            return
        run = self.guest.run_time(now)
        size = int((run - self._spread) * self.guest.model.disk_rate)
        for drive in self.drives:
            if not drive.readonly:
                drive.image.write(number)
                drive.image.spread(size)
        self._written, self._spread = number, run

    def notify(self) -> None:
        """Wake every task that waits for this process."""
        self.changed.set()
        self.changed = trio.Event()

    def end(self, why: str) -> None:
        """Let the process be gone: RAM is lost, disks hold what was written last, locks are free."""
        if self.ended:
            return
        if self.migration is not None:
            self.migration.cancel()
        if self.guest.runs:
            self.guest.stop(self.clock())
        self.ended = why
        self.guest.loaded = False
        self.locks.release(self.pid)
        self.forget(self)
        self.notify()

    # --- CPUs ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop the CPUs, if they run."""
        self._resumes = math.inf
        if self.guest.runs:
            self.guest.stop(self.clock())
            self.notify()

    def cont(self, at: float | None = None) -> None:
        """Start the CPUs, if they do not run; now, or at an instant since the last change."""
        if not self.guest.loaded:
            raise self.refusal("cont", "the guest waits for its memory")
        if why := refusal(self.condition or "paused", GuestVerb.RESUME):
            if self.condition == "suspended":
                return  # as QEMU does
            raise self.refusal("cont", why)
        if not self.guest.runs:
            self.condition = ""
            self.guest.start(self.clock() if at is None else at)
            self.notify()

    def get_into(self, condition: str) -> None:
        """Let the guest stop by itself, in a run state of QEMU's: ``suspended``, ``io-error``."""
        self.stop()
        self.condition = condition

    def freeze(self) -> None:
        """Let the guest's agent freeze its file systems: it runs on, and comes no further."""
        if not self.guest.model.agent or not self.guest.runs:
            raise self.refusal("guest-fsfreeze-freeze", "no guest agent answers")
        self.guest.freeze(self.clock())

    def thaw(self) -> None:
        """Let the guest's agent thaw them."""
        if self.guest.frozen:
            if not self.guest.runs:
                raise self.refusal("guest-fsfreeze-thaw", "no guest agent answers: the guest is paused")
            self.guest.thaw(self.clock())

    def power_button(self) -> None:
        """Ask the guest to power off."""
        self.guest.ask_off(self.clock(), self.speed.power_off)
        self.notify()

    def refusal(self, command: str, why: str) -> CommandRefused:
        """Return the error of a command that the hypervisor answers with no."""
        return CommandRefused(self.name, command, "GenericError", why)

    # --- disks --------------------------------------------------------------------------------------------

    def open_disks(self, disks: Sequence[DeviceDisk]) -> None:
        """Open the images to run on; `Locks.conflict` has said that they are free."""
        for disk in disks:
            image = self.files.image(disk.path, disk.format)
            self.drives.append(Drive(disk.target, image, f"disk-{disk.target}", disk.readonly))
            self.locks.hold(self.pid, disk.target, self.files.chain(disk.path, disk.format), disk.readonly)
            if not disk.readonly:
                self.files.freeze_below(image)

    def boot(self) -> None:
        """Let the guest find out where it was: at the highest number on its disks."""
        numbers = {drive.target: self.files.number(drive.image.path) for drive in self.drives if not drive.readonly}
        self._fill(max(numbers.values(), default=0), frozenset())

    def _fill(self, number: int, torn: frozenset[str], *, frozen: bool = False) -> None:
        self.guest.put(number, torn | self.differing(number), frozen=frozen)
        self._written, self._spread = number, 0.0

    def differing(self, number: int) -> frozenset[str]:
        """Return the writable disks that do not hold `number`."""
        return frozenset(
            drive.target
            for drive in self.drives
            if not drive.readonly and self.files.number(drive.image.path) != number
        )

    def status(self) -> tuple[DiskStatus, ...]:
        """Return the disks as they are."""
        return tuple(
            DiskStatus(
                target=drive.target,
                active=drive.image.path,
                format=drive.image.format,
                readonly=drive.readonly,
                virtual_size=drive.image.virtual_size,
                chain=tuple(image.path for image in self.files.below(drive.image)),
                node=drive.node,
            )
            for drive in self.drives
        )

    def open_overlay(self, overlay: Overlay) -> None:
        """Open an overlay, which nobody else may have open."""
        if overlay.path in {*self.nodes, *(drive.node for drive in self.drives)}:
            raise self.refusal("blockdev-add", f"node {overlay.path} exists")
        image = self.files.by_path.get(overlay.path)
        if not isinstance(image, Image):
            raise self.refusal("blockdev-add", f"could not open {overlay.path}")
        if why := self.locks.writing(overlay.path):
            raise self.refusal("blockdev-add", why)
        self.nodes[overlay.path] = image
        self.locks.hold(self.pid, "", [image], False)

    def close_overlay(self, overlay: Overlay) -> None:
        """Close an overlay that no disk uses; nothing happens when it is not open."""
        if any(drive.node == overlay.path for drive in self.drives):
            raise self.refusal("blockdev-del", f"node {overlay.path} is in use")
        if (image := self.nodes.pop(overlay.path, None)) is not None:
            self.locks.drop(self.pid, image.path)

    def switch(self, overlays: Sequence[Overlay], check: Callable[[str], None]) -> None:
        """Put disks on their overlays, all or none; `check` may raise for a target."""
        before = [attrs.evolve(drive) for drive in self.drives]
        try:
            for overlay in overlays:
                self._switch_one(overlay)
                check(overlay.target)
        except BaseException:
            self.drives = before
            raise
        for overlay in overlays:
            image = self.nodes.pop(overlay.path)
            self.locks.hold(self.pid, overlay.target, self.files.chain(image.path), False)
            self.files.freeze_below(image)

    def _switch_one(self, overlay: Overlay) -> None:
        drive = self._drive(overlay.target)
        image = self.nodes.get(overlay.path)
        if drive is None or drive.readonly or image is None:
            raise self.refusal("transaction", f"{overlay.target}: no such disk, not writable, or no such node")
        if image.path != overlay.path or image.backing != drive.image.path:
            raise AssertionError(f"bug: {image.path} is over {image.backing}, {drive.target} on {drive.image.path}")
        if image.number is not None:
            raise AssertionError(f"bug: {image.path} is not empty: what it holds would hide the disk's content")
        drive.image, drive.node = image, overlay.path

    def _drive(self, target: str) -> Drive | None:
        return next((drive for drive in self.drives if drive.target == target), None)

    # --- merges -------------------------------------------------------------------------------------------

    def drive_over(self, path: str) -> Drive:
        """Return the disk with an image in its chain."""
        for drive in self.drives:
            if any(image.path == path for image in self.files.below(drive.image)):
                return drive
        raise self.refusal("block-job", f"cannot find {path} in any chain")

    def hold(self, pivot: Pivot) -> None:
        """Hold up what the guest writes, until `end_pivot`."""
        self.settle()
        self.pivot = pivot
        self.guest.hold(self.clock())
        self.locks.hold(self.pid, "", pivot.run[:1], False)

    def end_pivot(self, *, moved: bool, at: float | None = None) -> None:
        """Let a disk go over to the lower image, or stay, and the guest write again; nothing when none is held."""
        pivot, self.pivot = self.pivot, None
        if pivot is None:
            return
        if moved:
            self.replace(pivot.drive, pivot.run)
        else:
            self.locks.hold(self.pid, pivot.drive.target, pivot.run[:1], False)
        self.guest.let_go(self.clock() if at is None else at)
        self.notify()

    def commit(self, top: str, base: str) -> None:
        """Write what is over `base`, up to `top`, down into it."""
        if why := self.locks.reading(base, self.pid):
            raise self.refusal("block-commit", why)
        self.files.commit(top, base)

    def replace(self, drive: Drive, run: Sequence[Image]) -> None:
        """Have the last image of `run` take the place of the first in a disk's chain; what is over it is closed."""
        *over, into = run
        self.files.replace(run)
        for image in over:
            self.locks.drop(self.pid, image.path)
        if drive.image is over[0]:
            drive.image, drive.node = into, f"disk-{drive.target}"
            self.locks.drop(self.pid, into.path)
            self.locks.hold(self.pid, drive.target, [into], False)
        else:
            above = next(image for image in self.files.below(drive.image) if image.backing == over[0].path)
            self.files.rebase(above, into)

    def pull(self, top: str, base: str | None) -> None:
        """Copy what is between two images up into the upper one."""
        run = self.files.run(top, base)
        self.files.pull(top, base)
        for image in run[1:] if base is None else run[1:-1]:
            self.locks.drop(self.pid, image.path)

    # --- memory -------------------------------------------------------------------------------------------

    def prepare(self, plan: StreamPlan) -> None:
        """Make the settings of a stream."""
        self._idle("migrate-set-capabilities")
        background = plan.strategy is Strategy.BACKGROUND
        if background and (why := self.guest.model.background_blocker):
            raise self.refusal("migrate-set-capabilities", why)
        file = self.files.find(plan.path)
        if not isinstance(file, MemoryFile) or file.size:
            raise AssertionError(
                f"bug: {plan.path} is no memory file made for this stream: it would be overwritten"
            )
        self.settings = {"background-snapshot": background, "max-bandwidth": plan.bandwidth}

    def migrate(self, plan: StreamPlan) -> None:
        """Begin a stream with the present settings."""
        self._idle("migrate")
        file = self.files.find(plan.path)
        if not isinstance(file, MemoryFile) or not self.settings:
            raise AssertionError("bug: a stream is opened before it is started")
        bandwidth = min(self.settings["max-bandwidth"] or math.inf, self.speed.bandwidth)
        self.migration = Migration(
            guest=self.guest,
            file=file,
            ram=self.ram,
            versions=self.versions,
            background=bool(self.settings["background-snapshot"]),
            cursor=self.clock(),
            bandwidth=bandwidth,
            arming=self.ram / self.speed.arm_rate,
            limit=bandwidth * self.speed.downtime_limit,
        )
        self.notify()

    def limit_stream(self, bandwidth: float) -> None:
        """Let the stream under way go at another speed; nothing happens when there is none."""
        if self.migration is not None and self.migration.active:
            self.migration.bandwidth = min(bandwidth or math.inf, self.speed.bandwidth)
            self.migration.limit = self.migration.bandwidth * self.speed.downtime_limit
            self.notify()

    def _idle(self, command: str) -> None:
        if self.migration is not None and self.migration.active:
            raise self.refusal(command, "there is a migration process in progress")

    def abort_stream(self, settings: dict[str, float]) -> None:
        """End the stream, if one is under way, and put the settings back."""
        if self.migration is not None:
            self.migration.cancel()
        self.settings = dict(settings)
        self.notify()

    def load(self, path: str, offset: int) -> None:
        """Fill RAM from a memory file."""
        if self.guest.loaded:
            raise self.refusal("migrate-incoming", "the guest was not launched for it")
        file = self.files.by_path.get(path)
        if not isinstance(file, MemoryFile):
            raise self.refusal("migrate-incoming", f"could not open {path}")
        if offset or not file.complete or file.flips or file.ram != self.ram or file.versions != self.versions:
            raise self.refusal("migrate-incoming", f"error while loading state from {path}")
        self._fill(file.number, file.torn, frozen=file.frozen)

    # --- inside images ------------------------------------------------------------------------------------

    def _taken(self, command: str, targets: Sequence[str]) -> list[Drive]:
        found = [drive for drive in self.drives if drive.target in targets]
        if bad := [d.target for d in found if d.readonly or d.image.format != "qcow2"]:
            raise self.refusal(command, f"no room inside the image of {', '.join(bad)}")
        return found

    def save_inside(self, tag: str, targets: Sequence[str], seconds: float) -> None:
        """Keep RAM and disks inside the disks' images; the guest is paused for some seconds, if it ran."""
        self._idle("snapshot-save")
        drives = self._taken("snapshot-save", targets)
        if any(tag in drive.image.inside for drive in drives):
            raise self.refusal("snapshot-save", f"snapshot {tag!r} already exists in one or more devices")
        number, first = self.guest.ticks_at(self.clock()), drives[0].image
        memory = MemoryFile(first.path, first.system, first.inode, linked=False)
        memory.number, memory.torn, memory.ram = number, self.guest.torn, self.ram
        memory.versions, memory.complete, memory.frozen = self.versions, True, self.guest.frozen
        for drive in drives:
            held, content = drive.image.number, self.files.number(drive.image.path)
            with_memory = Inside(held, content, memory, self.ram)
            drive.image.keep(tag, with_memory if drive.image is first else Inside(held, content))
        if self.guest.runs:
            self.stop()
            self._resumes = self.clock() + seconds
        self.notify()

    def load_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Put RAM and disks back to what is inside the images; the CPUs stand still afterwards."""
        if self.guest.runs:
            raise AssertionError("bug: what is inside the images is loaded under a guest that runs")
        drives = self._taken("snapshot-load", targets)
        if not all(tag in drive.image.inside for drive in drives):
            raise self.refusal("snapshot-load", f"snapshot {tag!r} does not exist in one or more devices")
        memory = drives[0].image.inside[tag].memory
        if memory is None or memory.ram != self.ram or memory.versions != self.versions or drives[0].image.flips:
            raise self.refusal("snapshot-load", f"error while loading state from {tag!r}")
        for drive in drives:
            drive.image.go_back(tag)
        self._fill(memory.number, memory.torn, frozen=memory.frozen)

    def keeps(self, tag: str, targets: Sequence[str]) -> bool:
        """Return whether a snapshot is inside the images of all these disks."""
        return all(tag in drive.image.inside for drive in self.drives if drive.target in targets)

    @property
    def saving(self) -> float:
        """Seconds for which a save goes on that lets the guest run afterwards."""
        return max(0.0, self._resumes - self.clock()) if self._resumes < math.inf else 0.0

    def delete_inside(self, tag: str, targets: Sequence[str]) -> None:
        """Delete a snapshot from the images, wherever it is."""
        for drive in self._taken("snapshot-delete", targets):
            drive.image.forget(tag)
