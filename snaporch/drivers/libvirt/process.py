"""A running domain of libvirt's as its driver knows it: what is in the `data` of its handle."""

from __future__ import annotations

import attrs

from snaporch.drivers.local.process import LocalProcess, find_processes, process_of
from snaporch.model.domain import Handle

DRIVER = "libvirt"
NONE = LocalProcess(0, 0)


@attrs.frozen
class LibvirtDomain:
    """A domain of libvirt's, in one run.

    Attributes:
        uri: of the libvirtd.
        uuid: libvirt's, which a rename does not change.
        name: libvirt's name of it, as it was last seen.
        local: the QEMU process of this run; `NONE` where it does not run.
        directory: of a throw-away copy, and of a restored domain: what it was launched with; else empty.
        copy: it is a throw-away copy.
    """

    uri: str
    uuid: str
    name: str
    local: LocalProcess = NONE
    directory: str = ""
    copy: bool = False

    @classmethod
    def of(cls, handle: Handle) -> LibvirtDomain:
        """Return the domain that a handle is of."""
        data = handle.data
        return cls(
            data["uri"],
            data["uuid"],
            data["name"],
            LocalProcess(**data["local"]),
            data.get("directory", ""),
            data.get("copy", False),
        )

    def handle(self) -> Handle:
        """Return the handle of the domain in this run."""
        return Handle(DRIVER, f"{self.uuid}:{self.local.pid}:{self.local.started}", attrs.asdict(self))


def running(uuid: str) -> LocalProcess:
    """Return the QEMU process of a domain, which libvirt names by its UUID; `NONE` where it is not seen."""
    found = [process_of(pid) for pid in find_processes("-uuid", uuid)]
    return next((each for each in found if each is not None), NONE)
