"""Launch, attach to and connect to QEMU processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import (
    LOADING,
    Address,
    Clones,
    Copied,
    Discovers,
    Driver,
    Info,
    Launch,
    Machine,
    Original,
    Place,
    StartsBeside,
    StreamPlan,
    Trait,
    Writer,
)
from snaporch.drivers.local import process
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.local.memory import free_ram
from snaporch.drivers.local.sockets import address
from snaporch.drivers.local.trace import is_block_device
from snaporch.drivers.qemu import attach, clones, firmware, hostside, kvm, launcher, surroundings
from snaporch.drivers.qemu.command import command_line
from snaporch.drivers.qemu.discover import discover
from snaporch.drivers.qemu.host import default_emulator, doctor
from snaporch.drivers.qemu.hostside import Held
from snaporch.drivers.qemu.options import expand, parse
from snaporch.drivers.qemu.surroundings import foreign, untrusted
from snaporch.drivers.qmp import lazy, open_qmp
from snaporch.drivers.qmp.blocks import image_file
from snaporch.drivers.qmp.machine import MACHINE_TRAITS, QemuMachine
from snaporch.drivers.qmp.process import CONTROL, LOG, QemuProcess, last_words
from snaporch.drivers.qmp.stream import end_sinks
from snaporch.errors import ConnectionGone, HypervisorError, InvalidInput, OtherMachine, Refused, Unsupported
from snaporch.model.domain import NVRAM, Discovered, DomainDefinition, DomainRecord, Handle
from snaporch.model.rfc import DeviceDisk
from snaporch.model.way import Way, WayBack

GREETING_SECONDS = 20.0  # of a QEMU that is just starting, on a busy host
CONNECT_SECONDS = 20.0  # also each command: `stop` waits for every disk request in flight
QUERY_SECONDS = 2.0
KILL_SECONDS = 10.0  # a killed process is gone at once but for a disk that hangs in the kernel
QUERY, AGENT, PID = "query.sock", "agent.sock", "qemu.pid"


@contextmanager
def _listening(directory: Path, *names: str) -> Iterator[list[int]]:
    """Yield listening sockets for QEMU to inherit: there before QEMU is, and their paths may be of any length."""
    with ExitStack() as stack:
        listeners = []
        for name in names:
            path = directory / name
            path.unlink(missing_ok=True)
            listeners.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            with address(str(path)) as where:
                listeners[-1].bind(where)
            path.chmod(0o600)
            listeners[-1].listen(8)
        yield [listener.fileno() for listener in listeners]


@contextmanager
def _free_ports() -> Iterator[clones.FreePort]:
    """Yield what finds ports that nobody listens at, each another one."""
    with ExitStack() as held:

        def free_port(protocol: str, host: str) -> int:
            kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            found = held.enter_context(socket.socket(family, kind))
            try:
                found.bind((host.strip("[]"), 0))
            except OSError as error:
                raise Unsupported(f"no port can be had at {host}: {error.strerror}") from None
            return int(found.getsockname()[1])

        yield free_port


def _spawn(command: attach.Relaunch, fds: list[int], log: Path) -> int:
    """Start a process in a session of its own, its words appended to `log`; return its id."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        command.argv[0],
        command.argv,
        os.environ | command.environment,
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds),  # onto itself: inherited, under its own number
        ],
    )


INFO = Info(
    "qemu",
    MACHINE_TRAITS
    | {Trait.BACKGROUND_STREAMS, Trait.GUEST_AGENT, Trait.STARTS_BESIDE, Trait.DISCOVERS, Trait.CLONES}
    | LocalStorage.traits,
    logs=(LOG,),
)


