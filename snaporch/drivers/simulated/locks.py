"""Who has which image open, as QEMU's image locking has it: one writer, or any number of readers.

The image at the top of a writable disk is open for writing, everything below it for reading. That is what keeps two
machines from running on one disk, and lets a second one stand on the same frozen images beside the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import attrs

from snaporch.drivers.simulated.files import Files, Image
from snaporch.errors import Refused
from snaporch.model.rfc import DeviceDisk


@attrs.define(eq=False)
class Locks:
    """The open images of a host.

    Attributes:
        files: the host's.
        writers: by path, the process and the disk that writes there; no disk for an overlay that waits.
        readers: by path, the processes that read.
        held: by process, the paths it has open.
    """

    files: Files
    writers: dict[str, tuple[int, str]] = attrs.field(factory=dict)
    readers: defaultdict[str, set[int]] = attrs.field(factory=lambda: defaultdict(set))
    held: defaultdict[int, set[str]] = attrs.field(factory=lambda: defaultdict(set))

    def hold(self, pid: int, target: str, chain: Iterable[Image], readonly: bool) -> None:
        """Note a chain as open; what was open for writing and is now below another image, is for reading."""
        for depth, image in enumerate(chain):
            self.held[pid].add(image.path)
            if depth or readonly:
                if self.writers.get(image.path, (0, ""))[0] == pid:
                    del self.writers[image.path]
                self.readers[image.path].add(pid)
            else:
                self.writers[image.path] = (pid, target)

    def drop(self, pid: int, path: str) -> None:
        """Note that a process has closed an image."""
        self.held[pid].discard(path)
        if self.writers.get(path, (0, ""))[0] == pid:
            del self.writers[path]
        if path in self.readers:
            self.readers[path].discard(pid)
            if not self.readers[path]:
                del self.readers[path]

    def release(self, pid: int) -> None:
        """Close everything that a process has open."""
        for path in tuple(self.held[pid]):
            self.drop(pid, path)
        del self.held[pid]

    def writing(self, path: str) -> str:
        """Return why `path` cannot be opened, or an empty string: somebody writes to it."""
        return (
            f"failed to get lock: process {self.writers[path][0]} writes to {path}" if path in self.writers else ""
        )

    def reading(self, path: str, pid: int = 0) -> str:
        """Return why `path` cannot be opened for writing, or an empty string: one other than `pid` reads it."""
        others = self.readers.get(path, set()) - {pid}
        return f"failed to get lock: process {min(others)} reads {path}" if others else ""

    def in_use(self, path: str) -> bool:
        """Return whether a machine's disk depends on `path`."""
        return path in self.readers or bool(self.writers.get(path, (0, ""))[1])

    def conflict(self, disks: Sequence[DeviceDisk]) -> str:
        """Return why a process cannot open these disks, or an empty string."""
        seen: set[str] = set()
        for disk in disks:
            try:
                chain = list(self.files.chain(disk.path, disk.format))
            except Refused as error:
                return str(error)
            if not disk.readonly and disk.path in seen:
                return f"failed to get lock: {disk.path} is used by two disks"
            seen.add(disk.path)
            own = "" if disk.readonly else self.reading(disk.path)
            if why := own or next(filter(None, (self.writing(image.path) for image in chain)), ""):
                return why
        return ""
