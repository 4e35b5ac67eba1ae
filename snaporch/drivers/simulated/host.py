"""The world that simulated drivers act on; it survives every one of them."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs
import trio

from snaporch.drivers.base import Copied, Launch, Original, Place
from snaporch.drivers.simulated.faults import FaultPlan
from snaporch.drivers.simulated.files import EMPTY_IMAGE, PLENTY, Files, FileSystem, MemoryFile
from snaporch.drivers.simulated.guest import Guest, GuestModel, SimulatedSpeed
from snaporch.drivers.simulated.locks import Locks
from snaporch.drivers.simulated.process import SimulatedProcess
from snaporch.errors import Refused
from snaporch.model.domain import DomainDefinition, ForwardedPort, Handle
from snaporch.model.rfc import DeviceDisk

Hook = Callable[[str, str], None]
"""Called with the name of a call, as in `POINTS`, and the domain's name (empty for calls of `Storage`)."""

_PORT = re.compile(r"port=(\d+)")
_FIRST_PID = 1000
_FIRST_FREE_PORT = 40_000


def _nothing(at: str, domain: str) -> None:
    """Do nothing: the hook that is there until a test puts in its own."""


def _ports(launch: Launch) -> list[str]:
    return [] if launch.isolated else _PORT.findall(" ".join(launch.definition.extra_args))


