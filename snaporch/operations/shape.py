"""Is the machine that was started the one that was asked for? Compares them; the only I/O is reading links.

A hypervisor that is told of a disk in words that mean something else to it starts all the same, with another disk
or an empty one. So before a guest's memory is loaded into a machine, and before a machine runs, what its hypervisor
reports is compared with what it was to be.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import attrs

from snaporch.errors import OtherMachine
from snaporch.model.domain import DiskStatus, MachineShape
from snaporch.model.rfc import DeviceDisk


@attrs.frozen
class WantedDisk:
    """What one disk is to be.

    Attributes:
        image: what it is to be on.
        chain: from that image to its base; empty: not known.
        virtual_size: what the guest is to see, in bytes; 0: not known.
    """

    image: DeviceDisk
    chain: tuple[str, ...] = ()
    virtual_size: int = 0

    def differences(self, found: DiskStatus) -> Iterator[str]:
        """Yield what is different about a disk, one phrase each, both sides named."""
        disk, target = self.image, self.image.target
        chain, there = _real(self.chain or (disk.path,)), _real(found.chain if self.chain else (found.active,))
        if chain != there:
            yield f"{target} is to be on {' over '.join(chain)}, and is on {' over '.join(there)}"
        if found.format != disk.format:
            yield f"{target} is to be read as {disk.format}, and is read as {found.format}"
        if found.readonly != disk.readonly:
            yield f"{target} is to be {_access(disk.readonly)}, and is {_access(found.readonly)}"
        if self.virtual_size and found.virtual_size != self.virtual_size:
            yield f"{target} is to have {self.virtual_size} bytes, and has {found.virtual_size}"


def _real(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(os.path.realpath(path) for path in paths)


def _access(readonly: bool) -> str:
    return "read-only" if readonly else "writable"


def wanted_disks(
    disks: Iterable[DeviceDisk], chains: Mapping[str, tuple[str, ...]], shape: MachineShape | None
) -> tuple[WantedDisk, ...]:
    """Return what disks are to be.

    Args:
        disks: the images that they are to be on.
        chains: by target, what backs the image, as far as it is known.
        shape: what the machine was made of: the sizes of the disks, and the chains of those on the same images.
    """
    known = {disk.target: disk for disk in shape.disks} if shape else {}
    found = []
    for disk in disks:
        before = known.get(disk.target)
        chain = (disk.path, *chains[disk.target]) if disk.target in chains else ()
        if not chain and before is not None and before.active == disk.path:
            chain = before.chain
        found.append(WantedDisk(disk, chain, before.virtual_size if before else 0))
    return tuple(found)


def differences(disks: Iterable[WantedDisk], shape: MachineShape | None, found: MachineShape) -> tuple[str, ...]:
    """Return how a machine differs from what it is to be, one phrase each, both sides named.

    Args:
        disks: what each disk is to be.
        shape: what the machine is to be made of otherwise; None: that is not known.
        found: what it is made of.
    """
    there = {disk.target: disk for disk in found.disks}
    phrases: list[str] = []
    wanted = {disk.image.target: disk for disk in disks}
    for target, disk in wanted.items():
        if target in there:
            phrases += disk.differences(there[target])
        else:
            phrases.append(f"{target} is to be on {disk.image.path}, and is not there")
    if shape is None:
        return tuple(phrases)
    for target in there.keys() - wanted.keys():
        phrases.append(f"{target} was not there, and is on {there[target].active}")
    for what, before, now in (
        ("bytes of memory", shape.memory, found.memory),
        ("CPUs", shape.vcpus, found.vcpus),
    ):
        if before and now and before != now:
            phrases.append(f"it is to have {before} {what}, and has {now}")
    if shape.devices and found.devices:
        phrases += _devices(Counter(shape.devices), Counter(found.devices))
    return tuple(phrases)


def _devices(wanted: Counter[str], found: Counter[str]) -> Iterator[str]:
    yield from (f"device {device} is missing" for device in wanted - found)
    yield from (f"device {device} was not there" for device in found - wanted)


def check_shape(name: str, disks: Iterable[WantedDisk], shape: MachineShape | None, found: MachineShape) -> None:
    """Refuse a machine that is not what it is to be.

    Raises:
        OtherMachine: the error names both sides of each difference.
    """
    if phrases := differences(disks, shape, found):
        raise OtherMachine(f"{name}: the new machine differs from the domain's: {'; '.join(phrases)}")
