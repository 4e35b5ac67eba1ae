"""Domains under the Xen of this host, through libxl; snaporch runs in dom0, as root."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import Address, Discovers, Driver, Info, Launch, Machine, StartsBeside, Trait, Writer
from snaporch.drivers.local import process
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qmp import open_qmp
from snaporch.drivers.xen import config as configs
from snaporch.drivers.xen.client import SharedHelper, open_helper
from snaporch.drivers.xen.domain import XenDomain
from snaporch.drivers.xen.machine import MACHINE_TRAITS, XenMachine
from snaporch.drivers.xen.owners import owner_blocker, saved_blocker
from snaporch.drivers.xen.xenstore import RELEASE, Xenstore, open_xenstore
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    HypervisorError,
    InvalidInput,
    NotFound,
    Refused,
    Unsupported,
)
from snaporch.model.domain import Discovered, DomainDefinition, DomainRecord, Handle
from snaporch.model.rfc import DeviceDisk

CONNECT_SECONDS = 20.0
KILL_SECONDS = 60.0  # a domain that is half made may keep libxl busy
OWNER_SECONDS = 5.0  # for the program that started a domain to remove it after its shutdown
POLL_SECONDS = 0.1
SLOW_STARTS = 2
_SLOW = "device model did not start"
_BESIDE = "--sp-"  # in the name of a domain that is to take another's place, or is a throw-away copy
_NAMESPACE = uuid.UUID("5a7e9c34-8d0b-4a8c-9f0e-3f0f5b1d2c66")


def _uuid(directory: Path) -> str:
    """Return the uuid of the domain that is launched with a directory: it is found by it."""
    return str(uuid.uuid5(_NAMESPACE, str(directory)))


@attrs.define
class XenDriver(Driver, StartsBeside, Discovers):
    """Domains under Xen."""

    info: Info = attrs.field(init=False)
    storage: LocalStorage = attrs.field(factory=LocalStorage)
    _libxl: SharedHelper = attrs.field(factory=SharedHelper)

    def __attrs_post_init__(self) -> None:
        traits = MACHINE_TRAITS | self.storage.traits | {Trait.STARTS_BESIDE, Trait.DISCOVERS}
        self.info = Info("xen", traits, one_call=True)

    # --- starting

    def _config(self, launch: Launch) -> configs.Config:
        """Return what libxl is to start, before it has a name."""
        if launch.template is not None:
            return XenDomain.of(launch.template).config
        return configs.from_definition(launch.definition, launch.disks)

    async def launch(self, launch: Launch) -> Handle:
        """See Driver."""
        await self.storage.make_directory(str(launch.directory))
        return await self._start(launch, self._config(launch), "create")

    async def restore(
        self, launch: Launch, memory: str, *, offset: int = 0, versions: Mapping[str, str] | None = None
    ) -> Handle:
        """See Driver."""
        await self.storage.make_directory(str(launch.directory))
        label = launch.definition.name
        try:
            config = await self._libxl.ask("header", path=memory, offset=offset)
        except CommandRefused as error:
            raise Unsupported(f"{label}: {memory} cannot be loaded: {error.description}") from error
        await self._check_versions(label, config, versions)
        return await self._start(launch, config, "restore", path=memory, offset=offset)

    async def _start(self, launch: Launch, config: configs.Config, how: str, **arguments: Any) -> Handle:
        label, identity = launch.definition.name, _uuid(launch.directory)
        async with open_xenstore() as xenstore:
            names = [await xenstore.name(domid) for domid in await xenstore.domids()]
        name = label if label not in names and not launch.isolated else f"{label}{_BESIDE}{identity[:8]}"
        beside = name != label
        options = {"beside": beside, "isolated": launch.isolated}
        wanted = configs.changed(config, name=name, uuid=identity, disks=launch.disks, **options)
        if short := await self._memory_blocker(wanted):
            raise Unsupported(f"{label}: {short}")
        try:
            await self._made(how, label, config=wanted, **arguments)
            made = await self._found(XenDomain(identity, 0, name, directory=str(launch.directory)))
        except BaseException:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await self._end(identity)
                await self.clear(launch.directory)
            raise
        if made is None:
            raise ConnectionGone(f"{label}: the domain ended right after its start")
        if launch.template is not None:
            made = attrs.evolve(made, config=self._config(launch))
        if beside and not launch.isolated:
            made = attrs.evolve(made, interfaces=configs.interfaces(config))
        return made.handle(self.info.name)

    async def _made(self, how: str, label: str, **arguments: Any) -> None:
        """Start a domain; again, where the QEMU of its disks is too slow for libxl's patience: the host is busy."""
        for _ in range(SLOW_STARTS):
            try:
                await _do(how, label, **arguments)
            except Unsupported as error:
                if _SLOW not in str(error):
                    raise
                await self._end(arguments["config"]["c_info"]["uuid"])
            else:
                return
        await _do(how, label, **arguments)

    async def beside_blocker(self, launch: Launch) -> str:
        """See StartsBeside: memory, of which the old guest keeps its own."""
        config = configs.changed(self._config(launch), name="any", uuid=_uuid(launch.directory), disks=())
        return await self._memory_blocker(config)

    async def _memory_blocker(self, config: configs.Config) -> str:
        """Return why a domain does not fit into the host's memory beside all others, or an empty string."""
        memory = await self._libxl.ask("memory", config=config)
        if memory["needed"] <= memory["free"]:
            return ""
        return (
            f"it needs {memory['needed']:,} bytes of the host's memory beside what runs now, and "
            f"{memory['free']:,} are free: shut down another domain, or give dom0 less (`xl mem-set 0 …`)"
        )

    async def _check_versions(self, label: str, config: configs.Config, versions: Mapping[str, str] | None) -> None:
        """Refuse memory of another Xen or of another kind of guest.

        Raises:
            Unsupported: as its name says.
        """
        host = await self._libxl.ask("hello")
        here = {"xen": str(host["version"]), "kind": configs.kind_of(config)}
        for key, value in here.items():
            if versions is not None and versions.get(key) != value:
                raise Unsupported(
                    f"{label} needs {key} {versions.get(key)}, and this is {value}: its memory would not load"
                )

    # --- finding

    async def find(self, directory: Path) -> Handle | None:
        """See Driver."""
        found = await self._found(XenDomain(_uuid(directory), 0, "", directory=str(directory)))
        return found.handle(self.info.name) if found is not None else None

    async def _found(self, domain: XenDomain) -> XenDomain | None:
        """Return a domain as it is now: id, name, and the QEMU of its disks."""
        async with open_xenstore() as xenstore:
            if (domid := await xenstore.domid(domain.uuid)) is None:
                return None
            name, qemu = await xenstore.name(domid), await xenstore.disks_process(domid)
        return attrs.evolve(domain, domid=domid, name=name, qemu=qemu or 0)

    async def present(self, record: DomainRecord) -> Handle | None:
        """See Driver: a domain that its owner has rebooted has another id; one that is down is removed.

        Raises:
            Refused: `xendomains` has saved its memory, to which its images belong.
        """
        if (last := record.handle or record.template) is None:
            name, found = record.name, None
        else:
            name, found = XenDomain.of(last).name, await self._found(XenDomain.of(last))
        if found is not None and await self._is_up(found):
            return found.handle(self.info.name)
        if reason := saved_blocker(name):
            raise Refused(reason)
        return None

    async def alive(self, handle: Handle) -> bool:
        """See Driver; a domain that has shut down is gone, and removed where nobody else does that."""
        return await self._is_up(XenDomain.of(handle))

    def pid(self, handle: Handle) -> int | None:
        """See Driver: of the QEMU that has the images open."""
        return XenDomain.of(handle).qemu or None

    async def _is_up(self, domain: XenDomain) -> bool:
        info = await self._libxl.ask("info", domid=domain.domid)
        if info is None or info["uuid"] != domain.uuid or info.get("dying"):
            return False
        if not info.get("shutdown") or info.get("shutdown_reason") == "suspend":
            return True
        # After its first suspension `xl`'s own watcher is gone: from then on nobody but us removes a domain.
        with trio.move_on_after(OWNER_SECONDS):
            await self._gone(domain)
            return False
        await self._end(domain.uuid)
        return False

    @asynccontextmanager
    async def connect(self, handle: Handle, label: str) -> AsyncIterator[Machine]:
        """See Driver."""
        domain = XenDomain.of(handle)
        async with open_helper(label) as helper:
            info = await helper.ask("info", domid=domain.domid)
            if info is None or info["uuid"] != domain.uuid:
                raise ConnectionGone(f"{label}: its domain is gone")
            config = await helper.ask("config", domid=domain.domid)
            if reason := configs.blocker(config):
                raise HypervisorError(f"{label}: {reason}")
            async with open_qmp(domain.socket, label=label, timeout=CONNECT_SECONDS) as qmp:
                machine = XenMachine(qmp, helper, domain, config)
                await machine.open()
                yield machine

    def query(self, handle: Handle, label: str) -> Any:
        """See Driver: the QEMU of the disks takes one client, so beside an operation there is no answer."""
        return self.connect(handle, label)

    # --- ending

    async def wait_gone(self, handle: Handle) -> None:
        """See Driver."""
        await self._gone(XenDomain.of(handle))

    async def _gone(self, domain: XenDomain) -> None:
        """Return when a domain is gone, and the QEMU that had its images open."""
        async with open_xenstore() as xenstore:
            await xenstore.watch(RELEASE)
            while (domid := await xenstore.domid(domain.uuid)) is not None:
                qemu = await xenstore.disks_process(domid)
                with trio.move_on_after(POLL_SECONDS):
                    await xenstore.event()
                if qemu is not None and await xenstore.domid(domain.uuid) is None:
                    await _process_gone(qemu)

    async def kill(self, handle: Handle) -> None:
        """See Driver."""
        await self._end(XenDomain.of(handle).uuid)

    async def _end(self, identity: str) -> None:
        async with open_xenstore() as xenstore:
            if (domid := await xenstore.domid(identity)) is None:
                return
            qemu = await xenstore.disks_process(domid)
        with suppress(CommandRefused):  # somebody else has, meanwhile
            await self._libxl.ask("destroy", domid=domid)
        if qemu is not None:
            await _process_gone(qemu)
        await self._gone(XenDomain(identity, domid, ""))

    async def clear(self, directory: Path) -> None:
        """See Driver."""
        with suppress(OSError):
            directory.rmdir()

    async def forget(self, handle: Handle) -> None:
        """See Driver."""
        if directory := XenDomain.of(handle).directory:
            await self.clear(Path(directory))

    async def take_place(self, old: Handle, new: Handle) -> Handle:
        """See Driver: the new domain takes the old one's name, and its network devices those of the old one's."""
        was, domain = XenDomain.of(old), XenDomain.of(new)
        name = was.name.partition(_BESIDE)[0]
        await self._libxl.ask("rename", domid=domain.domid, new=name)
        for number, interface in domain.interfaces.items():
            await _rename_interface(domain.domid, number, interface)
        if domain.interfaces:
            await self._libxl.ask("tell_interfaces", domid=domain.domid, names=domain.interfaces)
        return attrs.evolve(domain, name=name, interfaces={}).handle(self.info.name)

    # --- others' domains

    async def attach(self, name: str, address: Address) -> tuple[DomainDefinition, Handle]:
        """See Driver: by the domain's name there, or its id."""
        if address.qmp or address.uri:
            raise InvalidInput(f"{name}: a Xen domain is found by its name (--of), not by a socket or a URI")
        wanted = address.of or name
        async with open_xenstore() as xenstore:
            domid = await _find(xenstore, wanted)
            identity, theirs = await xenstore.uuid(domid), await xenstore.name(domid)
            qemu = await xenstore.disks_process(domid)
        config = await self._libxl.ask("config", domid=domid)
        if reason := configs.blocker(config) or owner_blocker(theirs):
            raise Unsupported(f"{name}: {reason}")
        domain = XenDomain(identity, domid, theirs, qemu=qemu or 0, config=config)
        handle = domain.handle(self.info.name)
        async with self.connect(handle, name) as machine:
            disks = tuple(
                DeviceDisk(disk.target, disk.active, disk.format, disk.readonly) for disk in await machine.disks()
            )
            memory = machine.capabilities.ram
        vcpus = int(config["b_info"].get("max_vcpus", 1))
        return DomainDefinition(name, memory=memory, vcpus=vcpus, disks=disks, driver=self.info.name), handle

    async def discover(self, known: Mapping[str, Handle]) -> Sequence[Discovered]:
        """See Discovers: the domains that run, but dom0."""
        uuids = {XenDomain.of(handle).uuid: name for name, handle in known.items()}
        found = list[Discovered]()
        async with open_xenstore() as xenstore:
            for domid in await xenstore.domids():
                name, mine = await xenstore.name(domid), uuids.get(await xenstore.uuid(domid), "")
                try:
                    config = await self._libxl.ask("config", domid=domid)
                except CommandRefused:  # it is half made, or gone meanwhile
                    continue
                why = "" if mine else configs.blocker(config) or owner_blocker(name)
                found.append(Discovered(self.info.name, name, domain=mine, blocker=why))
        return sorted(found, key=lambda each: each.name)

    async def writers_of(self, paths: Collection[str], besides: Handle | None = None) -> tuple[Writer, ...]:
        """See Driver: a QEMU that serves disks locks nothing, so its open files are looked at."""
        own = self.pid(besides) if besides is not None else None
        found = await trio.to_thread.run_sync(process.writers, paths)
        return tuple(Writer(f"process {pid}", path) for pid, path in found if pid != own)

    async def doctor(self) -> dict[str, Any]:
        """See Driver."""
        try:
            host = await self._libxl.ask("hello")
        except (Unsupported, HypervisorError) as error:
            return {"xen": str(error)}
        physical = host["physinfo"]
        return {
            "xen": host["version"],
            "live-pv": "possible" if physical.get("cap_shadow") else "not possible: no shadow paging (cap_shadow)",
            "live-pvh": "possible" if physical.get("cap_hap") else "not possible: no HAP (cap_hap)",
            "free-memory": physical["free_pages"] << 12,
        }


