"""What an archive of a snapshot says of itself: its first member, ``manifest.json``. No I/O.

An archive is a plain tar. After the manifest come, as far as the manifest has them and in this order: ``memory``,
``kernel``, ``initrd``, ``tpm``, and a ``disks/TARGET.qcow2`` for each disk, which is whole in it: one qcow2 without
backing file. Nothing else is in it. The manifest has no paths: whoever reads it chooses where the files go.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from snaporch.model.domain import DomainDefinition, DomainState
from snaporch.model.formats import versioned
from snaporch.model.names import UUID
from snaporch.model.request import Strategy

MANIFEST = "manifest.json"
MEMORY = "memory"
KERNEL = "kernel"
INITRD = "initrd"
TPM = "tpm"


def disk_member(target: str) -> str:
    """Return the name of a disk's member."""
    return f"disks/{target}.qcow2"


@attrs.frozen
class Member:
    """A file in an archive.

    Attributes:
        name: its name there.
        size: in bytes.
        checksum: ``xxh3-128:HEX`` over the whole file: finds damage, is no defence against forgery.
    """

    name: str
    size: int
    checksum: str


@attrs.frozen
class ArchivedDisk:
    """One disk of the guest.

    Attributes:
        target: the disk's name in its domain.
        virtual_size: what the guest sees, in bytes.
        size: of the member, in bytes.
        checksum: of the member.
        readonly: the guest cannot write to it.
    """

    target: str
    virtual_size: int
    size: int
    checksum: str
    readonly: bool = False

    @property
    def member(self) -> Member:
        """The file."""
        return Member(disk_member(self.target), self.size, self.checksum)


@versioned("archive")
@attrs.frozen
class Manifest:
    """What is in an archive.

    Attributes:
        written_by: the version of snaporch.
        name: the snapshot's.
        definition: the domain's at the point, without paths; disks are in `disks`.
        point: the instant that the snapshot holds, seconds since the epoch.
        disks: in the order in which the guest sees them.
        description: free text.
        creation_time: seconds since the epoch.
        domain_state: what the domain did at the point.
        strategy: how memory was streamed.
        quiesced: the guest's file systems were frozen at the point.
        serial: the guest has a serial port whose output goes to a file.
        uuid: the domain's.
        hypervisor: version and machine type that the memory belongs to.
        devices: what the machine was made of, see `snaporch.model.domain.MachineShape`; empty: not known.
        memory: the memory; None: disks only.
        kernel: for direct boot, as `initrd`.
        tpm: the state of the machine's TPM; None: it has none, had never been started, or it is in the memory.
    """

    written_by: str
    name: str
    definition: DomainDefinition
    point: float
    disks: tuple[ArchivedDisk, ...]
    description: str = ""
    creation_time: int = 0
    domain_state: DomainState = DomainState.INACTIVE
    strategy: Strategy = Strategy.NONE
    quiesced: bool = False
    serial: bool = False
    uuid: str = ""
    hypervisor: dict[str, str] = attrs.field(factory=dict)
    devices: tuple[str, ...] = ()
    memory: Member | None = None
    kernel: Member | None = None
    initrd: Member | None = None
    tpm: Member | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """All files, in their order."""
        return tuple(self._members())

    def _members(self) -> Iterator[Member]:
        yield from (each for each in (self.memory, self.kernel, self.initrd, self.tpm) if each is not None)
        yield from (disk.member for disk in self.disks)

    def faults(self) -> Iterator[str]:
        """Yield what no archive of snaporch's would say, a phrase each."""
        named = {MEMORY: self.memory, KERNEL: self.kernel, INITRD: self.initrd, TPM: self.tpm}
        for wanted, member in named.items():
            if member is not None and member.name != wanted:
                yield f"{member.name!r:.60} in the place of {wanted}"
        if len({disk.target for disk in self.disks}) < len(self.disks):
            yield "a disk is there twice"
        for disk in self.definition.disks:
            yield f"{disk.target} is in the definition"
        if self.definition.kernel or self.definition.initrd or self.definition.serial or self.definition.nvram:
            yield "a path is in the definition"
        if self.tpm is not None and self.definition.tpm is None:
            yield "the state of a TPM, and no TPM"
        if any(member.size < 0 for member in self.members) or any(disk.virtual_size < 0 for disk in self.disks):
            yield "a size is negative"
        if self.uuid and not UUID.fullmatch(self.uuid):
            yield f"{self.uuid!r:.60} for a UUID"
        if self.memory is None and self.domain_state is not DomainState.INACTIVE and not self.quiesced:
            yield f"a domain that is {self.domain_state} and has no memory"


@versioned("exported")
@attrs.frozen
class Exported:
    """Answer of `export` and `export_disk`.

    Attributes:
        domain: the domain's name.
        name: the snapshot's.
        file: what was written; ``-``: it went to the caller's stream.
        size: in bytes.
        memory: it has the memory.
        disks: targets of the disks in it.
    """

    domain: str
    name: str
    file: str
    size: int
    memory: bool
    disks: tuple[str, ...]


@versioned("imported")
@attrs.frozen
class Imported:
    """Answer of `import_archive`.

    Attributes:
        domain: the new domain's name.
        name: its snapshot's.
        memory: the memory was taken over.
        disks: targets of its disks.
        dropped: what the archive's definition said and was not taken over, ``key = value`` each.
    """

    domain: str
    name: str
    memory: bool
    disks: tuple[str, ...]
    dropped: tuple[str, ...] = ()