@attrs.define(eq=False)
class SimulatedHost:
    """Files, processes, guests and what goes wrong with them.

    Make the images, give the host to a `SimulatedDriver`, plan faults, and look at what has become of everything. A
    second driver on the same host is snaporch started again: it finds files and processes as the first left them.
    The methods here take no time, meet no fault, and may be called outside of Trio, where time stands still.

    Attributes:
        speed: how long things take.
        speeds: how long they take in the processes of single domains; looked up as `models`.
        model: the kind of every guest that is not in `models`.
        models: the kinds of guests, by domain; one is looked up when its process starts.
        alone: two processes cannot have one domain's name, but for a throw-away copy.
        ram: bytes of RAM for guests.
        epoch: seconds since the epoch, UTC, when the host's time began: a day of 2025, always the same.
        versions: what memory files are bound to; another value is another hypervisor.
        faults: what is to go wrong.
        on_call: called before each call has its effect, and can stop it by raising, by cancelling or by
            `SimulatedDriver.die`.
        on_effect: called when a call has had its effect, before its caller knows.
    """

    speed: SimulatedSpeed = attrs.field(factory=SimulatedSpeed)
    speeds: dict[str, SimulatedSpeed] = attrs.field(factory=dict)
    model: GuestModel = attrs.field(factory=GuestModel)
    models: dict[str, GuestModel] = attrs.field(factory=dict)
    alone: bool = False
    ram: int = PLENTY
    epoch: float = 1_750_000_000.0
    versions: dict[str, str] = attrs.field(factory=lambda: {"hypervisor": "simulated 1"})
    faults: FaultPlan = attrs.field(factory=FaultPlan)
    on_call: Hook = _nothing
    on_effect: Hook = _nothing
    disk: Files = attrs.field(factory=Files, init=False, repr=False)
    locks: Locks = attrs.field(
        default=attrs.Factory(lambda self: Locks(self.disk), takes_self=True), init=False, repr=False
    )
    _running: dict[int, SimulatedProcess] = attrs.field(factory=dict, init=False, repr=False)
    _growing: set[SimulatedProcess] = attrs.field(factory=set, init=False, repr=False)
    _ports: dict[str, SimulatedProcess] = attrs.field(factory=dict, init=False, repr=False)
    _sockets: dict[str, SimulatedProcess] = attrs.field(factory=dict, init=False, repr=False)
    _directories: dict[str, SimulatedProcess] = attrs.field(factory=dict, init=False, repr=False)
    _pids: itertools.count[int] = attrs.field(factory=lambda: itertools.count(_FIRST_PID), init=False, repr=False)
    _free_ports: itertools.count[int] = attrs.field(
        factory=lambda: itertools.count(_FIRST_FREE_PORT), init=False, repr=False
    )
    _run: trio.lowlevel.TrioToken | None = attrs.field(default=None, init=False, repr=False)
    _offset: float = attrs.field(default=0.0, init=False, repr=False)
    _last: float = attrs.field(default=0.0, init=False, repr=False)

    # --- what a test sets up --------------------------------------------------------------------------------

    def mount(self, prefix: str, capacity: int = PLENTY, *, readonly: bool = False) -> FileSystem:
        """Put a file system of `capacity` bytes at an absolute directory, which has nothing in it yet."""
        system = FileSystem(posixpath.normpath(prefix), capacity, readonly)
        self.disk.mount(system)
        return system

    def add_image(
        self, path: str, size: int = 2**30, *, format_: str = "qcow2", backing: str = "", number: int = 0
    ) -> DeviceDisk:
        """Make an image of a disk of `size` bytes that holds `number`; directories are made.

        Over a `backing` image it is an overlay, and then holds nothing of its own unless `number` is given.
        """
        self.disk.make_directory(posixpath.dirname(path))
        base = DeviceDisk("", backing, self.disk.image(backing).format) if backing else None
        image = self.disk.make_image(path, size, format_=format_, base=base)
        image.number = None if backing and not number else number
        if format_ == "raw":
            image.grow(size - EMPTY_IMAGE)
        return DeviceDisk("", path, format_)

    def add_file(self, path: str, size: int = 0) -> None:
        """Make a file of somebody else's; directories are made."""
        self.disk.make_directory(posixpath.dirname(path))
        self.disk.make_plain(path, size)

    def boot(self, definition: DomainDefinition, *, running: bool = True) -> Handle:
        """Start a domain by other means than snaporch, as for `Driver.attach`.

        Raises:
            Refused: as `Driver.launch`.
        """
        process = self.start(Launch(definition, definition.disks, Path("/run")))
        if running:
            process.cont()
        return process.handle

    # --- what a test does to it -----------------------------------------------------------------------------

    def damage(self, path: str, *, silent: bool = False) -> None:
        """Change a file's content, but not its size; `silent`: as a failing disk does, with no trace in its times.

        Raises:
            FileNotFoundError: there is none.
        """
        self.settle_files(path)
        file = self.disk.find(path)
        file.flips += 1
        file.version += not silent

    def crash(self, handle: Handle) -> None:
        """Let a process die; nothing happens when it is gone."""
        self._end(handle, "it crashed")

    def power_off(self, handle: Handle) -> None:
        """Let the guest power off by itself, at which its process ends."""
        self._end(handle, "the guest powered off")

    def _end(self, handle: Handle, why: str) -> None:
        if (found := self.find(handle)) is not None:
            found.end(why)

    def hang(self, handle: Handle) -> None:
        """Let a process answer nothing any more; its guest runs on, `Driver.kill` still ends it."""
        if (found := self.find(handle)) is not None:
            found.hung = True
            found.notify()

    def get_into(self, handle: Handle, condition: str) -> None:
        """Let a guest stop by itself, in a run state of QEMU's: ``suspended``, ``io-error``."""
        if (found := self.find(handle)) is not None:
            found.get_into(condition)

    # --- what a test looks at -------------------------------------------------------------------------------

    def files(self) -> tuple[str, ...]:
        """Return the paths of all files, sorted."""
        return tuple(sorted(self.disk.by_path))

    def number(self, path: str) -> int:
        """Return what a guest would read: of an image through its chain, of a memory file as RAM.

        Raises:
            FileNotFoundError: there is none.
        """
        self.settle_files(path)
        file = self.disk.find(path)
        return file.number if isinstance(file, MemoryFile) else self.disk.number(path)

    def processes(self, domain: str | None = None) -> tuple[Handle, ...]:
        """Return the processes that run, all or those of one domain, oldest first."""
        return tuple(process.handle for process in self.running(domain))

    def guest(self, handle: Handle) -> Guest:
        """Return the guest in a process.

        Raises:
            LookupError: the process is gone.
        """
        return self._get(handle).guest

    def consistent(self, handle: Handle, targets: Iterable[str] | None = None) -> bool:
        """Return whether RAM and the writable disks (those of `targets`) are of one point, and always were.

        A guest that was loaded from memory and disks of different points stays inconsistent although its next tick
        writes the same number everywhere. A process that is gone, or has not been loaded yet, is not consistent.
        """
        found = self.find(handle)
        if found is None or not found.guest.loaded:
            return False
        bad = found.guest.torn | found.differing(found.guest.ticks)
        return not (bad if targets is None else bad & set(targets))

    def nodes(self, handle: Handle) -> tuple[str, ...]:
        """Return the block nodes that are open beside those of the disks: none, unless a snapshot is being made."""
        return tuple(self._get(handle).nodes)

    def settings(self, handle: Handle) -> dict[str, float]:
        """Return the migration settings that are not the default's: none, unless a stream is under way."""
        return dict(self._get(handle).settings)

    def _get(self, handle: Handle) -> SimulatedProcess:
        if (found := self.find(handle)) is None:
            raise LookupError(f"process {handle.id} is gone")
        return found

    # --- for the drivers ------------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the host's time in seconds: Trio's, which the first look in another run of Trio continues."""
        try:
            run = trio.lowlevel.current_trio_token()
        except RuntimeError:
            return self._last
        time = trio.current_time()
        if run is not self._run:
            self._run, self._offset = run, self._last - time
        self._last = time + self._offset
        return self._last

    def running(self, domain: str | None = None) -> list[SimulatedProcess]:
        """Return the processes that run, all or those of one domain, brought up to date."""
        found = [process for process in self._running.values() if domain in {None, process.name}]
        for process in found:
            process.settle()
        return [process for process in found if not process.ended]

    def find(self, handle: Handle) -> SimulatedProcess | None:
        """Return a process that runs, brought up to date, or None."""
        found = self._running.get(int(handle.id))
        if found is None:
            return None
        found.settle()
        return None if found.ended else found

    def listening(self, socket: str) -> SimulatedProcess | None:
        """Return the process that listens at a control socket, or None."""
        found = self._sockets.get(socket)
        return None if found is None else self.find(found.handle)

    def launched_in(self, directory: Path) -> SimulatedProcess | None:
        """Return the process that was launched last with `directory`, if it runs."""
        found = self._directories.get(str(directory))
        return None if found is None else self.find(found.handle)

    def settle_files(self, path: str = "") -> None:
        """Bring up to date what grows by itself (streams, guests that write ever more) and what is at `path`."""
        if path in self.locks.writers:
            self._running[self.locks.writers[path][0]].settle()
        for process in tuple(self._growing):
            process.settle()
            if not process.growing:
                self._growing.discard(process)

    def watch(self, process: SimulatedProcess) -> None:
        """Count a process among those whose files grow, as long as they do."""
        self._growing.add(process)

    def conflict(self, launch: Launch) -> str:
        """Return why a launch cannot be beside what runs (its name, or a port), or an empty string."""
        there = any(not process.launch.isolated for process in self.running(launch.definition.name))
        if self.alone and there and not launch.isolated:
            return f"only one {launch.definition.name} can run at a time"
        for port in _ports(launch):
            if port in self._ports:
                return f"port {port} is in use by process {self._ports[port].pid}"
        return ""

    def copied(self, original: Original, place: Place) -> Copied:
        """Return how a clone is defined: with a port of its own for each that the original has."""
        ports: list[ForwardedPort] = []

        def other(found: re.Match[str]) -> str:
            port = next(self._free_ports)
            ports.append(ForwardedPort("tcp", "", port, int(found[1]), ""))
            return f"port={port}"

        words = tuple(_PORT.sub(other, word) for word in original.definition.extra_args)
        definition = attrs.evolve(
            original.definition, name=place.name, disks=place.disks, serial="", extra_args=words
        )
        return Copied(definition, ports=tuple(ports))

    @property
    def free_ram(self) -> int:
        """Bytes of RAM that no guest has."""
        return self.ram - sum(process.ram for process in self.running())

    def start(self, launch: Launch) -> SimulatedProcess:
        """Start a process, CPUs stopped.

        Raises:
            Refused: an image is missing or locked, or a port is in use.
        """
        definition = launch.definition
        if why := self.conflict(launch) or self.locks.conflict(launch.disks):
            raise Refused(f"{definition.name} does not start: {why}")
        pid = next(self._pids)
        process = self._made(pid, launch)
        process.open_disks(launch.disks)
        if not launch.incoming:
            process.boot()
        return process

    def _made(self, pid: int, launch: Launch) -> SimulatedProcess:
        socket = f"{launch.directory}/{launch.definition.name}-{pid}.sock"
        process = SimulatedProcess(
            pid=pid,
            handle=Handle("simulated", str(pid), {"socket": socket, "directory": str(launch.directory)}),
            launch=launch,
            files=self.disk,
            locks=self.locks,
            speed=self.speeds.get(launch.definition.name, self.speed),
            versions=dict(self.versions),
            clock=self.now,
            forget=self._forget,
        )
        process.guest = Guest(
            self.models.get(launch.definition.name, self.model), process.settle, loaded=not launch.incoming
        )
        self._running[pid] = self._sockets[socket] = process
        self._directories[str(launch.directory)] = process
        self._ports.update(dict.fromkeys(_ports(launch), process))
        if process.growing:
            self._growing.add(process)
        return process

    def _forget(self, process: SimulatedProcess) -> None:
        del self._running[process.pid], self._sockets[process.socket]
        if self._directories.get(str(process.launch.directory)) is process:
            del self._directories[str(process.launch.directory)]
        self._growing.discard(process)
        for port in [port for port, owner in self._ports.items() if owner is process]:
            del self._ports[port]