@attrs.define
class QemuDriver(Driver, StartsBeside, Discovers, Clones):
    """Domains in QEMU processes of this host."""

    info: Info = attrs.field(default=INFO, init=False)
    storage: LocalStorage = attrs.field(factory=LocalStorage)

    async def _accel(self, definition: DomainDefinition, emulator: str) -> str:
        if definition.accel != "auto":
            return definition.accel
        return "tcg" if await kvm.cached_probe(emulator) else "kvm"

    def _like(self, template: QemuProcess, launch: Launch, fds: list[int]) -> attach.Relaunch:
        """Return how a process like an attached one is started, in the surroundings that that one had."""
        try:
            made = attach.relaunch(
                template,
                launch.definition.disks,
                launch.disks,
                fds=fds,
                pidfile=str(launch.directory / PID),
                incoming=launch.incoming,
                isolated=launch.isolated,
                suffix=f".{launch.directory.name}",
            )
        except Unsupported as error:
            raise OtherMachine(str(error)) from None
        wanted: dict[str, Any] = {"cwd": template.cwd}
        program = made.argv[0]
        if template.surroundings:
            wanted |= template.surroundings | {"cwd": template.cwd}
            program = template.surroundings["program"]
        else:  # attached to by an earlier version
            program = shutil.which(program) or program
        if not os.access(program, os.X_OK):
            raise OtherMachine(f"QEMU's program {program} is not there any more")
        if why := untrusted(program):
            raise OtherMachine(why)
        wanted |= {"program": program, "private_network": made.private_network}
        return attrs.evolve(
            made,
            argv=(sys.executable, "-I", "-S", launcher.__file__, *made.argv),
            environment={"SNAPORCH_SURROUNDINGS": json.dumps(wanted)},
        )

    async def make_nvram(self, definition: DomainDefinition, store: DeviceDisk) -> str:
        """See Driver."""
        if await self.storage.exists(store.path):
            await self.storage.check_given(store.path, NVRAM, store.format)
            firmware.firmware_for(await self.storage.virtual_size(store.path, store.format))
            return ""
        if store.format != "raw":
            raise InvalidInput(f"{definition.name}: {store.path} is not there; only a raw variable store is made")
        await self.storage.make_directory(os.path.dirname(store.path))
        await trio.to_thread.run_sync(firmware.make_store, firmware.firmware_for(), store.path)
        return store.path

    async def _code(self, launch: Launch) -> str:
        """Return the program of the firmware that a machine is to have; empty: QEMU's own."""
        for disk in launch.disks if launch.definition.firmware == "uefi" else ():
            if disk.target == NVRAM:
                return firmware.firmware_for(await self.storage.virtual_size(disk.path, disk.format)).code
        return ""

    async def _command(self, launch: Launch, fds: list[int]) -> attach.Relaunch:
        pidfile = str(launch.directory / PID)
        if launch.template is not None:
            return self._like(QemuProcess.of(launch.template), launch, fds)
        emulator = launch.definition.emulator or default_emulator()
        if shutil.which(emulator) is None:
            raise Unsupported(f"{emulator} is not installed (Debian: apt install qemu-system-x86)")
        accel = await self._accel(launch.definition, emulator)
        definition = attach.isolated_definition(launch.definition) if launch.isolated else launch.definition
        arguments = command_line(
            definition,
            launch.disks,
            accel=accel,
            fds=fds[:2],
            pidfile=pidfile,
            incoming=launch.incoming,
            agent=fds[2] if definition.guest_agent else None,
            generation=launch.generation,
            firmware=await self._code(launch),
            devices={disk.path for disk in launch.disks if is_block_device(disk.path)},
        )
        return attach.Relaunch((emulator, *arguments))

    async def launch(self, launch: Launch) -> Handle:
        """See Driver."""
        for disk in launch.disks:
            await self.storage.lineage(disk.path, disk.format)  # QEMU would follow it anywhere
        await self.storage.make_directory(str(launch.directory))
        log = launch.directory.parent / LOG  # of all the processes that the domain has had
        start = log.stat().st_size if log.exists() else 0
        agent = (AGENT,) if launch.definition.guest_agent and launch.template is None else ()
        with _listening(launch.directory, CONTROL, QUERY, *agent) as fds:
            command = await self._command(launch, fds)
            template = QemuProcess.of(launch.template) if launch.template is not None else None
            pid = _spawn(command, fds, log)
        made = QemuProcess(
            process.process_of(pid) or process.LocalProcess(pid, 0),
            str(launch.directory / CONTROL),
            attached=template is not None,
            argv=template.argv if template else (),
            cwd=template.cwd if template else "/",
            directory=str(launch.directory),
            surroundings=template.surroundings if template else {},
            renames=command.renames,
        )
        handle = made.handle(self.name)
        try:
            async with open_qmp(made.socket, label=launch.definition.name, timeout=GREETING_SECONDS):
                return handle
        except HypervisorError as error:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await self.kill(handle)
                await self.clear(launch.directory)
            words = last_words(log, start)
            raise Unsupported(f"QEMU does not start {launch.definition.name}: {words or error}") from None
        except BaseException:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await self.kill(handle)
                await self.clear(launch.directory)
            raise

    async def find(self, directory: Path) -> Handle | None:
        """See Driver: QEMU has written its id before it does anything else."""
        pidfile = directory / PID
        for pid in process.find_processes("-pidfile", str(pidfile)):
            if (found := process.process_of(pid)) is not None:
                made = QemuProcess(found, str(directory / CONTROL), directory=str(directory))
                return made.handle(self.name)
        return None

    @asynccontextmanager
    async def connect(self, handle: Handle, label: str) -> AsyncIterator[QemuMachine]:
        """See Driver."""
        found = QemuProcess.of(handle)
        async with self._connected(found, found.socket, label, CONNECT_SECONDS) as machine:
            yield machine

    @asynccontextmanager
    async def query(self, handle: Handle, label: str) -> AsyncIterator[QemuMachine]:
        """See Driver: by the second socket of a QEMU of ours; one that was attached to has only the one."""
        found = QemuProcess.of(handle)
        path = _aside_of(found) or found.socket
        async with self._connected(found, path, label, QUERY_SECONDS, looking=True) as machine:
            yield machine

    async def await_inside(self, handle: Handle, label: str) -> None:
        """See Driver: its monitor says nothing meanwhile, so as long as bytes come and go it is given time."""
        found, before = QemuProcess.of(handle), None
        while (now := process.transferred(found.local)) != before:
            before = now
            with suppress(HypervisorError):
                async with open_qmp(found.socket, label=label, timeout=CONNECT_SECONDS):
                    return

    @asynccontextmanager
    async def _connected(
        self, found: QemuProcess, path: str, label: str, seconds: float, *, looking: bool = False
    ) -> AsyncIterator[QemuMachine]:
        if not process.alive(found.local):
            raise ConnectionGone(f"{label}: its QEMU (process {found.local.pid}) is gone")
        async with (
            open_qmp(path, label=label, timeout=seconds) as qmp,
            QemuMachine(qmp, found, _agent_of(found), _aside_of(found)).opened(looking=looking) as machine,
        ):
            yield machine

    async def clear(self, directory: Path) -> None:
        """See Driver."""
        await lazy.end(str(directory / LOADING))
        for name in (CONTROL, QUERY, AGENT, PID):
            (directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            directory.rmdir()

    async def abandon(self, plan: StreamPlan) -> None:
        """See Driver."""
        await end_sinks(plan.path)

    async def forget(self, handle: Handle) -> None:
        """See Driver."""
        if directory := QemuProcess.of(handle).directory:
            await self.clear(Path(directory))

    async def take_place(self, old: Handle, new: Handle) -> Handle:
        """See Driver: others know a QEMU that was attached to by the path of its socket."""
        before, after = QemuProcess.of(old), QemuProcess.of(new)
        if not before.attached or not after.attached:
            return new
        # What is not there any more was renamed before a crash of snaporch.
        for made, final in ((after.socket, before.socket), *after.renames):
            if os.path.exists(made):
                os.replace(made, final)
        if path := attach.pidfile(before):
            process.renew_pidfile(path, before.local.pid, after.local.pid)
        return attrs.evolve(after, socket=before.socket, renames=()).handle(self.name)

    async def alive(self, handle: Handle) -> bool:
        """See Driver."""
        return process.alive(QemuProcess.of(handle).local)

    def pid(self, handle: Handle) -> int:
        """See Driver."""
        return QemuProcess.of(handle).local.pid

    async def wait_gone(self, handle: Handle) -> None:
        """See Driver."""
        await process.wait_gone(QemuProcess.of(handle).local)

    async def kill(self, handle: Handle) -> None:
        """See Driver."""
        await process.kill(QemuProcess.of(handle).local)

    async def writers_of(self, paths: Collection[str], besides: Handle | None = None) -> tuple[Writer, ...]:
        """See Driver; a QEMU may keep such a descriptor of a frozen image and never use it."""
        own = self.pid(besides) if besides is not None else None
        found = process.writers({os.path.realpath(path) for path in paths})
        return tuple(Writer(f"process {pid}", path) for pid, path in found if pid != own)

    async def attach(self, name: str, address: Address) -> tuple[DomainDefinition, Handle]:
        """See Driver; by the QMP socket."""
        if not address.qmp or address.uri or address.of:
            raise InvalidInput(
                f"{name}: a QEMU is attached to by its QMP socket (--qmp SOCKET), and by nothing else"
            )
        path = os.path.abspath(address.qmp)
        async with open_qmp(path, label=name, timeout=CONNECT_SECONDS) as qmp:
            pid = qmp.peer_pid
            found = process.process_of(pid) if pid else None
            if pid is None or found is None:
                raise Refused(f"{name}: the process at the other end of {path} cannot be seen")
            argv, cwd = process.command_line(pid), os.readlink(f"/proc/{pid}/cwd")
            if why := foreign(pid):
                raise Refused(f"{name}: QEMU (process {pid}) cannot be managed: {why}")
            if "qemu" not in os.path.basename(argv[0]):
                # The kernel names whoever made the socket: a manager may have handed it to its QEMU.
                raise Refused(
                    f"{name}: {path} was opened by {argv[0]}, which is no QEMU: attach to a socket of its own"
                )
            if "-daemonize" in argv:
                blocks = [block["inserted"] for block in await qmp.execute("query-block") if "inserted" in block]
                files = [image_file(block["image"]) for block in blocks]
                if relative := [file for file in files if not os.path.isabs(file)]:
                    before = process.directory_before(pid, relative)
                    if before is None:
                        raise Refused(f"{name}: cannot see where {relative[0]} is: start it with absolute paths")
                    cwd = before
            made = QemuProcess(
                found,
                path,
                attached=True,
                argv=_expanded(argv, cwd),
                cwd=cwd,
                surroundings=attrs.asdict(surroundings.look(pid)),
            )
            async with QemuMachine(qmp, made).opened() as machine:
                disks = tuple(
                    DeviceDisk(disk.target, disk.active, disk.format, disk.readonly)
                    for disk in await machine.disks()
                )
                memory = machine.capabilities.ram
        return DomainDefinition(name=name, memory=memory, disks=disks, emulator=argv[0]), made.handle(self.name)

    async def discover(self, known: Mapping[str, Handle]) -> Sequence[Discovered]:
        """See Discovers: by what /proc says."""
        locals_ = {name: QemuProcess.of(handle).local for name, handle in known.items()}
        pids = {each.pid: name for name, each in locals_.items() if process.alive(each)}
        return await trio.to_thread.run_sync(discover, pids)

    async def way_back(self, record: DomainRecord, machine: Machine) -> WayBack:
        """See Driver: what the command line, the program and the devices of now allow."""
        if record.template is None:
            argv = process.command_line(pid) if record.handle and (pid := self.pid(record.handle)) else ()
            if argv and (why := attach.changed_since(argv, (await machine.shape()).devices)):
                return WayBack(Way.NONE, why)
            words = attach.held(
                QemuProcess(process.LocalProcess(0, 0), "", argv=("", *record.definition.extra_args))
            )
            return WayBack(Way.PROVEN, _both(words)) if words else WayBack(Way.BESIDE)
        template = QemuProcess.of(record.template)
        devices = (await machine.shape()).devices
        if why := attach.no_way_back(template, record.definition.disks, devices):
            return WayBack(Way.NONE, why)
        if template.surroundings:
            known = surroundings.known(template.surroundings)
            if not os.access(known.program, os.X_OK):
                return WayBack(Way.NONE, f"QEMU's program {known.program} is not there any more")
            if why := surroundings.replaced(known):
                return WayBack(Way.PROVEN, why)
        words = attach.held(template)
        return WayBack(Way.PROVEN, _both(words)) if words else WayBack(Way.BESIDE)

    def stand_ins(self, launch: Launch) -> tuple[str, ...]:
        """See Driver."""
        process_ = QemuProcess.of(launch.template) if launch.template else None
        argv = ("", *launch.definition.extra_args)
        held = attach.held(process_ or QemuProcess(process.LocalProcess(0, 0), "", argv=argv))
        return tuple(hostside.stand_ins(held))

    async def beside_blocker(self, launch: Launch) -> str:
        """See StartsBeside: what both would hold.

        Raises:
            OtherMachine: no machine like the present one can be started at all, beside it or in its place.
        """
        if launch.template is None:
            return ""
        template = QemuProcess.of(launch.template)
        self._like(template, launch, [])
        held = attach.held(template)
        if lost := [each for each in held if not each.again]:
            raise OtherMachine(f"{launch.definition.name}: no other process can have {lost[0]}")
        return _both(held)

    async def copies(self, original: Original, places: Sequence[Place]) -> tuple[Copied, ...]:
        """See Clones: by what is understood of the command line."""
        await trio.lowlevel.checkpoint()
        with _free_ports() as free_port:
            return tuple(clones.copied(original, place, free_port) for place in places)

    async def free_ram(self) -> int | None:
        """See Driver: what the kernel reckons it can give without swapping."""
        return free_ram()

    async def doctor(self) -> dict[str, Any]:
        """See Driver."""
        return await doctor(self.storage.qemu_img)


def _both(held: Iterable[Held]) -> str:
    return "; ".join(f"both would have {each}" for each in held)


def _expanded(argv: tuple[str, ...], cwd: str) -> tuple[str, ...]:
    """Return a command line with what the files for -readconfig say in place of that."""
    try:
        options = list(expand(parse(argv), lambda name: Path(cwd, name).read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"a file that QEMU was started with cannot be read: {error}") from None
    return (argv[0], *(word for option in options for word in option.words()))


def _aside_of(process: QemuProcess) -> str:
    """Return the second monitor's socket of a process that snaporch has launched, or an empty string."""
    beside = Path(process.socket).with_name(QUERY)
    return str(beside) if beside.exists() and Path(process.socket).name == CONTROL else ""


def _agent_of(process: QemuProcess) -> str:
    """Return the socket of a process's channel to the guest agent, or an empty string."""
    if process.attached:
        return attach.agent_socket(process)
    beside = Path(process.socket).with_name(AGENT)
    return str(beside) if beside.exists() else ""
