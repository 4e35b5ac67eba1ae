"""A hypervisor on this host."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import attrs

from snaporch.drivers.base.machine import Machine
from snaporch.drivers.base.storage import Storage
from snaporch.drivers.base.traits import LoadsMemory, check_versions, need
from snaporch.drivers.base.values import Address, Info, Launch, OverlayPlace, StreamPlan, Trait, Writer
from snaporch.errors import Unsupported
from snaporch.model.domain import DomainDefinition, DomainRecord, Handle
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DeviceDisk
from snaporch.model.way import Way, WayBack

KILL_SECONDS = 10.0  # a machine that is killed is gone at once but for a disk that hangs in the kernel


class Driver(abc.ABC):
    """A hypervisor on this host."""

    info: Info
    storage: Storage

    @property
    def name(self) -> str:
        """Its name."""
        return self.info.name

    @property
    def traits(self) -> frozenset[Trait]:
        """All traits that it, its storage and its machines may have."""
        return self.info.traits

    def serving(self, record: DomainRecord, directory: str) -> Driver:  # noqa: ARG002 - for others
        """Return what works on a domain: itself, or one like it that works with the rights of another user.

        Args:
            record: the domain's.
            directory: the domain's own.
        """
        return self

    @property
    def whose(self) -> str:
        """The user with whose rights it works on files, by name; empty: with ours."""
        return ""

    def named_files(self, definition: DomainDefinition) -> Collection[str]:  # noqa: ARG002 - where there are none
        """Return the files that a definition names beside its disks, in words of the hypervisor."""
        return ()

    def drives_beside(self, definition: DomainDefinition) -> Mapping[str, str]:  # noqa: ARG002 - as above
        """Return the files that a guest would write to beside its disks, each with the word that says so."""
        return {}

    @abc.abstractmethod
    async def launch(self, launch: Launch) -> Handle:
        """Start a machine, CPUs stopped; it outlives snaporch. If this raises, no machine is left.

        `Launch.directory` is made before anything else, and kept until `clear`.

        Raises:
            Refused: it cannot start; the error has its words.
        """

    async def restore(
        self, launch: Launch, memory: str, *, offset: int = 0, versions: Mapping[str, str] | None = None
    ) -> Handle:
        """Start a machine with the memory of a file; it is PAUSED, at the point.

        Whatever this raises, no machine is then left.

        Args:
            launch: what to start.
            memory: the memory file.
            offset: where memory begins in it.
            versions: what the memory is bound to, as `Capabilities.versions` had it.

        Raises:
            Unsupported: what would load it is of another version.
            Refused: it cannot start, or cannot load this; the error has its words.
        """
        import trio  # noqa: PLC0415 - what decides, and does no I/O, imports the values of this package

        label = launch.definition.name
        handle = await self.launch(attrs.evolve(launch, incoming=True))
        try:
            async with self.connect(handle, label) as machine:
                if versions is not None:
                    check_versions(machine, versions, label)
                await need(machine, LoadsMemory, label).load(memory, offset)
        except BaseException:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await self.kill(handle)
                await self.clear(launch.directory)
            raise
        return handle

    @abc.abstractmethod
    async def find(self, directory: Path) -> Handle | None:
        """Return the machine that was launched with `directory`, if it runs: for one whose launch was cut short."""

    async def make_nvram(self, definition: DomainDefinition, store: DeviceDisk) -> str:  # noqa: ARG002 - others do
        """Make the variable store of a domain with UEFI firmware, where it is not there.

        Returns:
            Its path if it was made, else an empty string.

        Raises:
            Unsupported: there is no UEFI firmware, or none that has stores of this size.
        """
        raise Unsupported(f"{definition.name}: the driver {self.name} starts no machine with UEFI firmware")

    def need_tpm(self, name: str) -> None:
        """Refuse a TPM for the domain of this name where there can be none.

        Raises:
            Unsupported: there is none here, or what it takes is not installed.
        """
        raise Unsupported(f"{name}: the driver {self.name} starts no machine with a TPM")

    async def make_tpm(self, directory: str, copy: str = "") -> None:
        """Make a directory for the state of a TPM: of a new one, or as a copy has it.

        Durable on return; idempotent.
        """
        raise NotImplementedError

    async def check_tpm(self, directory: str) -> None:
        """Refuse to start a machine whose TPM has lost its state: the TPM would be a new one.

        Raises:
            Refused: the state is not there.
        """
        raise NotImplementedError

    async def copy_tpm(self, directory: str, path: str, *, runs: bool) -> tuple[int, ...]:
        """Copy the state of a TPM to a file, which is made; not durable on return.

        Args:
            directory: of the TPM.
            path: of the file.
            runs: its machine runs; else this waits until nobody writes to the state any more.

        Returns:
            What `tpm_identity` says of the state that was copied.
        """
        raise NotImplementedError

    async def tpm_identity(self, directory: str) -> tuple[int, ...]:
        """Return what tells the present state of a TPM from every other that it has had."""
        raise NotImplementedError

    async def remove_tpm(self, directory: str) -> None:
        """Remove a TPM that no machine has, with its state; nothing where there is none."""
        raise NotImplementedError

    async def way_back(self, record: DomainRecord, machine: Machine) -> WayBack:  # noqa: ARG002 - others look
        """Return how a domain, as its machine is now, would go back to a point of it."""
        return WayBack(Way.BESIDE)

    def stand_ins(self, launch: Launch) -> tuple[str, ...]:  # noqa: ARG002 - others look
        """Return, in words, what an isolated machine has in place of what belongs to the host.

        So much a throw-away copy does not prove.

        Raises:
            Unsupported: what is to be launched is not understood.
        """
        return ()

    async def present(self, record: DomainRecord) -> Handle | None:
        """Return the machine that runs a domain at present; None where none does.

        Where others may start, end, move or rename a domain's machine, this finds it whatever the record has.

        Raises:
            Refused: what runs the domain is not what the record knows, in a way that nobody may pass over.
        """
        return record.handle if record.handle is not None and await self.alive(record.handle) else None

    @abc.abstractmethod
    def connect(self, handle: Handle, label: str) -> AbstractAsyncContextManager[Machine]:
        """Connect to a machine; `label` is the domain's name for errors.

        Raises:
            ConnectionGone: nothing is there, or nothing answers.
        """

    @abc.abstractmethod
    def query(self, handle: Handle, label: str) -> AbstractAsyncContextManager[Machine]:
        """As `connect`, for a look beside a running operation, where the hypervisor allows a second client.

        It changes nothing in the hypervisor, not even for a moment; `background_blocker` may be left out for that.
        """

    @abc.abstractmethod
    async def alive(self, handle: Handle) -> bool:
        """Return whether exactly that machine still runs."""

    @abc.abstractmethod
    async def wait_gone(self, handle: Handle) -> None:
        """Return when that machine is gone."""

    @abc.abstractmethod
    async def kill(self, handle: Handle) -> None:
        """End a machine that may not answer; returns when it is gone. Does nothing when it is."""

    @abc.abstractmethod
    async def attach(self, name: str, address: Address) -> tuple[DomainDefinition, Handle]:
        """Find out what runs at an address, for `DomainRecord.template` and `DomainRecord.handle`.

        Raises:
            InvalidInput: the address is not one of this driver's: which part is missing, or too much.
            HypervisorError: nothing answers there.
            Unsupported: what runs there could not be gone back to, or not be started again.
        """

    async def take_place(self, old: Handle, new: Handle) -> Handle:  # noqa: ARG002 - for those that have a place
        """Put a machine in the place of one that is gone, where others look for the domain: a path, a name.

        Idempotent.

        Returns:
            The handle of the new machine from now on.
        """
        return new

    async def come_back(self, template: Handle, new: Handle) -> Handle:  # noqa: ARG002 - as above
        """Put a machine that was started where none was in the place of the one that was attached to.

        Where something else has that place by now, it keeps it.

        Returns:
            The handle of the new machine from now on.
        """
        return new

    async def publish(  # noqa: B027 - where nobody else manages domains
        self, record: DomainRecord, snapshots: Sequence[SnapshotRecord]
    ) -> None:
        """Tell the domain's manager (libvirt, libxl) which images its disks are on; called after each operation.

        So that somebody who starts it by other means starts it on these; and where it has a list of snapshots, what
        it is to have there. Idempotent.

        Args:
            record: the domain's.
            snapshots: all that it has.
        """

    async def overlay_place(
        self,
        record: DomainRecord,  # noqa: ARG002 - for others
        disk: DeviceDisk,  # noqa: ARG002 - for others
        directory: str,
    ) -> OverlayPlace:
        """Return where overlays of a disk go, and whose they are.

        Args:
            record: the domain's.
            disk: on its active image.
            directory: the domain's, where they go by default.
        """
        return OverlayPlace(directory)

    @abc.abstractmethod
    async def writers_of(self, paths: Collection[str], besides: Handle | None = None) -> tuple[Writer, ...]:
        """Return who on this host has one of these files open for writing, beside that machine."""

    def pid(self, handle: Handle) -> int | None:  # noqa: ARG002 - for those that have one
        """Return the id of the process, on this host, that runs a machine; None where there is no such thing."""
        return None

    async def await_inside(self, handle: Handle, label: str) -> None:  # noqa: B027 - only where one is silent then
        """Return when a machine that may be saving memory inside an image, or loading it, answers or is idle."""

    async def abandon(self, plan: StreamPlan) -> None:  # noqa: B027 - many a driver has nothing to do here
        """End whatever still writes to the memory file of a stream whose machine is gone; leave the file itself."""

    async def clear(self, directory: Path) -> None:  # noqa: B027 - as above
        """Remove what a machine that is gone has left in the directory that it was launched with; logs are kept."""

    async def end(self, handle: Handle | None, directory: Path) -> None:
        """End a machine, where there is one, and remove what is left in the directory that it was launched with."""
        if handle is not None:
            await self.kill(handle)
        await self.clear(directory)

    async def forget(self, handle: Handle) -> None:  # noqa: B027 - as above
        """Remove what a machine that is gone has left, wherever that is; nothing if snaporch did not start it."""

    async def free_ram(self) -> int | None:
        """Return the bytes of RAM that another guest can have here; None: that is not known."""
        return None

    @abc.abstractmethod
    async def doctor(self) -> dict[str, Any]:
        """Return what this host can do and what prevents the rest, one finding for each key."""
