"""Launch, attach to and connect to QEMU processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import structlog
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
    OverlayPlace,
    Place,
    StartsBeside,
    StreamPlan,
    Trait,
    Writer,
)
from snaporch.drivers.local import filework, process
from snaporch.drivers.local.as_user import User, as_user
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.local.look import looked_at
from snaporch.drivers.local.memory import free_ram
from snaporch.drivers.local.trace import is_block_device
from snaporch.drivers.local.users_storage import UsersStorage
from snaporch.drivers.qemu import attach, attaching, clones, firmware, hostside, isolation, kvm, surroundings, tpm
from snaporch.drivers.qemu.command import command_line, mark
from snaporch.drivers.qemu.discover import discover
from snaporch.drivers.qemu.host import default_emulator, doctor
from snaporch.drivers.qemu.hostside import Held
from snaporch.drivers.qemu.spawn import PID, check_user, free_ports, like, listening, spawn, user_of
from snaporch.drivers.qemu.surroundings import replaced
from snaporch.drivers.qemu.tpm import Tpms
from snaporch.drivers.qmp import lazy, open_qmp
from snaporch.drivers.qmp.able import MACHINE_TRAITS
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.drivers.qmp.process import CONTROL, LOG, QemuProcess, last_words
from snaporch.drivers.qmp.stream import end_sinks
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    HypervisorError,
    InvalidInput,
    OtherMachine,
    ProtocolError,
    Refused,
    Unsupported,
)
from snaporch.model.domain import NVRAM, Discovered, DomainDefinition, DomainRecord, Handle
from snaporch.model.rfc import DeviceDisk
from snaporch.model.way import Way, WayBack

T = TypeVar("T")
_log = structlog.get_logger("snaporch")

GREETING_SECONDS = 20.0  # of a QEMU that is just starting, on a busy host
CONNECT_SECONDS = 20.0  # also each command: `stop` waits for every disk request in flight
QUERY_SECONDS = 2.0
KILL_SECONDS = 10.0  # a killed process is gone at once but for a disk that hangs in the kernel
QUERY, AGENT = "query.sock", "agent.sock"
MADE = "made.json"  # files elsewhere that the process makes, and that take other names with another one's place


def _called(work: Callable[..., T], *arguments: Any) -> T:
    return work(*arguments)


def _put(process: QemuProcess, old: QemuProcess) -> bool:
    """Return whether a process is found at the socket of another one from now on."""
    if os.path.dirname(old.socket) == old.directory:
        return False  # that was in no place that others know, and its own directory goes with it
    try:
        filework.put_socket(process.socket, old.socket)
    except OSError as error:  # its directory is gone, perhaps
        _log.warning("not in its old place", place=old.socket, socket=process.socket, error=str(error))
        return False
    return True


INFO = Info(
    "qemu",
    MACHINE_TRAITS
    | {Trait.BACKGROUND_STREAMS, Trait.GUEST_AGENT, Trait.STARTS_BESIDE, Trait.DISCOVERS, Trait.CLONES}
    | LocalStorage.traits,
    logs=(LOG,),
)


@attrs.define
class QemuDriver(Tpms, StartsBeside, Discovers, Clones):
    """Domains in QEMU processes of this host."""

    info: Info = attrs.field(default=INFO, init=False)
    storage: LocalStorage = attrs.field(factory=LocalStorage)

    def serving(self, record: DomainRecord, directory: str) -> Driver:
        """See Driver: of a QEMU that runs as another user, all work on its images is done as that user."""
        if (user := user_of(record.template)) is None:
            return self
        storage = UsersStorage(self.storage.qemu_img, self.storage.confinement, user=user, own=directory)
        return attrs.evolve(self, storage=storage)

    @property
    def _user(self) -> User | None:
        """As whom its QEMUs run; None: as we do."""
        return self.storage.user if isinstance(self.storage, UsersStorage) else None

    @property
    def whose(self) -> str:
        """See Driver."""
        return self._user.name if self._user is not None else ""

    async def overlay_place(self, record: DomainRecord, disk: DeviceDisk, directory: str) -> OverlayPlace:
        """See Driver: of a QEMU that runs as another user beside the image, and whose that is."""
        if not isinstance(storage := self.storage, UsersStorage):
            return await super().overlay_place(record, disk, directory)
        owner = await looked_at(disk.path, partial(storage.owner, disk.path), patient=True)
        return OverlayPlace(os.path.dirname(disk.path), owner)

    async def _accel(self, definition: DomainDefinition, emulator: str) -> str:
        if definition.accel != "auto":
            return definition.accel
        return "tcg" if await kvm.cached_probe(emulator) else "kvm"

    def named_files(self, definition: DomainDefinition) -> Collection[str]:
        """See Driver: in `extra_args`, where a drive may be that is only read."""
        return hostside.named_files(definition.extra_args)

    def drives_beside(self, definition: DomainDefinition) -> Mapping[str, str]:
        """See Driver: in `extra_args`."""
        return attach.written(definition.extra_args)

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

    async def _command(self, launch: Launch, fds: list[int], link: tpm.Link | None) -> attach.Relaunch:
        pidfile = str(launch.directory / PID)
        check_user(launch, self._user)
        if launch.template is not None:
            return like(QemuProcess.of(launch.template), launch, fds)
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
            tpm=link.qemu if link else None,
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
        async with tpm.linked(launch) as link:
            made = await self._started(launch, link, log)
            handle = made.handle(self.name)
            try:
                if link is not None:
                    link.start()
                async with open_qmp(made.socket, label=launch.definition.name, timeout=GREETING_SECONDS):
                    if link is not None:
                        link.check()
                    return handle
            except HypervisorError as error:
                with trio.move_on_after(KILL_SECONDS, shield=True):
                    await self._give_up(handle, launch.directory, link)
                words = "; ".join(filter(None, [last_words(log, start), link.words() if link is not None else ""]))
                raise Unsupported(f"QEMU does not start {launch.definition.name}: {words or error}") from None
            except BaseException:
                with trio.move_on_after(KILL_SECONDS, shield=True):
                    await self._give_up(handle, launch.directory, link)
                raise

    async def _started(self, launch: Launch, link: tpm.Link | None, log: Path) -> QemuProcess:
        """Start a process; whether it stays is not known yet."""
        agent = (AGENT,) if launch.definition.guest_agent and launch.template is None else ()
        template = QemuProcess.of(launch.template) if launch.template is not None else None
        with listening(launch.directory, CONTROL, QUERY, *agent) as fds:
            command = await self._command(launch, fds, link)
            if command.renames:
                (launch.directory / MADE).touch(mode=0o600)
                (launch.directory / MADE).write_text(json.dumps([made for made, _ in command.renames]))
            pid = spawn(command, [*fds, link.qemu] if link is not None else fds, log)
        return QemuProcess(
            process.process_of(pid) or process.LocalProcess(pid, 0),
            str(launch.directory / CONTROL),
            attached=template is not None,
            argv=template.argv if template else (),
            cwd=template.cwd if template else "/",
            directory=str(launch.directory),
            surroundings=template.surroundings if template else {},
            renames=command.renames,
        )

    async def _give_up(self, handle: Handle, directory: Path, link: tpm.Link | None) -> None:
        await self.end(handle, directory)
        if link is not None:
            await link.end()

    async def find(self, directory: Path) -> Handle | None:
        """See Driver: QEMU has written its id before it does anything else."""
        words = ("-pidfile", str(directory / PID)) if self._user is None else mark(str(directory))
        uid = self._user.uid if self._user is not None else os.geteuid()
        for pid in process.find_processes(*words):
            # Root's is the launcher, which is about to become that user.
            if process.user_of(pid) in {uid, os.geteuid()} and (found := process.process_of(pid)) is not None:
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
        if found.attached and not os.path.exists(path):
            raise ConnectionGone(
                f"{label}: its QEMU (process {found.local.pid}) runs, and its socket {path} was removed, as "
                "cleaners of /tmp do: nobody can reach that QEMU any more. Shut its guest down from inside, start "
                "it again with a socket in a directory that nobody cleans (/run, for example), and attach to that"
            )
        async with (
            open_qmp(path, label=label, timeout=seconds, listener=found.listener) as qmp,
            QemuMachine(qmp, found, _agent_of(found), _aside_of(found)).opened(looking=looking) as machine,
        ):
            yield machine

    async def clear(self, directory: Path) -> None:
        """See Driver."""
        await lazy.end(str(directory / LOADING))
        with suppress(FileNotFoundError, ValueError):  # killed while it was written: nothing was started yet
            for made in json.loads((directory / MADE).read_text()):  # of one that has taken nobody's place
                await self.storage.remove(made)
        for name in (CONTROL, QUERY, AGENT, PID, MADE):
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
        if self._user is None:
            if await trio.to_thread.run_sync(_put, after, before):
                after = attrs.evolve(after, socket=before.socket)
            call: Callable[..., None] = _called
        else:
            call = as_user(self._user).call
        # What is not there any more was renamed before a crash of snaporch.
        await trio.to_thread.run_sync(call, filework.rename, after.renames)
        if path := attach.pidfile(before):
            await trio.to_thread.run_sync(call, process.renew_pidfile, path, before.local.pid, after.local.pid)
        return attrs.evolve(after, renames=()).handle(self.name)

    async def come_back(self, template: Handle, new: Handle) -> Handle:
        """See Driver: to the socket that others know it by; not where another process listens there by now."""
        place = QemuProcess.of(template).socket
        call: Callable[..., bool] = _called if self._user is None else as_user(self._user).call
        if await trio.to_thread.run_sync(call, filework.listens, place):
            _log.warning("another process listens in its old place", place=place, socket=QemuProcess.of(new).socket)
            return new
        return await self.take_place(template, new)

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
        try:
            definition, made = await attaching.look(name, os.path.abspath(address.qmp), CONNECT_SECONDS)
        except (CommandRefused, ProtocolError) as error:
            raise Refused(
                f"{error}; attach to the QMP socket of a QEMU whose machine is built: to no monitor for people, "
                "and with -preconfig after `x-exit-preconfig`"
            ) from error
        return definition, made.handle(self.name)

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
            return _way_back(attach.held_by_definition(record.definition))
        template = QemuProcess.of(record.template)
        devices = (await machine.shape()).devices
        another = user_of(record.template) is not None
        if why := attach.no_way_back(template, record.definition.disks, devices, of_another=another):
            return WayBack(Way.NONE, why)
        if template.surroundings:
            known = surroundings.known(template.surroundings)
            if not os.access(known.program, os.X_OK):
                return WayBack(Way.NONE, f"QEMU's program {known.program} is not there any more")
            if why := replaced(known):
                return WayBack(Way.PROVEN, why)
        return _way_back(attach.held(template))

    def stand_ins(self, launch: Launch) -> tuple[str, ...]:
        """See Driver."""
        template = QemuProcess.of(launch.template) if launch.template else None
        held = attach.held(template) if template else attach.held_by_definition(launch.definition)
        return tuple(isolation.stand_ins(held))

    async def beside_blocker(self, launch: Launch) -> str:
        """See StartsBeside: what both would hold.

        Raises:
            OtherMachine: no machine like the present one can be started at all, beside it or in its place.
        """
        check_user(launch, self._user)
        if launch.template is None:
            held = attach.held_by_definition(launch.definition)
        else:
            template = QemuProcess.of(launch.template)
            like(template, launch, [])
            held = attach.held(template)
        if lost := [each for each in held if not each.again]:
            raise OtherMachine(f"{launch.definition.name}: no other process can have {lost[0]}")
        return _both(held)

    async def copies(self, original: Original, places: Sequence[Place]) -> tuple[Copied, ...]:
        """See Clones: by what is understood of the command line."""
        await trio.lowlevel.checkpoint()
        with free_ports() as free_port:
            return tuple(clones.copied(original, place, free_port) for place in places)

    async def free_ram(self) -> int | None:
        """See Driver: what the kernel reckons it can give without swapping."""
        return free_ram()

    async def doctor(self) -> dict[str, Any]:
        """See Driver."""
        return await doctor(self.storage.qemu_img)


def _way_back(held: Iterable[Held]) -> WayBack:
    """Return how one that holds all this goes back."""
    if lost := [each for each in held if not each.again]:
        return WayBack(Way.NONE, f"no other process can have {lost[0]}")
    return WayBack(Way.PROVEN, _both(held)) if held else WayBack(Way.BESIDE)


def _both(held: Iterable[Held]) -> str:
    return "; ".join(f"both would have {each}" for each in held)


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