async def _find(xenstore: Xenstore, wanted: str) -> int:
    for domid in await xenstore.domids():
        if wanted in {str(domid), await xenstore.name(domid)}:
            return domid
    raise NotFound(f"Xen runs no domain {wanted!r}; `xl list` names all")


async def _do(how: str, label: str, **arguments: Any) -> None:
    """Start a domain, in a helper of its own: it takes a while.

    Raises:
        Unsupported: libxl does not; with its words.
    """
    async with open_helper(label) as helper:
        try:
            await helper.ask(how, **arguments)
        except CommandRefused as error:
            raise Unsupported(f"Xen does not start {label}: {error.description}") from error


async def _rename_interface(domid: int, number: str, name: str) -> None:
    """Give a domain's network device in dom0 its name, for which it must be down for a moment; again, too.

    Raises:
        HypervisorError: it cannot be; with the words of `ip`.
    """
    made = f"vif{domid}.{number}"
    if not Path("/sys/class/net", made).exists():
        return
    for words in (("dev", made, "down"), ("dev", made, "name", name), ("dev", name, "up")):
        done = await trio.run_process(["ip", "link", "set", *words], check=False, capture_stderr=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise HypervisorError(f"{made} cannot be called {name}: {said}")
    async with open_xenstore() as xenstore:  # where the script that takes it down looks
        await xenstore.write(f"/local/domain/0/backend/vif/{domid}/{number}/vifname", name)


async def _process_gone(pid: int) -> None:
    if (found := process.process_of(pid)) is not None:
        await process.wait_gone(found)
